"""A process that has the libraries imported and forks workers: for searches that start many, one after the other.

Starting a worker takes 7 to 15 s, nearly all of it imports; forked from here it takes a fraction of one. Only where
starts are not what is measured: a plan's workers still come from nothing, since their starts are in the table.
Not multiprocessing's fork server: that runs the calling program's main module again in each child, and `planner.plan`
is called from people's own scripts. Linux only: elsewhere forking a process that has such libraries is not safe. No
CUDA is touched before the fork.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import IO, Any, Protocol

IMPORTED = ("accelerate", "peft", "transformers", "trainer.data", "trainer.model", "trainer.step", "trainer.lean")


class Child(Protocol):
    """What `planner.prober` needs of a worker's process; subprocess.Popen has it."""

    pid: int
    stdin: Any
    stdout: Any
    returncode: Any

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


class Nursery:
    """Starts workers by forking them. Not safe to use from several threads."""

    def __init__(self, environment: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        self._connection = ours
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "planner.nursery"],
                stdin=theirs.fileno(),  # the one channel that every way of starting a process passes on
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )

    def start(self, log: IO[bytes]) -> Child | None:
        """A worker whose errors go to `log`; None where the nursery is gone, and one has to be started otherwise."""
        stdin_read, stdin_write = os.pipe()
        stdout_read, stdout_write = os.pipe()
        status_read, status_write = os.pipe()
        given = [stdin_read, stdout_write, log.fileno(), status_write]
        try:
            socket.send_fds(self._connection, [b"f"], given)
            answer = self._connection.recv(8, socket.MSG_WAITALL)
        except OSError:
            answer = b""
        finally:
            for number in (stdin_read, stdout_write, status_write):
                os.close(number)
        if len(answer) < 8:
            for number in (stdin_write, stdout_read, status_read):
                os.close(number)
            return None
        return _Forked(int.from_bytes(answer, "big"), stdin_write, stdout_read, status_read)

    def stop(self) -> None:
        """End the nursery; workers that it has started end when their own input does."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def nursery(environment: dict[str, str]) -> Iterator[Nursery | None]:
    """A nursery for a while; None where the system has no safe fork."""
    made = Nursery(environment) if sys.platform == "linux" else None
    try:
        yield made
    finally:
        if made is not None:
            made.stop()


class _Forked:
    """A worker forked by the nursery, which waits for it and passes on its exit code."""

    def __init__(self, pid: int, stdin: int, stdout: int, status: int) -> None:
        self.pid = pid
        self.stdin = os.fdopen(stdin, "w", encoding="utf-8")
        self.stdout = os.fdopen(stdout, "r", encoding="utf-8")
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        return self.returncode if self.returncode is not None else self._ended_within(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self.returncode if self.returncode is not None else self._ended_within(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _ended_within(self, timeout: float | None) -> int | None:
        if not select.select([self._status], [], [], timeout)[0]:
            return None
        told = os.read(self._status, 16)
        os.close(self._status)
        # Nothing told: the nursery was killed before the worker ended.
        self.returncode = int(told) if told else -signal.SIGKILL
        return self.returncode


def serve(connection: socket.socket) -> None:
    """Import, then fork a worker for each request until the planner hangs up."""
    import importlib

    from trainer.process import growing_segments, quiet_waiting

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the planner decides
    quiet_waiting()
    growing_segments()
    # Asked through CUDA, "is there a GPU" would leave a context that no child could use.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for name in IMPORTED:
        importlib.import_module(name)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    waiting: dict[int, int] = {}  # process -> where its exit code goes
    while True:
        waited_for: list[Any] = [connection, woken]
        ready = select.select(waited_for, [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
            _tell_ends(waiting)
        if connection not in ready:
            continue
        message, given, _, _ = socket.recv_fds(connection, 1, 4)
        if not message:
            return
        child = os.fork()
        if child == 0:
            connection.close()
            for number in waiting.values():
                os.close(number)
            _become_worker(given)
        waiting[child] = given[3]
        for number in given[:3]:
            os.close(number)
        connection.sendall(child.to_bytes(8, "big"))


def _tell_ends(waiting: dict[int, int]) -> None:
    while waiting:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            return
        number = waiting.pop(child)
        with contextlib.suppress(OSError):  # whoever asked has gone
            os.write(number, str(os.waitstatus_to_exitcode(status)).encode())
        os.close(number)


def _become_worker(given: list[int]) -> None:
    """In the child: the worker, with its own streams, and an end without the parent's leave-taking."""
    import traceback

    code = 0
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, stream in enumerate(given[:3]):
            os.dup2(stream, number)
        for stream in given:
            os.close(stream)
        from planner.worker import main

        main()
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    with socket.socket(fileno=0) as own:
        serve(own)
