"""Is the machine the same from the first timing to the last? Warm-up, drift and jumps. numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planner.slope import NO_MOVEMENT, Movement
from planner.student import t_quantile
from trainer.tokens import FloatArray

MOST_WARMUP = 2  # rounds, beside the very first
WARMUP_SHARE = 0.08  # of all rounds, at most: what lasts longer is a machine that was slow, and may be so again
STEADY = 0.10  # relative: standard deviation of the rounds, or movement, above which the machine is called unsteady
JUMP = 0.05  # relative: distance of two levels of speed above which they are worth a warning
KOLMOGOROV_995 = 1.731  # 99.5 % quantile of the largest deviation of a Brownian bridge
LAG_99 = 2.326  # 99 % quantile of the lag-1 correlation of n independent values, x sqrt(n)
# Movement that has to stand out in 95 of 100 cases, or the timings are called too few to tell: what 24 % a minute makes
# of the default minute, less than twice what counts as steady.
HAS_TO_SHOW = 0.20
MOST_HIDDEN = 1.0  # relative: half of it to either side is what a single round's range reaches, and that knows nothing
MOST_ADVISED = 600  # seconds of budget that anybody is told to take
LEAST_TIMINGS = 24  # below it the quantile, which is a limit, is not to be trusted


@dataclass(frozen=True, kw_only=True, slots=True)
class Steadiness:
    """How much the machine's speed changed while it was timed. All relative; 0 where nothing stands out from noise."""

    spread: float = 0.0  # standard deviation of the rounds, its lower limit
    moved: float = 0.0  # from the first round to the last, along a slope
    jumped: float = 0.0  # from one level to another
    fast: float = 1.0  # the faster level, as a part of the mean
    slow: float = 1.0
    movement: Movement = NO_MOVEMENT  # along a line through single timings

    @property
    def is_steady(self) -> bool:
        return self.spread <= STEADY and self.moved <= STEADY and self.jumped <= JUMP

    @property
    def can_tell(self) -> bool:
        """Whether a machine that changes would have shown."""
        return self.movement.visible <= HAS_TO_SHOW

    @property
    def hidden(self) -> float:
        """The movement that the timings leave possible where they are too few to tell, else 0."""
        return 0.0 if self.can_tell else min(MOST_HIDDEN, self.movement.most)

    @property
    def warning(self) -> str | None:
        """Number, threshold and what to do."""
        if self.is_steady:
            return None
        if self.moved > STEADY and self.moved >= self.jumped:
            what, limit = f"its speed moved by {_over(self.moved, STEADY)}", STEADY
        elif self.jumped > JUMP:
            what, limit = f"its speed jumped between two levels {_over(self.jumped, JUMP)} apart", JUMP
        else:
            what, limit = f"the rounds scatter by at least {_over(self.spread, STEADY)}", STEADY
        return (
            f"this machine is not steady: {what} while it was timed, more than {limit:.0%}. The range is widened, but "
            "holds only if the run meets the same conditions. Close other programs, measure again, or raise --budget."
        )


def _over(share: float, limit: float) -> str:
    """A share that lies over a limit, so that it reads so: "5.2%" beside "more than 5%", not "5%"."""
    if f"{share:.0%}" != f"{limit:.0%}":
        return f"{share:.0%}"
    return f"{math.ceil(1000 * share) / 10:.1f}%"


def too_few(found: Steadiness, spent: float) -> str | None:
    """What to say where the timings could not have shown a change; number, threshold and what to do.

    Args:
        spent: seconds of timing, of all that shares a --budget.
    """
    if found.can_tell:
        return None
    seen = found.movement
    # The error goes with 1 / sqrt(timings). A quarter more, since the last part of a budget is too short for a round.
    enough = 1.25 * spent * (seen.visible / HAS_TO_SHOW) ** 2
    # With --fresh, since what is kept answers where its range was narrow enough.
    more = f"--fresh --budget {10 * math.ceil(enough / 10)}" if enough <= MOST_ADVISED else ""
    much = f"{seen.visible:.0%}" if seen.visible < 1 else "half"
    return (
        f"too few timings to tell whether this machine is steady: with {seen.count} micro-steps a speed that moves by "
        f"less than {much} may not stand out from noise, and {HAS_TO_SHOW:.0%} has to. The range reaches to what they "
        f"leave possible. Measure again with {more or '--fresh and a much longer --budget'}, or on a quieter machine."
    )


def judge(
    replicates: FloatArray, raw_replicates: FloatArray, timings: FloatArray, along: Movement = NO_MOVEMENT
) -> Steadiness:
    """Whether the speed stayed the same.

    Args:
        replicates: (rounds,) the total as each round alone would have it, rare slow timings set apart: a single one in
            a round of few is no sign of a machine that changes.
        raw_replicates: (rounds,) the same with them: where the level did change, its slow phase may look like them.
        timings: (timings,) logarithm of seconds / expected seconds of every micro-step, in the order of time.
        along: how these moved along a line.
    """
    rounds = len(replicates)
    mean = float(replicates.mean()) if rounds else 0.0
    if rounds < 2:
        return Steadiness()  # nothing to compare, and the range says so
    moved = abs(along.by) if along.stands_out else 0.0
    if rounds < 3 or mean <= 0:
        return Steadiness(moved=moved, movement=along)
    spread = surely(float(replicates.std(ddof=1)) / mean, rounds - 1)
    if not along.count:  # two looks at the same thing would be two false alarms
        moved = drift(replicates) / mean
    if not has_changed(timings):
        return Steadiness(spread=spread, moved=moved, movement=along)
    fast, slow = two_levels(raw_replicates / raw_replicates.mean())
    return Steadiness(spread=spread, moved=moved, jumped=slow / fast - 1, fast=fast, slow=slow, movement=along)


def surely(deviation: float, degrees: int) -> float:
    """What a standard deviation is above, 95 % surely: deviation / sqrt(chi-square / degrees).

    Four rounds that scatter by 6 % look like 10 % and more in four of a hundred cases. The quantile by Wilson and
    Hilferty (1931), good to 1 %.
    """
    by = 2 / (9 * degrees)
    return deviation / math.sqrt((1 - by + 1.6449 * math.sqrt(by)) ** 3)


def has_changed(timings: FloatArray) -> bool:
    """Whether timings in the order of time are not of one level.

    Two looks, since each is blind to what the other sees. The largest deviation of the cumulative sum: independent
    timings of one level make a Brownian bridge of it, which stays below `KOLMOGOROV_995` in 199 of 200 cases; a drift
    and a single jump exceed it (a Kolmogorov-Smirnov statistic of a change point; Csörgő and Horváth, Limit Theorems in
    Change-Point Analysis, 1997). And the correlation of each timing with the next: levels that take turns for longer
    than a few timings may cancel in the sum, but not there. Outliers are pulled in first: a single slow timing is no
    change of level.
    """
    count = len(timings)
    if count < LEAST_TIMINGS:
        return False
    middle = float(np.median(timings))
    robust = 1.4826 * float(np.median(np.abs(timings - middle)))
    if robust <= 0:
        return False
    pulled = np.clip(timings, middle - 3 * robust, middle + 3 * robust)
    deviation = pulled - pulled.mean()
    squares = float((deviation**2).sum())
    if squares <= 0:
        return False
    bridge = float(np.abs(np.cumsum(deviation)).max()) / math.sqrt(squares)
    lag = float((deviation[1:] * deviation[:-1]).sum()) / squares + 1 / count  # without correlation its mean is -1 / n
    return bridge > KOLMOGOROV_995 or lag > LAG_99 / math.sqrt(count)


def two_levels(values: FloatArray) -> tuple[float, float]:
    """Means of the two groups, low and high, that leave the least scatter inside (2-means, exact in one dimension)."""
    ordered = np.sort(values)
    count = len(ordered)
    sums = np.cumsum(ordered)
    below = np.arange(1, count)
    low = sums[:-1] / below
    high = (sums[-1] - sums[:-1]) / (count - below)
    between = below * (count - below) * (high - low) ** 2  # the larger, the less is left inside
    best = int(between.argmax())
    return float(low[best]), float(high[best])


def drift(replicates: FloatArray) -> float:
    """Seconds by which the total moved from the first round to the last where that stands out from noise, else 0."""
    rounds = len(replicates)
    if rounds < 6:
        return 0.0
    place = np.arange(rounds) - (rounds - 1) / 2
    squares = float((place**2).sum())
    slope = float((place * replicates).sum()) / squares
    residual = replicates - replicates.mean() - slope * place
    error = math.sqrt(float((residual**2).sum()) / (rounds - 2) / squares)
    # 2.5 standard errors more than at 90 %: a false alarm in a hundred.
    if abs(slope) <= 1.6 * t_quantile(rounds - 2) * error:
        return 0.0
    return abs(slope) * (rounds - 1)


def split_warmup(totals: FloatArray, least: int = 5) -> int:
    """How many leading rounds are warm-up, beside the very first: while they are slow to start.

    At least `least` rounds stay. Where more than `MOST_WARMUP` or `WARMUP_SHARE` would have to go, none does: that is
    no warm-up but a machine that changed its speed, which the run may meet again and the interval has to show.
    """
    dropped = 0
    while dropped <= MOST_WARMUP and len(totals) - dropped > least and is_slow_to_start(totals[dropped:]):
        dropped += 1
    return dropped if dropped <= min(MOST_WARMUP, WARMUP_SHARE * len(totals)) else 0


def is_slow_to_start(totals: FloatArray) -> bool:
    """Whether the first of some rounds is warm-up: pyperf's rule, it lies above the fence of the later ones.

    The fence is their third quartile plus 1.5 interquartile ranges, and at least 5 % above their median (without noise
    the range is nothing, and every first value an outlier). Below it a first round that was slow moves the mean by no
    more than the rounds scatter. Two later ones are needed, or there is no scatter to go by.
    """
    if len(totals) < 3:
        return False
    low, middle, high = np.quantile(totals[1:], [0.25, 0.5, 0.75])
    return bool(totals[0] > max(high + 1.5 * (high - low), 1.05 * middle))
