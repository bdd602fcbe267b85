"""Which earlier measurement may stand for a new one, and whether it may. numpy only."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from planner.conditions import UNCALIBRATED, beside_ours, is_told, summarise
from planner.estimate import of_a_run
from planner.hardware import DeviceFacts, cpu_name
from planner.history import History
from planner.measurement import Busier, Measurement, Measurements, PlannedRow, RowVerdict, StepSignature
from planner.strata import Strata
from planner.supervised import is_near
from planner.works import Extremes, Works
from presets import jsonio
from presets.errors import PlanError
from presets.home import expanded
from trainer.batching import BatchPlan
from trainer.evaluate import answerable
from trainer.job import Job
from trainer.model import inspect_model
from trainer.tokens import TokenizedDataset

VERSIONED = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "training-planner")
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)
# A change in one of these makes other timings, or keeps them in another form.
TIMED_SOURCES = (
    ("trainer", "step.py"), ("trainer", "model.py"), ("trainer", "collate.py"), ("trainer", "evaluate.py"),
    ("trainer", "lean.py"), ("trainer", "fused.py"), ("trainer", "documents.py"), ("trainer", "agreement.py"),
    ("trainer", "arrangement.py"), ("trainer", "grouped.py"), ("trainer", "halves.py"), ("trainer", "norms.py"),
    ("trainer", "rotary.py"), ("trainer", "kernels.py"), ("trainer", "entropy.py"), ("trainer", "alike.py"),
    ("trainer", "siblings.py"), ("trainer", "gated.py"), ("trainer", "packed.py"), ("trainer", "widths.py"),
    ("trainer", "beginning.py"),
    ("trainer", "checkpoint.py"), ("trainer", "feed.py"), ("trainer", "compiled.py"), ("trainer", "process.py"),
    ("planner", "worker.py"), ("planner", "workload.py"), ("planner", "prober.py"), ("planner", "measurement.py"),
    ("planner", "strata.py"), ("planner", "stopwatch.py"), ("planner", "memory.py"), ("planner", "first_times.py"),
    ("planner", "measured.py"), ("planner", "sequence.py"),
)  # fmt: skip
# A change in one of these makes another prediction of the same timings.
ESTIMATED_SOURCES = (
    ("planner", "estimate.py"), ("planner", "measure.py"), ("planner", "steadiness.py"), ("planner", "intervals.py"),
    ("planner", "outliers.py"), ("planner", "slope.py"), ("planner", "estimator.py"), ("planner", "decks.py"),
    ("planner", "fixed.py"), ("planner", "works.py"), ("planner", "first_times.py"),
    ("planner", "rounds.py"),
)  # fmt: skip
NOT_SHAPE = ("_name_or_path", "transformers_version")  # of a config.json
LIKE = 2.0  # a class of micro-batches may lie on average this factor from those timed for it; the fit bridges that much
MOST_OF_DATA = 0.25  # of the peak: data that are larger or smaller by more are measured with anew
SMALL_SHARE = 0.02  # of the plan's padded tokens: a class below it moves the sum too little to ask for that
GONE = 0.5  # of what others took of a CPU while it was timed: below it they are as good as gone
BUSIER = 0.15  # of a CPU's time: by so much more than then, others slow a run that starts now
# Seconds of looking at others. The kernel counts in hundredths: a glance tells two cores to a tenth, and is what a
# table from the history can spare.
GLANCE, LOOK = 0.1, 0.7
FEW_MORE = 1.05  # times the tokens learnt from in one micro-batch: a shuffle brings others together
NEAR = 0.95  # of the micro-batch whose memory is shown: below it, a note says so


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedRow:
    """How a row was judged, and what a later row is compared with."""

    micro_batch_size: int
    layout: str  # of packed rows; others have none
    accumulates: bool  # gradients were held while its memory was measured
    most_learnt: int  # see planner.works.Extremes
    most_spread: int
    verdict: RowVerdict


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedMeasurement:
    """One step signature's part of a `Measurements`, as it is stored."""

    measured_at: str  # ISO, UTC
    call: str  # the same for all signatures that were timed together, and only they are compared with each other
    budget_seconds: float
    precision_target: float
    free_bytes: int | None  # on the device, before
    data_bytes: int  # of the data that was measured with: a part of a process's resident memory
    in_turns: bool
    least_supervised: float  # of a plan's tokens, those that are learnt from: of the plan with the lowest share
    most_supervised: float  # and with the highest
    strata: Strata
    measurement: Measurement
    rows: tuple[CachedRow, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Reused:
    """Measurements for new rows, made from stored ones."""

    measurements: Measurements
    measured_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharpness:
    """How long and how sharply a measurement is asked to be."""

    budget_seconds: float
    precision_target: float


@dataclass(slots=True, eq=False)
class Keys:
    """Keys of jobs on one machine as it is now; what they share is gathered once."""

    facts: DeviceFacts
    _machine: dict[str, Any] | None = None
    _models: dict[tuple[str, bool], Any] = field(default_factory=dict)
    _data: dict[TokenizedDataset, str] = field(default_factory=dict)

    def of_runs(self, job: Job) -> str | None:
        """Runs of jobs with the same key are comparable; None where the model's shape is not known."""
        parts = self._parts(job)
        if parts is None:
            return None
        return _digest({**parts, "packing": job.packing, "estimate": _source_digest(ESTIMATED_SOURCES)})

    def of_measurement(self, job: Job, disk: str | None = None) -> str | None:
        """A measurement stands for jobs with the same key, as far as their batches allow; None as for `of_runs`.

        Args:
            job: any one of a step signature: how it forms its rows is compared row by row.
            disk: on which a checkpoint was or would be timed; None where none is.
        """
        parts = self._parts(job)
        return None if parts is None else _digest({**parts, "max_length": job.preset.max_length, "disk": disk})

    def of_data(self, data: TokenizedDataset) -> str:
        """Data with the same key takes the same time: lengths, how much of each is learnt from, what examples share."""
        if data not in self._data:
            sha = hashlib.sha256(np.ascontiguousarray(data.lengths).data)
            sha.update(np.ascontiguousarray(data.num_supervised).data)
            if data.beginnings is not None:
                sha.update(f"{data.beginnings.sizes.tolist()}".encode())
                sha.update(np.ascontiguousarray(data.beginnings.families).data)
            self._data[data] = sha.hexdigest()[:16]
        return self._data[data]

    def _parts(self, job: Job) -> dict[str, Any] | None:
        self._machine = self._machine or machine(self.facts)
        place = (job.model, job.trust_remote_code)
        if place not in self._models:
            self._models[place] = model_shape(*place)
        shape = self._models[place]
        if shape is None:
            return None
        signature = jsonio.to_plain(StepSignature.of(job))
        del signature["model"]  # a folder's name says nothing of what is in it
        return {
            "machine": self._machine,
            "model": shape,
            "signature": signature,
            "num_devices": job.num_devices,
        }


def machine(facts: DeviceFacts) -> dict[str, Any]:
    """What a timing depends on beside the job: device, processor, versions, our own code."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return {
        "device": [facts.name, facts.kind, facts.memory_bytes, facts.driver, facts.num_devices, facts.capability],
        "cpu": [cpu_name(), os.cpu_count(), len(affinity(0)) if affinity else None],
        "system": [platform.system(), platform.machine(), list(sys.version_info[:2])],
        "threads": {name: os.environ.get(name) for name in THREAD_VARIABLES},
        "versions": {name: _version(name) for name in VERSIONED},
        "sources": _source_digest(TIMED_SOURCES),
    }


def model_shape(model: str, trust_remote_code: bool = False) -> dict[str, Any] | None:
    """What decides the cost of a model's step: its configuration and, where that runs, its code. None: not known.

    The weights' values cost nothing, so only whether there are any is part of it: loading them takes its time.
    """
    folder = expanded(model)
    if not folder.is_dir():
        found = _hub_snapshot(model)
        if found is None:
            return None
        folder = found
    try:
        content = jsonio.loads((folder / "config.json").read_text(encoding="utf-8"), strict=False)
        code = [path.read_bytes() for path in sorted(folder.glob("*.py"))] if trust_remote_code else []
        has_weights = inspect_model(str(folder)).has_weights
    except (OSError, ValueError, PlanError):
        return None
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key not in NOT_SHAPE}
    return {"config": content, "has_weights": has_weights, "code": hashlib.sha256(b"\0".join(code)).hexdigest()}


def _hub_snapshot(name: str) -> Path | None:
    """The folder of a hub model that was fetched before, found without importing what fetches it."""
    home = expanded(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    hub = expanded(os.environ.get("HF_HUB_CACHE") or home / "hub")
    repository = hub / f"models--{name.replace('/', '--')}"
    try:
        snapshot = repository / "snapshots" / (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError, ValueError):
        return None
    return snapshot if snapshot.is_dir() else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source_digest(sources: Sequence[tuple[str, str]]) -> str:
    sha = hashlib.sha256()
    for package, name in sources:
        content = resources.files(package).joinpath(name).read_bytes()
        sha.update(f"{package}/{name} {len(content)}\n".encode() + content)
    return sha.hexdigest()


def _digest(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


# --- storing ----------------------------------------------------------------------------------------------------------


def keep(
    history: History,
    made: Keys,
    rows: Sequence[PlannedRow],
    data: TokenizedDataset,
    found: Measurements,
    asked: Sharpness,
    now: datetime,
    disk: str,
    works: Works | None = None,
) -> None:
    """Store what was measured, under a key of step signature, disk and data; what failed is left to be tried again."""
    contents, of_data = {}, made.of_data(data)
    works = works or Works(data)
    call = found.call or uuid.uuid4().hex
    for measurement in found.measurements:
        members = [row for row in rows if StepSignature.of(row.job) == measurement.signature]
        others = {row.name for row in rows} - {row.name for row in members}
        verdicts = [found.verdict(row.name) for row in members]
        judged = [
            _cached_row(row, verdict, works, data)
            for row, verdict in zip(members, verdicts, strict=True)
            if verdict is not None and verdict.fits is not None
        ]
        key = made.of_measurement(members[0].job, disk) if members else None
        timed = measurement.rounds or not any(row.verdict.fits for row in judged)
        if key is None or measurement.error is not None or not judged or not timed:
            continue
        timed_rows = [row for row, one in zip(members, verdicts, strict=True) if one is not None and one.fits]
        shares = [works.supervised_share(row.plan) for row in timed_rows or members]
        entry = CachedMeasurement(
            measured_at=now.astimezone(UTC).isoformat(timespec="seconds"),
            call=call,
            budget_seconds=asked.budget_seconds,
            precision_target=asked.precision_target,
            free_bytes=made.facts.free_bytes,
            data_bytes=data.num_bytes,
            in_turns=found.in_turns,
            least_supervised=min(shares),
            most_supervised=max(shares),
            strata=found.strata,
            measurement=measurement,
            rows=tuple(judged),
            notes=_apart_from(others, found.notes),
            warnings=_apart_from(others, found.warnings),
        )
        contents[f"{key}.{of_data}"] = json.dumps(jsonio.to_plain(entry), allow_nan=False)
    if contents:
        history.keep_measurements(contents)


def _layout(row: PlannedRow, data: TokenizedDataset) -> str:
    """What rows of several examples have in common: their length, and what they share of beginnings."""
    if not row.job.packing:
        return ""
    shares = data.beginnings is not None and row.job.shares_beginnings
    sizes = data.beginnings.sizes.tolist() if shares and data.beginnings is not None else []
    return f"{row.job.row_length} {sizes}"


def _cached_row(row: PlannedRow, verdict: RowVerdict, works: Works, data: TokenizedDataset) -> CachedRow:
    return CachedRow(
        micro_batch_size=row.job.micro_batch_size,
        layout=_layout(row, data),
        accumulates=_accumulates(row.plan),
        most_learnt=works.most_learnt(row.plan),
        most_spread=works.most_spread(row.plan),
        verdict=verdict,
    )


def _named(names: set[str], text: str) -> tuple[list[str], str] | None:
    """(names, rest) of a note that begins with some of these names: "baseline: ..." or "baseline, today: ...".

    A name may hold a comma itself ("recommended, tuned"). None where it begins otherwise.
    """
    found: list[str] = []
    at = 0
    while True:
        one = max((name for name in names if text.startswith((f"{name}: ", f"{name}, "), at)), key=len, default=None)
        if one is None:
            return None
        found.append(one)
        at += len(one) + 2
        if text[at - 2] == ":":
            return found, text[at:]


def _apart_from(names: set[str], texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(text for text in texts if _named(names, text) is None)


def _renamed(texts: tuple[str, ...], entry: CachedMeasurement, rows: list[PlannedRow]) -> list[str]:
    """What was said of an entry's rows, now of these: another table may name them otherwise, or not at all."""
    then = {one.verdict.name for one in entry.rows}
    now = [row.name for row in rows if not row.is_reference] or [rows[0].name]
    found = []
    for text in texts:
        named = _named(then, text)
        if named is None or set(named[0]) <= set(now):
            found.append(text)
        else:
            found.append(f"{', '.join(now if len(named[0]) > 1 else now[:1])}: {named[1]}")
    return found


# --- reusing ----------------------------------------------------------------------------------------------------------


class _Unfit(Exception):
    """Why the stored measurement cannot stand for these rows."""


def reuse(
    history: History,
    made: Keys,
    rows: Sequence[PlannedRow],
    data: TokenizedDataset,
    asked: Sharpness,
    disk: str,
    works: Works | None = None,
    look: Callable[[float], float | None] = lambda seconds: None,
) -> Reused | str | None:
    """Stored measurements for these rows, or why those that are stored do not do, or None where there are none.

    Those of this very data come first, then the latest of any: other data of the same model does not push out what was
    measured of this.

    They do where the rows' micro-batches lie within what was measured: the same micro-batch sizes, every class that has
    work was timed with micro-batches like the plan's, about as large a share of the tokens is learnt from, and each
    row's worst micro-batch is no larger than one that fitted (or no smaller than one that did not). All step signatures
    must come from one call, in which they were timed in turns: the speed factor compares them. What was timed beside
    others that are gone now says nothing of the device as it is.

    Args:
        look: the share of the device's time that others take just now, looked at for so many seconds at the least; None
            where it is not known.
    """
    wanted: dict[StepSignature, list[PlannedRow]] = {}
    for row in rows:
        wanted.setdefault(StepSignature.of(row.job), []).append(row)
    keyed: dict[StepSignature, str] = {}
    for signature, members in wanted.items():
        key = made.of_measurement(members[0].job, disk)
        if key is None:
            return None
        keyed[signature] = key
    of_data = made.of_data(data)
    works = works or Works(data)
    own = history.measurements(f"{key}.{of_data}" for key in keyed.values())
    why: str | None = None
    for stored in ({name.partition(".")[0]: content for name, content in own.items()}, None):
        contents = history.latest_measurements(keyed.values()) if stored is None else stored
        if len(contents) < len(set(keyed.values())):
            continue
        try:
            entries = {one: jsonio.from_json(CachedMeasurement, contents[key]) for one, key in keyed.items()}
            return _checked(entries, wanted, data, asked, made.facts, works, look)
        except PlanError:  # of another form than today's
            continue
        except _Unfit as reason:
            why = why or str(reason)
    return why


def _checked(
    entries: dict[StepSignature, CachedMeasurement],
    wanted: dict[StepSignature, list[PlannedRow]],
    data: TokenizedDataset,
    asked: Sharpness,
    facts: DeviceFacts,
    works: Works,
    look: Callable[[float], float | None],
) -> Reused:
    first = next(iter(entries.values()))
    if any(entry.call != first.call for entry in entries.values()):
        raise _Unfit("the configurations were not measured together")
    busier = _company(list(entries.values()), look, on_cpu=next(iter(wanted)).device == "cpu")
    verdicts: list[RowVerdict] = []
    notes: list[str] = []
    warnings: list[str] = []
    for signature, rows in wanted.items():
        entry = entries[signature]
        notes += _renamed(entry.notes, entry, rows)
        warnings += _renamed(entry.warnings, entry, rows)
        _check_sharpness(entry, asked)
        for row in rows:
            extremes = works.extremes(row.plan)
            cached = _judged(entry, row, works, data, facts)
            if row.job.device == "cpu":
                cached = replace(cached, verdict=_with_data(cached.verdict, data.num_bytes - entry.data_bytes))
            verdicts.append(replace(cached.verdict, name=row.name, signature=signature))
            if cached.verdict.fits:
                _check_strata(entry, row, works)
                _check_supervised(entry, row, works)
                if not row.is_reference:
                    _check_fixed(entry.measurement, row, data)
                    notes += _memory_note(cached, extremes)
    return Reused(
        measurements=Measurements(
            strata=first.strata,
            measurements=tuple(replace(entry.measurement, signature=signature) for signature, entry in entries.items()),
            rows=tuple(verdicts),
            in_turns=first.in_turns,
            call=first.call,
            busier=busier,
            notes=tuple(dict.fromkeys(notes)),
            warnings=tuple(dict.fromkeys(warnings)),
        ),
        measured_at=datetime.fromisoformat(min(entry.measured_at for entry in entries.values())),
    )


def _company(
    entries: Sequence[CachedMeasurement], look: Callable[[float], float | None], *, on_cpu: bool
) -> Busier | None:
    """Whether others take plainly more of the CPU's time now than while it was timed.

    Less is another matter: what they took then made it longer, and a run without them will not be. A glance has to be
    borne out by a longer look: what is there for a tenth of a second is no company for a run.
    """
    readings = [one.conditions for entry in entries for one in entry.measurement.rounds if one.conditions is not None]
    summary = summarise(readings, on_cpu=on_cpu)
    then = summary.others if on_cpu else summary.gpu_others  # what the host takes shows only while somebody computes
    if (on_cpu and not is_told(readings)) or (not on_cpu and then <= UNCALIBRATED):
        return None
    found: Busier | None = None
    why = ""
    for seconds in (GLANCE, LOOK):
        now = look(seconds)
        if now is None:
            return None
        beside = beside_ours(now) if on_cpu else now
        is_gone, is_busier = then > UNCALIBRATED and beside < GONE * then, on_cpu and beside > then + BUSIER
        if not (is_gone or is_busier):
            return None
        of = "CPU" if on_cpu else "GPU"
        why = f"other programs took {then:.0%} of the {of}'s time while it was timed, and {now:.0%} now"
        found = Busier(share=now, slower=(1 - then) / (1 - beside)) if is_busier else None
    if found is None:
        raise _Unfit(why)
    return found


def _check_sharpness(entry: CachedMeasurement, asked: Sharpness) -> None:
    """A request for more time or a narrower range is not answered with what was there before it."""
    if not entry.measurement.rounds:
        return
    sharp = entry.measurement.ended_by == "precision"
    if entry.precision_target <= asked.precision_target if sharp else entry.budget_seconds >= asked.budget_seconds:
        return
    raise _Unfit("a sharper measurement is asked for than the one that is stored")


def _judged(
    entry: CachedMeasurement, row: PlannedRow, works: Works, data: TokenizedDataset, facts: DeviceFacts
) -> CachedRow:
    """The stored verdict that covers a row: of those that fitted the smallest, so that its memory is the nearest."""
    extremes, layout = works.extremes(row.plan), _layout(row, data)
    padded, width = extremes.worst_padded, extremes.worst_width
    accumulates = _accumulates(row.plan)
    load = entry.measurement.load
    is_lean = row.job.loss == "lean" and (load is None or load.lean_refused is None)
    alike = [one for one in entry.rows if one.layout == layout]
    wide = [
        one
        for one in alike
        if one.verdict.fits and _padded(one) >= padded and one.verdict.worst_width >= width
        if one.accumulates or not accumulates
    ]
    covering = [
        one
        for one in wide
        if is_lean or FEW_MORE * one.most_learnt >= works.most_learnt(row.plan)
        if FEW_MORE * one.most_spread >= works.most_spread(row.plan)
    ]
    if covering:
        return _with_what_is_free(min(covering, key=_padded), entry, row, facts)
    if wide:
        raise _Unfit("one of the micro-batches holds more logits, or more of what rows share, than those measured")
    beyond = [
        one
        for one in alike
        if one.verdict.fits is False and _padded(one) <= padded and one.verdict.worst_width <= width
        if accumulates or not one.accumulates
    ]
    if not beyond:
        raise _Unfit(f"the longest micro-batch ({padded:,} tokens) lies outside what was measured")
    if entry.free_bytes is not None and facts.free_bytes is not None and facts.free_bytes > 1.02 * entry.free_bytes:
        raise _Unfit("more memory is free than when it did not fit")
    return beyond[0]


def _with_what_is_free(found: CachedRow, entry: CachedMeasurement, row: PlannedRow, facts: DeviceFacts) -> CachedRow:
    """The verdict with what stays free at the peak now; what no allocator counts (a CUDA context) is needed as then."""
    verdict = found.verdict
    if facts.free_bytes is None:
        return found
    if verdict.headroom_bytes is not None and entry.free_bytes is not None:
        left = verdict.headroom_bytes + facts.free_bytes - entry.free_bytes
        verdict = replace(verdict, headroom_bytes=max(0, left))
        fits = left >= 0 and of_a_run(verdict, row.job).fits
    else:
        needed = of_a_run(verdict, row.job).peak_reserved_bytes
        fits = needed is None or needed <= facts.free_bytes
    if not fits:
        raise _Unfit("less memory is free than was needed then")
    return replace(found, verdict=verdict)


def _with_data(verdict: RowVerdict, more: int) -> RowVerdict:
    """The verdict on a CPU with so many more bytes of data in memory.

    The 63,000 messages of the published example hold 33 MB more than the 3,000 bundled ones, beside a model of 530 MB.
    """
    reserved, allocated, left = verdict.peak_reserved_bytes, verdict.peak_allocated_bytes, verdict.headroom_bytes
    if not verdict.fits or reserved is None or allocated is None:
        return verdict
    if abs(more) > MOST_OF_DATA * reserved or (left is not None and left < more):
        raise _Unfit("the data are of another size, which matters to the memory")
    return replace(
        verdict,
        peak_reserved_bytes=reserved + more,
        peak_allocated_bytes=allocated + more,
        headroom_bytes=None if left is None else left - more,
    )


def _padded(row: CachedRow) -> int:
    return row.verdict.worst_rows * row.verdict.worst_width


def _accumulates(plan: BatchPlan) -> bool:
    return bool((np.diff(plan.window_offsets) > plan.num_devices).any())


def _check_strata(entry: CachedMeasurement, row: PlannedRow, works: Works) -> None:
    if not entry.strata.numbers(row.kind):
        raise _Unfit(f"micro-batches of {row.job.micro_batch_size} were not measured")
    work = works.of(row, entry.strata)
    timed: dict[int, list[int]] = {}
    for one in entry.measurement.rounds:
        for sample in one.samples:
            if sample.seconds is not None:
                timed.setdefault(sample.stratum, []).append(sample.rows * sample.width)
    total = float(work.padded.sum())
    for stratum in np.flatnonzero(work.count).tolist():
        if stratum not in timed:
            raise _Unfit("there are micro-batches of a size that was not timed")
        mean = float(work.padded[stratum] / work.count[stratum])
        mean_timed = sum(timed[stratum]) / len(timed[stratum])
        unlike = mean > LIKE * mean_timed or mean < mean_timed / LIKE
        if unlike and work.padded[stratum] > SMALL_SHARE * total:
            raise _Unfit("the lengths lie too far from those that were timed")


def _check_supervised(entry: CachedMeasurement, row: PlannedRow, works: Works) -> None:
    share, least, most = works.supervised_share(row.plan), entry.least_supervised, entry.most_supervised
    if not is_near(least, most, share, entry.measurement):
        timed = f"{least:.0%}" if f"{least:.0%}" == f"{most:.0%}" else f"{least:.0%} to {most:.0%}"
        raise _Unfit(
            f"{share:.0%} of the tokens are learnt from, and of those that were timed {timed}; the loss's time depends "
            "on it"
        )


def _check_fixed(measurement: Measurement, row: PlannedRow, data: TokenizedDataset) -> None:
    """What the run does beside its steps must have been timed, where this row does it."""
    held_out, spec, fixed = row.plan.evaluation, row.job.evaluation, measurement.fixed
    if len(held_out) == 0:
        return
    if not fixed.evaluation:
        raise _Unfit("evaluation was not timed")
    answers = spec.num_samples and spec.max_new_tokens and measurement.load and measurement.load.has_tokenizer
    if answers and not fixed.answer_tokens and len(answerable(data, held_out, 1)):
        raise _Unfit("sample answers were not timed")


def _memory_note(cached: CachedRow, extremes: Extremes) -> list[str]:
    largest = extremes.largest_padded
    if largest >= NEAR * _padded(cached):
        return []
    return [
        f"memory is that of a longer micro-batch ({_padded(cached):,} tokens) than this data's longest ({largest:,}); "
        "--fresh measures this one"
    ]
