"""Tables and JSON: what a reader sees, to the character, and what a program may rely on."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime, timedelta, timezone

import pytest

from planner.figures import GIB
from planner.formats import as_text
from planner.remarks import remarks
from planner.report import (
    DatasetInfo,
    DeviceInfo,
    ModelInfo,
    PhaseRow,
    PlanReport,
    Quality,
    Row,
    published_report,
)
from planner.table import measured_text, published_text
from presets.schema import load_preset, parse_preset, preset_names
from presets.text import printable

ZONE = timezone(timedelta(hours=1))
NOW = datetime(2026, 11, 23, 10, 0, tzinfo=ZONE)  # a Monday

BASELINE = Row(
    name="baseline",
    micro_batch_size=1,
    gradient_accumulation_steps=16,
    global_batch_size=16,
    num_epochs=1,
    learning_rate=2e-4,
    precision="fp32",
    num_steps=3938,
    seconds_per_step=3.812,
    seconds_per_sample=0.2383,
    tokens_per_second=812.0,
    speed_factor=1.0,
    seconds=15_012.0,
    seconds_low=14_700.0,
    seconds_high=15_480.0,
    peak_memory_bytes=int(9.2 * GIB),
    fits=True,
    quality=Quality(text="100 %", source="published"),
    risk="None",
    basis="measured",
    finish_at="2026-11-23T14:10:12+01:00",
)
TWO_STAGE = dataclasses.replace(
    BASELINE,
    name="two-stage",
    gradient_accumulation_steps=64,
    global_batch_size=64,
    learning_rate=3e-4,
    precision="fp16",
    num_steps=1298,
    seconds_per_step=8.27,
    speed_factor=1.42,
    seconds=10_735.0,
    seconds_low=10_500.0,
    seconds_high=11_060.0,
    peak_memory_bytes=int(7.4 * GIB),
    quality=Quality(),
    risk=None,
    basis="cached",
    finish_at="2026-11-23T12:58:55+01:00",
    phases=(
        PhaseRow(gradient_accumulation_steps=64, learning_rate=3e-4, num_steps=985),
        PhaseRow(gradient_accumulation_steps=32, learning_rate=2.5e-4, num_steps=313),
    ),
    note="fp16 runs as fp32 on a CPU",
)
TOO_LARGE = dataclasses.replace(
    BASELINE,
    name="aggressive",
    gradient_accumulation_steps=64,
    global_batch_size=64,
    num_steps=985,
    seconds_per_step=None,
    seconds_per_sample=None,
    tokens_per_second=None,
    speed_factor=None,
    seconds=None,
    seconds_low=None,
    seconds_high=None,
    peak_memory_bytes=None,
    fits=False,
    finish_at=None,
    error="does not fit",
)
PLAN = PlanReport(
    device=DeviceInfo(name="a card", kind="cuda", memory_bytes=11 * GIB),
    model=ModelInfo(name="demo", num_parameters=2_500_000, num_trainable_parameters=40_000, weights="loaded"),
    dataset=DatasetInfo(
        num_examples=63_000, num_evaluation_examples=1_000, source="count", lengths="assumed", num_tokens=9_000_000
    ),
    rows=(BASELINE, TWO_STAGE, TOO_LARGE),
    notes=("Accumulation alone saved 0.3 % here (measured).", "$ plan --run recommended --dataset 63000"),
)

WIDE = """\
┌───────────────┬────────────┬───────┬────────┬──────────────┬──────────────────────────────┬───────────┬───────────────────┬─────────┬──────────────────┐
│ configuration │ micro x GA │ steps │ s/step │ speed factor │ time                         │ finish    │ quality           │  memory │ risk (published) │
├───────────────┼────────────┼───────┼────────┼──────────────┼──────────────────────────────┼───────────┼───────────────────┼─────────┼──────────────────┤
│ baseline      │ 1 x 16     │ 3,938 │   3.81 │         1.00 │ 4 h 10 min (4 h 05 – 4 h 18) │ Mon 14:10 │ 100 % (published) │ 9.2 GiB │ None             │
│ two-stage     │ 1 x 64/32  │ 1,298 │   8.27 │         1.42 │ 2 h 59 min (2 h 55 – 3 h 04) │ Mon 12:58 │ unknown           │ 7.4 GiB │ unknown          │
│ aggressive    │ 1 x 64     │   985 │      – │            – │ does not fit                 │ –         │ 100 % (published) │ unknown │ None             │
└───────────────┴────────────┴───────┴────────┴──────────────┴──────────────────────────────┴───────────┴───────────────────┴─────────┴──────────────────┘

two-stage: fp16 runs as fp32 on a CPU
Measured earlier on this device, not now: two-stage.
Accumulation alone saved 0.3 % here (measured).
$ plan --run recommended --dataset 63000
"""  # noqa: E501

NARROW = """\
┌───────────────┬───────────┬───────┬────────┬────────┬─────────────────┐
│ configuration │ micro     │ steps │ s/step │  speed │ time            │
│               │ x GA      │       │        │ factor │                 │
├───────────────┼───────────┼───────┼────────┼────────┼─────────────────┤
│ baseline      │ 1 x 16    │ 3,938 │   3.81 │   1.00 │ 4 h 10 min      │
│               │           │       │        │        │ 4 h 05 – 4 h 18 │
│ two-stage     │ 1 x 64/32 │ 1,298 │   8.27 │   1.42 │ 2 h 59 min      │
│               │           │       │        │        │ 2 h 55 – 3 h 04 │
│ aggressive    │ 1 x 64    │   985 │      – │      – │ does not fit    │
└───────────────┴───────────┴───────┴────────┴────────┴─────────────────┘
┌───────────────┬───────────┬─────────────┬─────────┬─────────────┐
│ configuration │ finish    │ quality     │  memory │ risk        │
│               │           │             │         │ (published) │
├───────────────┼───────────┼─────────────┼─────────┼─────────────┤
│ baseline      │ Mon 14:10 │ 100 %       │ 9.2 GiB │ None        │
│               │           │ (published) │         │             │
│ two-stage     │ Mon 12:58 │ unknown     │ 7.4 GiB │ unknown     │
│ aggressive    │ –         │ 100 %       │ unknown │ None        │
│               │           │ (published) │         │             │
└───────────────┴───────────┴─────────────┴─────────┴─────────────┘

two-stage: fp16 runs as fp32 on a CPU
Measured earlier on this device, not now: two-stage.
Accumulation alone saved 0.3 % here (measured).
$ plan --run recommended --dataset 63000
"""

STACKED = """\
baseline
  micro x GA        1 x 16
  steps             3,938
  s/step            3.81
  speed factor      1.00
  time              4 h 10 min (4 h 05 – 4 h
        18)
  finish            Mon 14:10
  quality           100 % (published)
  memory            9.2 GiB
  risk (published)  None

two-stage
  micro x GA        1 x 64/32
  steps             1,298
  s/step            8.27
  speed factor      1.42
  time              2 h 59 min (2 h 55 – 3 h
        04)
  finish            Mon 12:58
  quality           unknown
  memory            7.4 GiB
  risk (published)  unknown

aggressive
  micro x GA        1 x 64
  steps             985
  s/step            –
  speed factor      –
  time              does not fit
  finish            –
  quality           100 % (published)
  memory            unknown
  risk (published)  None

two-stage: fp16 runs as fp32 on a CPU
Measured earlier on this device, not now:
  two-stage.
Accumulation alone saved 0.3 % here
  (measured).
$ plan --run recommended --dataset 63000
"""

PUBLISHED_AT_80 = """\
┌───────────────┬───────┬─────────┬───────────┬─────────┬─────────┬─────────┐
│ configuration │ steps │ formula │ published │ quality │ VRAM    │ risk    │
│               │       │    time │      time │         │         │         │
├───────────────┼───────┼─────────┼───────────┼─────────┼─────────┼─────────┤
│ baseline      │ 3,938 │  32.8 h │      35 h │ 100 %   │ 9 GB    │ None    │
│ recommended   │ 1,969 │  12.6 h │   13-18 h │ 100 %   │ 8 GB    │ None    │
│ aggressive    │   984 │   6.3 h │    8-10 h │ 95-98 % │ 8 GB    │ Low     │
│ progressive   │ 1,469 │   9.4 h │      20 h │ unknown │ unknown │ unknown │
└───────────────┴───────┴─────────┴───────────┴─────────┴─────────┴─────────┘

Published figures, not measured: they come from a guide written for 63,000
  messages on an RTX 2080 Ti. Leave out --step-time to measure on this device.
The formula charges a step the same at any gradient accumulation (GA): 30 s
  here, / 1.3 with FP16. On a real device a step at GA 32 does twice the work of
  one at GA 16, so GA alone saves next to nothing.
Steps are rounded to the nearest whole; a real run also trains its last, partial
  window.
With overhead: the formula's time + 1.4 h to 2.2 h, the span between formula and
  printed time in the guide's three worked examples (baseline, recommended,
  aggressive). The other published times do not follow from the formula.
recommended: VRAM stands as 8-9 GB in another place of the guide.
aggressive: risk stands as Moderate in another place of the guide.
progressive: phase 3 (GA 16) is never reached with 63,000 examples.
"""


def test_a_range_that_is_not_a_90_percent_range_is_marked_in_every_form() -> None:
    unsteady = dataclasses.replace(PLAN, rows=(dataclasses.replace(BASELINE, calibrated=False), TWO_STAGE))
    texts = [measured_text(unsteady, now=NOW, width=width) for width in (200, 80, 40)]
    for text in (*texts, as_text(unsteady, "markdown", now=NOW), as_text(unsteady, "html", now=NOW)):
        assert "4 h 05 – 4 h 18?" in " ".join(text.split())
        assert "3 h 04?" not in text  # two-stage: calibrated
        assert "not a 90 % range" in text
    assert "90 % range" not in measured_text(PLAN, now=NOW)


def test_a_wide_table_has_one_line_per_row() -> None:
    assert measured_text(PLAN, now=NOW) == WIDE
    assert measured_text(PLAN, now=NOW, width=300) == WIDE


def test_a_narrow_table_splits_in_two_and_keeps_every_column() -> None:
    text = measured_text(PLAN, now=NOW, width=80)
    assert text == NARROW
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_very_narrow_table_becomes_one_block_per_row() -> None:
    assert measured_text(PLAN, now=NOW, width=44) == STACKED


@pytest.mark.parametrize("width", [1, 10, 24, 40, 60, 80, 100, 120, 160])
def test_every_width_shows_every_figure(width: int) -> None:
    text = measured_text(PLAN, now=NOW, width=width)
    words = ("baseline", "3,938", "3.81", "1.42", "4 h 10", "14:10", "9.2", "100", "does", "unknown")
    running = " ".join(text.split())  # a figure may be broken over two lines, but only between its words
    assert [word for word in words if word not in running] == []
    assert "$ plan --run recommended --dataset 63000\n" in text  # a command stays in one piece


def test_a_terminal_without_box_drawing_gets_plain_ascii() -> None:
    text = measured_text(PLAN, now=NOW, ascii_only=True)
    assert text.isascii()
    assert "+===" in text
    assert "4 h 10 min (4 h 05 - 4 h 18)" in text


def test_the_published_table_fits_into_80_columns_with_every_published_figure() -> None:
    plan = published_report(63_000, 30.0, map(load_preset, ("baseline", "recommended", "aggressive", "progressive")))
    assert published_text(plan, width=80) == PUBLISHED_AT_80
    assert "14.0 – 14.8 h" in published_text(plan)


def test_another_size_or_step_time_leaves_the_guides_own_hours_out() -> None:
    for size, step_time in ((1_000, 30.0), (63_000, 2.0)):
        plan = published_report(size, step_time, [load_preset("recommended")])
        text = published_text(plan)
        assert "published time" not in text.split("\n\n")[0]
        assert "13-18 h" not in text
        assert (
            f"The guide's own hours are left out: they are for 63,000 messages at 30 s per step, and this is {size:,}"
            in (text.replace("\n  ", " "))
        )
        assert "8 GB" in text  # what does not depend on the size stays
        [row] = json.loads(plan.to_json())["rows"]
        assert row["published"] == {"hours_low": None, "hours_high": None, "vram": "8 GB"}


def test_the_published_json_has_the_published_figures() -> None:
    plan = json.loads(published_report(63_000, 30.0, map(load_preset, preset_names())).to_json())
    rows = {row["name"]: row for row in plan["rows"]}
    assert [rows[name]["num_steps"] for name in ("baseline", "recommended", "aggressive")] == [3938, 1969, 984]
    assert [rows[name]["seconds"] for name in ("baseline", "recommended", "aggressive")] == [118_140, 45_438, 22_708]
    assert {row["basis"] for row in plan["rows"]} == {"published"}
    assert {row["quality"]["source"] for row in plan["rows"]} == {"published", None}
    assert rows["recommended"]["published"] == {"hours_low": 13.0, "hours_high": 18.0, "vram": "8 GB"}
    assert plan["device"] == {"name": None, "kind": None, "memory_bytes": None}
    for row in plan["rows"]:
        assert row["num_steps"] * row["seconds_per_step"] == pytest.approx(row["seconds"], abs=0.5)


def test_published_phases_add_up_and_an_unreached_one_has_no_steps() -> None:
    plan = json.loads(published_report(63_000, 30.0, map(load_preset, preset_names())).to_json())
    rows = {row["name"]: row for row in plan["rows"]}
    assert [phase["num_steps"] for phase in rows["two-stage"]["phases"]] == [984, 313]
    assert [phase["num_steps"] for phase in rows["progressive"]["phases"]] == [500, 969, 0]
    assert "progressive: phase 3 (GA 16) is never reached with 63,000 examples." in plan["notes"]
    assert rows["progressive"]["num_steps"] == 1469
    small = published_report(40_000, 30.0, [load_preset("progressive")]).rows[0]
    assert [phase.num_steps for phase in small.phases] == [500, 250, 0]
    large = published_report(100_000, 30.0, [load_preset("progressive")]).rows[0]
    assert [phase.num_steps for phase in large.phases] == [500, 1000, 2250]


def test_a_sample_larger_than_the_data_takes_all_of_it() -> None:
    iterate, two_stage = published_report(1_000, 30.0, map(load_preset, ("iterate", "two-stage"))).rows
    assert iterate.num_steps == 16
    assert [phase.num_steps for phase in two_stage.phases] == [16, 31]


def test_a_preset_of_ones_own_has_unknown_published_figures() -> None:
    own = parse_preset(
        "mine",
        'summary = "x"\ngradient_accumulation_steps = 4\nlearning_rate = 1e-4\n'
        'precision = "bf16"\nmicro_batch_size = 2\n',
    )
    [row] = published_report(63_000, 30.0, [own]).rows
    assert (row.num_steps, row.speed_factor, row.quality) == (7875, 1.0, Quality())
    assert "2 x 4" in published_text(published_report(63_000, 30.0, [own]))


@pytest.mark.parametrize(("size", "step_time"), [(0, 30.0), (-1, 30.0), (63_000, 0.0), (63_000, float("nan"))])
def test_a_published_plan_of_nothing_is_refused(size: int, step_time: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        published_report(size, step_time, [load_preset("baseline")])


ROW_KEYS = [
    "name", "micro_batch_size", "gradient_accumulation_steps", "global_batch_size", "num_epochs", "learning_rate",
    "precision", "num_steps", "seconds_per_step", "seconds_per_sample", "tokens_per_second", "speed_factor", "seconds",
    "seconds_low", "seconds_high", "peak_memory_bytes", "fits", "quality", "risk", "basis", "finish_at",
]  # fmt: skip


def test_json_has_the_promised_keys_and_null_for_unknown() -> None:
    plan = json.loads(PLAN.to_json())
    assert list(plan) == ["schema", "device", "model", "dataset", "rows", "notes"]
    assert plan["schema"] == 1
    assert list(plan["device"]) == ["name", "kind", "memory_bytes"]
    assert list(plan["model"]) == ["name", "num_parameters", "num_trainable_parameters", "weights"]
    assert set(plan["dataset"]) >= {"num_examples", "source", "lengths", "num_tokens"}
    plain, phased, too_large = plan["rows"]
    assert list(plain) == [*ROW_KEYS, "note", "error"]
    assert list(phased) == [*ROW_KEYS, "phases", "note", "error"]
    assert set(plain["quality"]) == {"text", "source"}
    assert phased["gradient_accumulation_steps"] == 64
    assert phased["phases"][1] == {"gradient_accumulation_steps": 32, "learning_rate": 2.5e-4, "num_steps": 313}
    assert phased["quality"] == {"text": None, "source": None}
    assert too_large["seconds"] is None
    assert (too_large["fits"], too_large["error"]) == (False, "does not fit")


def test_json_never_holds_nan_or_infinity() -> None:
    odd = dataclasses.replace(BASELINE, seconds=float("nan"), speed_factor=float("inf"))
    [row] = json.loads(dataclasses.replace(PLAN, rows=(odd,)).to_json())["rows"]
    assert (row["seconds"], row["speed_factor"]) == (None, None)


def test_a_published_time_among_measured_ones_says_so_and_cached_ones_are_named() -> None:
    row = dataclasses.replace(BASELINE, basis="published")
    assert "4 h 10 min (published)" in measured_text(dataclasses.replace(PLAN, rows=(row,)), now=NOW)
    assert "Measured earlier on this device, not now: two-stage." in measured_text(PLAN, now=NOW)


def test_a_long_error_goes_under_the_table() -> None:
    row = dataclasses.replace(TOO_LARGE, error="the worker stopped with signal 9; the system may be out of memory")
    text = measured_text(dataclasses.replace(PLAN, rows=(row,)), now=NOW)
    assert "│ failed │" in text
    assert "\naggressive: the worker stopped with signal 9" in text


def test_memory_that_does_not_fit_says_so() -> None:
    row = dataclasses.replace(BASELINE, peak_memory_bytes=12 * GIB, fits=False)
    assert "12.0 GiB, too much" in measured_text(dataclasses.replace(PLAN, rows=(row,)), now=NOW)


def test_control_characters_in_texts_from_outside_are_escaped() -> None:
    row = dataclasses.replace(BASELINE, name="a\x1b[31m\nb", note="c\u202ed", risk="e\rf")
    for width in (None, 80, 30):
        text = measured_text(dataclasses.replace(PLAN, rows=(row,), notes=("g\x07",)), now=NOW, width=width)
        assert not {"\x1b", "\r", "\x07", "\u202e"} & set(text)
        assert "a\\x1b[31m\\nb" in text
    assert printable("\udcff ü 漢") == "\\udcff ü 漢"


def test_a_plan_without_rows_is_an_empty_table() -> None:
    assert "configuration" in measured_text(dataclasses.replace(PLAN, rows=()), now=NOW, width=80)


def test_what_rows_say_alike_but_for_their_numbers_is_said_once() -> None:
    texts = ("a step takes 32 of 292 examples", "a step takes 64 of 292 examples", "only 5 steps")
    rows = tuple(
        dataclasses.replace(PLAN.rows[0], name=name, note=note)
        for name, note in (("one", texts[0]), ("two", texts[1]), ("three", texts[2]))
    )
    lines = remarks(dataclasses.replace(PLAN, rows=rows, notes=()), NOW)
    assert "one / two: a step takes 32 to 64 of 292 examples" in lines
    assert "three: only 5 steps" in lines


def test_a_comma_behind_a_number_stays_where_it_was() -> None:
    texts = ("give --budget 20, of 1,000, or wait", "give --budget 30, of 63,000, or wait")
    rows = tuple(dataclasses.replace(PLAN.rows[0], name=text[-20:], note=text) for text in texts)
    (line,) = (line for line in remarks(dataclasses.replace(PLAN, rows=rows, notes=()), NOW) if "--budget" in line)
    assert line.endswith("give --budget 20 to 30, of 1,000 to 63,000, or wait")


DOUBTS = (
    "this machine is not steady: its speed moved by 33% while it was timed, more than 10%. The range is widened.",
    "a step takes 32 of 292 examples",
    "too few timings to tell whether this machine is steady: with 4 micro-steps a speed that moves by less than 40% "
    "may not stand out from noise, and 20% has to. The range reaches. Measure again with --fresh --budget 120, say.",
    "other programs used 41% of this machine's CPU time while it was timed, more than 10%. Close them.",
)


def test_in_brief_the_doubts_about_the_timings_are_one_remark_with_every_number() -> None:
    rows = (dataclasses.replace(PLAN.rows[0], name="one", note="\n".join(DOUBTS)),)
    report = dataclasses.replace(PLAN, rows=rows, notes=())
    full = [line for line in remarks(report, NOW) if line.startswith("one: ")]
    assert full == [f"one: {text}" for text in DOUBTS]
    first, second = (line for line in remarks(report, NOW, brief=True) if line.startswith("one: "))
    for fact in ("moved by 33%", "more than 10%", "4 micro-steps", "used 41%", "--fresh --budget 120", "--explain"):
        assert fact in first
    assert second == f"one: {DOUBTS[1]}"
    lone = dataclasses.replace(report, rows=(dataclasses.replace(rows[0], note="\n".join(DOUBTS[:2])),))
    assert f"one: {DOUBTS[0]}" in remarks(lone, NOW, brief=True)


def test_what_was_measured_alike_of_several_rows_is_said_once() -> None:
    rows = tuple(dataclasses.replace(PLAN.rows[0], name=name, note=None) for name in ("one", "two"))
    notes = ("One: the budget of 12 s allowed ±2.5%.", "Data: 12 examples.", "Two: the budget of 12 s allowed ±63%.")
    lines = remarks(dataclasses.replace(PLAN, rows=rows, notes=notes), NOW)
    assert lines[-2:] == ("One / Two: the budget of 12 s allowed ±2.5 to 63%.", "Data: 12 examples.")
