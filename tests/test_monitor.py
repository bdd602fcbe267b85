"""While it trains: the time left comes from the work that is left, not from the number of steps."""

from __future__ import annotations

import errno
import io
import json
import re
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trainer.monitor import Monitor

# Ten steps of four long micro-batches, then forty of one short one, as where the accumulation falls in mid-run.
PLANNED = np.concatenate([np.full(10, 40.0), np.full(40, 2.0)])


def run_to(monitor: Monitor, first: int, last: int, *, pace: float) -> None:
    for done in range(first + 1, last + 1):
        values = {"loss": 1.0, "tokens_per_second": 100.0, "memory_bytes": None}
        monitor.step(done, float(PLANNED[done - 1]) * pace, {**values})


def test_the_time_left_is_that_of_the_remaining_work(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, "progressive", PLANNED, is_time=True, done=0)
    assert monitor.seconds_left(0) == pytest.approx(480.0), "before the first step: as planned"
    run_to(monitor, 0, 10, pace=1.04)
    # A fifth of the steps is behind it. By their number 1,664 s would be left.
    assert monitor.seconds_left(10) == pytest.approx(80.0 * 1.04)
    run_to(monitor, 10, 30, pace=1.04)
    assert monitor.seconds_left(30) == pytest.approx(40.0 * 1.04)
    run_to(monitor, 30, 50, pace=1.04)
    assert monitor.seconds_left(50) == pytest.approx(0.0)
    monitor.close()


def test_the_drift_against_the_plan_and_the_time_of_day_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = Monitor(tmp_path, "progressive", PLANNED, is_time=True, done=0)
    monitor.last_line = -1e9  # the next step is due for a line
    run_to(monitor, 0, 1, pace=1.04)
    monitor.close()
    line = capsys.readouterr().err
    assert "4% behind plan" in line
    # 440 s of planned work at this pace, from now
    at = datetime.now() + timedelta(seconds=440 * 1.04)
    assert re.search(r"7 min 38 s left, done (\w{3} \d\d:\d\d)", line)
    assert {f"{at - timedelta(seconds=60):%H:%M}", f"{at:%H:%M}"} & set(re.findall(r"\d\d:\d\d", line))


def test_a_run_of_weeks_is_told_with_the_date_of_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(tmp_path, "baseline", PLANNED * 5000, is_time=True, done=0)
    monitor.last_line = -1e9
    monitor.step(1, float(PLANNED[0] * 5000), {"loss": 1.0, "tokens_per_second": 1.0, "memory_bytes": None})
    monitor.close()
    at = datetime.now() + timedelta(seconds=440 * 5000)
    assert re.search(rf"611 h 06 min left, done \w{{3}} {at.day} {at:%b} \d\d:\d\d", capsys.readouterr().err)


@pytest.mark.parametrize(("seconds", "said"), [(1e12, "277777777 h 54 min left"), (float("inf"), None)])
def test_a_time_left_that_no_calendar_holds_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: float, said: str | None
) -> None:
    beside: Any = SimpleNamespace(seconds=lambda done: seconds)
    monitor = Monitor(tmp_path, "progressive", PLANNED, is_time=True, done=0, ahead=beside)
    monitor.last_line = -1e9  # the next step is due for a line
    run_to(monitor, 0, 1, pace=1.0)
    monitor.close()
    line = capsys.readouterr().err
    assert "step 1/50" in line
    assert "done" not in line
    assert (said or "on plan") in line
    assert ("left" in line) == (said is not None)


def test_lines_that_are_nested_too_deeply_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + "[" * 100_000 + '\n{"step": 3}\n', encoding="utf-8")
    Monitor(tmp_path, "progressive", PLANNED, is_time=True, done=2).close()
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n'


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE])
def test_a_terminal_that_is_gone_does_not_end_a_run_and_a_full_disk_behind_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class Gone(io.StringIO):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def write(self, text: str) -> int:
            raise OSError(self.number, "gone")

        def fileno(self) -> int:
            return place.fileno()

    monitor = Monitor(tmp_path, "progressive", PLANNED, is_time=True, done=0)
    with open(tmp_path / "stderr", "wb", buffering=0) as place:
        monkeypatch.setattr("sys.stderr", Gone(errno.ENOSPC))
        with pytest.raises(OSError, match="gone"):
            monitor.say("a word")
        monkeypatch.setattr("sys.stderr", Gone(number))
        monitor.say("a word")
        monitor.last_line = -1e9
        run_to(monitor, 0, 1, pace=1.0)
        monitor.close()
        place.write(b"what the stream still held")
    assert (tmp_path / "stderr").read_bytes() == b""
    assert "a word" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_a_resumed_run_is_judged_by_what_it_did_itself(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, "progressive", PLANNED, is_time=True, done=10)
    assert monitor.drift(10) is None
    run_to(monitor, 10, 20, pace=2.0)
    assert monitor.drift(20) == pytest.approx(1.0)
    assert monitor.seconds_left(20) == pytest.approx(120.0)
    monitor.close()


def test_without_seconds_in_the_plan_its_work_still_weighs_the_steps(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, "baseline", PLANNED, is_time=False, done=0)
    assert monitor.seconds_left(0) is None
    assert monitor.drift(0) is None
    run_to(monitor, 0, 10, pace=3.0)
    assert monitor.seconds_left(10) == pytest.approx(240.0)
    assert monitor.drift(10) is None
    monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert {line["planned_seconds"] for line in lines} == {None}


def test_a_step_in_which_the_process_stood_still_is_left_out_of_the_pace(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, "progressive", PLANNED, is_time=True, done=0)
    assert monitor.paused(1, 40.0 * 19) == 0.0, "slow, by the plan"
    assert monitor.paused(1, 40.0 * 21) == pytest.approx(40.0 * 20)
    run_to(monitor, 0, 10, pace=2.0)
    assert monitor.paused(11, 2.0 * 2.0 * 7) == 0.0, "seven times as long as it should, and less than 30 s more"
    assert monitor.paused(11, 2.0 * 2.0 + 30.0) == 0.0, "30 s more, but not 20 times as long"
    hours = 3 * 3600.0
    assert monitor.paused(11, hours) == pytest.approx(hours - 4.0)
    values = {"loss": 1.0, "tokens_per_second": 100.0, "memory_bytes": None}
    monitor.step(11, hours, {**values}, paused=hours - 4.0)
    assert monitor.seconds_left(11) == pytest.approx(78.0 * 2.0)
    assert monitor.drift(11) == pytest.approx(1.0)
    monitor.close()
    last = json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert (last["seconds"], last["paused_seconds"]) == (hours, hours - 4.0)


def test_without_a_pace_and_without_seconds_in_the_plan_no_step_is_called_a_pause(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, "baseline", PLANNED, is_time=False, done=0)
    assert monitor.paused(1, 1e6) == 0.0
    run_to(monitor, 0, 1, pace=1.0)
    assert monitor.paused(2, 1e6) > 0.0
    monitor.close()


def test_the_windows_planned_seconds_add_up_to_what_was_promised() -> None:
    from fakes import make_data, make_job

    from trainer.planning import plan_job
    from trainer.record import CostModel, Predicted

    data = make_data(np.arange(10, 210))
    plan = plan_job(make_job(), data).plan
    cost = CostModel(base=0.1, per_token=1e-3, per_token_width=0.0, optimizer=0.05)
    shares = cost.window_seconds(plan, data.lengths)
    promised = Predicted(cost=cost, train_seconds=1.3 * float(shares.sum()))
    assert promised.window_seconds(plan, data.lengths) == pytest.approx(1.3 * shares)
    assert Predicted(cost=cost).window_seconds(plan, data.lengths) == pytest.approx(shares)
    tokens = Predicted().window_seconds(plan, data.lengths)
    assert float(tokens.sum()) == float(data.lengths[plan.order].sum())
