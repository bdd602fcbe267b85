"""A disk that is full, read-only, or too small from the beginning."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import Server, why_lost

from planner import cli, compare
from planner.room import least_trainable
from presets.errors import RunError
from trainer import disk
from trainer.disk import bytes_to_write, require_room, size_of
from trainer.record import RunRecord

Whole = tuple[Path, list[tuple[str, bool, str]]]
NO_CHECK = {"trainer.disk.BESIDES": -(10**12)}  # the room on a small disk is not looked at beforehand


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if sys.platform != "linux" or shutil.which("mount") is None or subprocess.run(mounting, check=False).returncode:
        pytest.skip("mounting a small disk needs Linux and root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Length and time of change of every file, the lock left out."""
    found = ((path, path.lstat()) for path in folder.rglob("*") if path.name != ".lock")
    return {str(path.relative_to(folder)): (status.st_size, status.st_mtime_ns) for path, status in found}


@pytest.mark.slow
def test_a_disk_that_is_full_while_saving_stops_the_run_in_one_line_and_loses_nothing(
    server: Server, make_short: Any, whole: Whole, small_disk: Path
) -> None:
    run = Path(shutil.move(make_short("run"), small_disk / "run"))
    checkpoint = size_of(whole[0] / "checkpoints" / "step-000006")
    ballast = small_disk / "ballast"
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - checkpoint * 3 // 2 - (96 << 10))
    ended = server.train(run, set=NO_CHECK)
    assert ended.code == 1, ended.said
    (line,) = ended.errors
    assert "the disk is full" in line
    assert f"plan --resume {run}" in line
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    ballast.unlink()
    ended = server.train(run, resume=True, set=NO_CHECK)
    assert ended.code == 0, ended.said
    assert why_lost(run, whole[0]) is None


@pytest.mark.slow
def test_a_full_disk_is_told_of_with_what_goes_on_from_there(
    server: Server, make_short: Any, whole: Whole, tmp_path: Path
) -> None:
    """The same without a right to mount: the system's answer at a write of safetensors' own."""
    expected, calls = whole
    run = make_short("run")
    at = next(n for n, (call, _, path) in enumerate(calls, 1) if call == "write" and ".step-000003." in path)
    ended = server.train(run, below=str(run), at=at, mode="full")
    assert ended.code == 1
    (line,) = ended.errors
    assert line.startswith(f"Error: {run}/checkpoints/step-000003 cannot be written (the disk is full: No space left")
    assert line.endswith(f"go on with 'plan --resume {run}'.")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    ended = server.train(run, resume=True)
    assert "resumed from step 2" in ended.said
    assert why_lost(run, expected) is None


@pytest.mark.slow
def test_a_folder_that_has_become_read_only_is_refused_in_one_line_and_nothing_is_lost(
    server: Server, make_short: Any, whole: Whole, small_disk: Path
) -> None:
    run = Path(shutil.move(make_short("run"), small_disk / "run"))
    assert server.train(run, set=NO_CHECK, below=str(run), at=130, mode="kill").code < 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    before = state_of(run)
    ended = server.train(run, resume=True, set=NO_CHECK)
    assert ended.code == 1
    (line,) = ended.errors
    assert line == (
        f"Error: run folder '{run}' cannot be written (Read-only file system). Mend that and try again; nothing was "
        "changed."
    )
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert state_of(run) == before
    assert server.train(run, resume=True, set=NO_CHECK).code == 0
    assert why_lost(run, whole[0]) is None


@pytest.mark.slow
def test_a_resume_looks_for_room_before_it_trains(server: Server, make_short: Any) -> None:
    run = make_short("run")
    ended = server.train(run, resume=True, set={"trainer.disk.BESIDES": 10**15})
    assert ended.code == 1
    (line,) = ended.errors
    assert "the run needs up to 9" in line
    assert not (run / "metrics.jsonl").exists()
    assert not (run / "checkpoints").exists()


def test_a_run_never_holds_more_than_was_planned_for_it(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import checkpoint, loop

    run = make_run(checkpoint_every=1)
    most = [0]
    real = checkpoint.rotate

    def rotate(folder: Path, keep: int, best: int | None) -> None:
        most[0] = max(most[0], size_of(run))
        real(folder, keep, best)

    promised: list[int] = []
    monkeypatch.setattr(checkpoint, "rotate", rotate)
    monkeypatch.setattr(loop, "require_room", lambda folder, needed: promised.append(needed))
    loop.train(run)
    (needed,) = promised
    tensors = sum(size_of(path) for path in (run / "checkpoints").glob("step-000009"))
    assert max(most[0], size_of(run)) <= needed
    assert needed - disk.BESIDES >= 4 * (tensors - 32_000)  # two kept, the best, and the one that is being written


def test_too_little_room_is_said_with_both_numbers_and_what_is_held_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 << 30))
    require_room(tmp_path / "not" / "there", 5 << 30)
    with pytest.raises(RunError, match=r"has 5\.00 GiB free; the run needs up to 7\.00 GiB .* --output"):
        require_room(tmp_path / "not" / "there", 7 << 30)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    with open(tmp_path / "checkpoints" / "step-000001" / "model.safetensors", "wb") as file:
        file.truncate(2 << 30)
    require_room(tmp_path, 7 << 30)


def test_plan_run_refuses_a_disk_without_room_before_it_measures(
    tiny_model: Path,
    chat_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure(*_: Any) -> Any:
        raise AssertionError("minutes were spent on measuring")

    monkeypatch.setattr(compare, "_measure_all", measure)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=20 << 20))
    monkeypatch.chdir(tmp_path)
    words = ["plan", "--run", "baseline", "--model", str(tiny_model), "--dataset", str(chat_file), "--output", "run"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert lines == [
        "Error: the disk of 'run' has 20.0 MiB free; the run needs up to 64.0 MiB for its checkpoints and result. Make "
        "room, or use another disk (a new run: --output)."
    ]
    assert not (tmp_path / "run").exists()


def test_full_fine_tuning_is_known_to_write_the_whole_model_before_it_is_loaded(make_job: Any, make_run: Any) -> None:
    from trainer.model import load_model

    job = make_job(adapter="full")
    assert least_trainable(job) == load_model(job, need_weights=True).num_trainable_parameters
    assert bytes_to_write(1_000_000, 2) - disk.BESIDES == 4 * 12_000_000 + 4_000_000
    assert least_trainable(make_job()) == 0


def test_a_metrics_line_that_cannot_be_written_stops_the_run_and_the_record_says_so(
    make_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.loop import train
    from trainer.monitor import Monitor

    whole, run = make_run("whole", checkpoint_every=1), make_run("run", checkpoint_every=1)
    train(whole)
    real = Monitor.step

    def step(self: Monitor, done: int, *arguments: Any, **more: Any) -> None:
        if done == 4:
            raise OSError(28, os.strerror(28))
        real(self, done, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "step", step)
        with pytest.raises(RunError, match=r"the disk is full.*plan --resume"):
            train(run)
    record = RunRecord.read(run / "record.json")
    assert record.status == "failed"
    train(run, resume=True)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
