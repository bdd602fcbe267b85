"""Measurement x batch plan -> Estimate: seconds with an interval, and peak memory. numpy only."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from planner.conditions import summarise
from planner.intervals import half_width, lopsided
from planner.measurement import (
    FixedSamples,
    Measurement,
    Measurements,
    MicroSample,
    PlannedRow,
    Round,
    RowVerdict,
    StepSignature,
)
from planner.outliers import set_apart
from planner.steadiness import judge
from planner.strata import Kind, Strata, keys
from presets.errors import MeasurementError
from trainer.batching import MicroShapes
from trainer.job import Job
from trainer.planning import checkpoint_interval, evaluation_steps, needs_loss
from trainer.record import CostModel
from trainer.tokens import FloatArray, IntArray, TokenizedDataset

CONFIDENCE = 0.90
GIB = 1024**3
FRAGMENTATION = 0.05  # of the peak: margin below which "fits" comes with a warning
MIN_RELATIVE_HALF_WIDTH = 0.002  # no two runs of one machine agree better, whatever the samples say
# Start, loading, evaluation and saving are timed once or a few times, and depend on what lies in the file cache.
FIXED_RELATIVE_HALF_WIDTH = 0.2
# By how much one run differs from the next on the same machine, half of the 90 % interval: assumed till past runs tell.
# CPUs share memory bandwidth, heat and often their host with others: of twelve pairs of profile and run on two cores of
# a shared machine eleven lay within 6 %, one, with other work beside it, at 13 %
# (bench/results/accuracy-2026-11-24.json). A GPU alone in its machine is steadier; how steady has not been measured.
BETWEEN_RUNS = {"cpu": 0.06, "mps": 0.03, "cuda": 0.01}
TIMER_SECONDS = 1e-6  # what reading the clock adds to each timed call
WINDOW_TOLERANCE = 0.10  # a window that differs more from the sum of its parts is worth a note


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedSeconds:
    """What a run takes beside its steps, in seconds. None: unknown, and not in the sum."""

    start: float | None = None  # process start and imports
    load: float | None = None  # the model
    compile: float | None = None
    data: float | None = None
    evaluation: float | None = None
    checkpoints: float | None = None
    save: float | None = None
    samples: float | None = None  # sample answers

    @property
    def total(self) -> float:
        parts = (
            self.start, self.load, self.compile, self.data, self.evaluation, self.checkpoints, self.save, self.samples,
        )  # fmt: skip
        return sum(part for part in parts if part is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """How long a job takes and whether it fits. Seconds and bytes; None is unknown."""

    name: str
    fits: bool | None
    error: str | None = None
    num_steps: int = 0
    seconds_per_step: float | None = None  # train_seconds / num_steps
    seconds_per_sample: float | None = None
    tokens_per_second: float | None = None  # real tokens, whole job
    train_seconds: float | None = None  # the loop's steps alone
    train_seconds_low: float | None = None  # of the 90 % interval, and so below
    train_seconds_high: float | None = None
    fixed: FixedSeconds = FixedSeconds()
    seconds: float | None = None  # process start to the written record
    seconds_low: float | None = None
    seconds_high: float | None = None
    peak_memory_bytes: int | None = None  # reserved
    peak_memory_allocated_bytes: int | None = None
    speed_factor: float | None = None
    cost: CostModel | None = None
    num_rounds: int = 0
    calibrated: bool = True  # False: the machine changed its speed while timed, and the range is a range, not 90 %
    window_ratio: float | None = None  # whole windows as timed / as summed from their parts
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


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
    stratum = strata.of(row.kind, shapes)
    padded, width = shapes.padded_tokens, shapes.width
    devices = row.plan.num_devices
    if devices > 1:
        # Windows hold a multiple of `devices` micro-batches, so no round of devices crosses two windows.
        slowest = keys(shapes).reshape(-1, devices).argmax(axis=1) + np.arange(0, len(padded), devices)
        stratum, padded, width = stratum[slowest], padded[slowest], width[slowest]
    counted = stratum >= 0
    if not counted.all():  # three copies of ten million numbers take as long as all the rest
        stratum, padded, width = stratum[counted], padded[counted], width[counted]

    def per_stratum(weights: IntArray) -> FloatArray:
        return np.bincount(stratum, weights=weights, minlength=strata.count).astype(np.float64)

    return PlanWork(
        count=per_stratum(np.ones_like(stratum)),
        padded=per_stratum(padded),
        padded_width=per_stratum(padded * width),
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
    replicates: FloatArray  # (rounds,) the total as each round alone would have it, rare slow ones set apart
    raw_replicates: FloatArray  # (rounds,) the same with them
    round_variance: float  # of one replicate, if its micro-steps scatter independently
    degrees: int  # of freedom of `round_variance`
    own_variance: float  # of the run itself, around what is expected of it
    slow_down: float  # seconds by which rare slow micro-steps may add less: half of a 90 % interval
    slow_up: float  # and more

    def halves(self) -> tuple[float, float]:
        """How far the 90 % interval reaches down and up, in seconds."""
        floor = MIN_RELATIVE_HALF_WIDTH * self.seconds
        half = max(floor, half_width(self.replicates, self.round_variance, self.degrees, self.own_variance))
        return math.hypot(half, self.slow_down), math.hypot(half, self.slow_up)

    @property
    def relative_half_width(self) -> float:
        """Half of the interval that more rounds would narrow, relative: the run's own scatter is left out."""
        if self.seconds <= 0:
            return math.inf
        half = half_width(self.replicates, self.round_variance, self.degrees)
        return (math.hypot(half, self.slow_down) + math.hypot(half, self.slow_up)) / 2 / self.seconds


class Estimator:
    """The timings of one measurement, arranged by round and stratum, to be summed over any plan.

    Means, not medians: what is estimated is a sum over the plan, and the sum of a population is its size times its
    mean. The rare slow micro-step that a median throws away happens in the run too.
    """

    def __init__(self, rounds: tuple[Round, ...], strata: Strata, kind: Kind) -> None:
        """Raises: MeasurementError where no micro-batch of this kind was timed."""
        self.numbers = strata.numbers(kind)
        timed = [
            (number, sample.stratum, sample.seconds, sample.rows * sample.width, sample.width)
            for number, one in enumerate(rounds)
            for sample in one.samples
            if sample.seconds is not None and sample.stratum in self.numbers
        ]
        columns = np.array(timed, dtype=np.float64).reshape(-1, 5).T  # in order of time
        place = (columns[0].astype(np.int64), columns[1].astype(np.int64))
        self._stratum, self._seconds = place[1], columns[2]
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
        replicates = (1 + slow.share) * (stratum_seconds * (1.0 + deviation)).sum(axis=1) + optimizer_seconds
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
        )

    def timings(self) -> FloatArray:
        """Logarithm of seconds / expected seconds of every micro-step, in the order of time."""
        return self._relative(self._seconds)

    def clean_timings(self) -> FloatArray:
        """The same, rare slow ones set apart."""
        return self._relative(self.outliers.clean)

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


def reference_job(job: Job) -> Job:
    """The job in fp32, frozen weights included: what the speed factor compares with."""
    return replace(job, precision="fp32", base_precision="fp32")


def estimate(
    row: PlannedRow,
    data: TokenizedDataset,
    found: Measurements,
    *,
    shapes: MicroShapes | None = None,
    data_seconds: float | None = None,
    between: float = 0.0,
) -> Estimate:
    """The estimate of one row, from what was measured of its step signature.

    Args:
        shapes: `row.plan.micro_shapes(data.lengths)`, where the caller has it already.
        data_seconds: what the run will take to read its data, where known.
        between: half of the 90 % interval, relative, by which one hour differs from the next on such a machine; no
            minute of timing shows it.
    """
    verdict = found.verdict(row.name)
    measurement = found.of(StepSignature.of(row.job))
    if verdict is None or measurement is None:
        raise MeasurementError(f"'{row.name}' was not measured.")
    plain = Estimate(
        name=row.name,
        fits=verdict.fits,
        error=verdict.error,
        num_steps=row.plan.num_steps,
        peak_memory_bytes=verdict.peak_reserved_bytes,
        peak_memory_allocated_bytes=verdict.peak_allocated_bytes,
    )
    if not verdict.fits or not measurement.rounds:
        return plain
    shapes = row.plan.micro_shapes(data.lengths) if shapes is None else shapes
    work = plan_work(row, shapes, found.strata)
    estimator = Estimator(measurement.rounds, found.strata, row.kind)
    total = estimator.total(work)
    least = TIMER_SECONDS * work.num_micro_batches
    down, up = (max(math.hypot(half, between * total.seconds), least) for half in total.halves())
    # As far down in proportion as up: where the noise is large, a time of nothing or less is no answer. Further up
    # where the noise leans that way: the mean is then more often too small than too large.
    low = total.seconds / (1 + down / total.seconds)
    high = total.seconds + up * (1 + lopsided(estimator.clean_timings()))
    notes, warnings = [], []
    ratio = window_ratio(measurement, estimator)
    if ratio is not None and abs(ratio - 1) > WINDOW_TOLERANCE:
        # The parts do not add up, and the run executes windows: the interval reaches as far as they were seen to.
        low, high = min(low, total.seconds * ratio), max(high, total.seconds * ratio)
        warnings.append(
            f"whole windows took {ratio:.2f} x the sum of their parts, more than {WINDOW_TOLERANCE:.0%} apart: the "
            "range is widened. Measure again on a quiet machine, or with a longer --budget."
        )
    steadiness = judge(total.replicates, total.raw_replicates, estimator.timings())
    if steadiness.warning:
        # The run may meet any of the speeds that were seen.
        low, high = min(low, total.seconds * steadiness.fast), max(high, total.seconds * steadiness.slow)
        warnings.append(steadiness.warning)
    conditions = summarise(
        [one.conditions for one in measurement.rounds if one.conditions is not None],
        on_cpu=row.job.device == "cpu",
    )
    if conditions.warnings:
        # At best the run has the whole machine to itself; at worst what was taken from it doubles.
        share = conditions.disturbed
        low, high = min(low, total.seconds * (1 - share)), max(high, total.seconds * (1 + share / (1 - share)))
        warnings += conditions.warnings
    if len(measurement.rounds) < 2:
        warnings.append("only one round could be timed, so the range is a guess (±50 %). Give more time with --budget.")
    tight = memory_warning(verdict)
    if tight:
        warnings.append(tight)
    if row.plan.num_devices > 1:
        notes.append("the exchange of gradients between devices is not in the figure")
    if measurement.load is not None and measurement.load.compile_refused is not None:
        notes.append(f"the layers are not compiled: {measurement.load.compile_refused}")
    fixed = fixed_seconds(row, data, measurement, data_seconds)
    whole = whole_run(total.seconds, low, high, fixed)
    return replace(
        plain,
        seconds_per_step=total.seconds / work.num_steps,
        seconds_per_sample=total.seconds / work.num_examples,
        tokens_per_second=work.num_tokens / total.seconds,
        train_seconds=total.seconds,
        train_seconds_low=low,
        train_seconds_high=high,
        fixed=fixed,
        seconds=whole[0],
        seconds_low=whole[1],
        seconds_high=whole[2],
        speed_factor=speed_factor(row, work, total.seconds, found),
        cost=estimator.fit,
        num_rounds=len(measurement.rounds),
        window_ratio=ratio,
        calibrated=steadiness.is_steady and conditions.is_calibrated and len(measurement.rounds) > 1,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def whole_run(seconds: float, low: float, high: float, fixed: FixedSeconds) -> tuple[float, float, float]:
    """Seconds from process start to the written record, and both ends of their interval.

    Args:
        seconds: of the training loop; `low` and `high` are its interval.
    """
    half = FIXED_RELATIVE_HALF_WIDTH * fixed.total  # by chance apart from the loop's: the squares add up
    whole = seconds + fixed.total
    return whole, whole - math.hypot(seconds - low, half), whole + math.hypot(high - seconds, half)


def memory_warning(verdict: RowVerdict) -> str | None:
    """What to say of a row that fits with less left over than fragmentation can take."""
    needed, left = verdict.peak_reserved_bytes, verdict.headroom_bytes
    if not needed or left is None or left >= FRAGMENTATION * needed:
        return None
    return (
        f"memory is tight: {left / GIB:.1f} GiB stay free beside a peak of {needed / GIB:.1f} GiB, less than the "
        f"{FRAGMENTATION:.0%} that fragmentation can take in a long run. Close what else uses the memory, or lower "
        "--micro-batch-size or --max-length; a run that meets the limit halves its micro-batch and goes on."
    )


def speed_factor(row: PlannedRow, work: PlanWork, seconds: float, found: Measurements) -> float | None:
    """Seconds at fp32 / seconds at this precision over the same batches; None where fp32 was not measured."""
    reference = StepSignature.of(reference_job(row.job))
    if reference == StepSignature.of(row.job):
        return 1.0
    measured = found.of(reference)
    numbers = found.strata.numbers(row.kind)
    if measured is None or not any(one.stratum in numbers for rounds in measured.rounds for one in rounds.samples):
        return None  # fp32 was not timed, or over other kinds of micro-batches
    return Estimator(measured.rounds, found.strata, row.kind).total(work).seconds / seconds


def window_ratio(measurement: Measurement, estimator: Estimator) -> float | None:
    """Seconds of whole windows as timed / as summed from their parts; None where none was timed."""
    windows = [one for one in measurement.windows if one.samples and one.samples[0].stratum in estimator.numbers]
    predicted = sum(estimator.window_seconds(window.samples) for window in windows)
    return sum(window.seconds for window in windows) / predicted if predicted > 0 else None


def fixed_seconds(
    row: PlannedRow, data: TokenizedDataset, measurement: Measurement, data_seconds: float | None = None
) -> FixedSeconds:
    """What the run takes beside its steps: each measured part x how often the run does it."""
    load, samples, spec = measurement.load, measurement.fixed, row.job.evaluation
    evaluation = None
    if len(row.plan.evaluation) == 0:
        evaluation = 0.0
    elif samples.evaluation:
        evaluation = _forward_seconds(data, row.plan.evaluation, samples) * evaluations_and_checkpoints(row)[0]
    if needs_loss(row.job.preset):
        # The run scores every training example with the model before it can make its batch plan.
        training = np.setdiff1d(np.arange(len(data)), row.plan.evaluation)
        known = data_seconds is not None and samples.evaluation
        data_seconds = (data_seconds or 0.0) + _forward_seconds(data, training, samples) if known else None
    answers = None
    if spec.num_samples == 0 or len(row.plan.evaluation) == 0:
        answers = 0.0
    elif samples.answer_seconds is not None and samples.answer_tokens:
        first = min(samples.first_token_seconds, samples.answer_seconds)
        per_token = (samples.answer_seconds - first) / max(1, samples.answer_tokens - 1)
        per_answer = first + per_token * (spec.max_new_tokens - 1)
        answers = 2 * spec.num_samples * per_answer  # before and after
    checkpoints = evaluations_and_checkpoints(row)[1]
    return FixedSeconds(
        start=None if load is None else load.start_seconds + load.import_seconds,
        load=None if load is None else load.load_seconds,
        compile=None if load is None else load.compile_seconds,
        data=data_seconds,
        evaluation=evaluation,
        checkpoints=None if samples.save is None else samples.save.checkpoint_seconds * checkpoints,
        save=None if samples.save is None else samples.save.adapter_seconds,
        samples=answers,
    )


def _forward_seconds(data: TokenizedDataset, examples: IntArray, samples: FixedSamples) -> float:
    """Seconds of one forward pass over some examples, at the rate of the timed evaluation batches."""
    from trainer.evaluate import evaluation_batches

    padded = sum(len(batch) * int(data.lengths[batch].max()) for batch in evaluation_batches(data, examples))
    timed = sum(one.seconds or 0.0 for one in samples.evaluation)
    return timed / max(1, sum(one.rows * one.width for one in samples.evaluation)) * padded


def evaluations_and_checkpoints(row: PlannedRow) -> tuple[int, int]:
    """How often a run evaluates (before, between, after) and writes a checkpoint (then, and every so many steps)."""
    steps = row.plan.num_steps
    between, every = evaluation_steps(row.job, steps), checkpoint_interval(row.job, steps)
    return len(between) + 2, len(between | set(range(every, steps + 1, every)) | {steps})


def accumulation_saving(cost: CostModel, micro_seconds: float, *, accumulation: int = 16, to: int = 64) -> float:
    """Share of the seconds per sample that accumulating longer saves, with the same micro-batches.

    Seconds per sample are (m + o / GA) / micro-batch size, m a mean micro-step and o an optimizer step: only the
    optimizer's share shrinks. saving = (o / 16 - o / 64) / (m + o / 16).
    """
    now = micro_seconds + cost.optimizer / accumulation
    return (cost.optimizer / accumulation - cost.optimizer / to) / now if now > 0 else 0.0


def mean_micro_seconds(found: Estimate, num_micro_batches: int) -> float:
    """Mean seconds of an estimate's micro-steps, the optimizer's part taken off; `num_micro_batches` per device."""
    if found.train_seconds is None or found.cost is None:
        raise MeasurementError(f"'{found.name}' has no measured time.")
    return (found.train_seconds - found.num_steps * found.cost.optimizer) / max(1, num_micro_batches)
