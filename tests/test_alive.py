"""Whether the process of a run is still there, and what a watcher and the history say of one that was killed."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from planned import past_run
from run_folders import begin, end, write_steps

import planner.cli as command_line
from planner import remember
from planner.cli import cli
from planner.figures import UNKNOWN
from planner.history import RUNNING, History
from planner.launch import open_to_write
from planner.past import accuracy
from planner.run_view import look_at
from planner.unended import settle
from planner.watch import lines_of
from presets.errors import RunError
from trainer import alive
from trainer.alive import NAME, note_process, still_there
from trainer.finished import open_finished

NOW = datetime(2026, 11, 25, 18, 0).astimezone()
WITH_PROC = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="the system has no /proc")
TRAINER = """
import sys, time
from pathlib import Path
from trainer.alive import note_process
note_process(Path(sys.argv[1]))
print("noted", flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with a plan of 22 steps, of which three are done."""
    run = begin(tmp_path / "recommended-1")
    write_steps(run, range(1, 4))
    return run


@pytest.fixture
def trainer(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that says it trains in the folder, and does nothing."""
    with subprocess.Popen([sys.executable, "-c", TRAINER, str(folder)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"noted\n"
        yield child
        child.kill()


def change(folder: Path, **values: Any) -> None:
    path = folder / NAME
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_a_killed_run_is_stopped_at_once(folder: Path, trainer: subprocess.Popen[bytes]) -> None:
    assert still_there(folder) is True
    assert look_at(folder).state == "running"
    trainer.kill()
    if os.name == "posix":
        # Its parent has not asked how it ended: its number is still taken.
        os.waitid(os.P_PID, trainer.pid, os.WEXITED | os.WNOWAIT)
        assert still_there(folder) is False
    trainer.wait()
    assert still_there(folder) is False
    view = look_at(folder)
    assert (view.state, view.record) == ("stopped", None)
    text = "\n".join(lines_of(view, gpu=None, now=NOW))
    assert "recommended-1: stopped, step 3 of 22" in text
    assert "Its process is gone" in text
    assert f"Go on with it: plan --resume {shlex.quote(str(folder))}" in text
    assert "it was killed, the memory ran out, or it ended with an error that its terminal showed." in text
    assert " left" not in text


def test_a_command_to_copy_is_quoted_where_the_folder_s_name_has_blanks(tmp_path: Path) -> None:
    folder = begin(tmp_path / "my run")
    write_steps(folder, range(1, 4))
    with subprocess.Popen([sys.executable, "-c", TRAINER, str(folder)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"noted\n"
        child.kill()
    command = f"plan --resume '{folder}'"
    assert command in "\n".join(lines_of(look_at(folder), gpu=None, now=NOW))
    with pytest.raises(RunError, match="it is not finished") as refused:
        open_finished(folder)
    assert command in str(refused.value)


def test_a_run_that_ended_by_itself_says_how_although_its_process_is_gone(
    folder: Path, trainer: subprocess.Popen[bytes]
) -> None:
    trainer.kill()
    trainer.wait()
    end(folder)
    view = look_at(folder)
    assert view.state == "finished"
    assert "process" not in "\n".join(lines_of(view, gpu=None, now=NOW))


@WITH_PROC
def test_another_process_of_the_same_number_is_not_taken_for_it(folder: Path) -> None:
    note_process(folder)
    assert still_there(folder) is True
    change(folder, started=json.loads((folder / NAME).read_text(encoding="utf-8"))["started"] - 60.0)
    assert still_there(folder) is False


@WITH_PROC
def test_a_process_that_proc_hides_is_not_taken_for_gone(
    folder: Path, trainer: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert still_there(folder) is True
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "stat").touch()
    monkeypatch.setattr(alive, "PROC", tmp_path / "proc")
    monkeypatch.setattr("psutil.pid_exists", lambda pid: False)  # as it says there
    assert still_there(folder) is None
    assert look_at(folder).state == "running"
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", refuse)
        assert still_there(folder) is None
    trainer.kill()
    trainer.wait()
    assert still_there(folder) is False


def refuse(*_: Any) -> None:
    raise PermissionError


def test_where_a_clock_that_is_set_moves_the_start_a_small_difference_tells_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alive, "PROC", tmp_path / "none")
    note_process(folder)
    assert still_there(folder) is True
    started = json.loads((folder / NAME).read_text(encoding="utf-8"))["started"]
    for seconds, expected in ((3600.0, None), (-3600.0, None), (3 * 86_400.0, False)):
        change(folder, started=started + seconds)
        assert still_there(folder) is expected


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_in_the_notes_place_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / NAME)
    found: list[bool | None] = []
    asking = threading.Thread(target=lambda: found.append(still_there(folder)), daemon=True)
    asking.start()
    asking.join(timeout=30)
    assert found == [None]


def test_a_killed_run_that_is_resumed_is_not_dead_until_its_trainer_has_begun(
    folder: Path, trainer: subprocess.Popen[bytes]
) -> None:
    trainer.kill()
    trainer.wait()
    assert look_at(folder).state == "stopped"
    open_to_write(folder)
    assert look_at(folder).state == "running"
    long_ago = time.time() - 86_400
    for path in folder.iterdir():
        os.utime(path, (long_ago, long_ago))
    assert look_at(folder).state == "silent"
    note_process(folder)
    assert look_at(folder).state == "running", "a process that has just begun is a sign of life"


@pytest.mark.parametrize("values", [{"host": "another"}, {"pid": -1}, {"pid": "x"}, {"started": 0.0}, {"more": 1}])
def test_where_it_cannot_be_told_the_run_is_called_silent_after_a_while_as_before(
    folder: Path, values: dict[str, Any]
) -> None:
    note_process(folder)
    change(folder, **values)
    assert still_there(folder) is None
    assert look_at(folder).state == "running"


def test_a_damaged_note_or_none_tells_nothing(folder: Path) -> None:
    assert still_there(folder) is None
    (folder / NAME).write_bytes(b"\xff{")
    assert still_there(folder) is None
    note_process(folder)
    change(folder, pid=10**30)
    assert not still_there(folder), "no such number: no error"
    (folder / NAME).write_bytes(b"\xff{")
    assert look_at(folder).state == "running"


def test_a_real_run_notes_its_process_and_no_name_of_the_machine(make_run: Any) -> None:
    import platform

    from trainer.loop import train

    run = make_run()
    train(run)
    text = (run / NAME).read_text(encoding="utf-8")
    assert json.loads(text)["pid"] == os.getpid()
    assert platform.node() not in text
    assert still_there(run) is True


# --- the time left, while nothing is written --------------------------------------------------------------------------


def left_of(folder: Path) -> str:
    (line,) = [line for line in lines_of(look_at(folder), gpu=None, now=NOW) if line.startswith("time")]
    return line.partition(",")[0]


def test_the_time_left_runs_down_while_the_run_evaluates_and_saves(folder: Path) -> None:
    write_steps(folder, range(22, 23))
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 22, "seconds": 5.0, "seconds_left": 7200.0}\n')
    ahead = time.time() + 5
    os.utime(folder / "metrics.jsonl", (ahead, ahead))
    assert left_of(folder) == "time      2 h 00 min left"
    view = dataclasses.replace(look_at(folder), seconds_since_step=1800.0)
    assert "time      1 h 30 min left, done Wed 19:30" in lines_of(view, gpu=None, now=NOW)
    late = dataclasses.replace(view, seconds_since_step=9000.0)
    assert "time      0.0 s left, done Wed 18:00" in lines_of(late, gpu=None, now=NOW)


def test_a_resume_that_has_not_come_to_a_step_yet_does_not_count_the_time_since_the_one_before(folder: Path) -> None:
    long_ago = time.time() - 1800
    os.utime(folder / "metrics.jsonl", (long_ago, long_ago))
    since = look_at(folder).seconds_since_step
    assert since is not None
    assert since >= 1800
    note_process(folder)
    assert look_at(folder).seconds_since_step is None
    assert left_of(folder) == "time      1 min 35 s left"


# --- the history ------------------------------------------------------------------------------------------------------


def listed(folder: Path) -> list[str]:
    done = CliRunner().invoke(cli, ["history", "--json"])
    assert done.exit_code == 0
    (one,) = json.loads(done.stdout)["runs"]
    assert one["folder"] == str(folder.resolve())
    assert one["actual_seconds"] is None
    assert one["error"] is None
    return [one["status"], one["ended_at"]]


def test_a_run_is_in_the_history_from_its_start_and_one_that_was_killed_stays_there(
    folder: Path, trainer: subprocess.Popen[bytes]
) -> None:
    remember.begun(folder, look_at(folder).job)
    assert listed(folder)[0] == "running"
    assert settle(History()) == [folder], "it trains beside what is measured"
    assert History().runs()[0].status == RUNNING, "it has not ended"
    table = CliRunner().invoke(cli, ["history"]).stdout.splitlines()[-1].split()
    assert (table[0], table[-1]) == ("–", "running")
    long_ago = time.time() - 86_400
    for name in ("metrics.jsonl", "job.json", NAME):
        os.utime(folder / name, (long_ago, long_ago))
    trainer.kill()
    trainer.wait()
    status, ended_at = listed(folder)
    assert status == "killed"
    assert abs(datetime.fromisoformat(ended_at).timestamp() - long_ago) < 3600, "when it last wrote something"
    assert History().runs()[0].status == RUNNING, "looking at it writes nothing"


def test_a_run_without_an_end_counts_neither_in_the_accuracy_nor_in_later_estimates(folder: Path) -> None:
    remember.begun(folder, look_at(folder).job)
    history = History()
    (found,) = history.runs()
    history.add_run(dataclasses.replace(found, signature_key="k", raw_train_seconds=80.0))
    assert history.counted_runs("k", 10) == []
    history.add_run(past_run())
    measured = accuracy(history.runs())
    assert measured is not None
    assert measured.num_runs == 1
    assert [run.folder for run in history.counted_runs("k", 10)] == [past_run().folder]


def test_a_run_whose_plan_was_ended_before_it_is_listed_by_its_record(folder: Path) -> None:
    remember.begun(folder, look_at(folder).job)
    end(folder)
    (one,) = remember.as_they_stand(History().runs())
    assert (one.status, one.actual_seconds) == ("finished", 120.0)
    assert History().runs()[0].status == RUNNING, "looking at it writes nothing"
    settle(History())  # an estimate does: the run is to correct it
    (stored,) = History().runs()
    assert (stored.status, stored.actual_seconds, stored.not_counted) == ("finished", 120.0, None)
    remember.begun(folder, look_at(folder).job)  # it goes on from there: what lies there is of the stop before
    os.utime(folder / "record.json", (time.time() - 60,) * 2)
    settle(History())
    assert History().runs()[0].status == RUNNING
    (folder / "record.json").unlink()
    settle(History())
    assert History().runs()[0].status == RUNNING, "killed: there is nothing to take in"
    (folder / "job.json").unlink()
    assert listed(folder)[0] == UNKNOWN


@pytest.mark.parametrize(
    ("code", "status"),
    [(0, UNKNOWN), (1, "failed"), (129, "stopped"), (130, "stopped"), (143, "stopped"), (137, "killed")],
)
def test_a_trainer_that_leaves_no_record_is_listed_by_its_exit_code(folder: Path, code: int, status: str) -> None:
    job = look_at(folder).job
    remember.begun(folder, job)
    remember.ended(folder, job, None, code)
    assert listed(folder)[0] == status


def test_a_run_whose_record_is_damaged_is_not_listed_as_running(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = look_at(folder).job
    remember.begun(folder, job)
    (folder / "record.json").write_text("{")
    assert command_line._ended(folder, job, 143) == 143
    assert f"note: {folder / 'record.json'}: not JSON" in capsys.readouterr().err
    (one,) = History().runs()
    assert (one.status, one.actual_seconds) == ("stopped", None)


def test_the_accuracy_is_of_the_runs_as_they_are_listed(folder: Path) -> None:
    remember.begun(folder, look_at(folder).job)
    end(folder)  # its plan was ended before it
    done = CliRunner().invoke(cli, ["history", "--accuracy", "--json"])
    found = json.loads(done.stdout)["accuracy"]
    assert found is not None
    assert (found["num_runs"], found["worst"]) == (1, pytest.approx(0.2))


def test_a_second_plan_that_finds_the_folder_taken_does_not_end_the_first_ones_run(folder: Path) -> None:
    job = look_at(folder).job
    note_process(folder)
    remember.begun(folder, job)
    remember.ended(folder, job, None, 1)
    assert listed(folder)[0] == "running"


def test_an_end_takes_the_place_of_the_start(folder: Path) -> None:
    job = look_at(folder).job
    remember.begun(folder, job)
    end(folder)
    record = look_at(folder).record
    remember.ended(folder, job, record, 0)
    (one,) = History().runs()
    assert (one.status, one.actual_seconds, one.not_counted) == ("finished", 120.0, None)
    assert datetime.fromisoformat(one.ended_at) <= datetime.now().astimezone() + timedelta(seconds=1)


@pytest.mark.skipif(os.name == "nt", reason="a signal that cannot be caught")
def test_a_run_and_its_plan_killed_are_listed_and_watched_as_such(
    make_run: Any, preloaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(num_epochs=500)
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "planner.cli", "--resume", str(run)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while len(look_at(run).steps) < 2:
            assert child.poll() is None
            time.sleep(0.05)
        child.kill()  # the plan first: it can tell nobody
        assert listed(run)[0] == "running"
    finally:
        child.kill()
        child.wait()
        os.kill(json.loads((run / NAME).read_text(encoding="utf-8"))["pid"], signal.SIGKILL)
    while still_there(run):
        time.sleep(0.05)
    assert listed(run)[0] == "killed"
    assert "stopped, step" in CliRunner().invoke(cli, ["watch", str(run), "--once"]).stdout
