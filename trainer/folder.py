"""A run folder has one writer at a time, and that one writes into the folder itself, never through a link. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from presets.errors import RunError

LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # some network disks


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold the run folder. The system lets go of it with the process, however that ends: no lock is left to remove.

    Raises:
        RunError: another process holds it, or the folder cannot be written. Nothing was changed.
    """
    import filelock

    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise RunError(_in_use(folder)) from None
    except OSError as reason:
        if reason.errno in WITHOUT_LOCKS:
            print(
                f"note: '{folder}' lies on a disk that knows no locks: start one run in it at a time", file=sys.stderr
            )
            yield
            return
        raise RunError(
            f"run folder '{folder}' cannot be written ({reason.strerror or reason}). Mend that and try "
            "again; nothing was changed."
        ) from None
    try:
        yield
    finally:
        lock.release()


def require_unused(folder: Path) -> None:
    """Refuse a run folder in which a process trains now. Nothing is written, not even the lock.

    Raises:
        RunError: as `sole_writer`.
    """
    if (folder / LOCK).is_file():
        with sole_writer(folder):
            return


def _in_use(folder: Path) -> str:
    quoted = shlex.quote(str(folder))
    return (
        f"run folder '{folder}' is in use: another process trains in it. Watch it with 'plan watch {quoted}', "
        "or wait until it ends."
    )


def is_main_process() -> bool:
    """Whether this is the one of a run's processes that writes; known before Accelerate is."""
    return os.environ.get("RANK", "0") == "0"


def refuse_links(folder: Path) -> None:
    """Refuse a run folder that holds links where a run writes: what is written must stay in it.

    The folder itself may lie behind a link that its user has made; what comes from elsewhere is what is in it.

    Raises:
        RunError: naming the first link.
    """
    for level in ("*", "checkpoints/*", "checkpoints/*/*"):
        for path in sorted(folder.glob(level)):
            if path.is_symlink():
                raise RunError(
                    f"'{path}' is a link to '{path.readlink()}'. A run reads and writes in its own folder only: put "
                    "what it points to in its place, or remove it."
                )
