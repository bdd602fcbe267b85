"""Past runs -> a factor for the next estimate of the same signature. Always from raw predictions."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.estimate import EXCHANGE, Estimate, whole_run
from planner.estimator import Z_90
from planner.history import History
from planner.student import t_quantile

LEAST_RUNS = 3
MOST_RUNS = 10  # the latest: what a machine did last year says little of today
PRIOR_SPREAD = 0.15  # how far a machine's true ratio is expected to lie from 1 (standard deviation of its logarithm)
RUN_SPREAD = 0.05  # what single runs scatter by before any was seen, likewise
RUN_SPREAD_DEGREES = 1  # runs that this expectation is worth
MOST_KEPT = 5 * MOST_RUNS  # looked through for those of the present measurement
# What one measurement is off by, likewise, which all runs predicted from it share: the pairs of profile and run in
# bench/results are off by 1 to 4 % in the median, which is two thirds of a standard deviation.
PROFILE_SPREAD = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """What past runs say of the next one, in logarithms of actual / raw predicted training seconds."""

    num_runs: int
    mean: float
    weight: float  # of the mean against 0, in [0, 1)
    half_width: float  # half of the 90 % interval for the next run
    shared: float = 0.0  # half of a 90 % interval for what the past measurements were off by, beyond the runs' scatter

    @property
    def factor(self) -> float:
        return math.exp(self.weight * self.mean)

    @property
    def text(self) -> str:
        return f"corrected by x{self.factor:.2f} from {self.num_runs} runs on this machine"


def correction(
    ratios: Sequence[float], measured_as: Sequence[str | None] = (), now: str | None = None
) -> Correction | None:
    """The correction that follows from actual / raw predicted seconds of past runs; None from fewer than three.

    factor = exp(w m), m the mean of the n log-ratios (their geometric mean, so that twice too long and twice too short
    cancel), w = P^2 / (P^2 + v), P = PRIOR_SPREAD and v the variance of that mean. This is the posterior mean of a
    ratio that is expected near 1 (normal in its logarithm) and seen n times: where runs agree, v is small and the
    factor soon is their own; where they scatter, a few of them hardly move it. Were v the same for all, ten runs that
    agree on 1.3 would stay at 1.25 for ever.

    s^2 = (d s0^2 + sum of squared deviations) / (d + n - 1), with s0 = RUN_SPREAD and d = RUN_SPREAD_DEGREES: three
    runs that happen to agree do not prove that the fourth will. From ten runs that agree, s is 1.6 %. The next run is
    expected within t s sqrt(1 + 1 / n), Student's t of d + n - 1 degrees at 90 %.

    Runs that were predicted from one measurement share its error, and do not tell of it by their scatter: however many
    they are, for an estimate from another measurement they are as one. So v = s^2 / n + PROFILE_SPREAD^2 x (sum of
    n_j^2 / n^2 - 1 / n) over measurements with n_j runs each: nothing more where each run has its own, nearly all of it
    where one has served them all. An estimate from a measurement that has three runs itself is corrected by these
    alone: it is off by what they were.

    Every ratio is that of a *raw* prediction. Ratios of corrected ones would tend to 1 as soon as the correction
    worked, and take it back.

    Args:
        ratios: newest first.
        measured_as: which measurement each was predicted from; None, or nothing here: from one of its own.
        now: the measurement that the next estimate comes from.
    """
    seen = [
        (math.log(ratio), one)
        for ratio, one in itertools.zip_longest(ratios, measured_as[: len(ratios)])
        if ratio > 0 and math.isfinite(ratio)
    ]
    own = [(log, one) for log, one in seen if one is not None and one == now]
    is_own = len(own) >= LEAST_RUNS
    used = (own if is_own else seen)[:MOST_RUNS]
    n = len(used)
    if n < LEAST_RUNS:
        return None
    mean = sum(log for log, _ in used) / n
    degrees = RUN_SPREAD_DEGREES + n - 1
    variance = (RUN_SPREAD_DEGREES * RUN_SPREAD**2 + sum((log - mean) ** 2 for log, _ in used)) / degrees
    sharing = Counter(one for _, one in used if one is not None)
    alone = sum(one is None for _, one in used)
    together = 0.0 if is_own else (alone + sum(count**2 for count in sharing.values())) / n**2 - 1 / n
    shared = PROFILE_SPREAD**2 * max(0.0, together)
    return Correction(
        num_runs=n,
        mean=mean,
        weight=PRIOR_SPREAD**2 / (PRIOR_SPREAD**2 + variance / n + shared),
        half_width=t_quantile(degrees) * math.sqrt(variance * (1 + 1 / n)),
        shared=Z_90 * math.sqrt(shared),
    )


def past_correction(history: History, signature_key: str, now: str | None = None) -> Correction | None:
    """The correction from the latest comparable runs in a history, for an estimate from the measurement `now`."""
    runs = [
        run
        for run in history.counted_runs(signature_key, MOST_KEPT)
        if run.actual_train_seconds is not None and run.raw_train_seconds
    ]
    ratios = [(run.actual_train_seconds or 0.0) / (run.raw_train_seconds or 1.0) for run in runs]
    return correction(ratios, [run.measured_as for run in runs], now)


def corrected(raw: Estimate, by: Correction) -> Estimate:
    """An estimate with its training seconds x factor; what a run does beside its steps stays as measured.

    The interval, in logarithms around the corrected figure, is the measured one or the scatter of past runs, whichever
    is wider: past ratios hold the error of their profiles already, so the two do not add up. What past runs share of
    the error of another measurement comes on top, by chance apart from both. On the side where the runs' own mean lies,
    what shrinking took off is added, so that the range reaches as far as if there were none.
    """
    if raw.train_seconds is None or raw.train_seconds_low is None or raw.train_seconds_high is None:
        return raw
    factor = by.factor
    seconds = raw.train_seconds * factor
    left_out = by.mean - math.log(factor)
    up = max(math.log(raw.train_seconds_high / raw.train_seconds), by.half_width)
    down = max(math.log(raw.train_seconds / raw.train_seconds_low), by.half_width)
    up = math.hypot(up, by.shared) + max(0.0, left_out)
    down = math.hypot(down, by.shared) + max(0.0, -left_out)
    low, high = seconds * math.exp(-down), seconds * math.exp(up)
    whole = whole_run(seconds, low, high, raw.fixed, raw.slower)
    cost = raw.cost
    return replace(
        raw,
        seconds_per_step=None if raw.seconds_per_step is None else raw.seconds_per_step * factor,
        seconds_per_sample=None if raw.seconds_per_sample is None else raw.seconds_per_sample * factor,
        tokens_per_second=None if raw.tokens_per_second is None else raw.tokens_per_second / factor,
        train_seconds=seconds,
        train_seconds_low=low,
        train_seconds_high=high,
        seconds=whole[0],
        seconds_low=whole[1],
        seconds_high=whole[2],
        # Planned seconds beside the run's own come from it, and have to add up to what was promised.
        cost=None
        if cost is None
        else replace(
            cost,
            base=cost.base * factor,
            per_token=cost.per_token * factor,
            per_token_width=cost.per_token_width * factor,
            optimizer=cost.optimizer * factor,
        ),
        calibrated=raw.calibrated or raw.is_but_for_exchange,
        warnings=tuple(text for text in raw.warnings if text != EXCHANGE),
        notes=(*raw.notes, by.text),
    )
