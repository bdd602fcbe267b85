"""What others take of the CPU's time, and what is our own: the kernel's counts, through psutil."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

PROC_STAT = "/proc/stat"
FULL = 0.8  # of the CPU's time: where others take more, threads wait for a core
LOOKS, BETWEEN_LOOKS = 5, 0.005  # at least so many, so many seconds apart
STALE = 1.0  # seconds: what was before is not now


@dataclass(frozen=True, slots=True)
class MachineSeconds:
    """CPU seconds since the machine started, over the cores that this process may use."""

    busy: float
    steal: float
    total: float


def machine_seconds() -> MachineSeconds | None:
    """What the kernel has counted up to now; None where it does not tell."""
    try:
        each = _usable_cores()
    except (OSError, psutil.Error, ValueError):
        return None
    idle = sum(one.idle + getattr(one, "iowait", 0.0) for one in each)
    steal = sum(getattr(one, "steal", 0.0) for one in each)
    # guest time is counted in user time already
    guest = sum(getattr(one, "guest", 0.0) + getattr(one, "guest_nice", 0.0) for one in each)
    total = sum(map(sum, each)) - guest
    return MachineSeconds(busy=total - idle - steal, steal=steal, total=total)


def _usable_cores() -> Sequence[Any]:
    """The times of each core that this process may use; of the whole machine where that is all of them, or not told."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    usable = affinity(0) if affinity else ()
    if usable and len(usable) < (os.cpu_count() or 1):
        times, numbers = psutil.cpu_times(percpu=True), _core_numbers()
        if len(times) == len(numbers) and set(numbers) >= usable:  # those that are switched off are not in the list
            return [one for number, one in zip(numbers, times, strict=True) if number in usable]
    return [psutil.cpu_times()]


def _core_numbers() -> list[int]:
    """Of the cores that the kernel counts, in its order."""
    with open(PROC_STAT, encoding="ascii") as file:
        names = [line.split()[0] for line in file if line.startswith("cpu")]
    return [int(name.removeprefix("cpu")) for name in names if name != "cpu"]


def runnable_threads() -> int | None:
    """Threads of the machine that run or could; None where the kernel does not tell, or not all cores are ours."""
    affinity = getattr(os, "sched_getaffinity", None)
    if affinity is None or len(affinity(0)) < (os.cpu_count() or 1):
        return None
    try:
        with open(PROC_STAT, encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("procs_running")), None)
    except (OSError, ValueError, IndexError):
        return None


def family(of: psutil.Process) -> Iterator[psutil.Process]:
    """A process and all that come from it."""
    yield of
    with contextlib.suppress(psutil.Error):
        yield from of.children(recursive=True)


def own_cpu_seconds() -> float:
    """CPU seconds of this process and its children, living and waited for."""
    seconds = 0.0
    with contextlib.suppress(psutil.Error, OSError):
        for process in family(psutil.Process()):
            with contextlib.suppress(psutil.Error):  # it ended while it was looked at
                times = process.cpu_times()
                seconds += times.user + times.system
                seconds += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return seconds


class Since:
    """What was taken of the CPU's time from a moment on."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self._own = own_cpu_seconds()
        self._before = machine_seconds()

    def taken(self) -> tuple[float, float] | None:
        """Shares: by the host, and by others than this process and its children; None where nothing can be read."""
        after, own = machine_seconds(), own_cpu_seconds()
        if after is None or self._before is None or after.total <= self._before.total:
            return None
        total = after.total - self._before.total
        steal = max(0.0, after.steal - self._before.steal)
        # A child that ended since takes its seconds with it into our own count, so `own` never falls for long.
        others = max(0.0, (after.busy - self._before.busy) - max(0.0, own - self._own))
        return min(1.0, steal / total), min(1.0, others / total)

    def share(self) -> float | None:
        """Both together."""
        taken = self.taken()
        return None if taken is None else min(1.0, sum(taken))


class Company:
    """What others and the host take of the CPU's time, from when this is made on."""

    def __init__(self) -> None:
        self._first = self._last = Since()

    def share(self) -> float | None:
        """Of the CPU's time since then, 0 to 1; None where nothing can be read."""
        return self._first.share()

    def demand(self, least: float) -> float | None:
        """Threads of others that want to run, per core, while ours rest; None where nothing can be read.

        Their share of the CPU's time, as long as they leave some of it. Then it is the number of those that can run:
        two programs and six fill two cores alike, and leave a third one unlike parts of them.

        Args:
            least: seconds to look for, waited for where they are not yet over.
        """
        if time.monotonic() - self._last.begun > STALE:
            self._last = Since()
        running = []
        while True:
            running.append(runnable_threads())
            left = least - (time.monotonic() - self._last.begun)
            if left <= 0 and len(running) >= LOOKS:
                break
            time.sleep(min(max(left, BETWEEN_LOOKS), least / LOOKS))
        share = self._last.share()
        known = [one for one in running if one is not None]
        if share is None or share < FULL or not known:
            return share
        return max(share, (sum(known) / len(known) - 1) / (os.cpu_count() or 1))  # less the one that looks
