"""Rare slow micro-steps: another process, an interrupt, a collector. Told apart from the noise of all. numpy only.

A step that took two or three times as long says little of its own class of micro-batches, and much of how often such a
thing happens. Left in its class's mean it is multiplied by all the work of that class; a class with none has nothing.
So what the slow ones took beyond what was expected is taken out, and put back as a share of *all* the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from trainer.tokens import FloatArray, IntArray

FENCE = 4.0  # robust standard deviations above which a timing is an outlier: without any, one in thirty thousand
LEAST_EXCESS = 0.4  # in the logarithm, about half as long again: below it an outlier is not worth the trouble
LEAST_OF_CLASS = 3  # timings of a class, before one of them can be told from the rest
UNSEEN = 1.25  # excess of an outlier that was not seen: 2.25 times as long (an assumption)
MOST_UNSEEN = 0.03  # of the time, that unseen outliers are taken to add at most: more would be no rare thing (likewise)
Z = 1.6448536  # 95 % quantile of the normal distribution
# Where k were seen, k - Z sqrt(k) + POISSON or more are expected, 95 % surely: near Garwood's exact limit, k >= 1.
POISSON = 0.67


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Outliers:
    """What slow timings add to the others, relative to what all should have taken."""

    clean: FloatArray  # (timings,) seconds, those of outliers replaced by what their class takes
    share: float  # mean excess
    down: float  # by how much the share may be smaller: 5 % quantile, roughly
    up: float
    square: float  # mean square of a timing's excess


def set_apart(seconds: FloatArray, fitted: FloatArray, stratum: IntArray) -> Outliers:
    """Find the outliers among timings, and what they add.

    Each timing's excess is taken relative to what was expected of it. Where what slows it multiplies its seconds, equal
    weights give the sharpest mean; where it adds seconds, weights by the seconds do. Both are right on average in
    either case; weights by the square root do well in both.

    The excess of n timings is a sum of few large parts: its variance is the sum of their squares. Who has seen k of
    them may as well have seen one more, so one more counts towards the upper end; and where none was seen, one may have
    been missed, since what is rarer than 1 in n does not show in n timings.

    Args:
        seconds: (timings,)
        fitted: (timings,) by the cost model.
        stratum: (timings,)
    """
    count = len(seconds)
    total = float(seconds.sum())
    if count == 0 or total <= 0:
        return Outliers(clean=seconds, share=0.0, down=0.0, up=MOST_UNSEEN, square=0.0)
    residual = np.log(np.maximum(seconds, 1e-9) / np.maximum(fitted, 1e-12))
    usual = np.full(count, np.inf)  # of a class's timings; a small class has no outliers
    for one in np.unique(stratum):
        own = stratum == one
        if int(own.sum()) >= LEAST_OF_CLASS:
            usual[own] = np.median(residual[own])
    known = np.isfinite(usual)
    deviation = residual[known] - usual[known]
    robust = 1.4826 * float(np.median(np.abs(deviation))) if len(deviation) else 0.0
    is_slow = known & (residual - usual > max(FENCE * robust, LEAST_EXCESS))
    clean = np.where(is_slow, fitted * np.exp(np.where(known, usual, 0.0)), seconds)
    excess = seconds / clean - 1
    weight = np.sqrt(clean)
    weight /= weight.sum()
    parts = weight * excess
    squares, share = float((parts**2).sum()), float(parts.sum())
    typical = math.sqrt(float((weight**2).mean()))  # part of a timing, for each unit of its excess
    one_more = float(max(parts.max(), typical * excess.max()))
    down = Z * math.sqrt(squares) - POISSON * squares / share if share > 0 else 0.0
    return Outliers(
        clean=clean,
        share=share,
        down=min(share, down),
        up=one_more + Z * math.sqrt(squares + one_more**2)
        if share > 0
        else min(MOST_UNSEEN, UNSEEN * typical * (1 + Z)),
        square=float((excess**2).mean()),
    )
