"""One writer a run folder; and a process that stands still for a while."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Server, adapter_bytes, losses

from planner import cli
from presets.errors import RunError
from trainer.folder import sole_writer
from trainer.job import EvaluationSpec
from trainer.record import RunRecord

pytestmark = pytest.mark.slow


def when(condition: Callable[[], bool]) -> None:
    """Wait for something that another process does."""
    for _ in range(12_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def has_steps(run: Path, count: int) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and len(metrics.read_text().splitlines()) >= count


def plan(*words: str) -> int:
    """The command line in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["plan", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_second_start_is_refused_in_one_line_changes_nothing_and_the_lock_goes_with_a_kill(
    server: Server, make_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer import __main__ as entry

    run = make_run(num_epochs=500)
    job = str(run / "job.json")

    def while_it_trains(child: int) -> None:
        when(lambda: has_steps(run, 2))
        os.kill(child, signal.SIGSTOP)  # it holds still, so that a change would not be its own
        before = files_of(run)
        try:
            for words in (["plan", "--resume", str(run)], ["plan", "--run", "baseline", "--output", str(run)]):
                assert plan(*words[1:]) == 1
                (line,) = capsys.readouterr().err.splitlines()
                assert line.startswith(f"Error: run folder '{run}' is in use: another process trains in it.")
                assert f"plan watch {run}" in line
            for words in ([job], [job, "--resume"]):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(sys, "argv", ["trainer", *words])
                    assert entry.main() == 1
                (line,) = capsys.readouterr().err.splitlines()
                assert "is in use" in line
            assert files_of(run) == before
            assert plan("watch", str(run), "--once") == 0  # who only reads is not kept out
            assert "step" in capsys.readouterr().out
            assert plan("report", str(run)) == 0
        finally:
            os.kill(child, signal.SIGKILL)

    assert server.train(run, meanwhile=while_it_trains).code == -signal.SIGKILL
    with sole_writer(run), pytest.raises(RunError, match="is in use"), sole_writer(run):
        pass


def test_of_several_processes_only_the_first_takes_the_lock(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.loop import train

    run = make_run()
    started: list[Path] = []
    monkeypatch.setattr("trainer.loop._train_in", lambda folder, **_: started.append(folder))
    with sole_writer(run):
        monkeypatch.setenv("RANK", "1")
        train(run)
        assert started == [run]
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(RunError, match="is in use"):
            train(run)
    assert started == [run]


def test_a_process_that_stood_still_ends_with_the_same_bytes_and_the_pause_is_no_pace(
    server: Server, make_run: Any
) -> None:
    # Nothing but steps after the first: what is stopped is one of them, and not an evaluation or a checkpoint.
    quiet = EvaluationSpec(num_samples=0, times_during_training=0)
    changes: dict[str, Any] = {"num_epochs": 2, "lora_dropout": 0.1, "checkpoint_every": 1000, "evaluation": quiet}
    whole, run = make_run("whole", **changes), make_run("run", **changes)
    assert server.train(whole).code == 0

    def pauses(child: int) -> None:
        when(lambda: has_steps(run, 4))
        steps = [json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()[:4]]
        for _ in range(3):  # one of them may meet it between two steps
            os.kill(child, signal.SIGSTOP)
            time.sleep(1.5 + max(steps) * 5)  # far longer than a step, also where the machine is busy
            os.kill(child, signal.SIGCONT)
            time.sleep(max(steps) / 2)

    ended = server.train(
        run, meanwhile=pauses, set={"trainer.monitor.PAUSE_SECONDS": 0.5, "trainer.monitor.PAUSE_FACTOR": 1.5}
    )
    assert ended.code == 0, ended.said
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert losses(run) == losses(whole)
    assert "stood still for" in ended.said
    actual = RunRecord.read(run / "record.json").actual
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    paused = sum(line.get("paused_seconds", 0.0) for line in lines)
    assert paused > 0.9
    assert actual.paused_seconds is not None
    assert actual.paused_seconds >= paused - 1e-3
    assert actual.train_seconds == pytest.approx(sum(line["seconds"] for line in lines) - paused, abs=1e-3)
