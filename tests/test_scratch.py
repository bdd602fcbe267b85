"""Where a checkpoint is timed: on the disk of the run, in a folder that does not stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from planned import Bench

from planner import scratch
from planner.cli import cli
from planner.options import same_options
from planner.scratch import PREFIX, Place, disk_of, place_for, scratch_folder
from presets.errors import DataError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, which is not the system's temporary one."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def forbid(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) not in folders)  # root may write everywhere


def fill(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Nothing more can be made there, though it can be written."""
    make = tempfile.mkdtemp

    def full(*arguments: Any, **named: Any) -> str:
        if named.get("dir") == folder:
            raise OSError(28, "No space left on device")
        return make(*arguments, **named)

    monkeypatch.setattr(tempfile, "mkdtemp", full)


def test_the_place_is_beside_the_run_folders(here: Path, tmp_path: Path) -> None:
    assert place_for(None) == Place(folder=here)  # runs/ is made by a run, not by a plan
    (here / "runs").mkdir()
    assert place_for(None) == Place(folder=here / "runs")
    assert place_for(Path("runs/one")) == Place(folder=here / "runs")
    assert place_for(tmp_path / "not" / "there" / "yet") == Place(folder=tmp_path)
    (here / "file").touch()
    assert place_for(Path("file/run")) == Place(folder=here)
    assert place_for(Path("~nobody-of-this-name/run")) == Place(folder=here)


def test_a_run_folder_that_is_a_disk_of_its_own_is_tried_itself(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / "mounted"
    run.mkdir()
    assert place_for(run) == Place(folder=here)
    monkeypatch.setattr(scratch, "disk_of", lambda folder: folder.name)
    assert place_for(run) == Place(folder=run)


def test_a_run_folder_that_alone_can_be_written_is_tried_itself(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "run").mkdir()
    forbid(monkeypatch, here)
    assert place_for(here / "run") == Place(folder=here / "run")


def test_where_nothing_can_be_written_the_temporary_folder_is_tried_and_it_is_said(
    bench: Bench, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, here)
    note = f"a checkpoint was timed in '{tempfile.gettempdir()}' and not where a run will write it ('{here}': not wri"
    place = place_for(None)
    assert place.folder == Path(tempfile.gettempdir())
    assert place.note is not None
    assert place.note.startswith(note)
    found = bench.plan()
    assert any(one.startswith(f"A{note[1:]}") for one in found.report.notes)
    assert [one.parent for one in bench.scratch if one] == [Path(tempfile.gettempdir())]
    again = bench.plan()  # of a kept measurement it is still true
    assert bench.starts == 0
    assert sum(one.startswith(f"A{note[1:]}") for one in again.report.notes) == 1


def test_what_was_timed_on_the_disk_of_the_run_and_what_was_not_do_not_answer_for_each_other(
    bench: Bench, here: Path
) -> None:
    """Not even where the temporary folder lies on the same disk: only one of them is told with a note."""

    def plan() -> tuple[bool, bool]:
        notes = bench.plan().report.notes
        return bool(bench.starts), any(one.startswith("A checkpoint was timed in") for one in notes)

    for is_full, answers in ((False, [(True, False), (False, False)]), (True, [(True, True), (False, True)])):
        for expected in answers:
            with pytest.MonkeyPatch.context() as patch:
                if is_full:
                    fill(patch, here)
                assert plan() == expected
    assert plan() == (False, False)


def test_a_folder_that_cannot_be_made_there_lies_in_the_temporary_one(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writable = place_for(None)
    fill(monkeypatch, here)
    filled = place_for(None)
    assert filled.disk == f"{writable.disk}, timed on {disk_of(Path(tempfile.gettempdir()))}"
    for place in (filled, writable):  # full before anything was measured, or only then
        with scratch_folder(place) as made:
            assert made.folder.parent == Path(tempfile.gettempdir())
            assert made.note is not None
            assert "No space left on device" in made.note
            assert made.disk == filled.disk
        assert not made.folder.exists()


@pytest.mark.parametrize("reason", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_the_folder_goes_with_all_that_is_in_it(here: Path, reason: type[BaseException] | None) -> None:
    with pytest.raises(reason) if reason else nullcontext(), scratch_folder(place_for(None)) as made:
        assert made.folder.parent == here
        (made.folder / "checkpoints").mkdir()
        (made.folder / "checkpoints" / "state").touch()
        if reason is not None:
            raise reason
    assert list(here.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_folder_goes_also_where_the_process_is_told_to_end(here: Path, number: int) -> None:
    code = (  # tests may run where signals are ignored (nohup, or behind a shell's &), which children inherit
        "import signal, time; from planner.scratch import *\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with scratch_folder(place_for(None)) as made: print(made.folder, flush=True); time.sleep(60)"
    )
    root = str(Path(scratch.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": root},
    ) as child:  # fmt: skip
        assert child.stdout is not None
        made = Path(child.stdout.readline().strip())
        assert made.parent == here
        assert made.is_dir()
        child.send_signal(number)
        assert child.wait(timeout=60) == (128 + number if number != signal.SIGINT else -number)
    assert list(here.iterdir()) == []


def test_signals_are_left_to_who_has_taken_them_and_given_back(here: Path) -> None:
    taken: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: taken.append(number))
    try:
        with scratch_folder(place_for(None)):
            signal.raise_signal(signal.SIGTERM)
        assert taken == [signal.SIGTERM]
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with scratch_folder(place_for(None)):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_a_killed_measurement_left_goes_with_the_next_one_a_day_later(here: Path) -> None:
    for name, hours in ((f"{PREFIX}old", 25), (f"{PREFIX}new", 1), ("of somebody else", 25)):
        (here / name).mkdir()
        (here / name / "file").touch()
        os.utime(here / name, (time.time() - 3600 * hours,) * 2)
    nowhere = [here / f"{PREFIX}link-{number}" for number in range(20)]
    for link in nowhere:
        link.symlink_to(here / "not there")
    with scratch_folder(place_for(None)):
        pass
    left = {one.name for one in here.iterdir()}
    assert left == {f"{PREFIX}new", "of somebody else", *(link.name for link in nowhere)}


@pytest.mark.parametrize("from_settings", [False, True])
def test_a_plan_gives_its_workers_a_folder_beside_the_run_and_leaves_nothing(
    bench: Bench, here: Path, tmp_path: Path, from_settings: bool
) -> None:
    big = tmp_path / "big"
    big.mkdir()
    if from_settings:
        (bench.home / ".env").write_text(f"OUTPUT={big / 'run'}\n")
    bench.plan(output=None if from_settings else big / "run")
    (given,) = bench.scratch
    assert given is not None
    assert given.parent == big
    assert given.name.startswith(PREFIX)
    assert not any(big.iterdir())
    assert not any(here.iterdir())


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/my\\040disk rw shared:7 - nfs4 server:/export rw,vers=4.2
31 22 8:17 / /mnt rw - vfat /dev/sdb1 rw
32 31 0:50 / /mnt/my\\040disk/inner rw - tmpfs tmpfs rw
33 22 8:33 / /mnt rw - exfat /dev/sdc1 rw
a damaged line
"""


def test_disks_are_told_apart_by_what_is_mounted_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    monkeypatch.setattr(scratch, "MOUNTS", mounts)
    monkeypatch.setattr(os.path, "realpath", str)
    for folder, disk in (
        ("/home/me", "/ ext4 /dev/sda1"),
        ("/mnt/my disk/runs", "/mnt/my disk nfs4 server:/export"),
        ("/mnt/my disk/inner", "/mnt/my disk/inner tmpfs tmpfs"),
        ("/mnt/mine", "/mnt exfat /dev/sdc1"),  # over the one that was mounted there before
    ):
        assert disk_of(Path(folder)) == disk
    mounts.unlink()
    assert disk_of(tmp_path) == str(tmp_path.stat().st_dev)


@pytest.mark.skipif(not Path("/proc/self/mountinfo").is_file(), reason="Linux tells what is mounted where")
def test_this_machine_tells_its_disks() -> None:
    assert disk_of(Path("/proc")) != disk_of(Path("/"))
    assert disk_of(Path("/")).startswith("/ ")


@pytest.mark.parametrize("more", [[], ["--run", "recommended"]], ids=["table", "run"])
def test_the_command_line_hands_its_output_on(here: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]) -> None:
    asked: dict[str, Any] = {}

    def compare(*_arguments: Any, **named: Any) -> None:
        asked.update(named)
        raise DataError("that is enough")

    monkeypatch.setattr("planner.compare.compare", compare)
    done = CliRunner().invoke(cli, ["--dataset", "bundled", "--output", "big/run", *more])
    assert isinstance(done.exception, DataError)
    assert asked["output"] == Path("big/run")


def test_the_command_under_a_table_keeps_the_output_whose_disk_was_tried() -> None:
    given = cli.make_context("plan", ["--dataset", "a.jsonl", "--output", "my disk/run"]).params
    assert same_options(given) == " --dataset a.jsonl --output 'my disk/run'"
    given = cli.make_context("plan", ["--dataset", "a.jsonl"]).params
    assert same_options(given) == " --dataset a.jsonl"
