"""A folder for a while on the disk that a run will write to: a checkpoint is timed there. No torch.

The system's temporary folder is often another disk, or memory. A run folder itself is not made before the run is
certain, so the scratch folder lies beside where it will be.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from presets.home import expanded

PREFIX = ".plan-scratch-"
OLD_SECONDS = 86_400.0  # no measurement lasts so long: an older scratch folder is left from one that was killed
MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """An existing folder, and why it is not where the run will write, if it is not."""

    folder: Path
    wanted: Path | None = None  # where the run will write, if the folder lies elsewhere
    note: str | None = None

    @property
    def disk(self) -> str:
        """What tells measurements in this place from others: the disk of the run, and where another was timed that."""
        timed = disk_of(self.folder)
        return timed if self.wanted is None else f"{disk_of(self.wanted)}, timed on {timed}"


def place_for(output: Path | None) -> Place:
    """Where a scratch folder for a run can be: beside its folder, which need not exist yet, on the same disk.

    Args:
        output: the run folder; None: one in runs/.
    """
    run = expanded(output or Path("runs") / "run").absolute()
    above = run.parent
    while not os.path.isdir(above) and above != above.parent:  # Path.is_dir() fails where it may not look
        above = above.parent
    # Into the run folder only where it is there and a disk of its own, or alone can be written.
    inside = [run] if os.path.isdir(run) else []
    beside = [above] if not inside or disk_of(above) == disk_of(run) else []
    refused: dict[Path, str] = {}
    for one in (*beside, *inside):
        reason = _refusal(one)
        if reason is None:
            return Place(folder=one)
        refused[one] = reason
    return _elsewhere(*next(iter(refused.items())))


def _refusal(folder: Path) -> str | None:
    """Why no folder can be made in this one; None where one can. It is tried: what was kept is looked up by it."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return "not writable"
    try:
        os.rmdir(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
    except OSError as reason:  # full, or a disk that says "writable" and is not
        return reason.strerror or str(reason)
    return None


def _elsewhere(wanted: Path, reason: str) -> Place:
    instead = Path(tempfile.gettempdir())
    note = f"a checkpoint was timed in '{instead}' and not where a run will write it ('{wanted}': {reason})"
    return Place(folder=instead, wanted=wanted, note=note)


@contextlib.contextmanager
def scratch_folder(place: Place) -> Iterator[Place]:
    """A new folder in a place, removed at the end, also where a signal ends this process.

    Where it cannot be made it lies in the temporary folder, and its note says so.
    """
    with _ended_by_exceptions():
        _remove_left(place.folder)
        try:
            made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place.folder))
        except OSError as reason:  # since it was tried
            place = _elsewhere(place.folder, reason.strerror or str(reason))
            made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place.folder))
        try:
            yield replace(place, folder=made)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _remove_left(folder: Path) -> None:
    """Scratch folders of measurements that were killed: a checkpoint in one may be as large as the model."""
    with contextlib.suppress(OSError):  # the folder cannot be read
        for left in folder.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):  # a link that leads nowhere, or another process was quicker
                if left.stat().st_mtime < time.time() - OLD_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _ended_by_exceptions() -> Iterator[None]:
    """Let signals that would end this process at once raise SystemExit instead, so that what is to be removed is.

    Handlers that somebody has set stay theirs; only the main thread can set any.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def disk_of(folder: Path) -> str:
    """What tells the disk under an existing folder from others, also after a restart.

    Where it is mounted, its kind and its name; where the system does not tell them, its number, which on some disks is
    another one after each restart.
    """
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        lines = []
    real = Path(os.path.realpath(folder))
    found: tuple[Path, str] | None = None
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, named = before.split(), after.split()
        if len(fields) < 5 or len(named) < 2:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4]))
        # Of two at one place the later one lies over the other.
        if real.is_relative_to(point) and (found is None or len(point.parts) >= len(found[0].parts)):
            found = point, f"{named[0]} {named[1]}"
    return f"{found[0]} {found[1]}" if found else str(real.stat().st_dev)
