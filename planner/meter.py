"""Reads what else goes on while something is timed: /proc through psutil, the GPU through NVML."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil

from planner.conditions import throttle_reasons
from planner.measurement import Conditions, GpuConditions
from trainer.nvml import VisibleGpu

LEAST_SECONDS = 0.5  # between two readings: the kernel counts CPU time in hundredths of a second


class ConditionsMeter:
    """Reads the conditions since the last call; at most every half second, in between the last reading again."""

    def __init__(self, *, is_gpu: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._own = psutil.Process()
        self._gpu = NvmlGpu() if is_gpu else None
        self._last = Conditions(seconds=0.0)
        self._read_at = clock()
        self._times = _machine_seconds()
        self._own_seconds = _own_cpu_seconds(self._own)

    def __call__(self) -> Conditions:
        now = self._clock()
        seconds = now - self._read_at
        if seconds < LEAST_SECONDS:
            return self._last
        times, own = _machine_seconds(), _own_cpu_seconds(self._own)
        total = times.total - self._times.total
        steal = others = None
        if total > 0:
            steal = max(0.0, times.steal - self._times.steal) / total
            # A child that ended since takes its seconds with it into our own count, so `own` never falls for long.
            others = max(0.0, (times.busy - self._times.busy) - max(0.0, own - self._own_seconds)) / total
        self._last = Conditions(
            seconds=seconds,
            load=_load(),
            steal=steal,
            others=None if others is None else min(1.0, others),
            gpu=None if self._gpu is None else self._gpu.read({process.pid for process in _family(self._own)}),
        )
        self._read_at, self._times, self._own_seconds = now, times, own
        return self._last


@dataclass(frozen=True, slots=True)
class _MachineSeconds:
    """CPU seconds since the machine started, over all its cores."""

    busy: float
    steal: float
    total: float


def _machine_seconds() -> _MachineSeconds:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    steal = getattr(times, "steal", 0.0)
    # guest time is counted in user time already
    guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    total = sum(times) - guest
    return _MachineSeconds(busy=total - idle - steal, steal=steal, total=total)


class Company:
    """What others and the host take of the machine's CPU time, from when this is made until it is asked."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._own = _own_cpu_seconds(psutil.Process())
        self._before = _machine_seconds()

    def __call__(self, least: float = 0.1) -> float | None:
        """The share; None where nothing can be read.

        Args:
            least: seconds to look for, waited for where they are not yet over. The kernel counts in hundredths of a
                second, so that 0.1 s of two cores tell it to a tenth: what a table from the history can spare.
        """
        time.sleep(max(0.0, least - (time.monotonic() - self._begun)))
        after, own = _machine_seconds(), _own_cpu_seconds(psutil.Process())
        total = after.total - self._before.total
        if total <= 0:
            return None
        taken = (after.busy - self._before.busy) + (after.steal - self._before.steal)
        return min(1.0, max(0.0, taken - max(0.0, own - self._own)) / total)


def nobody_on_gpu() -> float | None:
    """0.0 where no other process is on the first visible GPU; None where one is, or nobody tells."""
    found = NvmlGpu().read({process.pid for process in _family(psutil.Process())})
    return 0.0 if found is not None and found.other_processes == 0 else None


def _family(of: psutil.Process) -> Iterator[psutil.Process]:
    yield of
    with contextlib.suppress(psutil.Error):
        yield from of.children(recursive=True)


def _own_cpu_seconds(of: psutil.Process) -> float:
    """CPU seconds of a process and its children, living and waited for."""
    seconds = 0.0
    for process in _family(of):
        with contextlib.suppress(psutil.Error):  # it ended while it was looked at
            times = process.cpu_times()
            seconds += times.user + times.system
            seconds += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return seconds


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none
        return None


class NvmlGpu:
    """The conditions of the first visible GPU, through NVML; what it cannot say is None."""

    def __init__(self) -> None:
        self._gpu = VisibleGpu()
        self._seen = 0  # microseconds: the newest sample of what processes used

    def read(self, own: set[int]) -> GpuConditions | None:
        """How it is now, `own` being the processes that are not others'; None where there is none."""
        nvml, ask = self._gpu.nvml, self._gpu.ask
        if nvml is None:
            return None
        bits = ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:
            bits = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        processes = ask("nvmlDeviceGetComputeRunningProcesses")
        others = None if processes is None else [one for one in processes if one.pid not in own]
        if others and not all(psutil.pid_exists(one.pid) for one in others):
            others = None  # the driver counts processes outside of this container: our own cannot be told from others
        return GpuConditions(
            sm_clock_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            max_sm_clock_mhz=ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
            temperature_c=self._gpu.temperature_c(),
            power_watts=self._gpu.power_watts(),
            throttle=throttle_reasons(bits or 0),
            other_processes=None if others is None else len(others),
            other_memory_bytes=None if others is None else sum(one.usedGpuMemory or 0 for one in others),
            other_share=None if others is None else self._share_of_others(own),
        )

    def _share_of_others(self, own: set[int]) -> float | None:
        """Of the GPU's time since the last reading, what kernels of other processes ran; desktops are among them."""
        samples = self._gpu.samples("nvmlDeviceGetProcessUtilization", self._seen)
        if samples is None:
            return None
        self._seen = max((int(one.timeStamp) for one in samples), default=self._seen)
        by_process: dict[int, list[float]] = {}
        for one in samples:
            by_process.setdefault(one.pid, []).append(one.smUtil / 100)
        shares = [sum(found) / len(found) for pid, found in by_process.items() if pid not in own]
        return min(1.0, sum(shares))
