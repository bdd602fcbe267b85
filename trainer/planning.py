"""Job + data -> BatchPlan and learning rates: the one place where a preset's words become batches. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from presets.errors import DataError
from presets.schema import Preset, Sampling
from trainer.batching import BatchPlan, Pass, Stretch, make_batch_plan
from trainer.job import DataSpec, EvaluationSpec, Job
from trainer.sampling import evaluation_size, select, split_evaluation
from trainer.tokens import FloatArray, IntArray, TokenizedDataset

MOST_DOCUMENTS = 200_000_000  # in a batch plan
CHECKPOINT_SECONDS = 600.0  # a crash loses ten minutes at most, where steps are short enough
CHECKPOINT_SHARE = 0.02  # of the steps' time, for checkpoints: in a short run they come seldomer than ten times
GROUPED_NOTE = "grouped by length: changes which examples share a batch; not quality-neutral"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Planned:
    """A batch plan and what a user should know of how it came about."""

    plan: BatchPlan
    notes: tuple[str, ...]


def with_checkpoint_interval(
    job: Job, num_steps: int, seconds_per_step: float | None, checkpoint_seconds: float | None = None
) -> Job:
    """The job with its own checkpoints, else ten times a run, in a short one seldomer, and every ten minutes at least.

    Ten checkpoints of a second each would take a third of a run of half a minute, which is quickly done again: they may
    take `CHECKPOINT_SHARE` of the steps' time. That of the last step, and those beside evaluations, are always written.
    Whatever they take, they come every ten minutes, where steps are short enough.

    Args:
        seconds_per_step: None: not known, and neither rule is applied.
        checkpoint_seconds: of writing one and taking an old one away; None: not known.
    """
    every = checkpoint_interval(job, num_steps)
    if seconds_per_step and job.checkpoint_every is None:
        if checkpoint_seconds:
            bearable = math.ceil(checkpoint_seconds / (CHECKPOINT_SHARE * seconds_per_step))
            every = max(every, bearable)
            # None falls shortly before the last step's. Beyond half of the run there is none but that.
            spread = range(every, num_steps if 2 * bearable <= num_steps else every)
            every = next((one for one in spread if not 0 < num_steps % one < bearable), num_steps)
        every = min(every, max(1, round(CHECKPOINT_SECONDS / seconds_per_step)))
    return replace(job, checkpoint_every=every)


def with_evaluation_on_top(spec: DataSpec, evaluation: EvaluationSpec) -> DataSpec:
    """A bare count names training examples: the spec with the evaluation examples added to it."""
    if not spec.is_count or spec.num_examples is None:
        return spec
    return replace(spec, num_examples=spec.num_examples + _evaluation_of_count(spec.num_examples, evaluation))


def _evaluation_of_count(num_training: int, spec: EvaluationSpec) -> int:
    if spec.fraction <= 0:
        return 0
    return min(max(round(num_training * spec.fraction), spec.minimum), spec.maximum)


def split(spec: DataSpec, evaluation: EvaluationSpec, num_examples: int, seed: int) -> tuple[IntArray, IntArray]:
    """(training, evaluation) examples. From a file the evaluation part is taken off, from a count it came on top."""
    if spec.is_count and spec.num_examples is not None:
        return np.arange(spec.num_examples), np.arange(spec.num_examples, num_examples)
    held_out = evaluation_size(num_examples, evaluation.fraction, evaluation.minimum, evaluation.maximum)
    return split_evaluation(num_examples, held_out, seed)


def plan_job(job: Job, data: TokenizedDataset, loss: FloatArray | None = None) -> Planned:
    """The batch plan of a job over its tokenised data.

    Args:
        loss: the model's own loss per example, for a preset that samples by it.

    Raises:
        DataError: sampling needs a field that the data lacks, or nothing is left to train on.
    """
    return Plans(data, loss).of(job)


class Plans:
    """Batch plans of several jobs over the same data: what they share is made once, whole plans included."""

    def __init__(self, data: TokenizedDataset, loss: FloatArray | None = None) -> None:
        """
        Args:
            loss: as in `plan_job`.
        """
        self._data, self._loss = data, loss
        self._splits: dict[tuple[Any, ...], tuple[IntArray, IntArray]] = {}
        self._chosen: dict[tuple[Any, ...], tuple[IntArray, tuple[str, ...]]] = {}
        self._shares: dict[tuple[Any, ...], IntArray] = {}
        self._plans: dict[tuple[Any, ...], BatchPlan] = {}

    def of(self, job: Job) -> Planned:
        """As `plan_job`. Jobs with the same batches get the same plan object, not only an equal one."""
        data, preset = self._data, job.preset
        parts = (job.data, job.evaluation, job.seed)
        if parts not in self._splits:
            self._splits[parts] = split(job.data, job.evaluation, len(data), job.seed)
        training, evaluation = self._splits[parts]
        notes: list[str] = []

        def chosen(sampling: Sampling) -> IntArray:
            examples, said = self._select(sampling, training, job.seed)
            notes.extend(said)
            return examples

        sizes = job.global_batch_sizes
        if preset.phases and preset.phases[0].is_stage:
            passes = tuple(
                Pass(
                    examples=chosen(phase.sampling),
                    num_epochs=phase.num_epochs or 1,
                    stretches=(Stretch(phase=index, global_batch_size=sizes[index]),),
                )
                for index, phase in enumerate(preset.phases)
            )
        else:
            stretches = tuple(
                Stretch(phase=index, global_batch_size=sizes[index], num_steps=phase.num_steps)
                for index, phase in enumerate(preset.phases)
            ) or (Stretch(phase=0, global_batch_size=sizes[0]),)
            examples = chosen(preset.sampling)
            if preset.num_epochs < 1:
                of_all = (id(examples), preset.num_epochs, job.seed)
                if of_all not in self._shares:
                    self._shares[of_all] = _share(examples, preset.num_epochs, job.seed)
                examples = self._shares[of_all]
            passes = (Pass(examples=examples, num_epochs=max(1, int(preset.num_epochs)), stretches=stretches),)
        total = sum(len(one.examples) * one.num_epochs for one in passes)
        if total > MOST_DOCUMENTS:
            raise DataError(
                f"the batch plan would hold {total:,} examples, all epochs together; {MOST_DOCUMENTS:,} is the most "
                "that is planned (about 6 GB of memory). Choose fewer --epochs or a sample."
            )
        if job.evaluation.fraction > 1 / 3 and not job.data.is_count:
            notes.append(
                f"held out are {len(evaluation):,} of {len(data):,} examples, fewer than the share of "
                f"{job.evaluation.fraction:g} that was asked for: at most a third, and at most "
                f"{job.evaluation.maximum:,}"
            )
        plan = self._made(
            passes,
            evaluation,
            micro_batch_size=job.micro_batch_size,
            num_devices=job.num_devices,
            seed=job.seed,
            sort_window=job.sort_window,
            packed_length=job.row_length or None,
            group_by_length=job.group_by_length,
            beginnings=self._data.beginnings if job.packing and job.shares_beginnings else None,
        )
        if job.group_by_length:
            notes.append(GROUPED_NOTE)
        if plan.saved.any():
            notes.append(_shared_note(plan, data))
        reached = set(np.flatnonzero(np.bincount(plan.window_phase)).tolist())
        for index, phase in enumerate(preset.phases):
            if index not in reached:
                before = sum(earlier.num_steps or 0 for earlier in preset.phases[:index])
                notes.append(
                    f"phase {index + 1} of {len(preset.phases)} (GA {phase.gradient_accumulation_steps}, from step "
                    f"{before + 1:,}) is never reached: the data ends at step {plan.num_steps:,}"
                )
        return Planned(plan=plan, notes=tuple(notes))

    def _select(self, sampling: Sampling, training: IntArray, seed: int) -> tuple[IntArray, tuple[str, ...]]:
        key = (sampling, id(training), seed)
        if key not in self._chosen:
            data = self._data
            self._chosen[key] = select(
                sampling,
                training,
                engagement=data.engagement,
                created_at=data.created_at,
                loss=self._loss,
                seed=seed,
            )
        return self._chosen[key]

    def _made(self, passes: tuple[Pass, ...], evaluation: IntArray, **settings: Any) -> BatchPlan:
        # All that `make_batch_plan` is given is in the key. Arrays stand there by identity: this object keeps each.
        of_passes = tuple((id(one.examples), one.num_epochs, one.stretches) for one in passes)
        key = (of_passes, id(evaluation), *settings.items())
        if key not in self._plans:
            self._plans[key] = make_batch_plan(self._data.lengths, passes, evaluation=evaluation, **settings)
        return self._plans[key]


def _shared_note(plan: BatchPlan, data: TokenizedDataset) -> str:
    assert data.beginnings is not None
    whole = int(data.lengths[plan.order].sum())
    share = float((data.beginnings.families[plan.order] > 0).mean())
    of_all = "all examples" if share == 1 else f"{min(0.99, share):.0%} of the examples"
    sizes = [f"{size:,}" for size in data.beginnings.sizes[1:].tolist()]
    many = sizes[0] if len(sizes) == 1 else f"{', '.join(sizes[:-1])} or {sizes[-1]}"
    return (
        f"{of_all} begin with the same {many} tokens, a system prompt for instance: a packed row computes them once, "
        f"{int(plan.saved.sum()) / whole:.0%} fewer tokens for the same gradient"
    )


def _share(examples: IntArray, share: float, seed: int) -> IntArray:
    """A random share of the examples, at least one: what an epoch under one sees."""
    size = max(1, round(share * len(examples)))
    return np.sort(np.random.default_rng([seed, 0x5E]).choice(examples, size, replace=False))


STAND_IN_NOTE = (
    "which examples the model's own loss selects is decided when the run starts; time is estimated on a random sample "
    "of the same size"
)


def _by_loss(sampling: Sampling) -> bool:
    return sampling.score == "loss" and sampling.strategy != "random" and not sampling.takes_all


def needs_loss(preset: Preset) -> bool:
    """Whether the batch plan depends on the model's own loss per example."""
    if preset.phases and preset.phases[0].is_stage:
        return any(_by_loss(phase.sampling) for phase in preset.phases)
    return _by_loss(preset.sampling)


def stand_in(job: Job) -> Job:
    """For an estimate: the job with a random sample of the same size wherever it samples by the model's own loss.

    The cost is the same in expectation; `STAND_IN_NOTE` says so. The run itself takes the job as it was.
    """
    preset = job.preset
    changes: dict[str, Any] = {}
    if _by_loss(preset.sampling):
        changes |= _random_of_same_size(preset.sampling)
    if any(_by_loss(phase.sampling) for phase in preset.phases):
        changes["phases"] = tuple(
            replace(phase, **_random_of_same_size(phase.sampling)) if _by_loss(phase.sampling) else phase
            for phase in preset.phases
        )
    return replace(job, preset=replace(preset, **changes)) if changes else job


def _random_of_same_size(sampling: Sampling) -> dict[str, Any]:
    ratio = sampling.ratio
    if sampling.strategy == "prioritized" and sampling.size is None and ratio is None:
        ratio = 0.5  # as in trainer.sampling
    return {"sampling_strategy": "random", "sample_ratio": ratio}


def learning_rates(preset: Preset, plan: BatchPlan) -> FloatArray:
    """Learning rate of each *applied* optimizer step, (num_steps,).

    Linear warm-up over `warmup_ratio` of the steps, then linear decay to zero, as in transformers'
    `get_linear_schedule_with_warmup`. Stages have a schedule each; the stretches of one pass share one schedule, whose
    peak is each stretch's own learning rate.
    """
    phase_of_step = plan.window_phase
    if not preset.phases:
        return preset.learning_rate * _warmup_decay(plan.num_steps, preset.warmup_ratio)
    peaks = np.array([phase.learning_rate for phase in preset.phases])[phase_of_step]
    if not preset.phases[0].is_stage:
        return np.asarray(peaks * _warmup_decay(plan.num_steps, preset.warmup_ratio))
    shape = np.empty(plan.num_steps)
    for index in range(len(preset.phases)):
        steps = phase_of_step == index
        shape[steps] = _warmup_decay(int(steps.sum()), preset.warmup_ratio)
    return np.asarray(peaks * shape)


def _warmup_decay(num_steps: int, warmup_ratio: float) -> FloatArray:
    # The first warm-up step has a rate of 0, as in transformers: a run of a single step would train nothing.
    warmup = min(int(np.ceil(num_steps * warmup_ratio)), num_steps - 1)
    step = np.arange(num_steps, dtype=np.float64)
    rising = step / max(1, warmup)
    falling = (num_steps - step) / max(1, num_steps - warmup)
    return np.where(step < warmup, rising, np.maximum(falling, 0.0))


def evaluation_steps(job: Job, num_steps: int) -> set[int]:
    """Steps after which the held-out loss is taken; the ones before the first and after the last step not counted."""
    times = job.evaluation.times_during_training
    return {round(num_steps * part / (times + 1)) for part in range(1, times + 1)} - {0, num_steps}


def checkpoint_steps(job: Job, num_steps: int) -> set[int]:
    """Steps after which a checkpoint is written: every so many, where the held-out loss is taken, and the last one."""
    every = checkpoint_interval(job, num_steps)
    return evaluation_steps(job, num_steps) | set(range(every, num_steps + 1, every)) | {num_steps}


def checkpoint_interval(job: Job, num_steps: int) -> int:
    """Steps between checkpoints: the job's own, else a tenth of the run."""
    return job.checkpoint_every or max(1, -(-num_steps // 10))
