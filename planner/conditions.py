"""What else went on while something was timed, and what that means for a forecast. planner.meter reads it."""

from __future__ import annotations

from dataclasses import dataclass

from planner.measurement import Conditions

STEAL = 0.02  # of the machine's CPU time, taken by the host: above it a warning
OTHERS = 0.10  # of the machine's CPU time, used by other processes
UNCALIBRATED = 0.10  # of the two together: above it the interval is not called calibrated
MOST_TAKEN = 0.9  # of it, that a range reckons with: a run beside others always gets some
CLOCK_DROP = 0.05  # of a GPU's SM clock, between the readings of one profile
# NVML's reasons that say "slower than it could be", by bit (nvml.h, nvmlClocksEventReasons). Idle, application clocks
# and the like are no fault.
THROTTLE_BITS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal limit (software)",
    0x40: "thermal limit (hardware)",
    0x80: "power brake",
}
HARMFUL = ("hardware slowdown", "thermal limit (software)", "thermal limit (hardware)", "power brake")


def throttle_reasons(bits: int) -> tuple[str, ...]:
    """NVML's bit mask in words, where it means that the GPU runs slower than it could."""
    return tuple(text for bit, text in THROTTLE_BITS.items() if bits & bit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The conditions of a whole profile."""

    steal: float = 0.0
    others: float = 0.0
    warnings: tuple[str, ...] = ()

    @property
    def disturbed(self) -> float:
        """Share of the machine's CPU time that was not to be had."""
        return min(MOST_TAKEN, self.steal + self.others)

    @property
    def is_calibrated(self) -> bool:
        return self.disturbed <= UNCALIBRATED


def summarise(readings: list[Conditions], *, on_cpu: bool) -> Summary:
    """Means over time, and a warning (number, threshold, what to do) for each condition that spoils a forecast.

    Args:
        on_cpu: the training itself runs on the CPU. Beside a GPU, other programs on the CPU hardly matter.
    """
    readings = list(dict.fromkeys(readings))  # a reading that stood for several rounds counts once
    warnings: list[str] = []

    def mean(name: str) -> float:
        known = [(one.seconds, getattr(one, name)) for one in readings if getattr(one, name) is not None]
        total = sum(seconds for seconds, _ in known)
        return sum(seconds * value for seconds, value in known) / total if total > 0 else 0.0

    steal, others = (mean("steal"), mean("others")) if on_cpu else (0.0, 0.0)
    if steal > STEAL:
        warnings.append(
            f"the host took {steal:.0%} of this machine's CPU time while it was timed, more than {STEAL:.0%}: a run "
            "may get more or less of it. Measure again at another hour, or on a machine that is not shared."
        )
    if others > OTHERS:
        warnings.append(
            f"other programs used {others:.0%} of this machine's CPU time while it was timed, more than {OTHERS:.0%}. "
            "Close them and measure again, unless they will run beside the training too."
        )
    gpus = [one.gpu for one in readings if one.gpu is not None]
    reasons = sorted({reason for gpu in gpus for reason in gpu.throttle if reason in HARMFUL})
    if reasons:
        hottest = max((gpu.temperature_c for gpu in gpus if gpu.temperature_c is not None), default=None)
        heat = "" if hottest is None else f" at up to {hottest} °C"
        warnings.append(
            f"the GPU slowed itself down while it was timed ({', '.join(reasons)}){heat}. Look at its cooling and "
            "power supply, and measure again with a longer --budget."
        )
    clocks = [gpu.sm_clock_mhz for gpu in gpus if gpu.sm_clock_mhz]
    if len(clocks) > 2 and max(clocks[1:]) > 0 and 1 - min(clocks[1:]) / max(clocks[1:]) > CLOCK_DROP:
        warnings.append(
            f"the GPU's clock went between {min(clocks[1:])} and {max(clocks[1:])} MHz while it was timed, more than "
            f"{CLOCK_DROP:.0%} apart: a long run settles at the lower end. Measure again with a longer --budget."
        )
    if gpus and any(gpu.other_processes for gpu in gpus):
        most = max(gpu.other_processes or 0 for gpu in gpus)
        held = max(gpu.other_memory_bytes or 0 for gpu in gpus)
        warnings.append(
            f"{most} other process(es) used this GPU while it was timed and held {held / 1024**3:.1f} GiB of its "
            "memory. Measure again when they are done, unless they will run beside the training too."
        )
    return Summary(steal=steal, others=others, warnings=tuple(warnings))


def busier_now(share: float) -> str:
    """Said of an earlier measurement, beside which others took less of the CPU's time than they do now."""
    return (
        f"other programs take {share:.0%} of this machine's CPU time just now, far more than while it was timed: a run "
        "takes so much longer as long as they do. Close them before training, or measure beside them with --fresh."
    )
