"""Estimates -> rows: what the table says of each configuration, and the notes of the whole. It decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from planner.candidates import BASELINE, Candidate
from planner.correction import Correction
from planner.estimate import Estimate, accumulation_saving, mean_micro_seconds
from planner.figures import finish_at
from planner.hardware import DeviceFacts
from planner.measurement import Measurements
from planner.prober import LoadReply
from planner.report import (
    BreakdownInfo,
    CorrectionInfo,
    DatasetInfo,
    DeviceInfo,
    ModelInfo,
    PhaseRow,
    PlanReport,
    Quality,
    Row,
)
from planner.speedup import speedup, speedup_by_loops
from planner.twin import TUNED, Twin
from presets.schema import Preset, Published, load_preset, preset_names
from trainer.job import DataSpec
from trainer.tokens import TokenizedDataset


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Past:
    """What the history had to say: measurements that were not made now, and runs that correct estimates. By name."""

    raw: dict[str, Estimate] = field(default_factory=dict)  # as measured, before any correction
    corrections: dict[str, Correction] = field(default_factory=dict)
    signature_keys: dict[str, str] = field(default_factory=dict)  # under which a run enters the history
    measured_at: dict[int, datetime] = field(default_factory=dict)  # by maximum length


def make_report(
    facts: DeviceFacts,
    model: str,
    spec: DataSpec,
    candidates: tuple[Candidate, ...],
    estimates: dict[str, Estimate],
    past: Past,
    found: dict[int, Measurements],
    now: datetime,
) -> PlanReport:
    loads = [one.load for each in found.values() for one in each.measurements if one.load is not None]
    load: LoadReply | None = loads[0] if loads else None
    first = next(candidate for candidate in candidates if candidate.planned is not None)
    assert first.planned is not None
    assert first.data is not None
    evaluation = first.planned.plan.evaluation
    training = len(first.data) - len(evaluation)
    twins = {one.twin.preset: one.twin for one in candidates if one.twin is not None}
    tokens = int(first.data.lengths.sum()) - int(first.data.lengths[evaluation].sum())
    return PlanReport(
        device=DeviceInfo(name=facts.name, kind=facts.kind, memory_bytes=facts.memory_bytes),
        model=ModelInfo(
            name=model,
            num_parameters=load.num_parameters if load else None,
            num_trainable_parameters=load.num_trainable_parameters if load else None,
            weights=("random" if load.weights == "random" else "loaded") if load else None,
        ),
        dataset=DatasetInfo(
            num_examples=training,
            num_evaluation_examples=len(evaluation),
            source=spec.source,
            lengths="assumed" if first.data.report.lengths == "assumed" else "measured",
            num_tokens=tokens,
        ),
        rows=tuple(_row(one, twins, estimates, past, now, _counted_from(candidates, estimates)) for one in candidates),
        notes=_notes(candidates, estimates, found, first.data, training, len(evaluation)),
    )


def _counted_from(candidates: tuple[Candidate, ...], estimates: dict[str, Estimate]) -> Estimate | None:
    """The estimate that speed-ups are counted from; None where the table has none of that kind.

    It is not compiled, as it is not in a search (`planner.candidates.baseline_job`): one figure whatever the table has.
    """
    jobs = [one.resolved.job for one in candidates if one.name == BASELINE]
    return estimates.get(BASELINE) if any(job is not None and not job.compile for job in jobs) else None


def _row(
    candidate: Candidate,
    twins: dict[str, Twin],
    estimates: dict[str, Estimate],
    past: Past,
    now: datetime,
    baseline: Estimate | None,
) -> Row:
    preset, job, name = candidate.resolved.preset, candidate.resolved.job, candidate.name
    found = estimates.get(name)
    measured_at = past.measured_at.get(job.preset.max_length) if job else None
    by, raw = past.corrections.get(name), past.raw.get(name)
    searched = twins.get(preset.name)
    if searched is None:
        loops = None
    else:
        loops = searched.loop_speedup if candidate.twin is not None else searched.written_loop_speedup
    accumulation = job.gradient_accumulation_steps if job else (preset.gradient_accumulation_steps,)
    published = preset.published if is_as_published(preset) else Published()
    common = {
        "name": name,
        "tuned_from": preset.name if candidate.twin is not None else None,
        "micro_batch_size": job.micro_batch_size if job else preset.micro_batch_size,
        "gradient_accumulation_steps": accumulation[0],
        "global_batch_size": job.global_batch_sizes[0] if job else preset.global_batch_size,
        "num_epochs": preset.num_epochs,
        "learning_rate": preset.phases[0].learning_rate if preset.phases else preset.learning_rate,
        "precision": job.precision if job else preset.precision,
        "quality": Quality(text=published.quality, source="published" if published.quality else None),
        "risk": published.risk,
        "basis": "cached" if measured_at is not None and found is not None else "measured",
        "phases": tuple(
            PhaseRow(gradient_accumulation_steps=steps, learning_rate=phase.learning_rate, num_steps=phase.num_steps)
            for steps, phase in zip(accumulation, preset.phases, strict=False)
        ),
        "note": "\n".join(candidate.notes) or None,
        "run_as": candidate.run_as,
        "is_sampled": is_sampled(preset),
        "blocked_by": candidate.blocked_by,
    }
    if found is None or candidate.planned is None:
        return Row(**common, error=candidate.error)  # type: ignore[arg-type]
    warnings = "\n".join((*candidate.notes, *found.notes, *found.warnings))
    common["note"] = warnings or None
    return Row(
        **common,  # type: ignore[arg-type]
        num_steps=candidate.planned.plan.num_steps,
        seconds_per_step=found.seconds_per_step,
        seconds_per_sample=found.seconds_per_sample,
        tokens_per_second=found.tokens_per_second,
        speed_factor=found.speed_factor,
        seconds=found.seconds,
        seconds_low=found.seconds_low,
        seconds_high=found.seconds_high,
        peak_memory_bytes=found.peak_memory_bytes,
        fits=found.fits,
        finish_at=finish_at(now, found.seconds),
        calibrated=found.calibrated,
        speedup=speedup(baseline, found) or speedup_by_loops(loops, found),
        breakdown=_breakdown(found),
        measured_at=None if measured_at is None else measured_at.astimezone().isoformat(timespec="seconds"),
        correction=None
        if by is None or raw is None or raw.seconds is None
        else CorrectionInfo(factor=by.factor, num_runs=by.num_runs, raw_seconds=raw.seconds),
        error=found.error or ("does not fit" if found.fits is False else None),
    )


def _breakdown(found: Estimate) -> BreakdownInfo | None:
    """Where an estimate's seconds go."""
    if found.train_seconds is None or found.cost is None:
        return None
    optimizer = found.num_steps * found.cost.optimizer
    fixed = found.fixed
    return BreakdownInfo(
        forward_backward=found.train_seconds - optimizer,
        optimizer=optimizer,
        start=fixed.start,
        load=fixed.load,
        compile=fixed.compile,
        data=fixed.data,
        evaluation=fixed.evaluation,
        samples=fixed.samples,
        checkpoints=fixed.checkpoints,
        save=fixed.save,
    )


def _notes(
    candidates: tuple[Candidate, ...],
    estimates: dict[str, Estimate],
    found: dict[int, Measurements],
    data: TokenizedDataset,
    training: int,
    evaluation: int,
) -> tuple[str, ...]:
    notes = []
    lengths = data.lengths
    assumed = (
        "lengths assumed, not measured: the bundled distribution"
        if data.report.lengths == "assumed"
        else "lengths measured"
    )
    notes.append(
        f"Data: {training:,} training examples, {evaluation:,} more for evaluation"
        f"{' on top' if data.report.lengths == 'assumed' else ' taken off'}; {assumed} "
        f"(median {int(np.sort(lengths)[len(lengths) // 2]):,} tokens, longest {int(lengths.max()):,})."
    )
    notes += [f"Data: {note}." for note in data.report.notes]
    notes += [
        f"{note[0].upper()}{note[1:].rstrip('.')}." for each in found.values() for note in (*each.notes, *each.warnings)
    ]
    saving = _accumulation_note(candidates, estimates)
    if saving:
        notes.append(saving)
    untuned = _untuned(candidates)
    if untuned:
        notes.append(f"Tuned: {untuned}. 'plan tune' finds the fastest split of the same batches.")
    published = [c.resolved.preset for c in candidates if c.planned is not None and c.twin is None]
    for preset in published:
        steps, by_formula = estimates[preset.name].num_steps, _steps_by_formula(preset, training)
        if by_formula is not None and by_formula != steps:
            notes.append(
                "Steps: a run also takes the last, partial window as a step, where the published formula rounds "
                f"({preset.name}: {steps:,} here, by the formula {by_formula:,})."
            )
            break
    return tuple(notes)


def _untuned(candidates: tuple[Candidate, ...]) -> str | None:
    """Which presets no search has looked at yet for this model and data; None where it has at all."""
    searched = {one.resolved.preset.name for one in candidates if one.twin is not None}
    searched |= {c.name for c in candidates if any(note.startswith(TUNED) for note in c.notes)}
    planned = [one.name for one in candidates if one.planned is not None and one.twin is None]
    missing = [name for name in planned if name not in searched]
    if not missing:
        return None
    return f"not yet for {', '.join(missing)}" if searched else "not yet for this model and data"


def _steps_by_formula(preset: Preset, num_examples: int) -> int | None:
    if preset.phases or not preset.sampling.takes_all:
        return None
    from planner.formula import steps

    return steps(
        max(1, round(num_examples * preset.num_epochs)), preset.gradient_accumulation_steps, preset.micro_batch_size
    )


def _accumulation_note(candidates: tuple[Candidate, ...], estimates: dict[str, Estimate]) -> str | None:
    for candidate in candidates:
        found = estimates.get(candidate.name)
        if found is None or found.cost is None or found.train_seconds is None or candidate.planned is None:
            continue
        plan = candidate.planned.plan
        micro = mean_micro_seconds(found, plan.num_micro_batches // plan.num_devices)
        saving = accumulation_saving(found.cost, micro)
        return (
            f"Accumulation alone saves {saving:.1%} here (measured): a message takes the same forward and backward at "
            f"any GA, only the optimizer's {found.cost.optimizer * 1000:.1f} ms a step come less often (GA 64 against "
            f"16)."
        )
    return None


def is_as_published(preset: Preset) -> bool:
    """Whether what the guide says of a preset's quality and risk is said of these settings."""
    if preset.name not in preset_names():
        return True  # a preset of the user's own says what it says
    original = load_preset(preset.name)
    named = ("global_batch_size", "learning_rate", "num_epochs", "sampling", "adapter", "phases")
    return all(getattr(preset, name) == getattr(original, name) for name in named)


def is_sampled(preset: Preset) -> bool:
    """Whether a preset trains on a part of the data, in all of its stages."""
    if preset.phases and preset.phases[0].is_stage:
        return all(not phase.sampling.takes_all for phase in preset.phases)
    return preset.num_epochs < 1 or not preset.sampling.takes_all
