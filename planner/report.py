"""The nouns of an answer, and its JSON; planner.table makes text of it. It decides nothing and measures nothing.

`Row` is one configuration, whatever mode it comes from; `PlanReport` is the whole answer. Both are plain data, so the
table, the JSON and later forms say the same. None means unknown: "unknown" in a table, null in JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from planner.published import PublishedRow, published_notes, published_rows
from presets import jsonio
from presets.schema import Preset

Basis = Literal["measured", "cached", "published"]

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """What is known of the quality, and who says so ("published" or "measured")."""

    text: str | None = None
    source: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseRow:
    """One phase of a preset that has phases."""

    gradient_accumulation_steps: int
    learning_rate: float
    num_steps: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFigures:
    """What the guide prints of a configuration; hours are None unless the case is the guide's own."""

    hours_low: float | None = None
    hours_high: float | None = None
    vram: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectionInfo:
    """What past runs on this machine did to a row's figures."""

    factor: float  # of the training seconds
    num_runs: int
    raw_seconds: float  # of the whole run, as measured


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakdownInfo:
    """Where a run's seconds go. None is unknown, and not in the sum."""

    forward_backward: float
    optimizer: float
    start: float | None = None  # process start and imports
    load: float | None = None
    compile: float | None = None
    data: float | None = None
    evaluation: float | None = None
    samples: float | None = None
    checkpoints: float | None = None
    save: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One configuration. Seconds and bytes; None is unknown.

    `seconds_per_step` is always at this row's own precision, so that num_steps x seconds_per_step is the time: in
    published mode it is the given step time / `speed_factor`. Where there are phases, `gradient_accumulation_steps`,
    `global_batch_size` and `learning_rate` are the first phase's.
    """

    name: str
    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    num_epochs: int | float
    learning_rate: float
    precision: str
    num_steps: int | None = None
    seconds_per_step: float | None = None
    seconds_per_sample: float | None = None
    tokens_per_second: float | None = None
    speed_factor: float | None = None
    seconds: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    peak_memory_bytes: int | None = None
    fits: bool | None = None
    quality: Quality = Quality()
    risk: str | None = None
    basis: Basis
    finish_at: str | None = None  # ISO, local time with offset
    phases: tuple[PhaseRow, ...] = ()
    published: PublishedFigures | None = None
    note: str | None = None  # one remark a line
    error: str | None = None  # why there is no time, e.g. "does not fit"
    tuned_from: str | None = None  # the preset that this row is the tuned twin of
    speedup: float | None = None  # predicted seconds of the baseline's whole run / this row's, of the same parts
    breakdown: BreakdownInfo | None = None
    calibrated: bool = True  # False: an unsteady machine, or too little was timed to tell; no 90 % interval
    measured_at: str | None = None  # ISO, local time with offset, where the basis is "cached"
    correction: CorrectionInfo | None = None
    run_as: str | None = None  # what `--run` takes where it is not the preset's name: a file
    is_sampled: bool = False  # trains on a part of the data
    blocked_by: tuple[str, ...] = ()  # safety rules: a run needs --force

    @property
    def run_name(self) -> str:
        """What `--run` takes."""
        return self.run_as or self.tuned_from or self.name

    def to_plain(self) -> dict[str, Any]:
        """The row as a JSON object; phases, published figures, an earlier measurement's time, a correction, a sample
        and safety rules only where there are any, `calibrated` only where it is false."""
        plain: dict[str, Any] = jsonio.to_plain(self)
        if not self.phases:
            del plain["phases"]
        if self.calibrated:
            del plain["calibrated"]
        for name in ("published", "measured_at", "correction", "breakdown", "tuned_from", "speedup", "run_as"):
            if getattr(self, name) is None:
                del plain[name]
        for name in ("is_sampled", "blocked_by"):
            if not getattr(self, name):
                del plain[name]
        return plain


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceInfo:
    name: str | None = None
    kind: str | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    name: str | None = None
    num_parameters: int | None = None
    num_trainable_parameters: int | None = None
    weights: Literal["random", "loaded"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInfo:
    num_examples: int | None = None  # training examples
    num_evaluation_examples: int | None = None
    source: str | None = None
    lengths: Literal["measured", "assumed"] | None = None
    num_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanReport:
    """The whole answer. A note that starts with "$ " is a command and is never wrapped."""

    device: DeviceInfo
    model: ModelInfo
    dataset: DatasetInfo
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """One JSON object, schema 1, with a newline at its end."""
        plain = {
            "schema": SCHEMA,
            "device": jsonio.to_plain(self.device),
            "model": jsonio.to_plain(self.model),
            "dataset": jsonio.to_plain(self.dataset),
            "rows": [row.to_plain() for row in self.rows],
            "notes": list(self.notes),
        }
        return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def published_report(dataset_size: int, step_time: float, presets: Iterable[Preset]) -> PlanReport:
    """The published mode's answer for `dataset_size` examples at `step_time` seconds per fp32 step.

    Raises:
        ValueError: as `planner.published.published_rows`.
    """
    rows = published_rows(dataset_size, step_time, presets)
    return PlanReport(
        device=DeviceInfo(),
        model=ModelInfo(),
        dataset=DatasetInfo(num_examples=dataset_size, source="count"),
        rows=tuple(row_from_published(row) for row in rows),
        notes=published_notes(dataset_size, step_time, rows),
    )


def row_from_published(row: PublishedRow) -> Row:
    """A published row as a `Row`: seconds are the formula's, low and high add the guide's overhead."""
    return Row(
        name=row.name,
        micro_batch_size=row.micro_batch_size,
        gradient_accumulation_steps=row.gradient_accumulation_steps,
        global_batch_size=row.global_batch_size,
        num_epochs=row.num_epochs,
        learning_rate=row.learning_rate,
        precision=row.precision,
        num_steps=row.num_steps,
        seconds_per_step=row.step_time / row.speed_factor,
        seconds_per_sample=row.seconds / row.num_examples_seen,
        speed_factor=row.speed_factor,
        seconds=row.seconds,
        seconds_low=row.seconds_low,
        seconds_high=row.seconds_high,
        quality=Quality(text=row.quality, source="published" if row.quality else None),
        risk=row.risk,
        basis="published",
        phases=tuple(
            PhaseRow(
                gradient_accumulation_steps=phase.gradient_accumulation_steps,
                learning_rate=phase.learning_rate,
                num_steps=phase.num_steps,
            )
            for phase in row.phases
        ),
        published=PublishedFigures(hours_low=row.hours_low, hours_high=row.hours_high, vram=row.vram),
        note=row.note,
    )
