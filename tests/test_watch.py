"""A run seen from outside: as it stands, as it goes on in a terminal, and as a page."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from run_folders import begin, end, step, write_steps

from planner.cli import cli
from planner.outcome import outcome_text
from planner.run_report import run_page, write_report
from planner.run_view import look_at
from planner.watch import lines_of
from presets.errors import PlanError, RunError
from trainer.sparkline import sparkline

NOW = datetime(2026, 11, 25, 18, 0).astimezone()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with a plan of 22 steps, of which none is done."""
    return begin(tmp_path / "recommended-1")


def told(folder: Path) -> str:
    """As it stands in the moment in which its last line was written."""
    return "\n".join(lines_of(replace(look_at(folder), seconds_since_step=0.0), gpu=None, now=NOW))


def test_a_run_that_starts_goes_on_and_ends(folder: Path) -> None:
    assert look_at(folder).state == "starting"
    write_steps(folder, range(1, 12))
    text = told(folder)
    assert "recommended-1: running, step 11 of 22, 50%" in text
    assert "loss      0.364  █" in text
    assert "25% behind plan" in text
    assert "55 s left, done Wed 18:00" in text
    end(folder)
    text = told(folder)
    assert "finished" in text
    assert "2 min 00 s, predicted 1 min 40 s (1 min 30 – 1 min 50)" in text
    assert "left" not in text


@pytest.mark.parametrize("calibrated", [None, True, False])
def test_a_range_that_was_no_90_percent_range_is_not_spoken_of_as_one(tmp_path: Path, calibrated: bool | None) -> None:
    folder = begin(tmp_path / "run", calibrated=calibrated)
    end(folder)
    view = look_at(folder)
    assert view.record is not None
    watched, page, ended = told(folder), run_page(view, now=NOW), outcome_text(view.record, folder)
    if calibrated is False:
        assert "predicted 1 min 40 s (1 min 30 – 1 min 50, not a 90 % range)" in watched
        assert "1 min 30 – 1 min 50?" in page
        assert "? after a range: not a 90 % range" in page
        assert "The predicted range 1 min 30 – 1 min 50 (not a 90 % range) does NOT hold the actual time." in ended
    else:
        assert "90 %" not in watched + page + ended
        assert "The predicted range 1 min 30 – 1 min 50 does NOT hold the actual time." in ended


def test_a_run_that_says_nothing_for_long_is_called_silent(folder: Path) -> None:
    write_steps(folder, range(1, 4))
    assert look_at(folder).state == "running"
    long_ago = time.time() - 3600
    for name in ("metrics.jsonl", "job.json"):
        os.utime(folder / name, (long_ago, long_ago))
    assert look_at(folder).state == "silent"
    assert f"plan --resume {folder}" in told(folder)


def test_a_run_that_died_before_its_first_step_is_called_silent_in_the_end(folder: Path) -> None:
    assert look_at(folder).state == "starting"
    long_ago = time.time() - 3600
    os.utime(folder / "job.json", (long_ago, long_ago))
    assert look_at(folder).state == "silent"


@pytest.fixture
def stopped(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A real run that was stopped in its first window."""
    from trainer import loop

    run: Path = make_run()
    monkeypatch.setattr(loop, "run_window", lambda run, state: loop._discard_and_stop(run, state, 15))
    with pytest.raises(loop.Stopped):
        loop.train(run)
    assert look_at(run).state == "stopped"
    return run


def test_a_resume_takes_the_record_of_the_stop_away(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import loop

    seen: list[str] = []

    def first_window(_run: Any, _state: Any) -> None:
        seen.append(look_at(stopped).state)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "run_window", first_window)
    with pytest.raises(KeyboardInterrupt):
        loop.train(stopped, resume=True)
    assert seen == ["starting"]


def test_a_resume_that_finds_nothing_to_go_on_with_leaves_the_record(stopped: Path) -> None:
    from trainer import loop

    for state in (stopped / "checkpoints").glob("step-*/state.json"):
        state.write_text("{", encoding="utf-8")
    with pytest.raises(PlanError, match="No whole checkpoint"):
        loop.train(stopped, resume=True)
    assert look_at(stopped).state == "stopped"


def test_without_block_characters_the_loss_is_a_number(folder: Path) -> None:
    write_steps(folder, range(1, 4))
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(
        [sys.executable, "-m", "planner.cli", "watch", str(folder), "--once"],
        capture_output=True,
        env=environment,
        check=True,
    )
    assert b"loss      1.333\n" in done.stdout.replace(b"\r", b"")


def test_a_failed_run_says_why_and_no_control_character_comes_through(folder: Path) -> None:
    end(folder, "failed", error="out of \x1b[31mmemory")
    text = told(folder)
    assert "Error: out of \\x1b[31mmemory" in text
    assert "\x1b" not in text


def test_damaged_and_half_written_lines_are_left_out(folder: Path) -> None:
    write_steps(folder, range(1, 3))
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"step": "x"}\n[1]\n{"loss": 1}\n{"step": 3, "loss": 2.0, "sec')
    assert [one["step"] for one in look_at(folder).steps] == [1, 2]


def test_ten_thousand_lines_are_read_and_drawn_soon(folder: Path) -> None:
    write_steps(folder, range(1, 10_001))
    begun = time.process_time()
    assert "step 10,000" in told(folder)
    page = run_page(look_at(folder), now=NOW)
    assert len(page) < 3_000_000
    assert time.process_time() - begun < 60  # seconds of processor time: a guard against the square of the lines


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([1.0], "▁"),
        ([2.0, 2.0], "▁▁"),
        ([1.0, 8.0], "▁█"),
        ([8.0, float("nan"), 1.0], "█▁"),
        ([float(value) for value in range(8)], "▁▂▃▄▅▆▇█"),
    ],
)
def test_the_course_of_numbers_in_one_line(values: list[float], line: str) -> None:
    assert sparkline(values) == line


def test_many_numbers_become_few_blocks() -> None:
    assert len(sparkline([float(value) for value in range(1000)], width=24)) == 24


def test_once_is_plain_lines(folder: Path) -> None:
    write_steps(folder, range(1, 3))
    done = CliRunner().invoke(cli, ["watch", str(folder), "--once"])
    assert done.exit_code == 0
    assert "step 2 of 22" in done.stdout
    assert "\x1b" not in done.stdout


def test_what_is_no_run_folder_gives_one_line(tmp_path: Path) -> None:
    for command in ("watch", "report"):
        done = subprocess.run(
            [sys.executable, "-m", "planner.cli", command, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "not a run folder" in done.stderr


def test_in_a_terminal_the_view_goes_on_until_the_run_ends(folder: Path) -> None:
    write_steps(folder, range(1, 5))
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", "PYTHONIOENCODING": "utf-8"}
    watcher = subprocess.Popen(
        [sys.executable, "-m", "planner.cli", "watch", str(folder)], stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen, fed, ended = b"", False, False
    until = time.monotonic() + 90
    while time.monotonic() < until:
        ready, _, _ = select.select([ours], [], [], 1.0)
        if ready:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end was closed
                break
            if not part:
                break
            seen += part
        if not fed and b"step 4 of 22" in seen:
            write_steps(folder, range(5, 23))
            fed = True
        elif fed and not ended and b"step 22 of 22" in seen:
            end(folder)
            ended = True
    assert watcher.wait(timeout=30) == 0
    os.close(ours)
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", seen).decode("utf-8", errors="replace")
    assert "step 4 of 22" in text
    assert "step 22 of 22" in text
    assert "finished" in text
    assert re.search(r"│ loss +0\.182 +[█▁-▇]+", text), "each line of its own, also the one after the bar"


def test_the_page_has_curves_figures_and_settings_and_needs_nothing(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    write_steps(folder, range(1, 23))
    with (folder / "evaluations.jsonl").open("w", encoding="utf-8") as file:
        file.write('{"step": 0, "loss": 5.0}\n{"step": 11, "loss": 2.0}\n{"step": 22, "loss": 1.5}\n')
    end(folder, notes=("<b>a note</b>",))
    path = write_report(folder)
    text = path.read_text(encoding="utf-8")
    assert path == folder / "report.html"
    assert text.count("<svg") == 3  # loss, time, memory
    assert "held-out" in text
    assert "1 min 40 s" in text
    assert "2 min 00 s" in text
    assert "91.7%" in text  # of the time: training
    assert "&lt;b&gt;a note" in text
    assert "<script" not in text
    assert not re.search(r'(src|href)="?https?:', text)
    assert write_report(folder).read_text(encoding="utf-8")[:500] == text[:500]


def test_the_page_shows_answers_before_and_after_as_text(folder: Path) -> None:
    def write(when: str, answers: dict[int, str]) -> None:
        samples = [
            {"example": number, "prompt": f"what is {number}?", "answer": answer, "expected": "<i>seven</i>"}
            for number, answer in answers.items()
        ]
        (folder / f"samples-{when}.json").write_text(json.dumps(samples), encoding="utf-8")

    assert "Sample answers" not in run_page(look_at(folder), now=NOW)
    write("before", {3: "who knows", 8: "<script>alert(1)</script>\nand \x1b[31mmore"})
    text = run_page(look_at(folder), now=NOW)
    assert "<dt>before</dt><dd>who knows</dd><dt>expected</dt><dd>&lt;i&gt;seven" in text  # while it trains
    write("after", {3: "it is\n  seven"})
    text = run_page(look_at(folder), now=NOW)
    assert "<dt>after</dt><dd>it is\n  seven</dd>" in text
    assert text.count("<dt>after</dt>") == 1
    assert "<script" not in text
    assert "\x1b" not in text
    (folder / "samples-before.json").write_text('[{"example": 1}]', encoding="utf-8")
    assert "Sample answers" not in run_page(look_at(folder), now=NOW)


def test_without_matplotlib_the_page_says_how_to_get_its_charts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find(name, *more)
    )
    write_steps(folder, range(1, 3))
    text = run_page(look_at(folder), now=NOW)
    assert "pip install matplotlib" in text
    assert "<svg" not in text


def test_a_page_that_cannot_be_written_gives_one_clear_line(folder: Path) -> None:
    done = CliRunner().invoke(cli, ["report", str(folder), "--output", str(folder / "missing" / "x.html")])
    assert done.exit_code == 1
    assert "cannot be written" in str(done.exception)


@pytest.mark.parametrize("content", ['{"text": "a"}\n', "<!doctype html>\n<title>Mine</title>", "\0"])
def test_a_page_is_not_written_over_what_is_no_page_of_a_run(folder: Path, tmp_path: Path, content: str) -> None:
    kept, page = tmp_path / "chats.jsonl", tmp_path / "page.html"
    kept.write_text(content)
    with pytest.raises(RunError, match=r"chats\.jsonl' exists and is no report of a run\. Choose another --output"):
        write_report(folder, kept)
    assert kept.read_text() == content
    page.write_text("")
    for _ in range(2):  # an empty file, then its own page
        assert write_report(folder, page).read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_page_is_written_to_no_pipe_and_no_device(folder: Path, tmp_path: Path, kind: str) -> None:
    place = Path(os.devnull)
    if kind == "pipe":
        place = tmp_path / "pipe"
        os.mkfifo(place)
    said: list[str] = []

    def write() -> None:
        try:
            write_report(folder, place)
        except RunError as reason:
            said.append(str(reason))

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    writing.join(timeout=30)
    assert said == [f"'{place}' is no file that a page can be written to. Choose another --output."]


def test_the_speed_is_that_of_the_latest_steps_not_of_a_partial_last_one(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(step(number, seconds=5.0, tokens_per_second=100.0) for number in range(1, 22))
        file.write(step(22, seconds=0.1, tokens_per_second=5000.0))
    assert "speed     105 tokens/s" in told(folder)
    assert "4.8 s a step" in told(folder)
