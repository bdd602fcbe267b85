"""From replicates to a 90 % interval. numpy only."""

from __future__ import annotations

import math

import numpy as np

from planner.steadiness import drift
from planner.student import t_quantile
from trainer.tokens import FloatArray

UNKNOWN_RELATIVE_HALF_WIDTH = 0.5  # from a single round, which says nothing of its own spread


def half_width(
    replicates: FloatArray,
    round_variance: float = 0.0,
    degrees: int = 1,
    own_variance: float = 0.0,
    moved: float = 0.0,
) -> float:
    """Half of the 90 % interval for a total of which each round gives an independent look.

    Student's t on the rounds: a round is the unit that repeats, so what slows a whole round (another process, a clock
    that drops) is in the spread. Two things break independence and widen it:
    - lag-1 autocorrelation r: n rounds are worth n (1 - r) / (1 + r). Only where r stands out from the 1 / sqrt(n)
      that independent rounds show by chance.
    - drift: where a slope stands out, the machine is not what it was, and the run may see either end. Half the way
      travelled is added.

    Sampling stops when the interval is narrow, so it tends to stop where a few rounds happen to agree.
    `round_variance`, from the scatter inside each stratum, has several times the degrees of freedom and is not so
    easily fooled: the wider of the two intervals counts.

    Args:
        replicates: (rounds,) seconds.
        round_variance: of one replicate, as it follows from the scatter of single micro-steps.
        degrees: of freedom of `round_variance`.
        own_variance: of what is to be predicted, around its mean.
        moved: seconds by which the total moved while it was timed, where single micro-steps show it.
    """
    rounds = len(replicates)
    mean = float(replicates.mean()) if rounds else 0.0
    if rounds < 2:
        return UNKNOWN_RELATIVE_HALF_WIDTH * mean
    deviation = replicates - mean
    spread = float((deviation**2).sum())
    variance = spread / (rounds - 1)
    widening = 1.0
    if rounds >= 5 and spread > 0:
        # Without correlation its mean is -1 / n: taken off.
        lag = float((deviation[1:] * deviation[:-1]).sum()) / spread + 1.0 / rounds
        if lag > 1.645 / math.sqrt(rounds):
            lag = min(lag, 0.9)
            widening = (1 + lag) / (1 - lag)
    half = max(
        t_quantile(rounds - 1) * math.sqrt(variance * widening / rounds + own_variance),
        t_quantile(degrees) * math.sqrt(round_variance * widening / rounds + own_variance),
    )
    return half + max(drift(replicates), moved) / 2


def lopsided(timings: FloatArray) -> float:
    """How much further up than down an interval must reach, in parts of its half-width; 0 where timings lean nowhere.

    The mean of n values of skewness g lies low more often than high: Johnson's modified t adds g / (6 sqrt(n)) standard
    errors x (1 + 2 t^2) to the upper end (J. Am. Stat. Assoc. 73, 1978). Half a width is t standard errors.

    Args:
        timings: logarithm of seconds / expected seconds.
    """
    count = len(timings)
    values = np.exp(timings)
    deviation = values - values.mean() if count else values
    spread = float(np.sqrt((deviation**2).mean())) if count else 0.0
    if count < 10 or spread <= 0:
        return 0.0
    skewness = float((deviation**3).mean()) / spread**3
    z = 1.6448536
    return max(0.0, skewness) / (6 * math.sqrt(count)) * (1 + 2 * z**2) / z
