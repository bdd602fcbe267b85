"""Configurations on their way to a table: presets -> jobs -> batch plans, and the tuned twins beside them. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.figures import duration
from planner.hardware import DeviceFacts
from planner.history import History
from planner.keys import Keys
from planner.measurement import PlannedRow
from planner.prober import ProberFactory
from planner.resolve import Options, Resolved, resolve_job
from planner.safety import blocking, verdicts
from planner.twin import TUNED, Twin, Untimed, Wanted, twin_name
from planner.twins import find_twins, known_twin
from presets.env import Settings
from presets.errors import DataError, SettingsError
from presets.schema import Preset, load_preset
from trainer.data import prepare_data
from trainer.job import DataSpec, Job
from trainer.planning import STAND_IN_NOTE, Plans, needs_loss, stand_in, with_evaluation_on_top
from trainer.tokens import TokenizedDataset

if TYPE_CHECKING:
    from planner.measure import Progress

Say = Callable[[str], None]
Shown = Callable[[Say], AbstractContextManager["Progress"]]  # how the progress of measuring is shown while it lasts

BASELINE = "baseline"
TUNE_BUDGETS = 3.0  # a search takes this many times a measurement's budget: it times three times as much
OPENED_SECONDS = 0.3  # data that was there so soon lay in the cache, as it will for the run: no need to open it twice


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureSettings:
    """How long and how sharply to measure."""

    budget_seconds: float = 60.0
    quantized: bool = False  # a search for twins also tries 8-bit and 4-bit bases
    precision_target: float = 0.02  # relative half-width of the 90 % interval
    fresh: bool = False  # measure again, whatever is stored


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidate:
    """One configuration on its way through the chain."""

    resolved: Resolved
    twin: Twin | None = None  # set where this is the tuned twin of a preset
    planned: PlannedRow | None = None
    data: TokenizedDataset | None = None
    plans: Plans | None = None  # of this data
    data_seconds: float | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None
    blocked_by: tuple[str, ...] = ()  # safety rules; a run needs --force
    run_as: str | None = None  # what `--run` takes where it is not the preset's name: a file

    @property
    def name(self) -> str:
        """The row's name: the preset's, or that of its twin."""
        return twin_name(self.resolved.preset.name) if self.twin is not None else self.resolved.preset.name


def make_candidates(
    presets: tuple[Preset, ...], options: Options, settings: Settings, facts: DeviceFacts, spec: DataSpec, say: Say
) -> tuple[Candidate, ...]:
    prepared: dict[int, tuple[TokenizedDataset, float, Plans]] = {}
    found = []
    for preset in presets:
        resolved = resolve_job(preset, options, settings, facts, spec)
        if resolved.job is None:
            found.append(Candidate(resolved=resolved, error=resolved.error))
            continue
        job = resolved.job
        length = job.preset.max_length
        if length not in prepared:
            made = _prepare(job, say)
            prepared[length] = (*made, Plans(made[0]))
        data, seconds, plans = prepared[length]
        try:
            planned = plans.of(stand_in(job))
        except DataError as reason:  # this row's sampling needs a field that the data lacks: the others still show
            told = f"{reason} It {resolved.sampled.split(';')[0]}." if resolved.sampled else str(reason)
            found.append(Candidate(resolved=resolved, error=told))
            continue
        said = verdicts(job, planned.plan)
        found.append(
            Candidate(
                resolved=resolved,
                planned=PlannedRow(name=preset.name, job=job, plan=planned.plan),
                data=data,
                plans=plans,
                data_seconds=seconds,
                notes=(
                    *resolved.notes,
                    *((resolved.sampled,) if resolved.sampled else ()),
                    *planned.notes,
                    *((STAND_IN_NOTE,) if needs_loss(job.preset) else ()),
                    *(one.text for one in said),
                ),
                blocked_by=blocking(said),
            )
        )
    return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """What a search for twins needs."""

    measuring: MeasureSettings
    say: Say
    shown: Shown
    factory: Callable[[Path], ProberFactory]
    history: History | None
    keys: Keys
    now: datetime
    clock: Callable[[], float]

    @property
    def budget_seconds(self) -> float:
        return TUNE_BUDGETS * self.measuring.budget_seconds

    def twins(self, wanted: list[Wanted], data: TokenizedDataset) -> dict[str, Twin | Untimed]:
        try:
            with self.shown(self.say) as progress:
                return find_twins(
                    wanted,
                    data,
                    self.factory,
                    history=self.history,
                    keys=self.keys,
                    budget_seconds=self.budget_seconds,
                    quantized=self.measuring.quantized,
                    fresh=self.measuring.fresh,
                    now=self.now,
                    progress=progress,
                    clock=self.clock,
                )
        except KeyboardInterrupt:
            if self.history is not None and not self.measuring.fresh:
                self.say("the search was interrupted: the same command goes on after the last stage that was ended")
            raise


def baseline_job(
    options: Options, settings: Settings, facts: DeviceFacts, spec: DataSpec, max_length: int
) -> Job | None:
    """The published baseline under these options, which speed-ups are counted from; None where it cannot be a job.

    It is not compiled: what compiling gives is a part of the speed-up, where it is asked for.
    """
    resolved = resolve_job(load_preset(BASELINE), options, settings, facts, spec)
    if resolved.job is None:
        return None
    return replace(resolved.job, compile=False, preset=replace(resolved.job.preset, max_length=max_length))


def with_twins(
    candidates: tuple[Candidate, ...],
    baseline: Callable[[int], Job | None],
    search: Search,
    *,
    tuned: bool,
    instead: bool,
    unsearched: frozenset[str] = frozenset(),
) -> tuple[Candidate, ...]:
    """Each configuration followed by its tuned twin, where one is known (or, with `tuned`, after a search for it).

    A search that was too short to tell is made again where there is more time now.

    Args:
        unsearched: configurations that stand there for comparison: they show a twin that is known, no more.
    """
    twins: dict[str, Twin | Untimed] = {}
    missing: dict[int, list[Wanted]] = {}
    by_length: dict[int, TokenizedDataset] = {}
    for candidate in candidates:
        if candidate.planned is None or candidate.data is None:
            continue
        job, data, known = candidate.planned.job, candidate.data, None
        searched = tuned and candidate.name not in unsearched
        if search.history is not None and not (searched and search.measuring.fresh):
            known = known_twin(search.history, search.keys, job, data, quantized=search.measuring.quantized)
            if known is not None and searched and known.was_too_short and known.budget_seconds < search.budget_seconds:
                known = None
        length = job.preset.max_length
        against = baseline(length) if known is None and searched else None
        if known is not None:
            twins[candidate.name] = known
        elif against is not None:
            by_length[length] = data
            missing.setdefault(length, []).append(Wanted(name=candidate.name, job=job, baseline=against))
    for length, wanted in missing.items():
        twins |= search.twins(wanted, by_length[length])
    found: list[Candidate] = []
    for candidate in candidates:
        twin = twins.get(candidate.name)
        made = twin_candidate(candidate, twin) if isinstance(twin, Twin) and twin.changes else None
        if made is None or not instead:
            noted: tuple[str, ...] = ()
            if isinstance(twin, Untimed):
                noted = (f"{TUNED}: nothing could be timed ({twin.reason})",)
            elif twin is not None and not twin.changes:
                reasons = f" ({'; '.join(twin.refused)})" if twin.refused else ""
                noted = (f"{TUNED}: nothing found that is faster than as written{reasons}",)
            found.append(replace(candidate, notes=(*candidate.notes, *noted)))
        if made is not None:
            found.append(made)
    return tuple(found)


def twin_candidate(candidate: Candidate, twin: Twin) -> Candidate | None:
    """The tuned twin of a configuration; None where its split is not possible any more."""
    if candidate.planned is None or candidate.plans is None:
        return None
    try:
        job = twin.job(candidate.planned.job)
        planned = candidate.plans.of(stand_in(job))
    except (SettingsError, DataError):
        return None
    lost = () if all(change.is_neutral for change in twin.changes) else ("tuned with settings that change the result",)
    return replace(
        candidate,
        twin=twin,
        resolved=replace(candidate.resolved, job=job),
        planned=PlannedRow(name=twin_name(twin.preset), job=job, plan=planned.plan),
        notes=(twin.text, *lost),
    )


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
        what = "examples" if len(data) > 1 else "example"
        say(f"data: {len(data):,} {what} read and tokenised in {duration(first)}, imports included")
    if first < OPENED_SECONDS or job.data.is_count:  # a count is never kept, and never run
        return data, first
    begun = time.perf_counter()
    prepare_data(spec, **arguments)
    return data, time.perf_counter() - begun


def as_lines(say: Say) -> AbstractContextManager[Progress]:
    """How measuring is shown where there is no terminal."""
    return nullcontext(each_once(say))


def each_once(say: Say) -> Progress:
    """Progress as lines: each text once, however often it is told."""
    told: set[str] = set()

    def tell(text: str, _share: float) -> None:
        kind = text.partition(", round ")[0]  # "timing, round 12" is told as "timing"
        if kind not in told:
            told.add(kind)
            say(kind)

    return tell
