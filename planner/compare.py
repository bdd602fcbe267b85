"""The chain, in one place: presets -> jobs -> batch plans -> measurement -> estimates -> rows. No torch here."""

from __future__ import annotations

import functools
import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from planner.candidates import (
    BASELINE,
    TUNED,
    Candidate,
    MeasureSettings,
    Say,
    Search,
    Shown,
    as_lines,
    baseline_job,
    make_candidates,
    with_twins,
)
from planner.correction import Correction, corrected, past_correction
from planner.estimate import BETWEEN_RUNS, Estimate, accumulation_saving, estimate, mean_micro_seconds
from planner.hardware import DeviceFacts, detect_device
from planner.history import History
from planner.measure import measure, with_references
from planner.measurement import Measurements
from planner.prober import LoadReply, ProberFactory, ProcessProber
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
    ago,
    finish_at,
)
from planner.resolve import Options, presets_to_compare, resolve_data, resolve_model
from planner.reuse import Keys, Reused, Sharpness, keep, reuse
from planner.tune import Twin
from presets.env import Settings
from presets.errors import DataError, ModelError, SettingsError, together
from presets.schema import DEFAULT_PRESET, Preset, Published, load_preset, preset_names
from presets.user import is_path
from trainer.job import DataSpec
from trainer.model import inspect_model
from trainer.record import Breakdown, CostModel, Predicted
from trainer.tokens import TokenizedDataset


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Past:
    """What the history had to say: measurements that were not made now, and runs that correct estimates. By name."""

    raw: dict[str, Estimate] = field(default_factory=dict)  # as measured, before any correction
    corrections: dict[str, Correction] = field(default_factory=dict)
    signature_keys: dict[str, str] = field(default_factory=dict)  # under which a run enters the history
    measured_at: dict[int, datetime] = field(default_factory=dict)  # by maximum length


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Comparison:
    """All configurations, measured."""

    facts: DeviceFacts
    candidates: tuple[Candidate, ...]
    estimates: dict[str, Estimate]  # corrected by past runs where there are enough
    report: PlanReport
    past: Past = Past()


def compare(
    options: Options,
    settings: Settings,
    measuring: MeasureSettings,
    *,
    names: tuple[str, ...] = (),
    running: bool = False,
    say: Say = lambda text: None,
    shown: Shown = as_lines,
    factory: Callable[[Path], ProberFactory] = ProcessProber.factory,
    facts: DeviceFacts | None = None,
    now: datetime | None = None,
    history: History | None = None,
    clock: Callable[[], float] = time.perf_counter,
    tuned: bool = False,
    force: bool = False,
    before_measuring: Callable[[tuple[Candidate, ...]], None] = lambda candidates: None,
) -> Comparison:
    """Measure the named presets (all of them where none is named) on this device and report them.

    Args:
        running: a run follows: the model must have weights and the data messages.
        say: takes progress, one line each.
        shown: how the progress of measuring is shown.
        factory: makes probers for a folder of tokenised data; tests put a fake device here.
        history: earlier measurements and runs; None: measure, keep nothing and correct nothing.
        clock: seconds that the budget is counted in; a fake device has its own.
        tuned: search for the twins that the history does not have; with `running`, the twin is what will run.
        force: with `running`: run what the safety rules advise against.
        before_measuring: may refuse them before minutes are spent.

    Raises:
        PlanError: nothing can be compared: bad options, unreadable data or model, or nothing could be measured.
    """
    facts = facts or detect_device(options.device)
    model, spec, candidates = prepare(options, settings, facts, names=names, running=running, say=say, force=force)
    now = now or datetime.now().astimezone()
    keys = Keys(facts)
    if tuned or (history is not None and not running):
        baseline = functools.partial(baseline_job, options, settings, facts, spec)
        search = Search(measuring, say, shown, factory, history, keys, now, clock)
        candidates = with_twins(candidates, baseline, search, tuned=tuned, instead=running)
    before_measuring(candidates)
    found, measured_at = _measure_all(candidates, measuring, say, shown, factory, history, keys, now, clock)
    raw = {
        candidate.planned.name: estimate(
            candidate.planned,
            candidate.data,
            found[candidate.planned.job.preset.max_length],
            data_seconds=candidate.data_seconds,
            between=BETWEEN_RUNS[candidate.planned.job.device],
        )
        for candidate in candidates
        if candidate.planned is not None and candidate.data is not None
    }
    signature_keys: dict[str, str] = {}
    corrections: dict[str, Correction] = {}
    if history is not None:
        for candidate in candidates:
            key = keys.of_runs(candidate.planned.job) if candidate.planned is not None else None
            if candidate.planned is None or key is None:
                continue
            signature_keys[candidate.planned.name] = key
            by = past_correction(history, key)
            if by is not None:
                corrections[candidate.planned.name] = by
    estimates = {name: corrected(one, corrections[name]) if name in corrections else one for name, one in raw.items()}
    past = Past(raw=raw, corrections=corrections, signature_keys=signature_keys, measured_at=measured_at)
    report = _report(facts, model, spec, candidates, estimates, past, found, now)
    return Comparison(facts=facts, candidates=candidates, estimates=estimates, report=report, past=past)


def prepare(
    options: Options,
    settings: Settings,
    facts: DeviceFacts,
    *,
    names: tuple[str, ...] = (),
    running: bool = False,
    say: Say = lambda text: None,
    force: bool = False,
) -> tuple[str, DataSpec, tuple[Candidate, ...]]:
    """(model, data, configurations with their batch plans), before anything is measured.

    Raises:
        PlanError: as `compare`; with `running` also where the safety rules advise against it and `force` is not given.
    """
    model, where = resolve_model(options, settings)
    together(
        lambda: presets_to_compare(settings, names),
        lambda: resolve_data(options, settings, running=running),
        lambda: inspect_model(model),
    )
    presets = presets_to_compare(settings, names, say)
    spec = resolve_data(options, settings, running=running)
    files = inspect_model(model)
    if running and not files.has_weights:
        raise ModelError(
            f"model '{model}': it has a config.json but no weights (*.safetensors). Planning needs none; a run does."
        )
    say(f"model: {model} ({where})")
    candidates = make_candidates(presets, options, settings, facts, spec, say)
    files_of = {Path(name).stem: name for name in names if is_path(name)}
    candidates = tuple(replace(one, run_as=files_of.get(one.resolved.preset.name)) for one in candidates)
    if all(candidate.planned is None for candidate in candidates):
        raise DataError(" ".join(dict.fromkeys(candidate.error or "" for candidate in candidates)))
    blocked = [text for candidate in candidates for text in candidate.blocked_by]
    if running and blocked and not force:
        raise SettingsError("\n".join(f"{text}." for text in blocked))
    return model, spec, candidates


def _measure_all(
    candidates: tuple[Candidate, ...],
    measuring: MeasureSettings,
    say: Say,
    shown: Shown,
    factory: Callable[[Path], ProberFactory],
    history: History | None,
    keys: Keys,
    now: datetime,
    clock: Callable[[], float],
) -> tuple[dict[int, Measurements], dict[int, datetime]]:
    """Measurements by maximum length, and when those were made that were not made now.

    Almost always one: rows that cut at another length have data of their own.
    """
    groups: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.planned is not None:
            groups.setdefault(candidate.planned.job.preset.max_length, []).append(candidate)
    found: dict[int, Measurements] = {}
    measured_at: dict[int, datetime] = {}
    asked = Sharpness(
        budget_seconds=measuring.budget_seconds / max(1, len(groups)), precision_target=measuring.precision_target
    )
    for length, members in groups.items():
        data = members[0].data
        assert data is not None
        rows = [member.planned for member in members if member.planned is not None]
        rows = rows if len(rows) == 1 else with_references(rows)  # a single row that will run needs no comparison
        if history is not None and not measuring.fresh:
            stored = reuse(history, keys, rows, data, asked)
            if isinstance(stored, Reused):
                found[length], measured_at[length] = stored.measurements, stored.measured_at
                say(f"measured {ago(stored.measured_at, now)} on this machine; --fresh measures again")
                continue
            if stored is not None:
                say(f"measuring again: {stored}")
        from planner.meter import ConditionsMeter  # with psutil, which a table from the history does without

        with tempfile.TemporaryDirectory(prefix="plan-") as folder, shown(say) as progress:
            saved = Path(folder) / "data"
            saved.mkdir()
            data.save(saved)
            found[length] = measure(
                rows,
                data,
                factory(saved),
                budget_seconds=asked.budget_seconds,
                precision_target=asked.precision_target,
                clock=clock,
                progress=progress,
                meter=ConditionsMeter(is_gpu=rows[0].job.device == "cuda"),
            )
        if history is not None:
            keep(history, keys, rows, data, found[length], asked, now)
    return found, measured_at


def _report(
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
        rows=tuple(_row(candidate, estimates, past, now) for candidate in candidates),
        notes=_notes(candidates, estimates, found, first.data, training, len(evaluation)),
    )


def _row(candidate: Candidate, estimates: dict[str, Estimate], past: Past, now: datetime) -> Row:
    preset, job, name = candidate.resolved.preset, candidate.resolved.job, candidate.name
    found = estimates.get(name)
    measured_at = past.measured_at.get(job.preset.max_length) if job else None
    by, raw = past.corrections.get(name), past.raw.get(name)
    first = estimates.get(BASELINE)
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
        speedup=_speedup(first, found, candidate.twin),
        breakdown=_breakdown(found),
        measured_at=None if measured_at is None else measured_at.astimezone().isoformat(timespec="seconds"),
        correction=None
        if by is None or raw is None or raw.seconds is None
        else CorrectionInfo(factor=by.factor, num_runs=by.num_runs, raw_seconds=raw.seconds),
        error=found.error or ("does not fit" if found.fits is False else None),
    )


def _speedup(baseline: Estimate | None, found: Estimate, twin: Twin | None) -> float | None:
    """Over the baseline: of the whole run where it stands in the same table, else of the loop, from the search."""
    if baseline is not None and baseline.seconds and found.seconds:
        return baseline.seconds / found.seconds
    return twin.speedup if twin is not None else None


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
    if not any(candidate.twin is not None for candidate in candidates) and not any(
        note.startswith(TUNED) for candidate in candidates for note in candidate.notes
    ):
        notes.append("Tuned: not yet for this model and data. 'plan tune' finds the fastest split of the same batches.")
    published = [c.resolved.preset for c in candidates if c.planned is not None and c.twin is None]
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


def run_command(comparison: Comparison, argv_tail: str) -> str | None:
    """The command that starts the recommended row, or the only one there is; None where it does not fit or may not."""
    rows = [row for row in comparison.report.rows if row.tuned_from is None]
    wanted = [row for row in rows if row.name == DEFAULT_PRESET] or (rows if len(rows) == 1 else [])
    if not wanted or not wanted[0].fits or wanted[0].blocked_by:
        return None
    return f"plan --run {shlex.quote(wanted[0].run_name)}{argv_tail}"


def predicted_of(comparison: Comparison, candidate: Candidate) -> Predicted:
    """An estimate as the run folder keeps it: what is shown, and what was measured before past runs corrected it."""
    assert candidate.planned is not None
    name = candidate.planned.name
    past = comparison.past
    found, raw, by = comparison.estimates[name], past.raw[name], past.corrections.get(name)
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
        num_examples=candidate.planned.plan.num_examples,
        raw_seconds=raw.seconds,
        raw_seconds_low=raw.seconds_low,
        raw_seconds_high=raw.seconds_high,
        raw_train_seconds=raw.train_seconds,
        correction_factor=None if by is None else by.factor,
        correction_runs=None if by is None else by.num_runs,
        signature_key=past.signature_keys.get(name),
        parts=_parts(found),
    )


def _parts(found: Estimate) -> Breakdown | None:
    if found.train_seconds is None:
        return None
    known = {one.name: getattr(found.fixed, one.name, None) or 0.0 for one in fields(Breakdown) if one.name != "train"}
    return Breakdown(train=found.train_seconds, **known)
