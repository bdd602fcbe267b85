"""A report as text: the table, fitted to the terminal, and what is said under it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from planner.figures import (
    NOT_APPLICABLE,
    UNKNOWN,
    clock,
    duration,
    figure,
    gib,
    hours_text,
    promised_range,
)
from planner.remarks import LONGEST_ERROR_IN_A_CELL, cleaned, remarks
from planner.report import PlanReport, Row
from presets.text import printable

DOES_NOT_FIT = "does not fit"
_WIDEST_TEXT = 110  # characters; longer lines are hard to read on any terminal


@dataclass(frozen=True, kw_only=True, slots=True)
class _Column:
    """A column of a table; `compact` gives the cell (a line break allowed) where the table is too wide for one line."""

    title: str
    cell: Callable[[Row], str]
    compact: Callable[[Row], str] | None = None
    right: bool = False


def measured_text(
    report: PlanReport, *, now: datetime, width: int | None = None, ascii_only: bool = False, brief: bool = False
) -> str:
    """The table of a measured plan with its notes, at most `width` characters wide (None: as wide as it gets).

    `ascii_only` is for a stdout whose encoding has no box-drawing characters, `brief` as in `remarks`.
    """
    rows = tuple(map(cleaned, report.rows))
    return _text(_shown_columns(rows, now), rows, remarks(report, now, brief=brief), width, ascii_only)


def column_cells(report: PlanReport, now: datetime) -> tuple[list[tuple[str, bool]], list[list[str]]]:
    """The table's titles, each with whether its column stands to the right, and the rows' cells; for other forms."""
    rows = tuple(map(cleaned, report.rows))
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


def published_text(report: PlanReport, *, width: int | None = None, ascii_only: bool = False) -> str:
    """The published table with its notes; arguments as `measured_text`."""
    rows = tuple(map(cleaned, report.rows))
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
        return row.error if len(row.error) <= LONGEST_ERROR_IN_A_CELL else "failed"
    # A published figure in a table of measurements must not look like one of them.
    text = duration(row.seconds) + (" (published)" if row.basis == "published" else "")
    if row.seconds_low is None or row.seconds_high is None:
        return text
    return f"{text}{before}{promised_range(row.seconds_low, row.seconds_high, row.calibrated)}{after}"


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
