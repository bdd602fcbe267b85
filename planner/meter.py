"""Reads what else goes on while something is timed: /proc through psutil, the GPU through NVML."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil

from planner.conditions import throttle_reasons
from planner.measurement import Conditions, GpuConditions
from trainer.company import Since, family
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
        self._since = Since()

    def __call__(self) -> Conditions:
        now = self._clock()
        seconds = now - self._read_at
        if seconds < LEAST_SECONDS:
            return self._last
        steal, others = self._since.taken() or (None, None)
        self._last = Conditions(
            seconds=seconds,
            load=_load(),
            steal=steal,
            others=others,
            gpu=None if self._gpu is None else self._gpu.read({process.pid for process in family(self._own)}),
        )
        self._read_at, self._since = now, Since()
        return self._last


def nobody_on_gpu(seconds: float) -> float | None:
    """0.0 where no other process is on the first visible GPU; None where one is, or nobody tells. A look is enough."""
    found = NvmlGpu().read({process.pid for process in family(psutil.Process())})
    return 0.0 if found is not None and found.other_processes == 0 else None


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none
        return None


class NvmlGpu:
    """The conditions of the first visible GPU, through NVML; what it cannot say is None."""

    def __init__(self) -> None:
        self._gpu = VisibleGpu()
        self._seen = int(time.time() * 1e6)  # microseconds: the newest sample of what processes used

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
        # One that has left since may have been a worker of ours.
        others = [pid for pid in by_process if pid not in own and psutil.pid_exists(pid)]
        shares = [sum(by_process[pid]) / len(by_process[pid]) for pid in others]
        return min(1.0, sum(shares))
