"""What others take of the CPU's time, and what is our own: the kernel's counts, through psutil."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil


@dataclass(frozen=True, slots=True)
class MachineSeconds:
    """CPU seconds since the machine started, over the cores that this process may use."""

    busy: float
    steal: float
    total: float


def machine_seconds() -> MachineSeconds:
    """What the kernel has counted up to now."""
    each = _usable_cores()
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
        cores = psutil.cpu_times(percpu=True)
        if len(cores) == os.sysconf("SC_NPROCESSORS_CONF"):  # else some are off, and a place in the list is no number
            return [cores[number] for number in sorted(usable)]
    return [psutil.cpu_times()]


def family(of: psutil.Process) -> Iterator[psutil.Process]:
    """A process and all that come from it."""
    yield of
    with contextlib.suppress(psutil.Error):
        yield from of.children(recursive=True)


def own_cpu_seconds(of: psutil.Process) -> float:
    """CPU seconds of a process and its children, living and waited for."""
    seconds = 0.0
    for process in family(of):
        with contextlib.suppress(psutil.Error):  # it ended while it was looked at
            times = process.cpu_times()
            seconds += times.user + times.system
            seconds += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return seconds


class Company:
    """What others and the host take of the CPU's time, from when this is made until it is asked."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._own = own_cpu_seconds(psutil.Process())
        self._before = machine_seconds()

    def __call__(self, least: float = 0.0) -> float | None:
        """The share; None where nothing can be read.

        Args:
            least: seconds to look for, waited for where they are not yet over.
        """
        time.sleep(max(0.0, least - (time.monotonic() - self._begun)))
        after, own = machine_seconds(), own_cpu_seconds(psutil.Process())
        total = after.total - self._before.total
        if total <= 0:
            return None
        taken = (after.busy - self._before.busy) + (after.steal - self._before.steal)
        return min(1.0, max(0.0, taken - max(0.0, own - self._own)) / total)
