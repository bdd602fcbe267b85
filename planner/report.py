"""Numbers -> rows -> tables and JSON. Formatting only: it decides nothing and measures nothing.

`Row` is one configuration, whatever mode it comes from; `PlanReport` is the whole answer. Both are plain data, so the
table, the JSON and later forms say the same. None means unknown: "unknown" in a table, null in JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from planner.published import PublishedRow, published_notes, published_rows
from presets import jsonio
from presets.schema import Preset
from presets.text import printable

Basis = Literal["measured", "cached", "published"]

SCHEMA = 1
UNKNOWN = "unknown"
NOT_APPLICABLE = "–"
DOES_NOT_FIT = "does not fit"
GIB = 1024**3
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_LONGEST_ERROR_IN_A_CELL = 24  # characters; a longer one goes under the table
_WIDEST_TEXT = 110  # characters; longer lines are hard to read on any terminal


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
    speedup: float | None = None  # the baseline's seconds / this row's, in this table
    breakdown: BreakdownInfo | None = None
    calibrated: bool = True  # False: the range is what was seen on an unsteady machine, not a 90 % interval
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


def finish_at(now: datetime, seconds: float | None) -> str | None:
    """When a run that starts `now` (with offset) is done, as ISO local time with offset; None where that is unknown."""
    if seconds is None or not math.isfinite(seconds):
        return None
    try:
        # Through UTC and back to this machine's zone, so that a change to summer time in between is counted.
        return (now + timedelta(seconds=seconds)).astimezone().isoformat(timespec="seconds")
    except OverflowError:  # beyond the year 9999
        return None


# Formatting of single figures.


def duration(seconds: float | None, *, short: bool = False) -> str:
    """Seconds as text: "0.4 s", "45 s", "12 min 05 s", "2 h 05 min", from 48 h on "3 d 04 h". Short: no last unit."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return UNKNOWN
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = math.floor(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _two_units(whole, 60, "min", "s", short)
    minutes = math.floor(seconds / 60 + 0.5)
    if minutes < 48 * 60:
        return _two_units(minutes, 60, "h", "min", short)
    return _two_units(math.floor(seconds / 3600 + 0.5), 24, "d", "h", short)


def _two_units(amount: int, ratio: int, large: str, small: str, short: bool) -> str:
    text = f"{amount // ratio:,} {large} {amount % ratio:02d}"
    return text if short else f"{text} {small}"


def duration_range(low: float | None, high: float | None) -> str:
    """ "1 h 58 – 2 h 12", or "unknown" where a bound is."""
    if low is None or high is None:
        return UNKNOWN
    return f"{duration(low, short=True)} – {duration(high, short=True)}"


def hours_text(seconds: float | None) -> str:
    """Seconds as the guide prints times: "32.8 h"; under one hour "12 min", under one minute as `duration`."""
    if seconds is None or not math.isfinite(seconds) or seconds < 59.5:
        return duration(seconds)
    return f"{seconds / 60:.0f} min" if seconds < 59.5 * 60 else f"{seconds / 3600:,.1f} h"


def gib(num_bytes: float | None) -> str:
    """Bytes as GiB (1024^3): "0.15 GiB", "11.0 GiB"."""
    if num_bytes is None or not math.isfinite(num_bytes):
        return UNKNOWN
    amount = num_bytes / GIB
    return f"{amount:.2f} GiB" if amount < 0.995 else f"{amount:,.1f} GiB"


def clock(moment: datetime, now: datetime) -> str:
    """A moment as "Mon 12:05"; with the date if it is over six days away, with the year if that is another one."""
    moment = moment.astimezone(now.tzinfo) if now.tzinfo else moment.astimezone().replace(tzinfo=None)
    text = f"{WEEKDAYS[moment.weekday()]} {moment:%H:%M}"
    # Six days, not seven: a week later has the same weekday, and "Mon" would mean two days.
    if abs(moment - now) <= timedelta(days=6):
        return text
    date = f"{moment.day} {MONTHS[moment.month - 1]}" + (f" {moment.year}" if moment.year != now.year else "")
    return f"{WEEKDAYS[moment.weekday()]} {date} {moment:%H:%M}"


def ago(moment: datetime, now: datetime) -> str:
    """How long something lies back, in its largest unit: "12 s ago", "3 min ago", "5 h ago", "9 d ago"."""
    seconds = max(0.0, (now - moment).total_seconds())  # a clock that was set back does not make it the future
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= (2 if unit == "d" else 1) * size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{int(seconds)} s ago"


def figure(value: float | None) -> str:
    """A measured number with three significant digits: "0.731", "3.55", "23.1", "1,234"."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    for limit, digits in ((0.9995, 3), (9.995, 2), (99.95, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}g}" if limit < 1 else f"{value:.{digits}f}"
    return f"{value:,.0f}"


# Tables.


@dataclass(frozen=True, kw_only=True, slots=True)
class _Column:
    """A column of a table; `compact` gives the cell (a line break allowed) where the table is too wide for one line."""

    title: str
    cell: Callable[[Row], str]
    compact: Callable[[Row], str] | None = None
    right: bool = False


def measured_text(report: PlanReport, *, now: datetime, width: int | None = None, ascii_only: bool = False) -> str:
    """The table of a measured plan with its notes, at most `width` characters wide (None: as wide as it gets).

    `ascii_only` is for a stdout whose encoding has no box-drawing characters.
    """
    rows = tuple(map(_cleaned, report.rows))
    return _text(_shown_columns(rows, now), rows, remarks(report, now), width, ascii_only)


def column_cells(report: PlanReport, now: datetime) -> tuple[list[tuple[str, bool]], list[list[str]]]:
    """The table's titles, each with whether its column stands to the right, and the rows' cells; for other forms."""
    rows = tuple(map(_cleaned, report.rows))
    is_published = all(row.basis == "published" for row in rows)
    columns = _published_columns() if is_published else _shown_columns(rows, now)
    return [(column.title, column.right) for column in columns], [
        [column.cell(row) for column in columns] for row in rows
    ]


def _shown_columns(rows: Sequence[Row], now: datetime) -> list[_Column]:
    columns = _measured_columns(now)
    if any(row.tuned_from for row in rows):
        return columns
    # The presets as written differ in little else than their batches.
    return [column for column in columns if column.title != "speed-up"]


_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def remarks(report: PlanReport, now: datetime) -> tuple[str, ...]:
    """What stands under the table: what rows have to say, said once for all that say it, and the report's notes."""
    rows = tuple(map(_cleaned, report.rows))
    notes = tuple(map(printable, report.notes))
    if all(row.basis == "published" for row in rows):
        return notes
    said: dict[tuple[str, int], list[tuple[str, str]]] = {}  # what several rows have to say is said once, (row, text)
    for row in rows:
        alike: Counter[str] = Counter()  # what one row says twice with other numbers are two things
        for text in _under_the_table(row):
            form = _NUMBER.sub("#", text)
            said.setdefault((form, alike[form]), []).append((row.name, text))
            alike[form] += 1
    everyone = [row.name for row in rows if row.error is None]
    lines = []
    for told in said.values():
        names = [name for name, _ in told]
        who = "all rows" if names == everyone and len(names) > 1 else " / ".join(names)
        lines.append(f"{who}: {_as_one([text for _, text in told])}")
    cached: dict[str, list[str]] = {}
    for row in rows:
        if row.basis == "cached" and row.error is None:
            age = "earlier" if row.measured_at is None else ago(datetime.fromisoformat(row.measured_at), now)
            cached.setdefault(age, []).append(row.name)
    for age, names in cached.items():
        who = "all rows" if names == everyone and len(names) > 1 else " / ".join(names)
        again = "" if age == "earlier" else " --fresh measures again."
        lines.append(f"Measured {age} on this device, not now: {who}.{again}")
    return (*lines, *notes)


def _as_one(texts: list[str]) -> str:
    """Texts that differ in their numbers only, as one: "32 to 64" where they do."""
    numbers = [_NUMBER.findall(text) for text in texts]
    spans = []
    for of_one_place in zip(*numbers, strict=True):
        known = sorted(set(of_one_place), key=lambda number: float(number.replace(",", "")))
        spans.append(known[0] if len(known) == 1 else f"{known[0]} to {known[-1]}")
    filled = iter(spans)
    return _NUMBER.sub(lambda _: next(filled), texts[0])


def published_text(report: PlanReport, *, width: int | None = None, ascii_only: bool = False) -> str:
    """The published table with its notes; arguments as `measured_text`."""
    rows = tuple(map(_cleaned, report.rows))
    columns = _published_columns()
    if all(row.published is None or row.published.hours_low is None for row in rows):
        columns = [column for column in columns if column.title != "published time"]
    if width is not None and _width(_table(columns, rows, compact=False, ascii_only=ascii_only)) > width:
        # What the presets' own files and the note on overhead say anyway, so that the rest stays one table at 80.
        columns = [column for column in columns if column.title not in ("micro x GA", "with overhead")]
    return _text(columns, rows, report.notes, width, ascii_only)


def _measured_columns(now: datetime) -> list[_Column]:
    return [
        _Column(title="configuration", cell=lambda row: row.name),
        _Column(title="micro x GA", cell=_split),
        _Column(title="steps", cell=_steps, right=True),
        _Column(title="s/step", cell=lambda row: _unless_error(row, figure(row.seconds_per_step)), right=True),
        _Column(title="speed factor", cell=_speed_factor, right=True),
        _Column(title="time", cell=lambda row: _time(row, " (", ")"), compact=lambda row: _time(row, "\n", "")),
        _Column(title="speed-up", cell=_speedup, right=True),
        _Column(title="finish", cell=lambda row: _finish(row, now, " "), compact=lambda row: _finish(row, now, "\n")),
        _Column(title="quality", cell=lambda row: _quality(row, " "), compact=lambda row: _quality(row, "\n")),
        _Column(
            title="memory", cell=lambda row: _memory(row, ", "), compact=lambda row: _memory(row, "\n"), right=True
        ),
        _Column(title="risk (published)", cell=lambda row: row.risk or UNKNOWN),
    ]


def _published_columns() -> list[_Column]:
    return [
        _Column(title="configuration", cell=lambda row: row.name),
        _Column(title="micro x GA", cell=_split),
        _Column(title="steps", cell=_steps, right=True),
        _Column(title="formula time", cell=lambda row: hours_text(row.seconds), right=True),
        _Column(title="with overhead", cell=_overhead, right=True),
        _Column(title="published time", cell=_published_time, right=True),
        _Column(title="quality", cell=lambda row: row.quality.text or UNKNOWN),
        _Column(title="VRAM", cell=lambda row: (row.published and row.published.vram) or UNKNOWN),
        _Column(title="risk", cell=lambda row: row.risk or UNKNOWN),
    ]


def _speedup(row: Row) -> str:
    return UNKNOWN if row.speedup is None else f"{row.speedup:.2f}x"


def _cleaned(row: Row) -> Row:
    """The row with every text in it made printable, before line breaks of our own come in."""
    return dataclasses.replace(
        row,
        name=printable(row.name),
        quality=Quality(text=_printable_or_none(row.quality.text), source=_printable_or_none(row.quality.source)),
        risk=_printable_or_none(row.risk),
        note=None if row.note is None else "\n".join(map(printable, row.note.split("\n"))),
        error=_printable_or_none(row.error),
    )


def _printable_or_none(text: str | None) -> str | None:
    return None if text is None else printable(text)


def _unless_error(row: Row, text: str) -> str:
    return text if row.error is None else NOT_APPLICABLE


def _split(row: Row) -> str:
    accumulations = [phase.gradient_accumulation_steps for phase in row.phases] or [row.gradient_accumulation_steps]
    return f"{row.micro_batch_size} x {'/'.join(str(steps) for steps in accumulations)}"


def _steps(row: Row) -> str:
    return UNKNOWN if row.num_steps is None else f"{row.num_steps:,}"


def _speed_factor(row: Row) -> str:
    return _unless_error(row, UNKNOWN if row.speed_factor is None else f"{row.speed_factor:.2f}")


def _time(row: Row, before: str, after: str) -> str:
    if row.error is not None:
        return row.error if len(row.error) <= _LONGEST_ERROR_IN_A_CELL else "failed"
    # A published figure in a table of measurements must not look like one of them.
    text = duration(row.seconds) + (" (published)" if row.basis == "published" else "")
    if row.seconds_low is None or row.seconds_high is None:
        return text
    return f"{text}{before}{duration_range(row.seconds_low, row.seconds_high)}{after}"


def _finish(row: Row, now: datetime, before_clock: str) -> str:
    if row.error is not None:
        return NOT_APPLICABLE
    if row.finish_at is None:
        return UNKNOWN
    date, time = clock(datetime.fromisoformat(row.finish_at), now).rsplit(" ", 1)
    return f"{date}{before_clock if ' ' in date else ' '}{time}"  # "Mon 12:05" is short enough for one line


def _quality(row: Row, before: str) -> str:
    if row.quality.text is None:
        return UNKNOWN
    return row.quality.text + (f"{before}({row.quality.source})" if row.quality.source else "")


def _memory(row: Row, before: str) -> str:
    too_much = row.fits is False and row.peak_memory_bytes is not None
    return gib(row.peak_memory_bytes) + (f"{before}too much" if too_much else "")


def _overhead(row: Row) -> str:
    if row.seconds_low is None or row.seconds_high is None:
        return UNKNOWN
    return f"{row.seconds_low / 3600:,.1f} – {row.seconds_high / 3600:,.1f} h"


def _published_time(row: Row) -> str:
    published = row.published
    if published is None or published.hours_low is None:
        return UNKNOWN
    if published.hours_high is None or published.hours_high == published.hours_low:
        return f"{published.hours_low:g} h"
    return f"{published.hours_low:g}-{published.hours_high:g} h"


def _under_the_table(row: Row) -> list[str]:
    error = row.error if row.error is not None and len(row.error) > _LONGEST_ERROR_IN_A_CELL else None
    return [text for text in (error, *(row.note or "").split("\n")) if text]


def _text(
    columns: Sequence[_Column],
    rows: Sequence[Row],
    notes: Iterable[str],
    width: int | None,
    ascii_only: bool,
) -> str:
    blocks = _layout(columns, rows, width, ascii_only)
    lines = "\n".join(_wrap(note, width) for note in notes)
    text = f"{blocks}\n\n{lines}" if lines else blocks
    if ascii_only:
        text = text.replace("–", "-").encode("ascii", "backslashreplace").decode("ascii")
    return text + "\n"


def _wrap(note: str, width: int | None) -> str:
    note = printable(note)
    if note.startswith("$ "):  # a command has to stay in one piece to be copied
        return note
    limit = _WIDEST_TEXT if width is None else min(width, _WIDEST_TEXT)
    return textwrap.fill(note, max(limit, 20), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _layout(columns: Sequence[_Column], rows: Sequence[Row], width: int | None, ascii_only: bool) -> str:
    """The widest form that fits: one line per row, then two, then two tables, then one block per row."""
    table = _table(columns, rows, compact=False, ascii_only=ascii_only)
    if width is None or _width(table) <= width:
        return table
    groups = [[columns[0]]]
    for column in columns[1:]:
        for group in groups:
            if _width(_table([*group, column], rows, compact=True, ascii_only=ascii_only)) <= width:
                group.append(column)
                break
        else:
            groups.append([columns[0], column])
    tables = [_table(group, rows, compact=True, ascii_only=ascii_only) for group in groups]
    if len(tables) > 2 or max(map(_width, tables)) > width:
        return _stacked(columns, rows, width)
    return "\n".join(tables)


def _table(columns: Sequence[_Column], rows: Sequence[Row], *, compact: bool, ascii_only: bool) -> str:
    from tabulate import tabulate

    titles = [column.title.replace(" ", "\n", 1) if compact else column.title for column in columns]
    # The titles go in as the first row: tabulate widens every column by two where it is told of headers.
    table = tabulate(
        [titles, *([_cell(column, row, compact) for column in columns] for row in rows)],
        tablefmt="outline" if ascii_only else "simple_outline",
        disable_numparse=True,  # every cell is text already; tabulate would read "1e-5" or "100 %" its own way
        colalign=["right" if column.right else "left" for column in columns],
    )
    lines = table.splitlines()
    below_titles = 1 + max(title.count("\n") + 1 for title in titles)
    lines.insert(below_titles, lines[0].translate(str.maketrans("┌┬┐-", "├┼┤=")))
    return "\n".join(lines)


def _cell(column: _Column, row: Row, compact: bool) -> str:
    return column.compact(row) if compact and column.compact is not None else column.cell(row)


def _width(table: str) -> int:
    return max(len(line) for line in table.splitlines())


def _stacked(columns: Sequence[_Column], rows: Sequence[Row], width: int) -> str:
    """One block per row, one line per column: readable at any width, and nothing is left out."""
    indent = 2 + max(len(column.title) for column in columns[1:]) + 2
    blocks = []
    for row in rows:
        lines = [columns[0].cell(row)]
        for column in columns[1:]:
            text = f"  {column.title:<{indent - 4}}  {column.cell(row)}"
            lines.append(textwrap.fill(text, max(width, 24), subsequent_indent=" " * min(indent, 8)))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
