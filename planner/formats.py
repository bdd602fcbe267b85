"""The table in other forms: Markdown, CSV, HTML. Cells are those of the terminal's table; CSV has the raw numbers."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Sequence
from datetime import datetime

from planner.remarks import remarks
from planner.report import PlanReport
from planner.table import column_cells
from presets.text import printable, printable_lines

FORMATS = ("table", "markdown", "csv", "json", "html")

CSV_FIELDS = (
    "name", "tuned_from", "micro_batch_size", "gradient_accumulation_steps", "global_batch_size", "num_epochs",
    "learning_rate", "precision", "num_steps", "seconds_per_step", "seconds_per_sample", "tokens_per_second",
    "speed_factor", "seconds", "seconds_low", "seconds_high", "peak_memory_bytes", "fits", "risk", "basis", "finish_at",
    "speedup", "calibrated", "measured_at", "quality", "error",
)  # fmt: skip

STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #f6f8fa; --text: #1f2328; --dim: #59636e; --back: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3d444d; --soft: #151b23; --text: #f0f6fc; --dim: #9198a1; --back: #0d1117; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 1.5rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; }
.dim { color: var(--dim); }
.wide { overflow-x: auto; font-size: .875rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .4rem .5rem; text-align: left; white-space: nowrap; }
th { background: var(--soft); }
td.right, th.right { text-align: right; }
ul { padding-left: 1.2rem; } li { margin: .25rem 0; overflow-wrap: anywhere; }
figure { margin: 1rem 0; overflow-x: auto; } figure svg { width: 100%; min-width: 32rem; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: .5rem 0; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; } .said dd { white-space: pre-wrap; }
@media (max-width: 40rem) { body { padding: 1rem; } dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
"""


def markdown(report: PlanReport, *, now: datetime) -> str:
    """A table and a list of remarks."""
    titles, rows = column_cells(report, now)
    lines = [_pipes([title for title, _ in titles])]
    lines.append("|" + "|".join(" ---: " if right else " --- " for _, right in titles) + "|")
    lines += [_pipes(cells) for cells in rows]
    notes = [f"- {_marked(note)}" for note in remarks(report, now)]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def comma_separated(report: PlanReport) -> str:
    """One line a row: seconds, bytes and tokens as numbers, empty where unknown."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_FIELDS)
    for row in report.rows:
        values = {name: getattr(row, name) for name in CSV_FIELDS} | {"quality": row.quality.text}
        writer.writerow([_plain(value) for value in values.values()])
    return out.getvalue()


def page(report: PlanReport, *, now: datetime) -> str:
    """One page that needs nothing else: no script, no network."""
    data, model, device = report.dataset, report.model, report.device
    facts = [
        ("model", model.name),
        ("data", data.source),
        ("training examples", None if data.num_examples is None else f"{data.num_examples:,}"),
        ("device", device.name),
        ("made", f"{now:%Y-%m-%d %H:%M}"),
    ]
    body = [
        "<h1>Training plan</h1>",
        definitions(facts),
        '<div class="wide">' + html_table(report, now=now) + "</div>",
        bullets(remarks(report, now)),
    ]
    return document("Training plan", body)


def html_table(report: PlanReport, *, now: datetime) -> str:
    titles, rows = column_cells(report, now)

    def line(kind: str, cells: Iterable[str]) -> str:
        made = (
            f"<{kind}{' class=right' if right else ''}>{escaped(cell)}</{kind}>"
            for cell, (_, right) in zip(cells, titles, strict=True)
        )
        return "<tr>" + "".join(made) + "</tr>"

    head = line("th", (title for title, _ in titles))
    return f"<table><thead>{head}</thead><tbody>{''.join(line('td', cells) for cells in rows)}</tbody></table>"


def definitions(facts: Sequence[tuple[str, str | None]]) -> str:
    """Names and values; what is unknown is left out."""
    made = (f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in facts if value is not None)
    return f"<dl>{''.join(made)}</dl>"


def escaped(text: str) -> str:
    """Text that HTML shows as it is: no tag, and nothing that turns the line round for who reads the page."""
    return html.escape(printable_lines(text))


def bullets(texts: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escaped(text)}</li>" for text in texts) + "</ul>"


def document(title: str, body: Iterable[str]) -> str:
    """A whole page around what is given, which is taken as it is: texts in it are escaped already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing may be fetched or run, whatever a name in the data looks like.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_marked(cell) for cell in cells) + " |"


def _marked(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{char}" if char in "\\|*_`<[#" else char for char in text)


def _plain(value: object) -> object:
    if not isinstance(value, str):
        return "" if value is None else value
    text = printable(value)
    # A spreadsheet would take it for a formula and run it: the apostrophe makes it text, and is all that is changed.
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") else text


def as_text(report: PlanReport, kind: str, *, now: datetime) -> str:
    """The report in one of `FORMATS` but "table", whose width depends on the terminal."""
    if kind == "json":
        return report.to_json()
    if kind == "csv":
        return comma_separated(report)
    return markdown(report, now=now) if kind == "markdown" else page(report, now=now)
