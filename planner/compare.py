"""The chain, in one place: presets -> jobs -> batch plans -> measurement -> estimates -> rows. No torch here."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from planner.estimate import Estimate, accumulation_saving, estimate, mean_micro_seconds
from planner.hardware import DeviceFacts, detect_device
from planner.measure import measure, with_references
from planner.measurement import Measurements, PlannedRow
from planner.prober import LoadReply, ProberFactory, ProcessProber
from planner.report import (
    DatasetInfo,
    DeviceInfo,
    ModelInfo,
    PhaseRow,
    PlanReport,
    Quality,
    Row,
    duration,
    finish_at,
)
from planner.resolve import Options, Resolved, presets_to_compare, resolve_data, resolve_job, resolve_model
from presets.env import Settings
from presets.errors import DataError, ModelError
from presets.schema import DEFAULT_PRESET, Preset
from trainer.data import prepare_data
from trainer.job import DataSpec, Job
from trainer.model import inspect_model
from trainer.planning import STAND_IN_NOTE, needs_loss, plan_job, stand_in, with_evaluation_on_top
from trainer.record import CostModel, Predicted
from trainer.tokens import TokenizedDataset


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureSettings:
    """How long and how sharply to measure."""

    budget_seconds: float = 60.0
    precision_target: float = 0.02  # relative half-width of the 90 % interval


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidate:
    """One configuration on its way through the chain."""

    resolved: Resolved
    planned: PlannedRow | None = None
    data: TokenizedDataset | None = None
    data_seconds: float | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Comparison:
    """All configurations, measured."""

    facts: DeviceFacts
    candidates: tuple[Candidate, ...]
    estimates: dict[str, Estimate]
    report: PlanReport


Say = Callable[[str], None]


def compare(
    options: Options,
    settings: Settings,
    measuring: MeasureSettings,
    *,
    names: tuple[str, ...] = (),
    running: bool = False,
    say: Say = lambda text: None,
    factory: Callable[[Path], ProberFactory] = ProcessProber.factory,
    facts: DeviceFacts | None = None,
    now: datetime | None = None,
) -> Comparison:
    """Measure the named presets (all of them where none is named) on this device and report them.

    Args:
        running: a run follows: the model must have weights and the data messages.
        say: takes progress, one line each.
        factory: makes probers for a folder of tokenised data; tests put a fake device here.

    Raises:
        PlanError: nothing can be compared: bad options, unreadable data or model, or nothing could be measured.
    """
    facts = facts or detect_device(options.device)
    presets = presets_to_compare(settings, names)
    model, where = resolve_model(options, settings)
    spec = resolve_data(options, settings, running=running)
    files = inspect_model(model)
    if running and not files.has_weights:
        raise ModelError(
            f"model '{model}': it has a config.json but no weights (*.safetensors). Planning needs none; a run does."
        )
    say(f"model: {model} ({where})")
    candidates = _candidates(presets, options, settings, facts, spec, say)
    if all(candidate.planned is None for candidate in candidates):
        raise DataError(" ".join(dict.fromkeys(candidate.error or "" for candidate in candidates)))
    found = _measure_all(candidates, measuring, say, factory)
    estimates = {
        candidate.planned.name: estimate(
            candidate.planned,
            candidate.data,
            found[candidate.planned.job.preset.max_length],
            data_seconds=candidate.data_seconds,
        )
        for candidate in candidates
        if candidate.planned is not None and candidate.data is not None
    }
    report = _report(facts, model, spec, candidates, estimates, found, now or datetime.now().astimezone())
    return Comparison(facts=facts, candidates=candidates, estimates=estimates, report=report)


def _candidates(
    presets: tuple[Preset, ...], options: Options, settings: Settings, facts: DeviceFacts, spec: DataSpec, say: Say
) -> tuple[Candidate, ...]:
    prepared: dict[int, tuple[TokenizedDataset, float]] = {}
    found = []
    for preset in presets:
        resolved = resolve_job(preset, options, settings, facts, spec)
        if resolved.job is None:
            found.append(Candidate(resolved=resolved, error=resolved.error))
            continue
        job = resolved.job
        length = job.preset.max_length
        if length not in prepared:
            prepared[length] = _prepare(job, say)
        data, seconds = prepared[length]
        try:
            planned = plan_job(stand_in(job), data)
        except DataError as reason:  # this row's sampling needs a field that the data lacks: the others still show
            found.append(Candidate(resolved=resolved, error=str(reason)))
            continue
        found.append(
            Candidate(
                resolved=resolved,
                planned=PlannedRow(name=preset.name, job=job, plan=planned.plan),
                data=data,
                data_seconds=seconds,
                notes=(*resolved.notes, *planned.notes, *((STAND_IN_NOTE,) if needs_loss(job.preset) else ())),
            )
        )
    return tuple(found)


def _prepare(job: Job, say: Say) -> tuple[TokenizedDataset, float]:
    """The tokenised data, and what a run will take to open it: by then it lies in the cache."""
    spec = with_evaluation_on_top(job.data, job.evaluation)
    arguments: dict[str, Any] = {
        "model": job.model,
        "max_length": job.preset.max_length,
        "seed": job.seed,
        "trust_remote_code": job.trust_remote_code,
    }
    begun = time.perf_counter()
    data = prepare_data(spec, **arguments)
    first = time.perf_counter() - begun
    if first > 1.0:
        say(f"data: {len(data):,} examples tokenised in {duration(first)}")
    begun = time.perf_counter()
    prepare_data(spec, **arguments)
    return data, time.perf_counter() - begun


def _measure_all(
    candidates: tuple[Candidate, ...],
    measuring: MeasureSettings,
    say: Say,
    factory: Callable[[Path], ProberFactory],
) -> dict[int, Measurements]:
    """Measurements by maximum length. Almost always one: rows that cut at another length have data of their own."""
    groups: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.planned is not None:
            groups.setdefault(candidate.planned.job.preset.max_length, []).append(candidate)
    found = {}
    for length, members in groups.items():
        data = members[0].data
        assert data is not None
        with tempfile.TemporaryDirectory(prefix="plan-") as folder:
            saved = Path(folder) / "data"
            saved.mkdir()
            data.save(saved)
            rows = [member.planned for member in members if member.planned is not None]
            found[length] = measure(
                rows if len(rows) == 1 else with_references(rows),  # a single row that will run needs no comparison
                data,
                factory(saved),
                budget_seconds=measuring.budget_seconds / len(groups),
                precision_target=measuring.precision_target,
                progress=_each_once(say),
            )
    return found


def _each_once(say: Say) -> Callable[[str, float], None]:
    """Progress as lines: each text once, however often it is told."""
    told: set[str] = set()

    def tell(text: str, _share: float) -> None:
        kind = text.split(",")[0]  # "timing, round 12" is told as "timing"
        if kind not in told:
            told.add(kind)
            say(kind)

    return tell


def _report(
    facts: DeviceFacts,
    model: str,
    spec: DataSpec,
    candidates: tuple[Candidate, ...],
    estimates: dict[str, Estimate],
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
        rows=tuple(_row(candidate, estimates, now) for candidate in candidates),
        notes=_notes(candidates, estimates, found, first.data, training, len(evaluation)),
    )


def _row(candidate: Candidate, estimates: dict[str, Estimate], now: datetime) -> Row:
    preset, job = candidate.resolved.preset, candidate.resolved.job
    found = estimates.get(preset.name)
    accumulation = job.gradient_accumulation_steps if job else (preset.gradient_accumulation_steps,)
    common = {
        "name": preset.name,
        "micro_batch_size": job.micro_batch_size if job else preset.micro_batch_size,
        "gradient_accumulation_steps": accumulation[0],
        "global_batch_size": job.global_batch_sizes[0] if job else preset.global_batch_size,
        "num_epochs": preset.num_epochs,
        "learning_rate": preset.phases[0].learning_rate if preset.phases else preset.learning_rate,
        "precision": job.precision if job else preset.precision,
        "quality": Quality(text=preset.published.quality, source="published" if preset.published.quality else None),
        "risk": preset.published.risk,
        "basis": "measured",
        "phases": tuple(
            PhaseRow(gradient_accumulation_steps=steps, learning_rate=phase.learning_rate, num_steps=phase.num_steps)
            for steps, phase in zip(accumulation, preset.phases, strict=False)
        ),
        "note": "\n".join(candidate.notes) or None,
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
        error=found.error or ("does not fit" if found.fits is False else None),
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
        f"(median {int(sorted(lengths)[len(lengths) // 2]):,} tokens, longest {int(lengths.max()):,})."
    )
    notes += [f"Data: {note}." for note in data.report.notes]
    notes += [
        f"{note[0].upper()}{note[1:].rstrip('.')}." for each in found.values() for note in (*each.notes, *each.warnings)
    ]
    saving = _accumulation_note(candidates, estimates)
    if saving:
        notes.append(saving)
    published = [c.resolved.preset for c in candidates if c.planned is not None]
    if any(_steps_by_formula(preset, training) not in (None, estimates[preset.name].num_steps) for preset in published):
        notes.append(
            "Steps: a run also takes the last, partial window as a step, where the published formula rounds "
            "(63,000 messages at GA 64: 985 steps, by the formula 984)."
        )
    return tuple(notes)


def _steps_by_formula(preset: Preset, num_examples: int) -> int | None:
    if preset.phases or not preset.sampling.takes_all:
        return None
    from planner.formula import steps

    return steps(num_examples * preset.num_epochs, preset.gradient_accumulation_steps, preset.micro_batch_size)


def _accumulation_note(candidates: tuple[Candidate, ...], estimates: dict[str, Estimate]) -> str | None:
    for candidate in candidates:
        found = estimates.get(candidate.resolved.preset.name)
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


def run_command(comparison: Comparison, argv_tail: str) -> str | None:
    """The command that starts the recommended row, where it fits."""
    found = comparison.estimates.get(DEFAULT_PRESET)
    return f"plan --run {DEFAULT_PRESET}{argv_tail}" if found is not None and found.fits else None


def predicted_of(found: Estimate) -> Predicted:
    """An estimate as the run folder keeps it."""
    cost = found.cost
    return Predicted(
        seconds=found.seconds,
        seconds_low=found.seconds_low,
        seconds_high=found.seconds_high,
        train_seconds=found.train_seconds,
        peak_memory_bytes=found.peak_memory_bytes,
        cost=None
        if cost is None
        else CostModel(
            base=cost.base,
            per_token=cost.per_token,
            per_token_width=cost.per_token_width,
            optimizer=cost.optimizer,
        ),
    )
