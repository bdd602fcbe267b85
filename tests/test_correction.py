"""What past runs correct, and which of them count."""

from __future__ import annotations

import json
import math
import random
import sqlite3
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import fakes
import pytest
from planned import NOW, Bench, past_run

from planner.compare import predicted_of
from planner.correction import Correction, corrected, correction, past_correction
from planner.estimate import Estimate
from planner.history import (
    COLUMNS,
    History,
    PastRun,
)
from planner.table import measured_text
from presets import jsonio
from trainer.record import Actual, Predicted, RunRecord


def generations(history: History, ratio: float, count: int) -> list[float]:
    """Corrected training seconds of `count` runs, each predicted as 80 s raw and really taking 80 x ratio."""
    shown = []
    for number in range(count):
        by = past_correction(history, "k")
        shown.append(80.0 * (by.factor if by else 1.0))
        history.add_run(past_run(number, train_seconds=shown[-1], actual_train_seconds=80.0 * ratio))
    return shown


@pytest.mark.parametrize("ratio", [1.3, 0.8])
def test_corrections_converge_on_the_true_ratio_and_stay_there(tmp_path: Path, ratio: float) -> None:
    shown = generations(History(home=tmp_path), ratio, 30)
    assert shown[:3] == [80.0, 80.0, 80.0]  # from three runs on
    assert shown[3] == pytest.approx(80.0 * ratio, rel=0.02)
    assert shown[10:] == pytest.approx([80.0 * ratio] * 20, rel=0.002)


def test_right_predictions_are_left_as_they_are(tmp_path: Path) -> None:
    assert generations(History(home=tmp_path), 1.0, 30) == [80.0] * 30


def test_only_the_latest_ten_runs_of_the_same_signature_count(tmp_path: Path) -> None:
    history = History(home=tmp_path)
    for number in range(10):
        history.add_run(past_run(number, actual_train_seconds=800.0))
    for number in range(10, 20):
        history.add_run(past_run(number, actual_train_seconds=88.0))
    by = past_correction(history, "k")
    assert by is not None
    assert (by.num_runs, by.factor) == (10, pytest.approx(1.1, rel=0.005))
    assert past_correction(history, "another") is None


def test_interrupted_runs_are_listed_and_do_not_correct(tmp_path: Path) -> None:
    history = History(home=tmp_path)
    job = fakes.make_job()
    by_loss = fakes.make_job("prioritized", sampling_strategy="top", sample_score="loss", sample_ratio=0.5)
    predicted = Predicted(seconds=100.0, train_seconds=80.0, raw_train_seconds=80.0, signature_key="k")
    usual = Actual(seconds=900.0, train_seconds=800.0, num_resumes=0, micro_batch_split=1)
    cases = [
        ("finished", job, replace(usual, num_resumes=1)),
        ("finished", job, replace(usual, paused_seconds=7200.0)),
        ("stopped", job, usual),
        ("failed", job, usual),
        ("finished", job, replace(usual, micro_batch_split=2)),
        ("finished", by_loss, usual),
    ]
    for number, (status, of, actual) in enumerate(cases):
        record = RunRecord(status=status, job=of, predicted=predicted, actual=actual, versions={"torch": "2.13.0"})
        history.add_run(PastRun.of(record, Path(f"/runs/{number}"), NOW))
    assert len(history.runs()) == 6
    assert all(run.not_counted for run in history.runs())
    assert past_correction(history, "k") is None
    assert [run.error is None for run in history.runs()] == [False, False, True, True, True, True]
    for number in range(3):
        record = RunRecord(status="finished", job=job, predicted=predicted, actual=usual, versions={})
        history.add_run(PastRun.of(record, Path(f"/runs/whole-{number}"), NOW))
    by = past_correction(history, "k")
    assert by is not None
    assert by.num_runs == 3


def test_a_run_folder_has_one_entry_and_the_later_one_counts(tmp_path: Path) -> None:
    history = History(home=tmp_path)
    history.add_run(past_run(1, status="stopped"))
    history.add_run(past_run(2))
    history.add_run(past_run(1, num_resumes=1, ended_at=(NOW + timedelta(hours=9)).isoformat()))
    assert [(run.folder, run.status, run.num_resumes) for run in history.runs()] == [
        ("/runs/1", "finished", 1),
        ("/runs/2", "finished", 0),
    ]


def test_a_run_folder_reached_by_a_link_or_by_dots_is_one_run(tmp_path: Path) -> None:
    history = History(home=tmp_path)
    folder, link = tmp_path / "runs" / "one", tmp_path / "link"
    folder.mkdir(parents=True)
    link.symlink_to(folder)
    ways = [folder, link, tmp_path / "runs" / ".." / "runs" / "one"]
    actual = Actual(seconds=100.0, train_seconds=100.0)
    predicted = Predicted(seconds=80.0, train_seconds=80.0, raw_train_seconds=80.0, signature_key="k")
    record = RunRecord(status="finished", job=fakes.make_job(), predicted=predicted, actual=actual, versions={})
    for way in ways:
        history.add_run(PastRun.of(record, way, NOW))
    assert [run.folder for run in history.runs()] == [str(folder.resolve())]
    assert past_correction(history, "k") is None


def test_entries_of_one_folder_that_were_stored_under_several_names_count_once_and_go(tmp_path: Path) -> None:
    history = History(home=tmp_path)
    folder = tmp_path.resolve() / "one"
    history.add_run(past_run(1))
    with closing(sqlite3.connect(history.path)) as db:
        for number, name in enumerate([f"{folder}", f"{folder}/../one", f"{folder}/.", "/runs/2", "/runs/3"]):
            row = replace(past_run(1), folder=name, ended_at=(NOW + timedelta(hours=number)).isoformat())
            values = [getattr(row, one) for one in COLUMNS]
            db.execute(f"INSERT INTO runs VALUES ({', '.join('?' for _ in COLUMNS)})", values)
        db.commit()
    told = ["/runs/3", "/runs/2", f"{folder}/.", "/runs/1"]
    assert [run.folder for run in history.runs()] == told
    assert [run.folder for run in history.runs(limit=3)] == told[:3]
    assert [run.folder for run in history.counted_runs("k", 4)] == told
    history.add_run(replace(past_run(1), folder=str(folder)))
    with closing(sqlite3.connect(history.path)) as db:
        stored = {name for (name,) in db.execute("SELECT folder FROM runs")}
    assert stored == {"/runs/1", "/runs/2", "/runs/3", str(folder)}


def test_runs_that_scatter_hardly_correct_and_widen_the_range() -> None:
    alike, scattered = correction([1.3, 1.3, 1.3]), correction([1.0, 1.0, 2.2])
    assert alike is not None
    assert scattered is not None
    assert math.log(scattered.factor) < 0.5 * scattered.mean
    assert alike.half_width < 0.08
    ten = correction([1.3] * 10)
    assert ten is not None
    assert ten.half_width < 0.035
    assert scattered.half_width > math.log(2.2)
    assert correction([1.3, 1.3]) is None


def test_the_corrected_range_holds_the_next_run_as_often_as_it_says() -> None:
    """Ratios of a machine scatter by 8 % around 1.2, the measured range is far too narrow: past runs mend it."""
    draw = random.Random(3)
    raw = Estimate(
        name="x", fits=True, train_seconds=100.0, train_seconds_low=99.0, train_seconds_high=101.0,
        seconds=100.0, seconds_low=99.0, seconds_high=101.0,
    )  # fmt: skip
    for runs in (3, 10):
        held = 0
        for _ in range(1000):
            by = correction([1.2 * math.exp(draw.gauss(0, 0.08)) for _ in range(runs)])
            assert by is not None
            found = corrected(raw, by)
            assert found.train_seconds_low is not None
            assert found.train_seconds_high is not None
            held += found.train_seconds_low <= 120.0 * math.exp(draw.gauss(0, 0.08)) <= found.train_seconds_high
        assert 0.80 < held / 1000 < 0.97, runs


def test_runs_from_one_measurement_say_less_of_another() -> None:
    """Five runs that were predicted 10 % too long from one profile: the next profile need not be so."""
    ratios, calls = [0.90, 0.91, 0.90, 0.89, 0.90], ["a"] * 5
    same, other, each = correction(ratios, calls, "a"), correction(ratios, calls, "b"), correction(ratios)
    assert same is not None
    assert other is not None
    assert each is not None
    assert same == each  # its own profile is off by what they were
    assert same.shared == 0.0
    assert each == correction(ratios, list("abcde"), "f")
    assert abs(math.log(other.factor)) < abs(math.log(same.factor))
    assert other.shared > 0.05
    raw = Estimate(
        name="x", fits=True, train_seconds=100.0, train_seconds_low=97.0, train_seconds_high=103.0,
        seconds=100.0, seconds_low=97.0, seconds_high=103.0,
    )  # fmt: skip
    high = corrected(raw, other).train_seconds_high
    assert high is not None
    assert high > 99.0
    mixed = correction([*ratios, 1.0, 1.0, 1.0], [*calls, "b", "b", "b"], "b")
    assert mixed is not None
    assert (mixed.num_runs, mixed.factor) == (3, 1.0)  # those of the present profile alone


@pytest.mark.parametrize("fresh", [True, False])
def test_the_range_holds_the_next_run_whichever_measurement_served_the_past(fresh: bool) -> None:
    """A machine of any ratio, profiles off by 5 %, runs that differ by 2 %; several runs from one profile."""
    draw, held, forgetful, trials = random.Random(5), 0, 0, 1500

    def holds(by: Correction | None, profile: float, actual: float) -> bool:
        width = 1.645 * math.hypot(0.05, 0.02)
        raw = Estimate(
            name="x", fits=True, train_seconds=profile, train_seconds_low=profile * math.exp(-width),
            train_seconds_high=profile * math.exp(width), seconds=1.0, seconds_low=1.0, seconds_high=1.0,
        )  # fmt: skip
        assert by is not None
        found = corrected(raw, by)
        assert found.train_seconds_low is not None
        assert found.train_seconds_high is not None
        return found.train_seconds_low <= actual <= found.train_seconds_high

    for _ in range(trials):
        machine, old = math.exp(draw.gauss(0, 0.15)), math.exp(draw.gauss(0, 0.05))
        new = math.exp(draw.gauss(0, 0.05)) if fresh else old
        ratios = [machine / old * math.exp(draw.gauss(0, 0.02)) for _ in range(5)]
        actual = machine * math.exp(draw.gauss(0, 0.02))
        held += holds(correction(ratios, ["old"] * 5, "new" if fresh else "old"), new, actual)
        forgetful += holds(correction(ratios), new, actual)
    assert held / trials > 0.86
    assert (forgetful / trials < 0.86) is fresh


def test_a_run_beside_others_than_its_measurement_corrects_nothing() -> None:
    def entry(then: float | None, now: float | None) -> PastRun:
        record = RunRecord(
            status="finished",
            job=fakes.make_job(),
            predicted=Predicted(seconds=80.0, raw_train_seconds=80.0, measured_as="a", others_share=then),
            actual=Actual(seconds=200.0, train_seconds=200.0, others_share=now),
            versions={},
        )
        return PastRun.of(record, Path("/runs/one"), NOW)

    told = "others took 60% of the CPU's time, and 2% while it was timed"
    assert entry(0.02, 0.6).not_counted == told
    assert entry(0.6, 0.02).not_counted is not None
    for then, now in ((0.02, 0.15), (0.5, 0.6), (None, 0.6), (0.6, None)):
        assert entry(then, now).not_counted is None
    assert entry(0.0, 0.0).measured_as == "a"


def test_a_correction_keeps_a_wider_measured_range_and_the_fixed_parts() -> None:
    raw = fakes_estimate()
    by = Correction(num_runs=4, mean=math.log(1.5), weight=0.5, half_width=0.01)
    found = corrected(raw, by)
    factor = math.sqrt(1.5)
    assert found.train_seconds == pytest.approx(100 * factor)
    assert found.seconds == pytest.approx(100 * factor + 7)
    assert found.train_seconds_low == pytest.approx(50 * factor)
    # Upwards it reaches as far as the unshrunk ratio would.
    assert found.train_seconds_high == pytest.approx(200 * 1.5)
    assert found.seconds_per_step == pytest.approx(10 * factor)
    assert "corrected by x1.22 from 4 runs on this machine" in found.notes


def fakes_estimate() -> Estimate:
    from planner.estimate import FixedSeconds

    return Estimate(
        name="x", fits=True, num_steps=10, seconds_per_step=10.0, train_seconds=100.0, train_seconds_low=50.0,
        train_seconds_high=200.0, fixed=FixedSeconds(load=7.0), seconds=107.0, seconds_low=57.0, seconds_high=207.0,
    )  # fmt: skip


def test_a_plan_is_corrected_by_past_runs_and_the_run_keeps_the_raw_figures(bench: Bench) -> None:
    first = bench.plan()
    key = first.past.signature_keys["baseline"]
    assert first.past.corrections == {}
    raw = first.estimates["baseline"]
    for number in range(4):
        bench.history.add_run(past_run(number, signature_key=key, actual_train_seconds=80.0 * 1.25))
    second = bench.plan()
    row = json.loads(second.report.to_json())["rows"][0]
    assert row["correction"]["num_runs"] == 4
    assert row["correction"]["factor"] == pytest.approx(1.25, rel=0.01)
    assert row["correction"]["raw_seconds"] == second.past.raw["baseline"].seconds
    assert "corrected by x1.25 from 4 runs on this machine" in measured_text(second.report, now=NOW)
    kept = predicted_of(second, second.candidates[0])
    assert kept.raw_train_seconds == raw.train_seconds
    raw = second.past.raw["baseline"]
    assert (kept.raw_seconds, kept.raw_seconds_low) == (raw.seconds, raw.seconds_low)
    assert kept.raw_seconds_high == raw.seconds_high
    assert kept.train_seconds == pytest.approx(1.25 * raw.train_seconds, rel=0.01)
    assert kept.signature_key == key
    assert kept.cost is not None
    assert raw.cost is not None
    assert kept.cost.per_token == pytest.approx(raw.cost.per_token * second.past.corrections["baseline"].factor)
    # What enters the history is the raw figure, however the run was corrected.
    record = RunRecord(
        status="finished", job=fakes.make_job(), predicted=kept, actual=Actual(train_seconds=50.0), versions={}
    )
    assert PastRun.of(record, Path("run"), NOW).raw_train_seconds == raw.train_seconds
    assert PastRun.of(record, Path("run"), NOW).train_seconds == kept.train_seconds


@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_a_run_keeps_whether_its_range_is_a_90_percent_range(bench: Bench, drift: float) -> None:
    bench.device = {"noise": 0.02, "drift": drift}
    found = bench.plan(names=("baseline",))
    assert found.report.rows[0].calibrated is (drift == 0)
    kept = predicted_of(found, found.candidates[0])
    record = RunRecord(status="finished", job=fakes.make_job(), predicted=kept, actual=Actual(), versions={})
    record = jsonio.from_json(RunRecord, jsonio.to_json(record))
    bench.history.add_run(PastRun.of(record, Path("run"), NOW))
    assert [run.calibrated for run in bench.history.runs()] == [drift == 0]


def test_estimates_of_older_run_folders_can_be_read() -> None:
    old = '{"seconds": 5.0, "seconds_low": 4.0, "seconds_high": 6.0, "train_seconds": 3.0, "peak_memory_bytes": 9}'
    found = jsonio.from_json(Predicted, old)
    assert (found.seconds, found.raw_seconds, found.signature_key) == (5.0, None, None)
    assert found.calibrated is None
