"""What happens to the file that measurements and runs are kept in, and `plan history`."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planned import Bench, forget_company, past_run
from test_cli import PYTHON, plan

from planner.doctor import _free_disk
from planner.history import (
    _SCHEMA,
    APPLICATION_ID,
    BUSY_SECONDS,
    FILE_NAME,
    SCHEMA_VERSION,
    History,
    _identity,
)
from presets.demo import demo_folder
from presets.errors import DataError, SettingsError
from presets.home import plan_home
from presets.user import all_names
from trainer.data import prepare_data
from trainer.job import DataSpec
from trainer.sources import open_source

# --- the file ---------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from planner.history import History, PastRun
home, who = Path(sys.argv[1]), sys.argv[2]
history = History(home=home)
sys.stdin.readline()  # all at once
for number in range(40):
    history.add_run(PastRun(folder=f"/{who}/{number}", ended_at="2026-01-01T00:00:00+00:00", status="finished",
                            name="baseline", model=who))
    history.keep_measurements({f"{who}-{number}": "x" * 20_000, "shared": who})
    assert history.measurements(["shared"])
assert not history.notes, history.notes
"""


def test_tables_that_another_process_makes_meanwhile_are_no_stranger_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two of the questions that tell a new file from another program's."""
    path, connect, asked = tmp_path / FILE_NAME, sqlite3.connect, []
    path.touch()  # as the other one leaves it at first

    def make_tables(statement: str) -> None:
        if "sqlite_master" not in statement or asked:
            return
        asked.append(statement)
        locked = suppress(sqlite3.OperationalError)  # it has to wait
        with closing(connect(path, timeout=0, isolation_level=None)) as other, locked:
            other.executescript(f"BEGIN IMMEDIATE; {_SCHEMA}; PRAGMA application_id = {APPLICATION_ID}; COMMIT")

    def watched(*arguments: Any, **named: Any) -> sqlite3.Connection:
        made = connect(*arguments, **named)
        made.set_trace_callback(make_tables)
        return made

    monkeypatch.setattr(sqlite3, "connect", watched)
    history = History(home=tmp_path)
    history.add_run(past_run(1))
    assert asked
    assert history.notes == []
    assert [run.folder for run in history.runs()] == [past_run(1).folder]
    assert [one.name for one in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("times", [1, 2, 99])
@pytest.mark.parametrize("name", ["SQLITE_IOERR_DELETE_NOENT", "SQLITE_READONLY_DBMOVED"])
def test_what_another_process_is_at_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, times: int
) -> None:
    history, plain = History(home=tmp_path), History._transaction
    left = [times]

    def transaction(self: History, action: Any, writes: bool) -> Any:
        found = plain(self, action, writes)  # done, and yet it may be told to have failed
        if left[0]:
            left[0] -= 1
            failure = sqlite3.OperationalError("disk I/O error")
            failure.sqlite_errorname = name  # type: ignore[misc]
            raise failure
        return found

    monkeypatch.setattr(History, "_transaction", transaction)
    history.add_run(past_run(1))
    monkeypatch.undo()
    assert [run.folder for run in history.runs()] == [past_run(1).folder]
    assert bool(history.notes) is (times == 99)


def test_several_processes_write_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    home = tmp_path / "not there yet"
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(home), who],
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for who in ("one", "two", "three")
    ]  # fmt: skip
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        _, said = child.communicate(timeout=120)
        assert child.returncode == 0, said
    history = History(home=home)
    assert len(history.runs()) == 120
    assert len(history.measurements(f"{who}-{n}" for who in ("one", "two", "three") for n in range(40))) == 120
    assert history.measurements(["shared"])["shared"] in ("one", "two", "three")
    assert [path.name for path in home.iterdir()] == [FILE_NAME]


def test_a_process_that_comes_while_another_makes_the_tables_uses_those(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for statement in filter(str.strip, _SCHEMA.split(";")):
        other.execute(statement)
    other.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    other.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    history = History(home=tmp_path)
    late = threading.Thread(target=history.add_run, args=(past_run(),))
    late.start()
    time.sleep(0.2)  # it has seen that there are no tables, and waits to make them
    other.execute("COMMIT")
    other.close()
    late.join(timeout=60)
    assert not history.notes
    assert len(history.runs()) == 1


def _text(path: Path) -> None:
    path.write_text("this is no database, " * 100)


def _overwritten(path: Path) -> None:
    History(home=path.parent).add_run(past_run())
    content = bytearray(path.read_bytes())
    content[100:] = os.urandom(len(content) - 100)
    path.write_bytes(content)


def _cut(path: Path) -> None:
    history = History(home=path.parent)
    history.keep_measurements({f"key{number}": "x" * 5000 for number in range(20)})
    path.write_bytes(path.read_bytes()[:6000])


def _other_program(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE bookmarks (address TEXT)")


def _without_tables(path: Path) -> None:
    History(home=path.parent).add_run(past_run())
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE runs")
        db.execute("DROP TABLE measurements")


@pytest.mark.parametrize("spoil", [_text, _overwritten, _cut, _other_program, _without_tables])
def test_a_damaged_or_foreign_file_is_set_aside_with_a_note_that_names_it(tmp_path: Path, spoil: Any) -> None:
    path = tmp_path / FILE_NAME
    spoil(path)
    before = path.read_bytes()
    said: list[str] = []
    history = History(home=tmp_path, say=said.append)
    history.runs()
    history.measurements(["key19"])
    history.add_run(past_run(5))
    history.keep_measurements({"key": "content"})
    assert [run.folder for run in history.runs()] == ["/runs/5"]
    assert history.measurements(["key"]) == {"key": "content"}
    [aside] = [other for other in tmp_path.iterdir() if other.name != FILE_NAME]
    assert aside.read_bytes() == before
    [note] = said
    assert str(path) in note
    assert aside.name in note


def test_a_new_file_is_not_set_aside_for_the_damage_of_the_one_before_it(tmp_path: Path) -> None:
    """Two processes find the same damage: the second must not take away what the first has begun."""
    _text(tmp_path / FILE_NAME)
    found_by_both = _identity(tmp_path / FILE_NAME)
    first, second = History(home=tmp_path), History(home=tmp_path)
    first.add_run(past_run())
    second._set_aside(found_by_both, "it is damaged")
    assert len(second.runs()) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    history = History(home=tmp_path)
    history.add_run(past_run())
    with sqlite3.connect(history.path) as db:
        db.execute("PRAGMA user_version = 99")
    before = history.path.read_bytes()
    history.add_run(past_run(2))
    assert history.runs() == []
    assert history.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    [note] = history.notes
    assert "later version" in note


def test_a_home_that_cannot_be_used_is_a_note_and_no_error(tmp_path: Path, bench: Bench) -> None:
    (tmp_path / "file").write_text("")
    history = History(home=tmp_path / "file" / "home")
    history.add_run(past_run())
    history.keep_measurements({"key": "content"})
    assert history.runs() == []
    assert len(history.notes) == 1
    bench.home = tmp_path / "file" / "home"
    assert bench.plan().report.rows[0].seconds is not None


def test_a_number_that_the_file_cannot_hold_is_a_note_and_costs_no_other_entry(tmp_path: Path) -> None:
    history = History(home=tmp_path)
    history.add_run(past_run(1))
    history.add_run(replace(past_run(2), num_examples=2**63))
    assert [run.folder for run in history.runs()] == [past_run(1).folder]
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    [note] = history.notes
    assert "cannot hold a number above 2^63" in note


def test_a_file_that_another_process_holds_is_waited_for_and_not_set_aside(tmp_path: Path, monkeypatch: Any) -> None:
    assert BUSY_SECONDS >= 5
    monkeypatch.setattr("planner.history.BUSY_SECONDS", 0.05)
    history = History(home=tmp_path)
    history.add_run(past_run(1))
    with sqlite3.connect(history.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        assert len(history.runs()) == 1
        history.add_run(past_run(2))
        assert "locked" in history.notes[0]
        other.execute("COMMIT")
    history.add_run(past_run(2))
    assert len(history.runs()) == 2
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_old_measurements_go_when_there_are_too_many(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("planner.history.MOST_MEASUREMENTS", 3)
    history = History(home=tmp_path)
    for number in range(5):
        history.keep_measurements({f"key{number}": "x"})
    assert sorted(history.measurements(f"key{number}" for number in range(5))) == ["key2", "key3", "key4"]


# --- plan history -----------------------------------------------------------------------------------------------------


def test_a_history_of_the_version_before_is_read_and_goes_on(tmp_path: Path) -> None:
    """It has no column for whether a range was calibrated."""
    history = History(home=tmp_path)
    history.add_run(past_run(1))
    with closing(sqlite3.connect(history.path)) as db:
        db.execute("ALTER TABLE runs DROP COLUMN calibrated")
    assert [run.calibrated for run in history.runs()] == [None]
    assert [run.folder for run in history.counted_runs("k", 9)] == ["/runs/1"]
    history.add_run(past_run(2, calibrated=False))
    history.add_run(past_run(3, calibrated=True))
    assert [(run.folder, run.calibrated) for run in history.runs()] == [
        ("/runs/3", True),
        ("/runs/2", False),
        ("/runs/1", None),
    ]
    assert history.notes == []
    with closing(sqlite3.connect(history.path)) as db:
        db.execute("ALTER TABLE runs ADD COLUMN of_a_later_version")
    assert len(history.runs()) == 3
    assert [one.name for one in tmp_path.iterdir()] == [FILE_NAME]


WITHOUT_TORCH = """
import sys
sys.argv = ['plan', *sys.argv[1:]]
from planner.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {'torch', 'transformers', 'tokenizers', 'peft', 'accelerate', 'datasets', 'pyarrow', 'pandas', 'scipy'}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_measure_once_then_plan_without_torch_and_run_from_the_measurement(
    tmp_path: Path, tiny_model: Path, chat_file: Path, preloaded: None
) -> None:
    """The chain on a real model: measured, answered from the cache by a light process, run from it, and in the list."""
    options = ["--model", str(tiny_model), "--dataset", str(chat_file), "--gradient-accumulation-steps", "8"]
    timing = ["--budget", "1", "--preset", "baseline", "--preset", "recommended", "--json"]
    first = plan(*options, *timing, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    rows = {row["name"]: row for row in json.loads(first.stdout)["rows"]}
    assert {row["basis"] for row in rows.values()} == {"measured"}
    forget_company(Path(os.environ["PLAN_HOME"]))
    result = subprocess.run(
        [PYTHON, "-P", "-c", WITHOUT_TORCH, *options, *timing],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": PLAN_ROOT},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert re_measured(result.stderr)
    for row in json.loads(result.stdout)["rows"]:
        assert row["basis"] == "cached"
        assert row["seconds_per_step"] == rows[row["name"]]["seconds_per_step"]
    assert (tmp_path / "run").exists() is False

    ran = plan("--run", "recommended", *options, "--budget", "1", "--output", "run", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert re_measured(ran.stderr)
    assert "on this device, not now: recommended" in ran.stdout
    [entry] = json.loads(plan("history", "--json", cwd=tmp_path).stdout)["runs"]
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert entry["folder"] == str(tmp_path / "run")
    assert (
        entry["raw_train_seconds"] == record["predicted"]["raw_train_seconds"] == record["predicted"]["train_seconds"]
    )
    assert entry["actual_seconds"] == record["actual"]["seconds"]
    assert 0 <= record["actual"]["others_share"] <= 1
    assert entry["measured_as"] == record["predicted"]["measured_as"] != ""
    assert (entry["status"], entry["not_counted"], entry["num_examples"]) == ("finished", None, 72)
    assert entry["signature_key"]
    assert "1 run(s)" in plan("history", "--accuracy", cwd=tmp_path).stdout
    assert "recommended" in plan("history", cwd=tmp_path).stdout
    (Path(os.environ["PLAN_HOME"]) / FILE_NAME).unlink()
    assert plan("--resume", "run", cwd=tmp_path).returncode == 0
    assert json.loads(plan("history", "--json", cwd=tmp_path).stdout)["runs"] == [entry]


@pytest.mark.parametrize("home", ["x" * 300, "closed/in"])
def test_a_home_that_cannot_be_opened_is_said_and_nothing_else_is_lost(
    tmp_path: Path, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if home == "closed/in":
        (tmp_path / "closed").mkdir(mode=0)
        if os.access(tmp_path / "closed", os.X_OK):
            pytest.skip("whoever runs the tests may search any folder")
    monkeypatch.setenv("PLAN_HOME", str(tmp_path / home))
    said: list[str] = []
    history = History(say=said.append)
    assert history.runs() == []
    assert history.measurements(["a"]) == {}
    history.keep_measurements({"a": "b"})
    assert len(said) >= 1
    assert all("cannot be used" in one for one in said)
    assert all_names()[0] == "baseline"
    assert _free_disk(plan_home()) is None
    data = prepare_data(DataSpec(source="bundled", limit=20), model=str(demo_folder()), max_length=64)
    assert "could not be kept" in " ".join(data.report.notes)


def test_a_home_of_nobody_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAN_HOME", "~nobody-of-that-name/x")
    with pytest.raises(SettingsError, match="there is no such user"):
        plan_home()
    with pytest.raises(DataError, match="no such file"):
        open_source("~nobody-of-that-name/x.jsonl")


PLAN_ROOT = str(Path(__file__).resolve().parent.parent)


def re_measured(stderr: str) -> bool:
    return " ago on this machine; --fresh measures again" in stderr
