"""What else went on while something was timed, and what that means for a forecast. planner.meter reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.figures import GIB
from planner.measurement import Busier, Conditions, GpuConditions

STEAL = 0.02  # of the machine's CPU time, taken by the host: above it a warning
OTHERS = 0.10  # of the machine's CPU time, used by other processes
UNCALIBRATED = 0.10  # of the two together: above it the interval is not called calibrated
MOST_TAKEN = 0.9  # of it, that a range reckons with: a run beside others always gets some
SLOWED_DOWN = 0.10  # of its speed, what a GPU that throttles loses at least: the clock between readings is not seen
UNKNOWN_SHARE = 0.50  # of a GPU's time, what others may take where the driver does not tell: as much as the training
WAITING = 0.35  # of its time, that a training leaves to others beyond a fair scheduler's share, on full cores
TURNS = 1.5  # times as long, at most, as the share of the CPU's time alone would make it
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
    gpu_others: float = 0.0  # of the GPU's time, used by other processes
    gpu_slowed: float = 0.0  # of the GPU's speed, lost to heat and the like
    fastest: float = 1.0  # seconds of a run as a part of what was measured: where nothing of this happens to it
    slowest: float = 1.0  # and where as much again does
    warnings: tuple[str, ...] = ()

    @property
    def disturbed(self) -> float:
        """Share of the device's time that others took."""
        return min(MOST_TAKEN, self.steal + self.others + self.gpu_others)

    @property
    def is_calibrated(self) -> bool:
        return self.disturbed <= UNCALIBRATED and self.gpu_slowed == 0


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
    found = _gpu([(one.seconds, one.gpu) for one in readings if one.gpu is not None])
    found = replace(found, steal=steal, others=others, warnings=(*warnings, *found.warnings))
    if steal > STEAL or others > OTHERS:
        # At best the run has the whole machine to itself; at worst what was taken from it doubles.
        share = found.disturbed
        found = replace(found, fastest=found.fastest * (1 - share), slowest=found.slowest / (1 - share))
    return found


def _gpu(readings: list[tuple[float, GpuConditions]]) -> Summary:
    """The summary of a GPU alone, from (seconds, reading)."""
    slowed, fastest, slowest = 0.0, 1.0, 1.0
    warnings: list[str] = []
    clocks = [one.sm_clock_mhz for _, one in readings if one.sm_clock_mhz][1:]  # the first may be of one that idled
    mean_clock = sum(clocks) / len(clocks) if clocks else 0.0
    reasons = sorted({reason for _, one in readings for reason in one.throttle if reason in HARMFUL})
    if reasons:
        hottest = max((one.temperature_c for _, one in readings if one.temperature_c is not None), default=None)
        heat = "" if hottest is None else f" at up to {hottest} °C"
        warnings.append(
            f"the GPU slowed itself down while it was timed ({', '.join(reasons)}){heat}. Look at its cooling and "
            "power supply, and measure again with a longer --budget."
        )
        # Cooled, it would run at its full clock; what a minute's heat does, hours may do twice.
        full = max((one.max_sm_clock_mhz or 0 for _, one in readings), default=0)
        slowed = min(MOST_TAKEN, max(SLOWED_DOWN, 1 - mean_clock / full if full and mean_clock else 0.0))
        fastest, slowest = 1 - slowed, 1 / (1 - slowed)
    if len(clocks) > 1 and 1 - min(clocks) / max(clocks) > CLOCK_DROP:
        warnings.append(
            f"the GPU's clock went between {min(clocks)} and {max(clocks)} MHz while it was timed, more than "
            f"{CLOCK_DROP:.0%} apart: a long run settles at the lower end. Measure again with a longer --budget."
        )
        if 1 - min(clocks) / max(clocks) > UNCALIBRATED:  # cards at their power limit move by less all the time
            slowed = max(slowed, 1 - min(clocks) / max(clocks))
        fastest, slowest = min(fastest, mean_clock / max(clocks)), max(slowest, mean_clock / min(clocks))
    others = _others_on_gpu(readings, warnings)
    return Summary(
        gpu_others=others,
        gpu_slowed=slowed,
        fastest=fastest * (1 - others),
        slowest=slowest / (1 - others),
        warnings=tuple(warnings),
    )


def _others_on_gpu(readings: list[tuple[float, GpuConditions]], warnings: list[str]) -> float:
    """Share of the GPU's time that others took, where that is much; a warning is added where any were there."""
    most = max((one.other_processes or 0 for _, one in readings), default=0)
    if not most:
        return 0.0
    held = max(one.other_memory_bytes or 0 for _, one in readings)
    shares = [(seconds, one.other_share) for seconds, one in readings if one.other_share is not None]
    total = sum(seconds for seconds, _ in shares)
    used = sum(seconds * share for seconds, share in shares) / total if total > 0 else None
    told = "nobody tells how much of its time they took" if used is None else f"took {used:.0%} of its time"
    warnings.append(
        f"{most} other process(es) were on this GPU while it was timed, held {held / GIB:.1f} GiB of its memory "
        f"and {told}. Measure again when they are done, unless they will run beside the training too."
    )
    taken = UNKNOWN_SHARE if used is None else min(MOST_TAKEN, used)
    return taken if taken > OTHERS else 0.0


def is_told(readings: list[Conditions]) -> bool:
    """Whether any reading says what others took of the CPU's time."""
    return any(one.others is not None and one.seconds > 0 for one in readings)


def beside_ours(demand: float) -> float:
    """The share of the CPU's time that others get beside a training.

    With a thread of ours on each core, a scheduler that is fair to threads would leave them demand / (1 + demand). They
    get more, since a step is over when its slowest thread is, and the others wait: 47, 61 to 65 and 76 % beside one,
    two and four programs on two cores (the demo model, 2026-11-28), not 33, 50 and 67 %.

    Args:
        demand: their threads that want to run, per core.
    """
    return 1 - 1 / ((1 + demand) * (1 + WAITING * min(1.0, 2 * demand)))


def slower_at_most(by_share: float) -> float:
    """Of a training's seconds beside others over those without them, from what their share of the CPU's time makes.

    Beside one, two and four programs it took 2.6, 3.4 and 5.7 x as long, where their shares make 1.9, 2.7 and 4.2: who
    takes turns on a core finds its cache filled by others.
    """
    return TURNS * by_share


def busier_now(found: Busier) -> str:
    """Said of an earlier measurement, beside which others took less of the CPU's time than they do now."""
    return (
        f"other programs take {found.share:.0%} of this machine's CPU time just now, more than while it was timed: "
        f"beside them a run takes {found.slower:.1f} to {slower_at_most(found.slower):.1f} x as long. Close them "
        "before training, or measure beside them with --fresh."
    )
