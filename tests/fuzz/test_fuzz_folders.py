"""Run folders and the history file, damaged in any way: a view, or one PlanError; a history never fails at all."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import sqlite3
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from budget import MUTANTS, SEEDS, any_value, changed, fuzzed, mutants
from hypothesis import given

from planner import past
from planner.history import COLUMNS, History, PastRun
from planner.outcome import outcome_text
from planner.run_view import look_at
from planner.watch import lines_of
from presets import jsonio
from presets.errors import PlanError
from presets.schema import load_preset
from trainer.job import DataSpec, Job
from trainer.record import Actual, Breakdown, Predicted, RunRecord

NOW = datetime(2026, 1, 2, 3, 4, 5).astimezone()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def _job() -> Job:
    return Job(
        name="mine", preset=load_preset("recommended"), model="a", data=DataSpec(source="b"), device="cpu",
        precision="fp32", base_precision="fp32", micro_batch_size=1,
    )  # fmt: skip


def shows(run: Path) -> None:
    """What `plan watch` and `plan report` (but for its drawings) make of it."""
    from planner.run_report import _breakdown_table, _outcome_table, _settings

    try:
        view = look_at(run)
    except PlanError:
        return
    assert lines_of(view, gpu=None, now=NOW)
    assert _outcome_table(view)
    assert _settings(view)
    if view.record is not None and view.record.actual.breakdown is not None:
        assert _breakdown_table(view)
    if view.record is not None:
        assert outcome_text(view.record, run)
    assert list(view.steps) == sorted(view.steps, key=lambda one: int(one["step"]))


_NAMES = ("loss", "seconds", "planned_seconds", "seconds_left", "drift", "memory_bytes", "tokens_per_second")


def _metrics(chance: random.Random) -> bytes:
    lines = []
    for _ in range(chance.randint(0, 4)):
        line = {"step": chance.choice([0, 1, 2, 3, 3, -1, any_value(chance)])}
        line |= {name: chance.choice([1.5, any_value(chance)]) for name in _NAMES if chance.random() < 0.8}
        lines.append(json.dumps(line))
    return "\n".join(lines).encode()


@fuzzed()
@given(SEEDS)
def test_metrics_of_any_content_can_be_looked_at(folder: Path, seed: int) -> None:
    run, chance = folder / "run", random.Random(seed)
    run.mkdir(exist_ok=True)
    (run / "job.json").write_text(_JOB)
    for _ in range(MUTANTS // 5):
        whole, at = _metrics(chance), chance.getrandbits(48)
        (run / "evaluations.jsonl").write_bytes(whole)
        for content in itertools.islice(mutants(_metrics(chance), at), 5):
            (run / "metrics.jsonl").write_bytes(content)
            shows(run)


_JOB = _job().to_json()
_RECORD = RunRecord(
    status="finished", job=_job(),
    predicted=Predicted(seconds=2.0, seconds_low=1.0, seconds_high=3.0, parts=Breakdown()),
    actual=Actual(seconds=2.0, eval_loss_before=2.0, eval_loss_after=1.0, breakdown=Breakdown(train=1.0)),
    versions={"torch": "2"}, notes=("a",),
)  # fmt: skip
_PLACES: list[tuple[str, ...]] = [
    ("status",), ("notes",), ("error",), ("versions",), ("job",),
    *(("predicted", one.name) for one in dataclasses.fields(Predicted)),
    *(("actual", one.name) for one in dataclasses.fields(Actual)),
    *(("actual", "breakdown", one.name) for one in dataclasses.fields(Breakdown)),
]  # fmt: skip


_PLAIN = jsonio.to_json(_RECORD)


@fuzzed(5 * MUTANTS)
@given(SEEDS)
def test_a_record_of_any_content_can_be_looked_at_or_is_refused(folder: Path, seed: int) -> None:
    run, chance = folder / "ended", random.Random(seed)
    run.mkdir(exist_ok=True)
    (run / "job.json").write_text(_JOB)
    for _ in range(MUTANTS // 2):
        content = json.dumps(changed(json.loads(_PLAIN), _PLACES, chance)).encode()
        for one in itertools.islice(mutants(content, chance.getrandbits(48)), 2):
            (run / "record.json").write_bytes(one)
            shows(run)


def _history(home: Path) -> History:
    notes: list[str] = []
    history = History(home=home, say=notes.append)
    for number in range(3):
        history.add_run(PastRun(folder=f"/{number}", ended_at="2026-01-01", status="finished", name="a", model="b"))
    history.keep_measurements({"k": "v"})
    return history


def _file() -> bytes:
    with tempfile.TemporaryDirectory() as made:
        return _history(Path(made)).path.read_bytes()


def reads(history: History) -> None:
    """Everything a command does with a history."""
    runs = history.runs()
    assert past.runs_text(runs, NOW)
    assert json.loads(past.runs_json(runs))
    assert past.accuracy_text(past.accuracy(runs))
    history.counted_runs("s", 5)
    history.measurements(["k"])


_WHOLE = _file()


@fuzzed(5 * MUTANTS)  # a fifth of the inputs: each is a file renamed and another begun
@given(SEEDS)
def test_a_history_file_of_any_content_is_read_or_set_aside(folder: Path, seed: int) -> None:
    home, chance = folder / "home", random.Random(seed)
    home.mkdir(exist_ok=True)
    history = History(home=home)
    for content in mutants(_WHOLE, seed):
        for path in home.iterdir():
            path.unlink()
        cut = content if chance.random() < 0.7 else content[: chance.randint(0, len(content))]
        history.path.write_bytes(cut)
        reads(history)


_CELLS = [
    None, 0, -1, 2**62, 1.5, float("inf"), 1e308, -1e308, 5e-324, "", "a", "\x1b", "2026-01-01", b"\xff", "1e5",
    "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+14:00",
]  # fmt: skip
_ROW = {"folder": "/x", "ended_at": "2026-01-01", "status": "finished", "name": "a", "model": "b", "versions": ""}


@fuzzed()
@given(SEEDS)
def test_a_history_of_any_rows_is_shown_without_the_odd_ones(folder: Path, seed: int) -> None:
    chance, history = random.Random(seed), History(home=folder / "rows")
    if not history.path.exists():
        _history(history.home)
    rows = []
    for number in range(MUTANTS):
        row = _ROW | {"num_resumes": 0, "seconds": 2.0, "actual_seconds": 3.0}
        row |= {chance.choice(COLUMNS): chance.choice(_CELLS) for _ in range(chance.randint(1, 3))}
        rows.append(tuple((row | {"folder": f"/{number}"}).get(name) for name in COLUMNS))
    with contextlib.closing(sqlite3.connect(history.path)) as db:
        db.execute("DELETE FROM runs")
        db.executemany(f"INSERT INTO runs VALUES ({', '.join('?' for _ in COLUMNS)})", rows)
        db.commit()
    reads(history)
