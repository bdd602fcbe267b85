"""The time left holds what comes beside the steps: evaluations, sample answers, checkpoints, the result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import make_data, make_job, make_row
from small_runs import StopAfter, metrics

from planner.estimate import evaluations_and_checkpoints
from presets import jsonio
from trainer import loop
from trainer.ahead import Ahead, earlier_evaluations
from trainer.batching import BatchPlan
from trainer.job import EvaluationSpec, Job
from trainer.monitor import Monitor
from trainer.planning import plan_job
from trainer.record import Breakdown, CostModel, Predicted
from trainer.run import Clock

JOB = replace(
    make_job("recommended", gradient_accumulation_steps=16),
    evaluation=EvaluationSpec(times_during_training=3, num_samples=2),
    checkpoint_every=5,
)
PLAN = plan_job(JOB, make_data(np.full(352, 20))).plan
# Five evaluations, answers twice, eight checkpoints, one result: 2 s, 3 s, 0.5 s and 7.5 s each.
PARTS = Breakdown(train=88.0, evaluation=10.0, samples=6.0, checkpoints=4.0, save=7.5)


def ahead(parts: Breakdown | None = PARTS, job: Job = JOB, **taken: float) -> Ahead:
    return Ahead(job, PLAN, parts, earlier={}, each=lambda: taken)


def test_the_parts_are_counted_as_in_the_estimate() -> None:
    assert PLAN.num_steps == 22
    assert len(PLAN.evaluation)
    evaluations, checkpoints = evaluations_and_checkpoints(
        replace(make_row(JOB, make_data(np.full(352, 20))), plan=PLAN)
    )
    assert ahead().remaining(0) == {"evaluation": evaluations - 1, "samples": 1, "checkpoints": checkpoints, "save": 1}


def test_what_follows_a_step_at_once_is_still_to_come_when_it_ends() -> None:
    # Evaluations after 6, 11, 16 and 22; checkpoints there and after 5, 10, 15, 20.
    assert [ahead().remaining(done)["evaluation"] for done in (5, 6, 7, 16, 17, 22)] == [4, 4, 3, 2, 1, 1]
    assert [ahead().remaining(done)["checkpoints"] for done in (5, 6, 11, 20, 21, 22)] == [8, 7, 5, 2, 1, 1]
    assert ahead().seconds(0) == pytest.approx(4 * 2.0 + 3.0 + 8 * 0.5 + 7.5)
    assert ahead().seconds(22) == pytest.approx(2.0 + 3.0 + 0.5 + 7.5), "no step, but all that ends a run"


def test_what_a_part_took_in_this_run_counts_more_than_what_was_predicted() -> None:
    seen = ahead(evaluation=20.0, checkpoints=1.0)
    assert seen.seconds(17) == pytest.approx(20.0 + 3.0 + 2 * 1.0 + 7.5)
    assert ahead(None, evaluation=20.0).seconds(17) == 20.0, "nothing was predicted: what is known"
    assert ahead(None).seconds(17) == 0.0


def test_a_run_that_evaluates_nothing_and_answers_nothing_has_no_such_part_ahead() -> None:
    silent = replace(JOB, evaluation=EvaluationSpec(num_samples=0))
    assert ahead(job=silent).remaining(22)["samples"] == 0
    bare = Ahead(JOB, replace(PLAN, evaluation=PLAN.evaluation[:0]), PARTS, earlier={}, each=dict)
    assert bare.remaining(0)["evaluation"] == bare.remaining(0)["samples"] == 0
    assert bare.seconds(22) == pytest.approx(0.5 + 7.5)


def test_the_time_left_is_that_of_the_steps_at_their_pace_and_of_what_comes_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = Monitor(tmp_path, "recommended", np.full(22, 4.0), is_time=True, done=0, ahead=ahead())
    assert monitor.seconds_left(0) == pytest.approx(88.0 + ahead().seconds(0))
    values = {"loss": 1.0, "tokens_per_second": 100.0, "memory_bytes": None}
    for done in range(1, 23):
        monitor.step(done, 5.0, {**values})
    assert monitor.drift(22) == pytest.approx(0.25), "of the steps alone"
    monitor.close()
    lines = metrics(tmp_path)
    assert lines[10]["seconds_left"] == pytest.approx(11 * 5.0 + ahead().seconds(11))
    assert lines[-1]["seconds_left"] == pytest.approx(ahead().seconds(22))
    assert "step 22/22  loss 1.000  100 tok/s  13 s left, done" in capsys.readouterr().err


def test_without_any_prediction_the_time_left_waits_for_a_pace_and_holds_what_was_seen(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, "a", np.full(22, 100.0), is_time=False, done=10, ahead=ahead(None, evaluation=20.0))
    assert monitor.seconds_left(10) is None
    monitor.step(11, 5.0, {"loss": 1.0, "tokens_per_second": 100.0})
    assert monitor.seconds_left(11) == pytest.approx(11 * 5.0 + 3 * 20.0)
    monitor.close()
    ended = Monitor(tmp_path, "a", np.full(22, 100.0), is_time=False, done=22, ahead=ahead(None, evaluation=20.0))
    assert ended.seconds_left(22) == 20.0, "resumed behind the last step: no pace is needed"
    ended.close()


def test_the_first_of_a_part_counts_only_where_it_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import run

    moments = iter([0.0, 9.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(moments))
    clock = Clock()
    with clock.part("evaluation"):
        pass
    assert clock.each() == {"evaluation": 9.0}
    for _ in range(2):
        with clock.part("evaluation"):
            pass
    assert clock.each() == {"evaluation": 3.0}
    assert clock.parts == {"evaluation": 15.0}


def test_a_resume_knows_how_long_an_evaluation_took_before_it(tmp_path: Path) -> None:
    assert earlier_evaluations(tmp_path) == {}
    path = tmp_path / "evaluations.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n[]\n', encoding="utf-8")
    assert earlier_evaluations(tmp_path) == {}, "of an earlier version"
    path.write_text('{"seconds": 9.0}\n{"seconds": 4.0}\n{"seconds": NaN}\n{"seconds": null}\n{"sec', encoding="utf-8")
    assert earlier_evaluations(tmp_path) == {"evaluation": 4.0}
    path.write_text('{"seconds": 4.0}\n{"seconds": 1e9}\n' + "[" * 100_000, encoding="utf-8")
    assert earlier_evaluations(tmp_path) == {"evaluation": 4.0}, "no evaluation lasts thirty years"
    monitor = Monitor(tmp_path, "a", np.full(2, 1.0), is_time=True, done=0)
    monitor.evaluation(1, 2.0, 7.4, 5.5)
    monitor.close()
    assert earlier_evaluations(tmp_path) == {"evaluation": 5.5}


class Watched:
    """Counts what a run does beside its steps, and notes at the end of each step what it expects."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done = {"evaluation": 0, "samples": 0, "checkpoints": 0, "save": 0}
        self.seen: list[tuple[dict[str, int], dict[str, int]]] = []
        evaluated, answered, result = loop.held_out_loss, loop.write_samples, loop.save_result
        sums, step = loop.ckpt.write_sums, Monitor.step

        def count(name: str, real: Any) -> Any:
            def counted(*arguments: Any) -> Any:
                self.done[name] += 1
                return real(*arguments)

            return counted

        def noted(monitor: Monitor, done: int, *rest: Any, **named: Any) -> None:
            assert monitor.ahead is not None
            self.seen.append((dict(self.done), monitor.ahead.remaining(done)))
            step(monitor, done, *rest, **named)

        monkeypatch.setattr(loop, "held_out_loss", count("evaluation", evaluated))
        monkeypatch.setattr(loop, "write_samples", count("samples", answered))
        monkeypatch.setattr(loop, "save_result", count("save", result))
        monkeypatch.setattr(loop.ckpt, "write_sums", count("checkpoints", sums))  # once for each that is written
        monkeypatch.setattr(Monitor, "step", noted)


@pytest.mark.parametrize(
    ("preset", "stop_after", "changes"),  # the stop is in the middle of a step, counted in micro-steps
    [
        (
            "recommended",
            21,
            {"checkpoint_every": 3, "evaluation": EvaluationSpec(times_during_training=2, num_samples=1)},
        ),
        (
            "recommended",
            21,
            {"checkpoint_every": 4, "evaluation": EvaluationSpec(times_during_training=4, num_samples=1)},
        ),
        ("two-stage", 70, {"checkpoint_every": 2}),
        ("progressive", 70, {}),
    ],
)
def test_a_run_does_as_often_what_it_expected_after_each_of_its_steps(
    make_run: Any, monkeypatch: pytest.MonkeyPatch, preset: str, stop_after: int, changes: dict[str, Any]
) -> None:
    run = make_run(base=preset, **changes)
    watched = Watched(monkeypatch)
    StopAfter(monkeypatch, stop_after)
    with pytest.raises(loop.Stopped):
        loop.train(run)
    before = len(watched.seen)
    loop.train(run, resume=True)
    assert 0 < before < len(watched.seen)
    resumed_at = watched.seen[before]
    for done, expected in watched.seen[before:]:
        assert {name: watched.done[name] - done[name] for name in done} == expected, resumed_at
    plan = BatchPlan.load(run / "batch_plan.npz")
    assert watched.seen[0][1]["checkpoints"] == len(loop.checkpoint_steps(Job.read(run / "job.json"), plan.num_steps))


def test_the_last_checkpoint_is_written_once_and_before_the_last_evaluation(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(checkpoint_every=4)
    steps: list[str] = []
    real_evaluation, real_sums = loop.held_out_loss, loop.ckpt.write_sums
    monkeypatch.setattr(loop, "held_out_loss", lambda it: (steps.append("evaluation"), real_evaluation(it))[1])
    monkeypatch.setattr(loop.ckpt, "write_sums", lambda *of: (steps.append("checkpoint"), real_sums(*of))[1])
    assert loop.train(run) is not None
    assert steps[-2:] == ["checkpoint", "evaluation"]
    last = BatchPlan.load(run / "batch_plan.npz").num_steps
    log = (run / "train.log").read_text(encoding="utf-8")
    assert log.count(f"checkpoint of step {last} written") == 1


def test_a_run_counts_its_predicted_parts_from_its_own_folder(make_run: Any) -> None:
    run = make_run(evaluation=EvaluationSpec(times_during_training=1, num_samples=1, max_new_tokens=4))
    cost = CostModel(base=1e-3, per_token=1e-6, per_token_width=0.0, optimizer=1e-3)
    predicted = Predicted(cost=cost, train_seconds=1.0, parts=Breakdown(train=1.0, save=1000.0))
    (run / "estimate.json").write_text(jsonio.to_json(predicted), encoding="utf-8")
    loop.train(run)
    left = [line["seconds_left"] for line in metrics(run)]
    assert min(left) >= 1000.0, "the result is saved last"
    lines = (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["seconds"] > 0 for line in lines)
