"""The timings of a measurement, summed over a batch plan: seconds, and what their interval is made from. numpy only."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.intervals import half_width
from planner.measurement import MicroSample, PlannedRow, Round
from planner.outliers import set_apart
from planner.slope import Movement, movement
from planner.strata import Kind, Strata, keys
from presets.errors import MeasurementError
from trainer.batching import MicroShapes
from trainer.record import CostModel
from trainer.tokens import FloatArray

_NORMAL = statistics.NormalDist()
Z_90 = _NORMAL.inv_cdf(0.95)  # standard errors to either end of a 90 % interval
MIN_RELATIVE_HALF_WIDTH = 0.002  # no two runs of one machine agree better, whatever the samples say


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlanWork:
    """A batch plan, reduced to what its seconds depend on: sums per stratum.

    On several devices only the slowest micro-batch of each round of devices is counted, since the others wait for it.
    """

    count: FloatArray  # (strata,) micro-batches
    padded: FloatArray  # (strata,) sum of padded tokens
    padded_width: FloatArray  # (strata,) sum of padded tokens x width
    num_steps: int
    num_examples: int
    num_tokens: int  # real ones

    @property
    def num_micro_batches(self) -> float:
        """Micro-batches that one device waits for."""
        return float(self.count.sum())


def plan_work(row: PlannedRow, shapes: MicroShapes, strata: Strata) -> PlanWork:
    """The work of a row's plan, per stratum."""
    devices = row.plan.num_devices
    sums = np.zeros((3, strata.count))  # of whole numbers far below 2^53: exact, in whatever parts they are added
    for some in shapes.blocks(devices):
        if devices > 1:
            # Windows hold a multiple of `devices` micro-batches, so no round of devices crosses two windows.
            slowest = keys(some).reshape(-1, devices).argmax(axis=1)
            some = some.part(slowest + np.arange(0, len(some.rows), devices))
        stratum = strata.of(row.kind, some)
        if (stratum < 0).any():
            counted = np.flatnonzero(stratum >= 0)
            some, stratum = some.part(counted), stratum[counted]
        padded = some.padded_tokens
        for number, weights in enumerate((None, padded, padded * some.width)):
            sums[number] += np.bincount(stratum, weights=weights, minlength=strata.count)
    return PlanWork(
        count=sums[0],
        padded=sums[1],
        padded_width=sums[2],
        num_steps=row.plan.num_steps,
        num_examples=row.plan.num_examples,
        num_tokens=int(shapes.tokens.sum()),
    )


def fit_cost(rounds: tuple[Round, ...]) -> CostModel:
    """Least squares of the relative error, no coefficient below zero.

    With three coefficients, all seven sets of positive ones can be tried: the best with none below zero is the exact
    non-negative solution. Errors are taken relative to the seconds since timing noise grows with them.

    Raises:
        MeasurementError: nothing was timed.
    """
    samples = [
        (sample.seconds, sample.rows * sample.width, sample.width)
        for one in rounds
        for sample in one.samples
        if sample.seconds is not None
    ]
    seconds, padded, width = np.array(samples, dtype=np.float64).reshape(-1, 3).T
    return _fit(seconds, padded, width, [value for one in rounds for value in one.optimizer_seconds])


def _fit(seconds: FloatArray, padded: FloatArray, width: FloatArray, optimizer: list[float]) -> CostModel:
    if not len(seconds):
        raise MeasurementError("no micro-batch was timed. Give more time with --budget.")
    features = np.stack([np.ones_like(padded), padded, padded * width], axis=1)
    scale = features.max(axis=0)
    weighted = features / scale / np.maximum(seconds, 1e-9)[:, None]
    best, best_error = np.array([seconds.mean(), 0.0, 0.0]), math.inf
    for size in (1, 2, 3):
        for chosen in itertools.combinations(range(3), size):
            columns = list(chosen)
            solution, *_ = np.linalg.lstsq(weighted[:, columns], np.ones(len(seconds)), rcond=None)
            error = float(((weighted[:, columns] @ solution - 1.0) ** 2).sum())
            if (solution >= 0).all() and error < best_error - 1e-12:
                best, best_error = np.zeros(3), error
                best[columns] = solution / scale[columns]
    return CostModel(
        base=float(best[0]),
        per_token=float(best[1]),
        per_token_width=float(best[2]),
        optimizer=float(np.mean(optimizer)) if optimizer else 0.0,
    )


def _sum_seconds(fit: CostModel, work: PlanWork) -> FloatArray:
    """Fitted seconds of a plan's micro-batches per stratum: the fit is linear, so the sums are enough."""
    return np.asarray(fit.base * work.count + fit.per_token * work.padded + fit.per_token_width * work.padded_width)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Total:
    """Seconds of a plan's steps: the estimate, and what its interval is made from."""

    seconds: float  # with what rare slow micro-steps add
    replicates: FloatArray  # (rounds,) the total as each round alone would have it, without what rare slow ones add
    raw_replicates: FloatArray  # (rounds,) the same with them
    round_variance: float  # of one replicate, if its micro-steps scatter independently
    degrees: int  # of freedom of `round_variance`
    own_variance: float  # of the run itself, around what is expected of it
    slow_down: float  # seconds by which rare slow micro-steps may add less: half of a 90 % interval
    slow_up: float  # and more
    movement: Movement  # of the speed while it was timed

    def halves(self) -> tuple[float, float]:
        """How far the 90 % interval reaches down and up, in seconds."""
        floor = MIN_RELATIVE_HALF_WIDTH * self.seconds
        half = half_width(self.replicates, self.round_variance, self.degrees, self.own_variance, self._moved)
        return self._shared(max(floor, half))

    @property
    def relative_half_width(self) -> float:
        """Half of the interval that more rounds would narrow, relative: the run's own scatter is left out."""
        if self.seconds <= 0:
            return math.inf
        half = half_width(self.replicates, self.round_variance, self.degrees, moved=self._moved)
        return sum(self._shared(half)) / 2 / self.seconds

    @property
    def _moved(self) -> float:
        return abs(self.movement.by) * self.seconds if self.movement.stands_out else 0.0

    def _shared(self, half: float) -> tuple[float, float]:
        """Both halves, from that of the noise and what rare slow micro-steps may add or not.

        One time in ten lies outside. Where slow ones that may come push the upper end so far out that less than its 5 %
        lie above, the rest may lie below: the lower end moves up.
        """
        up = math.hypot(half, self.slow_up)
        above = 1 - _NORMAL.cdf(Z_90 * up / half) if half > 0 else 0.05
        return math.hypot(_NORMAL.inv_cdf(0.90 + above) / Z_90 * half, self.slow_down), up


def _with_times(one: Round) -> Iterator[tuple[float, MicroSample]]:
    """A round's micro-batches, each with the moment in whose middle it was timed, on the measuring clock."""
    at = one.started
    for sample in one.samples:
        seconds = sample.seconds or 0.0
        yield at + seconds / 2, sample
        at += seconds


class Estimator:
    """The timings of one measurement, arranged by round and stratum, to be summed over any plan.

    Means, not medians: what is estimated is a sum over the plan, and the sum of a population is its size times its
    mean. The rare slow micro-step that a median throws away happens in the run too.
    """

    def __init__(self, rounds: tuple[Round, ...], strata: Strata, kind: Kind) -> None:
        """Raises: MeasurementError where no micro-batch of this kind was timed."""
        self.numbers = strata.numbers(kind)
        timed = [
            (number, sample.stratum, sample.seconds, sample.rows * sample.width, sample.width, at)
            for number, one in enumerate(rounds)
            for at, sample in _with_times(one)
            if sample.seconds is not None and sample.stratum in self.numbers
        ]
        columns = np.array(timed, dtype=np.float64).reshape(-1, 6).T  # in order of time
        place = (columns[0].astype(np.int64), columns[1].astype(np.int64))
        self._stratum, self._seconds, self._times = place[1], columns[2], columns[5]
        optimizer_steps = [value for one in rounds for value in one.optimizer_seconds]
        self.fit = _fit(columns[2], columns[3], columns[4], optimizer_steps)
        self._fitted_seconds = self._fitted(columns[3], columns[4])
        self.outliers = set_apart(self._seconds, self._fitted_seconds, self._stratum)
        # Per round and stratum, summed where a round timed several of a stratum; NaN where it timed none.
        counts = np.zeros((len(rounds), strata.count))
        self.seconds, self.fitted, self.excess = counts.copy(), counts.copy(), counts.copy()
        np.add.at(counts, place, 1.0)
        np.add.at(self.seconds, place, self.outliers.clean)
        np.add.at(self.fitted, place, self._fitted_seconds)
        np.add.at(self.excess, place, self._seconds - self.outliers.clean)
        self.seconds[counts == 0] = self.fitted[counts == 0] = np.nan
        self.draws = float(counts.max(initial=1))  # timings of a stratum in a round
        optimizer = np.array([np.mean(one.optimizer_seconds) if one.optimizer_seconds else np.nan for one in rounds])
        self.optimizer = np.where(np.isnan(optimizer), self.fit.optimizer, optimizer)
        with_samples = ~np.isnan(self.seconds).all(axis=0)
        overall = np.nansum(self.seconds) / max(np.nansum(self.fitted), 1e-12)
        # Seconds per fitted second, per stratum: what corrects the fit where it is off. A stratum without a timing
        # takes the overall ratio.
        self.ratio = np.full(strata.count, overall)
        self.ratio[with_samples] = np.nansum(self.seconds[:, with_samples], axis=0) / np.maximum(
            np.nansum(self.fitted[:, with_samples], axis=0), 1e-12
        )

    def _fitted(self, padded: FloatArray, width: FloatArray) -> FloatArray:
        return np.asarray(self.fit.base + (self.fit.per_token + self.fit.per_token_width * width) * padded)

    def total(self, work: PlanWork) -> Total:
        """Seconds of a plan's micro-steps and optimizer steps.

        Per stratum: the plan's fitted seconds x (timed seconds / fitted seconds of the timed micro-batches). The ratio
        makes a sample that happens to be longer or shorter than its stratum stand for the stratum all the same. What
        rare slow micro-steps took beyond that comes on top, as a share of all: see planner.outliers.
        """
        stratum_seconds = _sum_seconds(self.fit, work) * self.ratio
        # How far each timing lies from its stratum's ratio, in parts of the stratum's mean timing. A timing left out
        # of a round counts as lying on it.
        timed = ~np.isnan(self.fitted)
        mean = np.nansum(self.fitted, axis=0) / np.maximum(timed.sum(axis=0), 1)
        deviation = (self.seconds - self.ratio * self.fitted) / np.maximum(self.ratio * mean, 1e-12)
        deviation = np.where(timed, deviation, 0.0)
        slow = self.outliers
        expected, optimizer_seconds = float(stratum_seconds.sum()), work.num_steps * self.optimizer
        replicates = (stratum_seconds * (1.0 + deviation)).sum(axis=1) + optimizer_seconds
        excess = self.excess / np.maximum(self.ratio * mean, 1e-12)
        within = self._variances(deviation)
        mean_seconds = stratum_seconds / np.maximum(work.count, 1.0)
        optimizer = float(self.optimizer.var(ddof=1)) if len(self.optimizer) > 1 else 0.0
        parts = np.append(stratum_seconds**2 * within, work.num_steps**2 * optimizer)
        # Satterthwaite: degrees of freedom of a sum of variances that were estimated apart.
        squares = float((parts**2).sum())
        degrees = (len(replicates) - 1) * float(parts.sum()) ** 2 / squares if squares > 0 else 1.0
        own = float((work.count * mean_seconds**2 * (within * self.draws + slow.square)).sum())
        return Total(
            seconds=float((1 + slow.share) * expected + optimizer_seconds.mean()),
            replicates=replicates,
            raw_replicates=(stratum_seconds * (1.0 + deviation + excess)).sum(axis=1) + optimizer_seconds,
            round_variance=float(parts.sum()),
            degrees=max(1, int(degrees)),
            own_variance=own + work.num_steps * optimizer,
            slow_down=slow.down * expected,
            slow_up=slow.up * expected,
            movement=self.movement,
        )

    def timings(self) -> FloatArray:
        """Logarithm of seconds / expected seconds of every micro-step, in the order of time."""
        return self._relative(self._seconds)

    def clean_timings(self) -> FloatArray:
        """The same, rare slow ones set apart."""
        return self._relative(self.outliers.clean)

    @functools.cached_property
    def movement(self) -> Movement:
        """By how much the speed moved along a line, as single micro-steps show it."""
        return movement(self._times, self.timings(), self._stratum)

    def _relative(self, seconds: FloatArray) -> FloatArray:
        expected = self._fitted_seconds * self.ratio[self._stratum]
        return np.asarray(np.log(np.maximum(seconds, 1e-9) / np.maximum(expected, 1e-12)))

    def _variances(self, deviation: FloatArray) -> FloatArray:
        """Variance of a micro-step's relative deviation, per stratum; 0 from a single round."""
        rounds = len(deviation)
        return np.asarray((deviation**2).sum(axis=0) / (rounds - 1)) if rounds > 1 else np.zeros(deviation.shape[1])

    def window_seconds(self, samples: tuple[MicroSample, ...]) -> float:
        """What a window should take by the sum of its parts."""
        shapes = [(one.rows * one.width, one.width, one.stratum) for one in samples if one.stratum >= 0]
        padded, width, stratum = np.array(shapes, dtype=np.float64).reshape(-1, 3).T
        parts = float((self._fitted(padded, width) * self.ratio[stratum.astype(np.int64)]).sum())
        return (1 + self.outliers.share) * parts + float(self.optimizer.mean())
