"""What is kept of a measurement, and under which key. numpy only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from planner.history import History
from planner.keys import Keys
from planner.measurement import Measurement, Measurements, PlannedRow, RowVerdict, StepSignature
from planner.strata import Strata
from planner.works import Works
from presets import jsonio
from trainer.batching import BatchPlan
from trainer.tokens import TokenizedDataset


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedRow:
    """How a row was judged, and what a later row is compared with."""

    micro_batch_size: int
    layout: str  # of packed rows; others have none
    accumulates: bool  # gradients were held while its memory was measured
    most_learnt: int  # see planner.works.Works, and the next
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
class Sharpness:
    """How long and how sharply a measurement is asked to be."""

    budget_seconds: float
    precision_target: float


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
            call=found.call,
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


def layout_of(row: PlannedRow, data: TokenizedDataset) -> str:
    """What rows of several examples have in common: their length, and what they share of beginnings."""
    if not row.job.packing:
        return ""
    shares = data.beginnings is not None and row.job.shares_beginnings
    sizes = data.beginnings.sizes.tolist() if shares and data.beginnings is not None else []
    return f"{row.job.row_length} {sizes}"


def _cached_row(row: PlannedRow, verdict: RowVerdict, works: Works, data: TokenizedDataset) -> CachedRow:
    return CachedRow(
        micro_batch_size=row.job.micro_batch_size,
        layout=layout_of(row, data),
        accumulates=accumulates(row.plan),
        most_learnt=works.most_learnt(row.plan),
        most_spread=works.most_spread(row.plan),
        verdict=verdict,
    )


def named(names: set[str], text: str) -> tuple[list[str], str] | None:
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
    return tuple(text for text in texts if named(names, text) is None)


def accumulates(plan: BatchPlan) -> bool:
    """Whether gradients are held while a micro-batch runs: where a device has several in a window."""
    return bool((np.diff(plan.window_offsets) > plan.num_devices).any())
