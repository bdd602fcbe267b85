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

from planner.candidates import (
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
from planner.estimate import BETWEEN_RUNS, Estimate, estimate, with_references
from planner.figures import ago
from planner.hardware import DeviceFacts, detect_device
from planner.history import History
from planner.keys import Keys
from planner.measurement import Measurements
from planner.prober import ProberMaker, ProcessProber
from planner.report import (
    PlanReport,
)
from planner.resolve import Options, presets_to_compare, resolve_data, resolve_model
from planner.reuse import Reused, reuse
from planner.rows import Past, make_report
from planner.scratch import Place, place_for, scratch_folder
from planner.stored import Sharpness, keep
from planner.unended import settle
from planner.works import Works
from presets.env import Settings
from presets.errors import DataError, ModelError, SettingsError, together
from presets.schema import DEFAULT_PRESET
from presets.user import is_path
from trainer.job import DataSpec, Device
from trainer.model import inspect_model
from trainer.record import Breakdown, CostModel, Predicted


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Comparison:
    """All configurations, measured."""

    facts: DeviceFacts
    candidates: tuple[Candidate, ...]
    estimates: dict[str, Estimate]  # corrected by past runs where there are enough
    report: PlanReport
    past: Past = field(default_factory=Past)


def compare(
    options: Options,
    settings: Settings,
    measuring: MeasureSettings,
    *,
    names: tuple[str, ...] = (),
    running: bool = False,
    say: Say = lambda text: None,
    shown: Shown = as_lines,
    factory: ProberMaker = ProcessProber.factory,
    facts: DeviceFacts | None = None,
    now: datetime | None = None,
    history: History | None = None,
    clock: Callable[[], float] = time.perf_counter,
    tuned: bool = False,
    force: bool = False,
    before_measuring: Callable[[tuple[Candidate, ...]], None] = lambda candidates: None,
    output: Path | None = None,
    unsearched: frozenset[str] = frozenset(),
) -> Comparison:
    """Measure the named presets (all of them where none is named) on this device and report them.

    Args:
        running: a run follows: the model must have weights and the data messages.
        say: takes progress, one line each.
        shown: how the progress of measuring is shown.
        factory: makes probers for a folder of tokenised data and a scratch folder; tests put a fake device here.
        history: earlier measurements and runs; None: measure, keep nothing and correct nothing.
        clock: seconds that the budget is counted in; a fake device has its own.
        tuned: search for the twins that the history does not have; with `running`, the twin is what will run.
        force: with `running`: run what the safety rules advise against.
        before_measuring: may refuse them before minutes are spent.
        unsearched: with `tuned`: names of presets that stand there for comparison; no twin of theirs is searched for.
        output: of the run that may follow: a checkpoint is timed on its disk. None: the settings', else in runs/.

    Raises:
        PlanError: nothing can be compared: bad options, unreadable data or model, or nothing could be measured.
    """
    facts = facts or detect_device(options.device)
    model, spec, candidates = prepare(options, settings, facts, names=names, running=running, say=say, force=force)
    now = now or datetime.now().astimezone()
    keys = Keys(facts)
    look = watch_others(facts.kind) if history is not None else nobody_looks
    if history is not None:
        for folder in settle(history):
            say(f"a run of yours trains on this machine now: {folder}")
    if tuned or (history is not None and not running):
        baseline = functools.partial(baseline_job, options, settings, facts, spec)
        search = Search(measuring, say, shown, factory, history, keys, now, clock)
        candidates = with_twins(candidates, baseline, search, tuned=tuned, instead=running, unsearched=unsearched)
    before_measuring(candidates)
    place = place_for(output or (Path(settings.output) if settings.output else None))
    works: dict[int, Works] = {}
    for candidate in candidates:
        if candidate.planned is not None and candidate.data is not None:
            works.setdefault(candidate.planned.job.preset.max_length, Works(candidate.data))
    found, measured_at = _measure_all(
        candidates, works, measuring, say, shown, factory, history, keys, now, clock, place, look
    )
    raw = {
        candidate.planned.name: estimate(
            candidate.planned,
            candidate.data,
            found[candidate.planned.job.preset.max_length],
            works=works[candidate.planned.job.preset.max_length],
            data_seconds=candidate.data_seconds,
            between=BETWEEN_RUNS[candidate.planned.job.device],
            budget_shares=len(found),
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
            by = past_correction(history, key, raw[candidate.planned.name].measured_as)
            if by is not None:
                corrections[candidate.planned.name] = by
    estimates = {name: corrected(one, corrections[name]) if name in corrections else one for name, one in raw.items()}
    past = Past(raw=raw, corrections=corrections, signature_keys=signature_keys, measured_at=measured_at)
    report = make_report(facts, model, spec, candidates, estimates, past, found, now)
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
    works: dict[int, Works],
    measuring: MeasureSettings,
    say: Say,
    shown: Shown,
    factory: ProberMaker,
    history: History | None,
    keys: Keys,
    now: datetime,
    clock: Callable[[], float],
    place: Place,
    look: Callable[[float], float | None],
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
            stored = reuse(history, keys, rows, data, asked, place.disk, works[length], look)
            if isinstance(stored, Reused):
                found[length], measured_at[length] = _noted(stored.measurements, place), stored.measured_at
                say(f"measured {ago(stored.measured_at, now)} on this machine; --fresh measures again")
                continue
            if stored is not None:
                say(f"measuring again: {stored}")
        from planner.measure import measure  # what measures, which a table from the history does without
        from planner.meter import ConditionsMeter

        with scratch_folder(place) as scratch, tempfile.TemporaryDirectory(prefix="plan-") as folder, shown(say) as bar:
            saved = Path(folder) / "data"
            saved.mkdir()
            data.save(saved)
            measured = measure(
                rows,
                data,
                factory(saved, scratch.folder),
                budget_seconds=asked.budget_seconds,
                precision_target=asked.precision_target,
                clock=clock,
                progress=bar,
                meter=ConditionsMeter(is_gpu=rows[0].job.device == "cuda"),
            )
            disk = scratch.disk
        if history is not None:
            keep(history, keys, rows, data, measured, asked, now, disk, works[length])
        found[length] = _noted(measured, scratch)  # not kept: it is said where it is true
    return found, measured_at


def nobody_looks(seconds: float) -> float | None:
    """Where nothing is reused."""
    return None


def watch_others(device: Device) -> Callable[[float], float | None]:
    """Tells how much of the CPU others want from here on (threads per core), or that no others are on the GPU."""
    if device == "cpu":
        from trainer.company import Company

        return Company().demand
    from planner.meter import nobody_on_gpu

    return nobody_on_gpu


def _noted(found: Measurements, place: Place) -> Measurements:
    return found if place.note is None else replace(found, notes=(*found.notes, place.note))


def run_command(comparison: Comparison, argv_tail: str, *, tuned: bool) -> str | None:
    """The command that starts the recommended row, or the only one there is; None where it does not fit or may not.

    Args:
        argv_tail: the options of data and model.
        tuned: as its twin, where it has one: else as written is the fastest known.
    """
    rows = [row for row in comparison.report.rows if row.tuned_from is None]
    wanted = [row for row in rows if row.name == DEFAULT_PRESET] or (rows if len(rows) == 1 else [])
    if not wanted or not wanted[0].fits or wanted[0].blocked_by:
        return None
    has_twin = any(row.tuned_from == wanted[0].name for row in comparison.report.rows)
    return f"plan --run {shlex.quote(wanted[0].run_name)}{' --tuned' if tuned and has_twin else ''}{argv_tail}"


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
        measured_as=raw.measured_as,
        others_share=raw.others_share,
        correction_factor=None if by is None else by.factor,
        correction_runs=None if by is None else by.num_runs,
        signature_key=past.signature_keys.get(name),
        parts=_parts(found),
        calibrated=found.calibrated,
        is_tuned=candidate.twin is not None,
    )


def _parts(found: Estimate) -> Breakdown | None:
    if found.train_seconds is None:
        return None
    known = {one.name: getattr(found.fixed, one.name, None) or 0.0 for one in fields(Breakdown) if one.name != "train"}
    return Breakdown(train=found.train_seconds, **known)
