"""How far a machine's speed moved while it was timed, and what could have moved unseen. numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planner.student import t_quantile, t_quantile_99
from trainer.tokens import FloatArray, IntArray

PULLED = 3.0  # robust standard deviations: timings further out are pulled in, so that one slow one makes no slope


@dataclass(frozen=True, kw_only=True, slots=True)
class Movement:
    """Change of the seconds per step along a straight line, from the first timing to the last; relative."""

    by: float = 0.0  # above 0: it became slower
    error: float = 0.0  # standard error of `by`
    degrees: int = 1  # of freedom of `error`
    scatter: float = 0.0  # standard deviation of single timings around the line
    count: int = 0  # timings

    @property
    def stands_out(self) -> bool:
        """Whether noise alone would show so much once in fifty cases at most."""
        return abs(self.by) > t_quantile_99(self.degrees) * self.error

    @property
    def visible(self) -> float:
        """The movement that would stand out in 95 of 100 cases: a smaller one may stay unseen."""
        return (t_quantile_99(self.degrees) + t_quantile(self.degrees)) * self.error

    @property
    def most(self) -> float:
        """What the movement is below, 95 % surely."""
        return abs(self.by) + t_quantile(self.degrees) * self.error


NO_MOVEMENT = Movement()


def movement(times: FloatArray, timings: FloatArray, stratum: IntArray) -> Movement:
    """Least squares of the timings on their times, each class of micro-batches by a level of its own.

    Single timings and not rounds: of eight rounds of eleven timings the rounds leave six degrees of freedom, which cost
    a third of the power at 10 % noise. From n timings of scatter s the standard error is about s sqrt(12 / n), the
    least that any unbiased look at a straight line has.

    Args:
        times: (timings,) seconds on any clock.
        timings: (timings,) logarithm of seconds / expected seconds.
        stratum: (timings,)

    Returns: an infinite error where too few timings are left beside the levels.
    """
    count = len(timings)
    degrees = count - len(np.unique(stratum)) - 1
    if degrees < 1:
        return Movement(error=math.inf, count=count)
    middle = float(np.median(timings))
    robust = 1.4826 * float(np.median(np.abs(timings - middle)))
    pulled = np.clip(timings, middle - PULLED * robust, middle + PULLED * robust) if robust > 0 else timings
    place, value = _around_own_mean(times, stratum), _around_own_mean(pulled, stratum)
    squares = float((place**2).sum())
    if squares <= 0:
        return Movement(error=math.inf, count=count)
    slope = float((place * value).sum()) / squares
    variance = float(((value - slope * place) ** 2).sum()) / degrees
    span = float(times.max() - times.min())
    return Movement(
        by=slope * span,
        error=math.sqrt(variance / squares) * span,
        degrees=degrees,
        scatter=math.sqrt(variance),
        count=count,
    )


def _around_own_mean(values: FloatArray, stratum: IntArray) -> FloatArray:
    _, own = np.unique(stratum, return_inverse=True)
    return np.asarray(values - (np.bincount(own, values) / np.bincount(own))[own])
