"""Run folders as a run leaves them, without the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from fakes import make_data, make_job

from planner.run_view import look_at
from presets import jsonio
from trainer.planning import plan_job
from trainer.record import Actual, Breakdown, Predicted, RunRecord


def begin(run: Path, *, calibrated: bool | None = True) -> Path:
    """A run folder with a plan of 22 steps, of which none is done."""
    run.mkdir()
    job = make_job("recommended", gradient_accumulation_steps=16)
    plan_job(job, make_data(np.full(352, 20))).plan.save(run / "batch_plan.npz")
    predicted = Predicted(
        seconds=100.0, seconds_low=90.0, seconds_high=110.0, train_seconds=88.0, peak_memory_bytes=1 << 30,
        calibrated=calibrated,
    )  # fmt: skip
    (run / "estimate.json").write_text(jsonio.to_json(predicted), encoding="utf-8")
    (run / "job.json").write_text(job.to_json(), encoding="utf-8")
    return run


def step(number: int, **values: Any) -> str:
    line = {
        "step": number,
        "loss": 4.0 / number,
        "tokens_per_second": 1000.0,
        "memory_bytes": 1 << 29,
        "seconds": 5.0,
        "planned_seconds": 4.0,
        "seconds_left": 5.0 * (22 - number),
        "drift": 0.25,
    }
    return json.dumps(line | values) + "\n"


def write_steps(folder: Path, numbers: range) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(step(number) for number in numbers)


def end(folder: Path, status: str = "finished", **changes: Any) -> None:
    job = look_at(folder).job
    actual = Actual(
        seconds=120.0,
        train_seconds=110.0,
        peak_memory_bytes=1 << 30,
        num_steps=22,
        eval_loss_before=5.0,
        eval_loss_after=1.5,
        breakdown=Breakdown(train=110.0, load=4.0, checkpoints=6.0),
    )
    record = RunRecord(
        status=status,
        job=job,
        predicted=look_at(folder).predicted,
        actual=actual,
        versions={"torch": "2.13"},
        **changes,
    )
    record.write(folder / "record.json")


def finished(run: Path) -> Path:
    """A run folder with all its steps, three evaluations and a record."""
    begin(run)
    write_steps(run, range(1, 23))
    with (run / "evaluations.jsonl").open("w", encoding="utf-8") as file:
        file.write('{"step": 0, "loss": 5.0}\n{"step": 11, "loss": 2.0}\n{"step": 22, "loss": 1.5}\n')
    end(run)
    return run
