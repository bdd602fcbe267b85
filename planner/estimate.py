"""Measurement x batch plan -> Estimate: seconds with an interval, and peak memory. numpy only."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from planner.measurement import FixedSamples, Measurement, Measurements, MicroSample, PlannedRow, Round, StepSignature
from planner.strata import Strata, keys
from presets.errors import MeasurementError
from trainer.batching import MicroShapes
from trainer.job import Job
from trainer.planning import checkpoint_interval, evaluation_steps, needs_loss
from trainer.record import CostModel
from trainer.tokens import FloatArray, IntArray, TokenizedDataset

CONFIDENCE = 0.90
MIN_RELATIVE_HALF_WIDTH = 0.002  # no two runs of one machine agree better, whatever the samples say
TIMER_SECONDS = 1e-6  # what reading the clock adds to each timed call
UNKNOWN_RELATIVE_HALF_WIDTH = 0.5  # from a single round, which says nothing of its own spread
MOST_WARMUP = 2  # rounds, beside the very first
STEADY = 0.10  # standard deviation of the rounds, relative, above which the machine is called unsteady
WINDOW_TOLERANCE = 0.10  # a window that differs more from the sum of its parts is worth a note


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedSeconds:
    """What a run takes beside its steps, in seconds. None: unknown, and not in the sum."""

    start: float | None = None  # process start and imports
    load: float | None = None  # the model
    data: float | None = None
    evaluation: float | None = None
    checkpoints: float | None = None
    save: float | None = None
    samples: float | None = None  # sample answers

    @property
    def total(self) -> float:
        parts = (self.start, self.load, self.data, self.evaluation, self.checkpoints, self.save, self.samples)
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
    stratum = strata.of(row.job.micro_batch_size, shapes)
    padded, width = shapes.padded_tokens, shapes.width
    devices = row.plan.num_devices
    if devices > 1:
        # Windows hold a multiple of `devices` micro-batches, so no round of devices crosses two windows.
        slowest = keys(shapes).reshape(-1, devices).argmax(axis=1) + np.arange(0, len(padded), devices)
        stratum, padded, width = stratum[slowest], padded[slowest], width[slowest]
    counted = stratum >= 0
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
    samples = [sample for one in rounds for sample in one.samples if sample.seconds is not None]
    if not samples:
        raise MeasurementError("no micro-batch was timed. Give more time with --budget.")
    seconds = np.array([sample.seconds for sample in samples], dtype=np.float64)
    padded = np.array([sample.rows * sample.width for sample in samples], dtype=np.float64)
    width = np.array([sample.width for sample in samples], dtype=np.float64)
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
    optimizer = [value for one in rounds for value in one.optimizer_seconds]
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

    seconds: float
    replicates: FloatArray  # (rounds,) the total as each round alone would have it; their mean is `seconds`
    round_variance: float  # of one replicate, if its micro-steps scatter independently
    degrees: int  # of freedom of `round_variance`
    own_variance: float  # of the run itself, around what is expected of it

    def half_width(self) -> float:
        """Half of the 90 % interval, in seconds."""
        floor = MIN_RELATIVE_HALF_WIDTH * self.seconds
        return half_width(self.replicates, self.round_variance, self.degrees, self.own_variance, floor=floor)

    @property
    def relative_half_width(self) -> float:
        """Half of the interval that more rounds would narrow, relative: the run's own scatter is left out."""
        if self.seconds <= 0:
            return math.inf
        return half_width(self.replicates, self.round_variance, self.degrees) / self.seconds


class Estimator:
    """The timings of one measurement, arranged by round and stratum, to be summed over any plan.

    Means, not medians: what is estimated is a sum over the plan, and the sum of a population is its size times its
    mean. The rare slow micro-step that a median throws away happens in the run too.
    """

    def __init__(self, rounds: tuple[Round, ...], strata: Strata) -> None:
        self.fit = fit_cost(rounds)
        self.seconds = np.full((len(rounds), strata.count), np.nan)
        self.fitted = np.full((len(rounds), strata.count), np.nan)
        for number, one in enumerate(rounds):
            for sample in one.samples:
                if sample.seconds is not None and sample.stratum >= 0:
                    self.seconds[number, sample.stratum] = sample.seconds
                    self.fitted[number, sample.stratum] = self._fitted(sample)
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

    def _fitted(self, sample: MicroSample) -> float:
        padded = sample.rows * sample.width
        return self.fit.base + (self.fit.per_token + self.fit.per_token_width * sample.width) * padded

    def total(self, work: PlanWork) -> Total:
        """Seconds of a plan's micro-steps and optimizer steps.

        Per stratum: the plan's fitted seconds x (timed seconds / fitted seconds of the timed micro-batches). The ratio
        makes a sample that happens to be longer or shorter than its stratum stand for the stratum all the same.
        """
        stratum_seconds = _sum_seconds(self.fit, work) * self.ratio
        # How far each timing lies from its stratum's ratio, in parts of the stratum's mean timing. A timing left out
        # of a round counts as lying on it.
        timed = ~np.isnan(self.fitted)
        mean = np.nansum(self.fitted, axis=0) / np.maximum(timed.sum(axis=0), 1)
        deviation = (self.seconds - self.ratio * self.fitted) / np.maximum(self.ratio * mean, 1e-12)
        deviation = np.where(timed, deviation, 0.0)
        seconds = float(stratum_seconds.sum() + work.num_steps * self.optimizer.mean())
        replicates = (stratum_seconds * (1.0 + deviation)).sum(axis=1) + work.num_steps * self.optimizer
        within = self._variances(deviation)
        mean_seconds = stratum_seconds / np.maximum(work.count, 1.0)
        optimizer = float(self.optimizer.var(ddof=1)) if len(self.optimizer) > 1 else 0.0
        parts = np.append(stratum_seconds**2 * within, work.num_steps**2 * optimizer)
        # Satterthwaite: degrees of freedom of a sum of variances that were estimated apart.
        squares = float((parts**2).sum())
        degrees = (len(replicates) - 1) * float(parts.sum()) ** 2 / squares if squares > 0 else 1.0
        return Total(
            seconds=seconds,
            replicates=replicates,
            round_variance=float(parts.sum()),
            degrees=max(1, int(degrees)),
            own_variance=float((work.count * mean_seconds**2 * within).sum()) + work.num_steps * optimizer,
        )

    def _variances(self, deviation: FloatArray) -> FloatArray:
        """Variance of a micro-step's relative deviation, per stratum; 0 from a single round."""
        rounds = len(deviation)
        return np.asarray((deviation**2).sum(axis=0) / (rounds - 1)) if rounds > 1 else np.zeros(deviation.shape[1])

    def window_seconds(self, samples: tuple[MicroSample, ...]) -> float:
        """What a window should take by the sum of its parts."""
        parts = sum(self._fitted(one) * float(self.ratio[one.stratum]) for one in samples if one.stratum >= 0)
        return parts + float(self.optimizer.mean())


def half_width(
    replicates: FloatArray,
    round_variance: float = 0.0,
    degrees: int = 1,
    own_variance: float = 0.0,
    *,
    floor: float = 0.0,
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
    """
    rounds = len(replicates)
    mean = float(replicates.mean()) if rounds else 0.0
    if rounds < 2:
        return max(UNKNOWN_RELATIVE_HALF_WIDTH * mean, floor)
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
    return max(half + drift(replicates) / 2, floor)


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


def t_quantile(degrees: int) -> float:
    """95 % quantile of Student's t, for two-sided 90 %. A table below 5 degrees, then Cornish-Fisher (good to 1e-3)."""
    table = {1: 6.3138, 2: 2.9200, 3: 2.3534, 4: 2.1318}
    if degrees in table:
        return table[degrees]
    z = 1.6448536
    v = float(degrees)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def split_warmup(totals: FloatArray, least: int = 5) -> int:
    """How many leading rounds are warm-up: pyperf's rule, first values are while they lie above the fence of the rest.

    The fence is the third quartile of the later rounds plus 1.5 interquartile ranges, and at least 5 % above their
    median (without noise the range is nothing, and every first value an outlier). At least `least` rounds stay. Where
    more than `MOST_WARMUP` would have to go, none does: that is no warm-up but a machine that changed its speed, which
    the run may meet again and the interval has to show.
    """
    dropped = 0
    while dropped <= MOST_WARMUP and len(totals) - dropped > least:
        low, middle, high = np.quantile(totals[dropped + 1 :], [0.25, 0.5, 0.75])
        if totals[dropped] <= max(high + 1.5 * (high - low), 1.05 * middle):
            break
        dropped += 1
    return dropped if dropped <= MOST_WARMUP else 0


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
) -> Estimate:
    """The estimate of one row, from what was measured of its step signature.

    Args:
        shapes: `row.plan.micro_shapes(data.lengths)`, where the caller has it already.
        data_seconds: what the run will take to read its data, where known.
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
    estimator = Estimator(measurement.rounds, found.strata)
    total = estimator.total(work)
    half = max(total.half_width(), TIMER_SECONDS * work.num_micro_batches)
    # As far down in proportion as up: where the noise is large, a time of nothing or less is no answer.
    low, high = total.seconds / (1 + half / total.seconds), total.seconds + half
    notes, warnings = [], []
    ratio = window_ratio(measurement, estimator)
    if ratio is not None and abs(ratio - 1) > WINDOW_TOLERANCE:
        # The parts do not add up, and the run executes windows: the interval reaches as far as they were seen to.
        low, high = min(low, total.seconds * ratio), max(high, total.seconds * ratio)
        warnings.append(
            f"whole windows took {ratio:.2f} x the sum of their parts, more than {WINDOW_TOLERANCE:.0%} apart: the "
            "range is widened. Measure again on a quiet machine, or with a longer --budget."
        )
    spread = float(total.replicates.std(ddof=1)) / total.seconds if len(measurement.rounds) > 2 else 0.0
    moved = drift(total.replicates) / total.seconds
    if spread > STEADY or moved > STEADY:
        what = f"its speed moved by {moved:.0%}" if moved > spread else f"the rounds scatter by {spread:.0%}"
        warnings.append(
            f"this machine is not steady: {what} while it was timed, more than {STEADY:.0%}; the range holds only if "
            "the run meets the same conditions. Close other programs and measure again, or raise --budget."
        )
    if len(measurement.rounds) < 2:
        warnings.append("only one round could be timed, so the range is a guess (±50 %). Give more time with --budget.")
    if row.plan.num_devices > 1:
        notes.append("the exchange of gradients between devices is not in the figure")
    fixed = fixed_seconds(row, data, measurement, data_seconds)
    return replace(
        plain,
        seconds_per_step=total.seconds / work.num_steps,
        seconds_per_sample=total.seconds / work.num_examples,
        tokens_per_second=work.num_tokens / total.seconds,
        train_seconds=total.seconds,
        train_seconds_low=low,
        train_seconds_high=high,
        fixed=fixed,
        seconds=total.seconds + fixed.total,
        seconds_low=low + fixed.total,
        seconds_high=high + fixed.total,
        speed_factor=speed_factor(row, work, total.seconds, found),
        cost=estimator.fit,
        num_rounds=len(measurement.rounds),
        window_ratio=ratio,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def speed_factor(row: PlannedRow, work: PlanWork, seconds: float, found: Measurements) -> float | None:
    """Seconds at fp32 / seconds at this precision over the same batches; None where fp32 was not measured."""
    reference = StepSignature.of(reference_job(row.job))
    if reference == StepSignature.of(row.job):
        return 1.0
    measured = found.of(reference)
    if measured is None or not measured.rounds:
        return None
    return Estimator(measured.rounds, found.strata).total(work).seconds / seconds


def window_ratio(measurement: Measurement, estimator: Estimator) -> float | None:
    """Seconds of whole windows as timed / as summed from their parts; None where none was timed."""
    if not measurement.windows:
        return None
    predicted = sum(estimator.window_seconds(window.samples) for window in measurement.windows)
    return sum(window.seconds for window in measurement.windows) / predicted if predicted > 0 else None


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
        per_answer = samples.answer_seconds * spec.max_new_tokens / samples.answer_tokens
        answers = 2 * spec.num_samples * per_answer  # before and after
    checkpoints = evaluations_and_checkpoints(row)[1]
    return FixedSeconds(
        start=None if load is None else load.start_seconds + load.import_seconds,
        load=None if load is None else load.load_seconds,
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
