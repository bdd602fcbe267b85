"""A limit on what a stranger's program may use in this process: processor seconds and memory. No torch.

Jinja's sandbox keeps a chat template from reaching Python, not from looping for years or doubling a text until the
machine has no memory left. Both are stopped here, by the operating system: on POSIX the seconds, on Linux the memory.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_STATM = "/proc/self/statm"  # pages; the first number is the size of the address space


class Overrun(BaseException):
    """The seconds are used up. Not an Exception, so that nothing on the way takes it for an ordinary failure."""


@contextlib.contextmanager
def limited(*, seconds: float, room: int) -> Iterator[None]:
    """Let what follows take so many seconds of this process's own time, and so many bytes more than it has now.

    A clock of processor time: neither a busy machine nor a suspended one makes anybody slow. Off the main thread,
    where Python delivers no signals, only the memory is limited.

    Raises:
        Overrun: the seconds are used up.
        MemoryError: the bytes are.
    """
    with _seconds(seconds), _memory(room):
        yield


@contextlib.contextmanager
def _seconds(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise Overrun

    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        # Again and again, should the first one be lost in a callback that cannot raise.
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _memory(room: int) -> Iterator[None]:
    try:
        import resource

        with open(_STATM, "rb", buffering=0) as statm:
            size = int(statm.read(64).split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([size + room, *known]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
