"""`plan history`: the list of past runs, and how good the predictions were."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import fakes
import pytest
from planned import NOW, past_run
from test_cli import plan, refused

from planner.history import (
    History,
    PastRun,
)
from planner.past import accuracy, accuracy_text, runs_json, runs_text, wilson
from trainer.record import Actual, Predicted, RunRecord


def test_the_accuracy_is_that_of_all_runs_that_finished_without_interruption() -> None:
    runs = [past_run(number, actual_seconds=100.0 + change) for number, change in enumerate([0, 2, -4, 8, 50])]
    runs += [past_run(7, actual_seconds=9e9, num_resumes=1), past_run(8, actual_seconds=1.0, status="stopped")]
    found = accuracy(runs)
    assert found is not None
    assert (found.num_runs, found.num_inside, found.num_with_range) == (5, 4, 5)
    assert found.median_absolute == pytest.approx(0.04)
    assert found.percentile_90_absolute == pytest.approx(0.08 + 0.6 * 0.42)
    assert found.worst == pytest.approx(0.5)
    assert found.median == pytest.approx(0.02)
    # Wilson (1927) for 4 of 5.
    assert (found.inside_low, found.inside_high) == (pytest.approx(0.3755, abs=1e-3), pytest.approx(0.9638, abs=1e-3))
    assert "The 90 % range held the actual time in 4 of 5" in accuracy_text(found)
    assert "not a 90 % range" not in accuracy_text(found)
    assert accuracy(runs[5:]) is None
    assert accuracy_text(None) == "no finished runs yet"


def test_ranges_that_were_no_90_percent_ranges_are_counted_apart() -> None:
    """How often those held says nothing of the others, which promise nine runs of ten."""
    held, missed = past_run(1, actual_seconds=100.0), past_run(2)
    told = [replace(held, calibrated=True), replace(missed, calibrated=None)]  # of an earlier version: not told
    doubted = [replace(held, calibrated=False), replace(held, calibrated=False), replace(missed, calibrated=False)]
    found = accuracy([*told, *doubted])
    assert found is not None
    assert (found.num_runs, found.num_inside, found.num_with_range) == (5, 1, 2)
    assert (found.num_inside_uncalibrated, found.num_with_range_uncalibrated) == (2, 3)
    text = accuracy_text(found)
    assert "The 90 % range held the actual time in 1 of 2" in text
    why = "the machine was not steady, or too little was timed to tell"
    assert f"A range that was not a 90 % range ({why}) held it in 2 of 3." in text
    alone = accuracy(doubted)
    assert alone is not None
    assert "The 90 % range" not in accuracy_text(alone)


@pytest.mark.parametrize("width", [200, 100, 80])
def test_the_list_fits_the_terminal_with_each_run_on_one_line(width: int) -> None:
    runs = [past_run(1, model="/models/a-model-of-a-long-name"), past_run(2)]
    lines = runs_text(runs, NOW, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) == 4
    assert ("model" in lines[0]) is (width == 200)
    assert all(column in lines[0] for column in ("ended", "preset", "predicted", "actual", "error", "status"))


def test_a_range_that_was_no_90_percent_range_is_marked_in_the_list() -> None:
    lines = runs_text([past_run(1, calibrated=False), past_run(2, calibrated=True), past_run(3)], NOW).splitlines()
    assert [("(1 min 30 – 1 min 50?)" in line, "(1 min 30 – 1 min 50)" in line) for line in lines[2:5]] == [
        (True, False),
        (False, True),
        (False, True),
    ]
    assert lines[5:] == ["? after a range: not a 90 % range, but what was seen or feared."]
    assert len(runs_text([past_run(2, calibrated=True), past_run(3)], NOW).splitlines()) == 4


def test_wilsons_interval_at_its_ends() -> None:
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-3))
    assert wilson(10, 10) == (pytest.approx(0.7225, abs=1e-3), pytest.approx(1.0))


def test_names_from_outside_cannot_write_to_the_terminal() -> None:
    text = runs_text([past_run(model="/models/\x1b[2Jevil\n", name="a\x07b", status="finished")], NOW)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert len(text.splitlines()) == 3
    assert r"\x1b[2Jevil\n" in text


def test_runs_that_cannot_be_compared_are_marked() -> None:
    lines = runs_text([past_run(1), past_run(2, num_resumes=1), past_run(3, status="stopped")], NOW).splitlines()
    assert "+30.0%" in lines[2]
    assert "NO" in lines[2]
    assert "resumed" in lines[3]
    assert "%" not in lines[3]
    assert "stopped" in lines[4]
    [first, second, _] = json.loads(runs_json([past_run(1), past_run(2, num_resumes=1), past_run(3)]))["runs"]
    assert (first["error"], first["inside"]) == (pytest.approx(0.3), False)
    assert (second["error"], second["inside"]) == (None, None)


def test_runs_of_a_tuned_twin_are_told_apart_from_those_of_its_preset() -> None:
    job = fakes.make_job("recommended")
    record = RunRecord(
        status="finished", job=job, predicted=Predicted(is_tuned=True), actual=Actual(seconds=9.0), versions={}
    )
    tuned = PastRun.of(record, Path("tuned"), NOW)
    written = PastRun.of(replace(record, predicted=Predicted()), Path("written"), NOW)
    assert [line.split("  ")[1].strip() for line in runs_text([tuned, written], NOW).splitlines()[2:]] == [
        "recommended, tuned",
        "recommended",
    ]
    plain = json.loads(runs_json([tuned, written]))["runs"]
    assert [(one["name"], one["tuned_from"]) for one in plain] == [
        ("recommended, tuned", "recommended"),
        ("recommended", None),
    ]


def test_a_run_that_stood_still_in_between_is_not_compared_with_its_prediction() -> None:
    from planner.history import PAUSED

    assert past_run(1).error == pytest.approx(0.3)
    assert past_run(1, actual_seconds=9000.0, not_counted=PAUSED).error is None


def test_plan_history_lists_a_thousand_runs_newest_first(tmp_path: Path) -> None:
    assert plan("history", cwd=tmp_path).stdout == "no finished runs yet\n"
    assert plan("history", "--accuracy", cwd=tmp_path).stdout == "no finished runs yet\n"
    history = History()
    history.add_run(past_run())
    with sqlite3.connect(history.path) as db:  # one transaction: a disk that syncs a thousand times is not the point
        names = [name for name in PastRun.__dataclass_fields__ if name != "folder"]
        columns = ", ".join(names)
        stamp = columns.replace("ended_at", "strftime('%Y-%m-%dT%H:%M:%S+00:00', '2027-01-01', '+' || n || ' hours')")
        db.execute(
            f"WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 999) "
            f"INSERT INTO runs (folder, {columns}) SELECT '/more/' || n, {stamp} FROM runs, c"
        )
    everything = plan("history", "--limit", "2000", "--json", cwd=tmp_path, timeout=60)
    runs = json.loads(everything.stdout)["runs"]
    assert len(runs) == 1000
    assert [run["folder"] for run in runs[:2]] == ["/more/999", "/more/998"]
    assert runs[-1]["folder"] == "/runs/0"
    assert len(plan("history", cwd=tmp_path).stdout.splitlines()) == 22
    assert len(plan("history", "--limit", "3", cwd=tmp_path).stdout.splitlines()) == 5
    found = json.loads(plan("history", "--accuracy", "--json", cwd=tmp_path).stdout)["accuracy"]
    assert (found["num_runs"], found["num_inside"]) == (1000, 0)
    assert found["median"] == pytest.approx(0.3)
    assert "0 of 1,000" in plan("history", "--accuracy", cwd=tmp_path).stdout
    refused(plan("history", "--limit", "0", cwd=tmp_path), "0", code=2)


def test_a_damaged_entry_is_neither_an_error_of_minus_a_hundred_per_cent_nor_three_hundred_digits_wide() -> None:
    odd = [
        past_run(1, actual_seconds=0.0),
        past_run(2, actual_seconds=-50.0),
        past_run(3, seconds=-100.0),
        past_run(4, actual_seconds=1e300),
        past_run(5, seconds_low=110.0, seconds_high=90.0),
    ]
    assert [run.error is None for run in odd] == [True, True, True, False, False]
    assert odd[4].is_inside is None
    table, told = runs_text(odd, NOW, width=120), accuracy_text(accuracy(odd))
    assert ">+999%" in table
    assert ">+999%" in told
    assert max(map(len, (table + "\n" + told).splitlines())) <= 120
    assert "median error (absolute)   >999%" in accuracy_text(accuracy([odd[3]]))


def test_a_run_beside_other_programs_is_marked_and_counted_apart() -> None:
    runs = [past_run(1, actual_seconds=101.0), past_run(2, actual_seconds=272.0, not_counted="others took 81% of ...")]
    table, found = runs_text(runs, NOW), accuracy(runs)
    assert "finished, other load" in table.splitlines()[-1]
    assert "other load" not in table.splitlines()[-2]
    assert found is not None
    assert (found.num_runs, found.num_other_company) == (2, 1)
    assert found.worst_else == pytest.approx(0.01)
    assert "Beside 1 of them others took plainly more of the CPU, or less" in accuracy_text(found)
    assert "without them the worst is +1.0%" in accuracy_text(found)
    assert "Beside" not in accuracy_text(accuracy(runs[:1]))
