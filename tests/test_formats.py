"""The table's other forms: the same cells, the raw numbers, and nothing from outside that is more than text."""

from __future__ import annotations

import csv
import io
import json
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner.cli import cli
from planner.formats import CSV_FIELDS, as_text
from planner.report import DatasetInfo, DeviceInfo, ModelInfo, PlanReport, Quality, Row
from planner.table import measured_text

NOW = datetime(2026, 11, 25, 18, 0).astimezone()
NASTY = "<script>alert(1)</script> | *x* \x1b[31m"


def report(name: str = "recommended", note: str | None = None) -> PlanReport:
    row = Row(
        name=name,
        micro_batch_size=2,
        gradient_accumulation_steps=16,
        global_batch_size=32,
        num_epochs=1,
        learning_rate=2.5e-4,
        precision="fp16",
        num_steps=1969,
        seconds_per_step=3.25,
        seconds=6400.0,
        seconds_low=6300.0,
        seconds_high=6500.0,
        peak_memory_bytes=8 << 30,
        fits=True,
        quality=Quality(text="100 %", source="published"),
        basis="measured",
        note=note,
    )
    unfit = Row(
        name="aggressive",
        micro_batch_size=64,
        gradient_accumulation_steps=1,
        global_batch_size=64,
        num_epochs=1,
        learning_rate=3e-4,
        precision="fp16",
        basis="measured",
        fits=False,
        error="does not fit",
    )
    return PlanReport(
        device=DeviceInfo(name="a card"),
        model=ModelInfo(name="model"),
        dataset=DatasetInfo(num_examples=63_000, source="x.jsonl"),
        rows=(row, unfit),
        notes=("Data: 63,000 examples.",),
    )


class Page(HTMLParser):
    """Tags and cells of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


def test_markdown_has_the_cells_of_the_table() -> None:
    text = as_text(report(), "markdown", now=NOW)
    lines = text.splitlines()
    assert lines[0].startswith("| configuration | micro x GA |")
    assert set(lines[1]) <= set("|-: ")
    assert lines[1].count("|") == lines[0].count("|") == lines[2].count("|")
    assert "1 h 47 min" in lines[2]
    assert "1,969" in lines[2]
    assert "does not fit" in lines[3]
    assert lines[-1] == "- Data: 63,000 examples."


def test_csv_has_the_raw_numbers_and_reads_back() -> None:
    rows = list(csv.DictReader(io.StringIO(as_text(report(), "csv", now=NOW))))
    assert tuple(rows[0]) == CSV_FIELDS
    assert float(rows[0]["seconds"]) == 6400.0
    assert int(rows[0]["peak_memory_bytes"]) == 8 << 30
    assert rows[1]["seconds"] == ""
    assert rows[1]["error"] == "does not fit"


def test_a_name_that_a_spreadsheet_would_run_is_text() -> None:
    rows = list(csv.DictReader(io.StringIO(as_text(report("=HYPERLINK(1)"), "csv", now=NOW))))
    assert rows[0]["name"] == "'=HYPERLINK(1)"


def test_json_is_the_same_as_ever() -> None:
    assert as_text(report(), "json", now=NOW) == report().to_json()


def test_the_page_needs_nothing_and_runs_nothing() -> None:
    text = as_text(report(NASTY, NASTY), "html", now=NOW)
    page = Page(text)
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert "http://" not in text
    assert "https://" not in text
    assert "\x1b" not in text
    assert "prefers-color-scheme: dark" in text
    assert page.cells[0].startswith("<script>alert(1)</script>")


def test_markdown_shows_nasty_names_as_they_are() -> None:
    text = as_text(report(NASTY), "markdown", now=NOW)
    assert "\\<script>" in text
    assert "\\| \\*x\\*" in text
    assert "\x1b" not in text


def test_every_form_says_what_the_table_says() -> None:
    table = measured_text(report(note="tuned: micro-batch 2"), now=NOW)
    for kind in ("markdown", "html"):
        text = as_text(report(note="tuned: micro-batch 2"), kind, now=NOW)
        for words in ("recommended: tuned: micro-batch 2", "8.0 GiB", "3.25"):
            assert words in text
            assert words in table


@pytest.mark.parametrize("kind", ["markdown", "csv", "json", "html"])
def test_the_published_table_in_each_form(kind: str) -> None:
    done = CliRunner().invoke(cli, ["--dataset", "63000", "--step-time", "30", "--format", kind])
    assert done.exit_code == 0
    if kind == "json":
        assert json.loads(done.stdout)["rows"][0]["num_steps"] == 3938
    elif kind == "csv":
        assert next(iter(csv.DictReader(io.StringIO(done.stdout))))["num_steps"] == "3938"
    else:
        assert "3,938" in done.stdout
        assert "32.8 h" in done.stdout


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(("name", "width"), [("wide", None), ("narrow", 60), ("ascii", 100)])
def test_the_table_is_the_golden_one(name: str, width: int | None) -> None:
    text = measured_text(report(note="tuned: micro-batch 2"), now=NOW, width=width, ascii_only=name == "ascii")
    assert text == (GOLDEN / f"table-{name}.txt").read_text(encoding="utf-8")
    assert width is None or max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize(("kind", "ending"), [("markdown", "md"), ("csv", "csv"), ("html", "html")])
def test_each_form_is_the_golden_one(kind: str, ending: str) -> None:
    text = as_text(report(note="tuned: micro-batch 2"), kind, now=NOW)
    assert text == (GOLDEN / f"table.{ending}").read_text(encoding="utf-8")
