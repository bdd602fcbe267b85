"""What is said under a table: once for all rows that have the same to say, in few words where it is a lot."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from datetime import datetime

from planner.figures import DOUBT, ago
from planner.report import PlanReport, Quality, Row
from presets.text import printable

LONGEST_ERROR_IN_A_CELL = 24  # characters; a longer one goes under the table
# How remarks begin that doubt the timings for what went on meanwhile. All end in the same advice, in other words.
DOUBTFUL = (
    "this machine is not steady",
    "too few timings to tell",
    "whole windows took",
    "the host took",
    "other programs used",
    "the GPU's clock went",
    "only one round could be timed",
)
_ADVISED = re.compile(r"--fresh --budget (\d+)")


def cleaned(row: Row) -> Row:
    """The row with every text in it made printable, before line breaks of our own come in."""
    return replace(
        row,
        name=printable(row.name),
        quality=Quality(text=_printable_or_none(row.quality.text), source=_printable_or_none(row.quality.source)),
        risk=_printable_or_none(row.risk),
        note=None if row.note is None else "\n".join(map(printable, row.note.split("\n"))),
        error=_printable_or_none(row.error),
    )


def _printable_or_none(text: str | None) -> str | None:
    return None if text is None else printable(text)


# A comma is of the number only where three digits follow it: else it ends a part of the sentence.
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")


def remarks(report: PlanReport, now: datetime, *, brief: bool = False) -> tuple[str, ...]:
    """What stands under the table: what rows have to say, said once for all that say it, and the report's notes.

    Args:
        brief: several reasons to doubt the timings become one remark; `--explain` shows each.
    """
    rows = tuple(map(cleaned, report.rows))
    notes = _notes([row.name for row in rows], tuple(map(printable, report.notes)))
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
    found: list[tuple[str, str]] = []
    for told in said.values():
        names = [name for name, _ in told]
        who = "all rows" if names == everyone and len(names) > 1 else " / ".join(names)
        found.append((who, _as_one([text for _, text in told])))
    lines = [f"{who}: {text}" for who, text in (_briefly(found) if brief else found)]
    if any(not row.calibrated and row.seconds_low is not None and row.error is None for row in rows):
        lines.append(f"{DOUBT}; the row's warnings say why.")
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


def _briefly(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(who, remark): where several doubt the timings of the same rows, one that names all their reasons."""
    doubts: dict[str, list[str]] = {}
    for who, text in found:
        if text.startswith(DOUBTFUL):
            doubts.setdefault(who, []).append(text)
    shorter = []
    for who, text in found:
        of_these = doubts.get(who, [])
        if len(of_these) < 2 or text not in of_these:
            shorter.append((who, text))
        elif text == of_these[0]:
            advised = [int(seconds) for each in of_these for seconds in _ADVISED.findall(each)]
            longest = f"--fresh --budget {max(advised)}" if advised else "a longer --budget"
            reasons = "; ".join(each.split(". ")[0].rstrip(".") for each in of_these)
            advice = f"Close other programs, or measure again with {longest}. --explain says more."
            shorter.append(
                (who, f"{reasons}. The range reaches that far, and holds if the run meets the same. {advice}")
            )
    return shorter


def _notes(names: list[str], notes: tuple[str, ...]) -> tuple[str, ...]:
    """The report's notes; those of several rows that differ in their numbers only, as one."""
    known = {name[:1].upper() + name[1:] for name in names}
    alike: dict[str, list[tuple[str, str]]] = {}
    for note in notes:
        name, _, text = note.partition(": ")
        is_of_a_row = name in known and text
        alike.setdefault(_NUMBER.sub("#", text) if is_of_a_row else note, []).append((name, text))
    lines = []
    for said in alike.values():
        who = " / ".join(dict.fromkeys(name for name, _ in said))
        text = _as_one([text for _, text in said])
        lines.append(f"{who}: {text}" if text else who)
    return tuple(lines)


def _under_the_table(row: Row) -> list[str]:
    error = row.error if row.error is not None and len(row.error) > LONGEST_ERROR_IN_A_CELL else None
    return [text for text in (error, *(row.note or "").split("\n")) if text]
