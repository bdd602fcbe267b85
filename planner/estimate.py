"""Measurement x batch plan -> Estimate: seconds with an interval, and peak memory. numpy only."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from planner.conditions import busier_now, is_told, slower_at_most, summarise
from planner.estimator import Z_90, Estimator, PlanWork
from planner.figures import GIB
from planner.intervals import lopsided
from planner.measurement import (
    FixedSamples,
    Measurement,
    Measurements,
    PlannedRow,
    RowVerdict,
    StepSignature,
    new_shape_seconds,
)
from planner.prober import SaveReply
from planner.steadiness import judge, too_few
from planner.works import Works
from presets.errors import MeasurementError
from trainer.disk import LEAST_KEPT
from trainer.evaluate import tokens_at_once
from trainer.job import Job
from trainer.planning import checkpoint_steps, evaluation_steps, needs_loss, with_checkpoint_interval
from trainer.record import CostModel
from trainer.tokens import FloatArray, IntArray, TokenizedDataset

CONFIDENCE = 0.90
FRAGMENTATION = 0.05  # of the peak: margin below which "fits" comes with a warning
# Start, loading, evaluation and saving are timed once or a few times, and depend on what lies in the file cache.
FIXED_RELATIVE_HALF_WIDTH = 0.2
# By how much one run differs from the next on the same machine, half of the 90 % interval: assumed till past runs tell.
# CPUs share memory bandwidth, heat and often their host with others: of twelve pairs of profile and run on two cores of
# a shared machine eleven lay within 6 %, one, with other work beside it, at 13 %
# (bench/results/accuracy-2026-11-24.json). A GPU that sets the pace is steadier: six loops of padded micro-batches on
# an H200 lay within 1.5 %, and two more within 5.6 % before what the memory probe loads was counted (2026-11-27). What
# waits for a host that others share is less steady, and is warned of where it shows. Of Apple's nothing is known.
BETWEEN_RUNS = {"cpu": 0.06, "mps": 0.03, "cuda": 0.02}
EXCHANGE = (
    "what several devices exchange, and on a CPU what their processes take from each other, was not timed and is not "
    "in the figure. Three runs on this machine correct it."
)
TIMER_SECONDS = 1e-6  # what reading the clock adds to each timed call
# A run's resident memory on a CPU over that of its longest micro-batches in a worker, since the heap grows on over
# hundreds of shapes. Medians of the 59 pairs of 6bdfcbb to cf650c3 in bench/results, what was added to predictions
# taken off again: 32 of LoRA and full fine-tuning (0.98 to 1.07, median 1.015), 13 with checkpointing (0.99 to 1.08),
# whose activations come and go by layers. A GPU's blocks grow in place: of 13 pairs on an H200 12 were within 0.8 %.
HEAP_GROWTH = 1.016
CHECKPOINTED_HEAP_GROWTH = 1.034
# Packed rows are nearly all of the largest size, each of other documents, and eager attention holds squares of hundreds
# of sizes: the heap grows for longer than a worker can watch. Seven pairs each: packed four at 1.02 and three at 1.08,
# so that the middle is off the least; eager 0.96 to 1.14, the median.
PACKED_HEAP_GROWTH = 1.048
EAGER_HEAP_GROWTH = 1.054
ONE_OFF_TOLD = 0.02  # of the loop: what the first steps of a process take longer is then worth a note
TOLD_APART = 2.0  # evaluation batches so many times as large as others show what the size matters
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
    checkpoint_every: int | None = None  # optimizer steps; the run is started with it
    # It would be calibrated, were the exchange between devices in the figure: from three runs on it is.
    is_but_for_exchange: bool = False
    calibrated: bool = True  # False: its speed changed while timed, or too little was timed to tell; no 90 % range
    window_ratio: float | None = None  # whole windows as timed / as summed from their parts
    notes: tuple[str, ...] = ()
    slower: float = 1.0  # times as long, at most, beside others who have come since it was timed
    measured_as: str | None = None  # the measurement that it comes from
    others_share: float | None = None  # of the CPU's time, taken by others while it was timed; None beside a GPU
    warnings: tuple[str, ...] = ()


def reference_job(job: Job) -> Job:
    """The job in fp32, frozen weights included: what the speed factor compares with."""
    return replace(job, precision="fp32", base_precision="fp32")


def with_references(rows: list[PlannedRow]) -> list[PlannedRow]:
    """The rows, and one in fp32 for each step signature whose fp32 twin is not among them: for the speed factor."""
    signatures = {StepSignature.of(row.job) for row in rows}
    added = []
    for row in rows:
        job = reference_job(row.job)
        signature = StepSignature.of(job)
        if signature not in signatures:
            signatures.add(signature)
            added.append(PlannedRow(name=f"{row.name} at fp32", job=job, plan=row.plan, is_reference=True))
    return [*rows, *added]


def estimate(
    row: PlannedRow,
    data: TokenizedDataset,
    found: Measurements,
    *,
    works: Works | None = None,
    data_seconds: float | None = None,
    between: float = 0.0,
    budget_shares: int = 1,
) -> Estimate:
    """The estimate of one row, from what was measured of its step signature.

    Args:
        works: of this data, where rows share it; None: made here.
        data_seconds: what the run will take to read its data, where known.
        between: half of the 90 % interval, relative, by which one hour differs from the next on such a machine; no
            minute of timing shows it.
        budget_shares: among how many measurements like this one a --budget is shared out.
    """
    verdict = found.verdict(row.name)
    measurement = found.of(StepSignature.of(row.job))
    if verdict is None or measurement is None:
        raise MeasurementError(f"'{row.name}' was not measured.")
    verdict = of_a_run(verdict, row.job)
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
    works = works or Works(data)
    work = works.of(row, found.strata)
    estimator = Estimator(measurement.rounds, found.strata, row.kind)
    total = estimator.total(work)
    least = TIMER_SECONDS * work.num_micro_batches
    steadiness = judge(total.replicates, total.raw_replicates, estimator.timings(), total.movement)
    # Where a change could not have shown, the run may lie half of it to either side, by chance apart from the noise.
    apart = math.hypot(between, steadiness.hidden / 2) * total.seconds
    down, up = (max(math.hypot(half, apart), least) for half in total.halves())
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
    if steadiness.warning:
        # The run may meet any of the speeds that were seen.
        low, high = min(low, total.seconds * steadiness.fast), max(high, total.seconds * steadiness.slow)
        warnings.append(steadiness.warning)
    unsure = too_few(steadiness, budget_shares * sum(one.seconds_spent for one in found.measurements))
    if unsure:
        warnings.append(unsure)
    readings = [one.conditions for one in measurement.rounds if one.conditions is not None]
    conditions = summarise(readings, on_cpu=row.job.device == "cpu")
    low, high = min(low, total.seconds * conditions.fastest), max(high, total.seconds * conditions.slowest)
    warnings += conditions.warnings
    slower = 1.0 if found.busier is None else slower_at_most(found.busier.slower)
    if found.busier is not None:
        high = max(high, total.seconds * slower)
        warnings.append(busier_now(found.busier))
    if len(measurement.rounds) < 2:
        warnings.append("only one round could be timed, so the range is a guess (±50 %). Give more time with --budget.")
    tight = memory_warning(verdict, row.job)
    if tight:
        warnings.append(tight)
    if row.plan.num_devices > 1:
        warnings.append(EXCHANGE)
    if measurement.load is not None and measurement.load.compile_refused is not None:
        notes.append(f"the layers are not compiled: {measurement.load.compile_refused}")
    if measurement.load is not None and measurement.load.lean_refused is not None:
        notes.append(f"the plain loss is used instead of the lean one: {measurement.load.lean_refused}")
    per_step = total.seconds / work.num_steps
    saved = measurement.fixed.save
    job = with_checkpoint_interval(
        row.job,
        row.plan.num_steps,
        per_step,
        None if saved is None else saved.checkpoint_seconds + saved.removal_seconds,
    )
    fixed = fixed_seconds(replace(row, job=job), works, measurement, data_seconds)
    high += measurement.first_time_share * total.seconds  # it may go on: each shape its own kernel
    # Taken once as measured: the run meets other micro-batches first.
    seconds, low, high = (
        of + share * measurement.one_off_seconds for of, share in ((total.seconds, 1.0), (low, 0.5), (high, 1.5))
    )
    if measurement.new_shape_seconds > 0 or measurement.new_shapes_apart:
        counts = works.new_shapes(row, found.strata)
        new, error = new_shape_seconds(measurement, counts)
        margin = Z_90 * error
        seconds, low, high = seconds + new, low + max(0.0, new - margin), high + new + margin
        if new > ONE_OFF_TOLD * seconds:
            notes.append(
                f"new shapes of micro-batches take {new:.1f} s more, since the GPU's library chooses for each: "
                f"up to {sum(counts.values()):,} in this run"
            )
    if measurement.one_off_seconds > ONE_OFF_TOLD * seconds:
        notes.append(f"the first steps take {measurement.one_off_seconds:.1f} s more, while kernels are loaded")
    whole = whole_run(seconds, low, high, fixed, slower)
    is_calibrated = (
        steadiness.is_steady
        and steadiness.can_tell
        and conditions.is_calibrated
        and found.busier is None
        and len(measurement.rounds) > 1
    )
    return replace(
        plain,
        seconds_per_step=per_step,
        seconds_per_sample=total.seconds / work.num_examples,
        tokens_per_second=work.num_tokens / total.seconds,
        train_seconds=seconds,
        train_seconds_low=low,
        train_seconds_high=high,
        fixed=fixed,
        seconds=whole[0],
        seconds_low=whole[1],
        seconds_high=whole[2],
        speed_factor=speed_factor(row, work, total.seconds, found),
        cost=estimator.fit,
        num_rounds=len(measurement.rounds),
        checkpoint_every=job.checkpoint_every,
        window_ratio=ratio,
        calibrated=is_calibrated and row.plan.num_devices == 1,
        is_but_for_exchange=is_calibrated and row.plan.num_devices > 1,
        slower=slower,
        measured_as=found.call,
        others_share=conditions.disturbed if row.job.device == "cpu" and is_told(readings) else None,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def whole_run(
    seconds: float, low: float, high: float, fixed: FixedSeconds, slower: float = 1.0
) -> tuple[float, float, float]:
    """Seconds from process start to the written record, and both ends of their interval.

    Args:
        seconds: of the training loop; `low` and `high` are its interval.
        slower: see `Estimate`: what stands beside the loop takes so much longer at the same time.
    """
    half = FIXED_RELATIVE_HALF_WIDTH * fixed.total  # by chance apart from the loop's: the squares add up
    whole, up = seconds + fixed.total, high - seconds
    return (
        whole,
        whole - math.hypot(seconds - low, half),
        whole + max(math.hypot(up, half), up + (slower - 1) * fixed.total),
    )


def of_a_run(verdict: RowVerdict, job: Job) -> RowVerdict:
    """The verdict with the peak that a run will have, and judged by it: on a CPU its heap outgrows the worker's."""
    measured, left = verdict.peak_reserved_bytes, verdict.headroom_bytes
    if measured is None or job.device != "cpu":
        return verdict
    peak = round(heap_growth(job) * measured)
    verdict = replace(verdict, peak_reserved_bytes=peak)
    if left is None:
        return verdict
    left -= peak - measured
    if left >= 0 or not verdict.fits:
        return replace(verdict, headroom_bytes=max(0, left))
    return replace(
        verdict,
        headroom_bytes=0,
        fits=False,
        error=f"does not fit: its heap grows to {peak / GIB:.2f} GiB in a run, {-left / GIB:.2f} GiB too much",
    )


def heap_growth(job: Job) -> float:
    """A run's resident memory on a CPU over that of its longest micro-batches."""
    if job.packing:
        return PACKED_HEAP_GROWTH
    if job.preset.attention == "eager":
        return EAGER_HEAP_GROWTH
    return CHECKPOINTED_HEAP_GROWTH if job.preset.gradient_checkpointing else HEAP_GROWTH


def memory_warning(verdict: RowVerdict, job: Job) -> str | None:
    """What to say of a row that fits with less left over than fragmentation can take."""
    needed, left = verdict.peak_reserved_bytes, verdict.headroom_bytes
    if not needed or left is None or left >= FRAGMENTATION * needed:
        return None
    can_be_halved = job.micro_batch_size > 1 and verdict.worst_rows != 1
    smaller = (
        "--micro-batch-size or --max-length" if can_be_halved else "--max-length, or take --gradient-checkpointing"
    )
    if job.device == "cpu":
        then = "the system kills a run that meets the limit, and plan --resume goes on from its last checkpoint"
    elif can_be_halved:
        then = "a run that meets the limit halves its micro-batch and goes on"
    else:
        then = "a run that meets the limit ends, since a single row cannot be halved"
    return (
        f"memory is tight: {left / GIB:.1f} GiB stay free beside a peak of {needed / GIB:.1f} GiB, less than the "
        f"{FRAGMENTATION:.0%} that fragmentation can take in a long run. Close what else uses the memory, or lower "
        f"{smaller}; {then}."
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
    new, _ = new_shape_seconds(measurement, Counter(stratum for window in windows for stratum in window.new_shapes))
    return sum(window.seconds for window in windows) / (predicted + new) if predicted > 0 else None


def fixed_seconds(
    row: PlannedRow, works: Works, measurement: Measurement, data_seconds: float | None = None
) -> FixedSeconds:
    """What the run takes beside its steps: each measured part x how often the run does it."""
    load, samples, spec = measurement.load, measurement.fixed, row.job.evaluation
    evaluation = None
    if len(row.plan.evaluation) == 0:
        evaluation = 0.0
    elif samples.evaluation:
        evaluation = _forward_seconds(works, row, row.plan.evaluation, samples) * evaluations_and_checkpoints(row)[0]
        evaluation += samples.evaluation_once
    if needs_loss(row.job.preset):
        # The run scores every training example with the model before it can make its batch plan.
        training = np.setdiff1d(np.arange(works.num_examples), row.plan.evaluation)
        known = data_seconds is not None and samples.evaluation
        data_seconds = (data_seconds or 0.0) + _forward_seconds(works, row, training, samples) if known else None
    answers, num_answers = None, works.num_answers(row.plan.evaluation, spec.num_samples)
    if num_answers == 0:
        answers = 0.0
    elif samples.answer_seconds is not None and samples.answer_tokens:
        first = min(samples.first_token_seconds, samples.answer_seconds)
        per_token = (samples.answer_seconds - first) / max(1, samples.answer_tokens - 1)
        per_answer = first + per_token * (spec.max_new_tokens - 1)
        answers = 2 * num_answers * per_answer  # before and after
    return FixedSeconds(
        start=None if load is None else load.start_seconds + load.import_seconds,
        load=None if load is None else load.load_seconds,
        compile=None if load is None else load.compile_seconds,
        data=data_seconds,
        evaluation=evaluation,
        checkpoints=None if samples.save is None else _checkpoint_seconds(row, samples.save),
        save=None if samples.save is None else samples.save.adapter_seconds,
        samples=answers,
    )


def _checkpoint_seconds(row: PlannedRow, saved: SaveReply) -> float:
    """Seconds of all checkpoints of a run, and of removing those that are not kept."""
    written = evaluations_and_checkpoints(row)[1]
    removed = max(0, written - max(LEAST_KEPT, row.job.keep_checkpoints))
    return saved.checkpoint_seconds * written + saved.removal_seconds * removed


def _forward_seconds(works: Works, row: PlannedRow, examples: IntArray, samples: FixedSamples) -> float:
    """Seconds of one forward pass over some examples, from the timed evaluation batches."""
    job = row.job
    at_once = tokens_at_once(job, works.extremes(row.plan).largest_padded)
    wanted = works.evaluation(examples, job.device, job.num_devices, at_once)
    sizes = np.array([one.rows * one.width for one in samples.evaluation], dtype=np.float64)
    seconds = np.array([one.seconds or 0.0 for one in samples.evaluation])
    if job.device == "cpu":
        return float(seconds.sum() / max(1.0, sizes.sum()) * wanted.sum())
    launch, per_token = batch_cost(sizes, seconds)
    return float(np.maximum(launch, per_token * wanted).sum())


def batch_cost(sizes: FloatArray, seconds: FloatArray) -> tuple[float, float]:
    """What launching a GPU's evaluation batch takes, however small it is, and seconds a token of the larger ones.

    A batch takes the longer of the two. Of all ways to say up to which size the host sets the pace, the one that the
    timings fit best, by the squares of relative errors.

    Args:
        sizes: padded tokens of each batch.
    """
    order = np.argsort(sizes, kind="stable")
    sizes, seconds = sizes[order], seconds[order]
    if sizes[-1] < TOLD_APART * sizes[0]:  # what the size does to it cannot be seen
        return 0.0, float(seconds.sum() / max(1.0, sizes.sum()))
    best, best_error = (0.0, 0.0), math.inf
    for small in range(len(sizes) + 1):
        launch = float(seconds[:small].mean()) if small else 0.0
        # Where launching is all that shows, larger ones than these take no more a token than the largest of them.
        rest = slice(min(small, len(sizes) - 1), None)
        per_token = float(seconds[rest].sum() / sizes[rest].sum())
        error = float(((np.maximum(launch, per_token * sizes) / np.maximum(seconds, 1e-9) - 1) ** 2).sum())
        if error < best_error:
            best, best_error = (launch, per_token), error
    return best


def evaluations_and_checkpoints(row: PlannedRow) -> tuple[int, int]:
    """How often a run evaluates (before, between, after) and writes a checkpoint (then, and every so many steps)."""
    steps = row.plan.num_steps
    return len(evaluation_steps(row.job, steps)) + 2, len(checkpoint_steps(row.job, steps))


def accumulation_saving(cost: CostModel, micro_seconds: float, *, accumulation: int = 16, to: int = 64) -> float:
    """Share of the seconds per sample that accumulating longer saves, with the same micro-batches.

    Seconds per sample are (m + o / GA) / micro-batch size, m a mean micro-step and o an optimizer step: only the
    optimizer's share shrinks. saving = (o / 16 - o / 64) / (m + o / 16).
    """
    now = micro_seconds + cost.optimizer / accumulation
    return (cost.optimizer / accumulation - cost.optimizer / to) / now if now > 0 else 0.0


def mean_micro_seconds(found: Estimate, num_micro_batches: int) -> float:
    """Mean seconds of an estimate's micro-steps, the optimizer's part taken off; `num_micro_batches` per device.

    Without what is taken once: kernels to load, new shapes to choose for.
    """
    if found.seconds_per_step is None or found.cost is None:
        raise MeasurementError(f"'{found.name}' has no measured time.")
    return found.num_steps * (found.seconds_per_step - found.cost.optimizer) / max(1, num_micro_batches)
