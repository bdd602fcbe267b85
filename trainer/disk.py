"""The disk under a run: room on it, what is really on it, and one line where it cannot be written. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from presets.errors import PlanError, RunError

FULL = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
BROKEN = frozenset({errno.EIO, errno.ENXIO, errno.ENODEV, getattr(errno, "ESTALE", errno.EIO)})

LEAST_KEPT = 2  # checkpoints: a power cut can spoil the newest one although it was written whole
BYTES_PER_VALUE = 4  # what trains is always fp32, and so are its moments
BESIDES = 64 << 20  # bytes: tokenizer, batch plan, log, metrics, sample answers, headers
GIB = 1024**3


def bytes_to_write(num_trainable: int, keep_checkpoints: int) -> int:
    """Most bytes that a run holds on its disk at once.

    A checkpoint is weights and two moments. There are those that are kept, the best one, and the one being written
    before the oldest may go; then the result.
    """
    checkpoint = 3 * num_trainable * BYTES_PER_VALUE
    return (max(LEAST_KEPT, keep_checkpoints) + 2) * checkpoint + num_trainable * BYTES_PER_VALUE + BESIDES


def require_room(folder: Path, needed: int) -> None:
    """Refuse a run that its disk has no room for. What `folder` holds already counts as room: a resume replaces it.

    Args:
        folder: where it will write; it need not exist yet.
        needed: bytes.

    Raises:
        RunError: with needed and free bytes.
    """
    free = free_bytes(folder)
    held = size_of(folder / "checkpoints")
    if free is None or free >= needed - held:
        return
    raise RunError(
        f"the disk of '{folder}' has {_size(free)} free; the run needs up to {_size(needed - held)} for its "
        "checkpoints and result. Make room, or use another disk (a new run: --output)."
    )


def free_bytes(folder: Path) -> int | None:
    """Bytes free to this user on the disk of a folder, which need not exist yet; None where the system does not say."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        return shutil.disk_usage(existing).free
    except OSError:
        return None


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder; 0 where there is none."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # gone while it was looked at
            total += path.lstat().st_size if not path.is_dir() else 0
    return total


@contextlib.contextmanager
def told_in_one_line(what: Path, folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into one line that names it and the way on. A defect stays the exception it is.

    A run stops there instead of going on without checkpoints: stopped, it has lost the time since the last one, which
    is minutes; gone on, it would add hours to what a crash takes away, and nobody may look before they are lost.

    Args:
        what: that is written. Where it is the folder itself, the file that an error names is told instead.
        folder: of the run.

    Raises:
        RunError: the disk is full, read-only or broken.
    """
    try:
        yield
    except PlanError:
        raise
    except Exception as reason:  # safetensors and tokenizers raise what the system said as an error of their own
        code = _errno(reason)
        if code not in FULL | FORBIDDEN | BROKEN:
            raise
        named = getattr(reason, "filename", None)
        told = Path(os.fsdecode(named)) if what == folder and isinstance(named, (str, bytes)) else what
        raise RunError(_refusal(told, folder, code)) from None


def _errno(reason: Exception) -> int:
    """The system's number of an error; 0 where it is none of the system's."""
    if isinstance(reason, OSError):
        return reason.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(reason))
    return int(found.group(1)) if found else 0


def _refusal(what: Path, folder: Path, code: int) -> str:
    if code in FULL:
        free = free_bytes(folder)
        left = "" if free is None else f", {_size(free)} free"
        why, remedy = f"the disk is full: {os.strerror(code)}{left}", "make room"
    elif code in FORBIDDEN:
        why, remedy = os.strerror(code), "make it writable"
    else:
        why, remedy = os.strerror(code), "look at the disk"
    verb = "written" if what.is_relative_to(folder) else "used"
    return (
        f"{what} cannot be {verb} ({why}). The last whole checkpoint is kept: {remedy} and go on with "
        f"'plan --resume {shlex.quote(str(folder))}'."
    )


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 1024**2:.1f} MiB"


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and not only in the system's memory."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` for a folder and all that is below it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
