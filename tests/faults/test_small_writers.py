"""What is written beside a run, failed at every one of its changes: the run folder as it is made, and the history."""

from __future__ import annotations

import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from harness import Server

from planner.history import History
from planner.launch import open_run
from presets.errors import RunError
from trainer.batching import BatchPlan
from trainer.record import read_predicted

pytestmark = pytest.mark.slow


def count_changes(server: Server, below: Path, log: Path, **asked: Any) -> int:
    ended = server.ask(below=str(below), at=0, mode="count", calls=str(log), **asked)
    assert ended.code == 0, ended.said
    return len(log.read_text().splitlines())


@pytest.mark.parametrize("mode", ["torn", "full"])
def test_a_run_folder_is_whole_or_says_that_it_is_none(
    server: Server, make_job: Any, tmp_path: Path, mode: str
) -> None:
    asked = {"action": "folder", "job": make_job(micro=4).to_json()}
    changes = count_changes(server, tmp_path / "whole", tmp_path / "calls", run=str(tmp_path / "whole"), **asked)
    assert changes > 20
    for at in range(1, changes + 1):
        run = tmp_path / f"run-{at}"
        ended = server.ask(run=str(run), below=str(run), at=at, mode=mode, **asked)
        if mode == "full":
            assert ended.code in (0, 1), ended.said
            assert run.exists() == (ended.code == 0), f"change {at}: left behind what could not be finished"
        else:
            assert ended.code == -signal.SIGKILL
        if (run / "job.json").exists():
            open_run(run)
            read_predicted(run)
            assert BatchPlan.load(run / "batch_plan.npz").num_steps == 4
        else:
            with pytest.raises(RunError, match=r"is not a run folder: there is no job\.json in it"):
                open_run(run)


@pytest.mark.parametrize("mode", ["torn", "full", "broken"])
def test_a_history_that_is_cut_off_at_any_change_keeps_what_it_had_and_takes_the_next(
    server: Server, tmp_path: Path, mode: str
) -> None:
    home = tmp_path / "home"
    asked = {"action": "history", "home": str(home)}
    assert server.ask(number=0, **asked).code == 0
    changes = count_changes(server, home, tmp_path / "calls", number=1, **asked)
    assert changes > 5
    known = {"run-0", "run-1"}
    for at in range(1, changes + 1):
        number = at + 1
        ended = server.ask(number=number, below=str(home), at=at, mode=mode, **asked)
        assert ended.code == (-signal.SIGKILL if mode == "torn" else 0), ended.said
        notes: list[str] = []
        found = {run.folder for run in History(home=home, say=notes.append).runs()}
        assert found - known <= {f"run-{number}"}
        assert known <= found, f"change {at}"
        assert notes == []
        known = found
    with sqlite3.connect(home / "history.sqlite") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert not list(home.glob("*.set-aside-*"))
