"""Where the time of each row goes, and what each change of a tuned twin gained. Formatting only."""

from __future__ import annotations

import textwrap

from tabulate import tabulate

from planner.compare import Comparison
from planner.figures import UNKNOWN, duration
from planner.speedup import speedup, speedup_by_loops
from planner.twin import Twin, twin_name
from presets.text import printable

PARTS = (
    ("forward_backward", "forward+backward"),
    ("optimizer", "optimizer"),
    ("start", "start"),
    ("load", "load"),
    ("compile", "compile"),
    ("data", "data"),
    ("evaluation", "evaluation"),
    ("samples", "samples"),
    ("checkpoints", "checkpoints"),
    ("save", "save"),
)


def explain_text(comparison: Comparison, *, width: int | None = None, ascii_only: bool = False) -> str:
    """A table of the seconds of each part, then a line for each twin."""
    shown = [row.breakdown for row in comparison.report.rows if row.breakdown is not None]
    titles = [part for part in PARTS if part[0] != "compile" or any(one.compile for one in shown)]
    rows = []
    for row in comparison.report.rows:
        if row.breakdown is None:
            continue
        parts = [getattr(row.breakdown, name) for name, _ in titles]
        rows.append([printable(row.name), *(UNKNOWN if part is None else duration(part) for part in parts)])
    lines = ["Where the time goes", ""]
    lines.append(
        tabulate(
            rows,
            headers=("", *(title for _, title in titles)),
            tablefmt="simple" if ascii_only else "simple_outline",
            disable_numparse=True,
            colalign=("left", *("right" for _ in titles)),
        )
        if rows
        else "nothing was measured"
    )
    twins = [candidate.twin for candidate in comparison.candidates if candidate.twin is not None]
    if twins:
        lines += [
            "",
            "What each twin gains over a whole run, then each change over the loop alone, one after the other",
        ]
    for twin in twins:
        text = f"{twin_name(twin.preset)}: {_gained(comparison, twin)}; loop: {twin.explained or twin.text}"
        lines.append(textwrap.fill(printable(text), min(width or 110, 110), subsequent_indent="  "))
    refused = sorted({reason for twin in twins for reason in twin.refused})
    lines += [f"not offered: {printable(reason)}" for reason in refused]
    return "\n".join(lines)


def _gained(comparison: Comparison, twin: Twin) -> str:
    """What its run gains, and over what: the baseline's, or where that does not fit that of the preset as written."""
    name = twin_name(twin.preset)
    over = next(row.speedup for row in comparison.report.rows if row.name == name)
    if over is not None:
        return f"{over:.2f}x over the baseline as written"
    tuned, written = comparison.estimates[name], comparison.estimates.get(twin.preset)
    if not tuned.train_seconds:
        return f"no speed-up can be told: it {'does not fit' if tuned.fits is False else 'could not be timed'} now"
    gain = speedup(written, tuned) or speedup_by_loops(twin.loop_gain, tuned)
    if gain is not None:
        return f"{gain:.2f}x over itself as written (the baseline could not be timed)"
    return "no speed-up can be told: as written it could not be timed"
