"""Which process trains in a run folder, and whether it is still there. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from presets import jsonio
from presets.errors import RunError

NAME = "process.json"
PROC = Path("/proc")
SAME_START = 1.0  # seconds between two readings of one start; a number comes round again much later
SET_CLOCK = 86_400.0  # seconds by which two readings may differ where a clock that was set meanwhile moves them


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerProcess:
    """The process that writes a run folder; with several devices the first one."""

    host: str  # tells this one, as it was started, from others; says nothing of it
    pid: int
    started: float  # seconds, on a clock of the system's: tells it from a later process of the same number


def note_process(folder: Path) -> None:
    """Write down that this process trains in a run folder; it holds the folder.

    Raises:
        OSError: it cannot be written.
    """
    mine = TrainerProcess(host=_host(), pid=os.getpid(), started=_started(os.getpid()) or 0.0)
    jsonio.write_atomically(folder / NAME, jsonio.to_json(mine))


def still_there(folder: Path) -> bool | None:
    """Whether the process that last trained in a run folder exists; None where that cannot be told.

    It can be told on the host that it ran on, until that is started anew. Another one may train there now.
    """
    path = folder / NAME
    if not path.is_file():  # of an earlier version; what else may stand there, a pipe, would be waited for
        return None
    try:
        noted = jsonio.from_json(TrainerProcess, path.read_text(encoding="utf-8"), what=str(path), error=RunError)
    except (OSError, UnicodeDecodeError, RunError):
        return None
    if noted.host != _host() or noted.pid <= 0:
        return None
    try:
        started = _started(noted.pid)
    except ProcessLookupError:
        return False
    if started is None or not noted.started:
        return None
    apart = abs(started - noted.started)
    if apart < SAME_START:
        return True
    return None if apart < SET_CLOCK and not _has_proc() else False


def _host() -> str:
    """This host since it was started. A container is one of its own: it has its own numbers of processes."""
    known = [platform.node()]
    with contextlib.suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        known.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(known).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _has_proc() -> bool:
    return (PROC / "self" / "stat").is_file()


def _started(pid: int) -> float | None:
    """When a process was started; None where the system does not say.

    Raises:
        ProcessLookupError: there is none, or nothing but its exit code is left of it.
    """
    return _started_by_proc(pid) if _has_proc() else _started_by_psutil(pid)


def _started_by_proc(pid: int) -> float | None:
    """As `_started`, in seconds since the boot: no clock that is set moves it, as it does psutil's."""
    try:
        # Not psutil's pid_exists: it looks into /proc, which may hide the processes of others (hidepid).
        with contextlib.suppress(PermissionError):  # another user's: it is there
            os.kill(pid, 0)
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        if fields[0] in "ZX":
            raise ProcessLookupError(pid)
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except ProcessLookupError:
        raise
    except (OSError, ValueError, IndexError, OverflowError):  # hidden, or it has just ended
        return None


def _started_by_psutil(pid: int) -> float | None:
    import psutil

    try:
        if not psutil.pid_exists(pid):
            raise ProcessLookupError(pid)
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        raise ProcessLookupError(pid) from None
    except ProcessLookupError:
        raise
    except (OSError, ValueError, OverflowError, psutil.Error):  # another user's, or it has just ended
        return None
