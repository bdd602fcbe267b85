"""No control sequence reaches the terminal and no markup a page, whichever file it stands in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import pytest

from planner.cli import _show, cli
from planner.history import History, PastRun
from presets import jsonio
from presets.errors import PlanError
from presets.text import printable
from trainer.job import Job

REPOSITORY = Path(__file__).resolve().parents[2]
# Colour, a title, the 8-bit CSI, a bell, a backspace, a return to the begin of the line, a turn of the line.
EVIL = "\x1b[31mA\x1b]0;B\x07C\x9b2JD\x08E\rF\u202eG\u2066H\x85I\x7fJ"
MARKUP = "<script>alert(1)</script>[red]x[/red]|`=cmd|' /C calc'!A0"


def is_clean(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


def shown(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """What a command prints, on both streams; its errors as `main` prints them."""
    try:
        cli.main(arguments, standalone_mode=False)
    except click.ClickException as reason:
        _show(reason)
    except PlanError as reason:
        from planner.terminal import say

        for line in str(reason).splitlines():
            say(line)
    told = capsys.readouterr()
    return told.out + told.err


@pytest.fixture
def evil_run(make_run: Callable[..., Path]) -> Path:
    """A run folder in which every text that can be is evil."""
    run = make_run(name=f"run-{EVIL.replace(chr(13), '')}")
    job = json.loads((run / "job.json").read_text("utf-8"))
    job |= {"name": EVIL + MARKUP.replace("/", ""), "model": EVIL + MARKUP}
    job["preset"] |= {"name": EVIL, "summary": EVIL, "lora_targets": EVIL}
    job["data"]["source"] = EVIL + MARKUP
    (run / "job.json").write_text(json.dumps(job), "utf-8")
    record = {
        "status": "failed", "job": job, "predicted": {"seconds": 5.0}, "actual": {"seconds": 6.0, "breakdown": {}},
        "versions": {EVIL: EVIL}, "notes": [EVIL + MARKUP], "error": EVIL + MARKUP,
    }  # fmt: skip
    (run / "record.json").write_text(json.dumps(record), "utf-8")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, "seconds": 1.0, EVIL: EVIL}) + "\n", "utf-8")
    return run


def test_a_run_folder_shows_no_control_sequence(evil_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["watch", str(evil_run), "--once"], ["report", str(evil_run)], ["--resume", f"{evil_run}x"]):
        text = shown(capsys, command)
        assert r"\x1b[31mA" in text
        assert is_clean(text)


def test_no_markup_of_a_run_folder_reaches_its_page(evil_run: Path) -> None:
    from planner.run_report import write_report

    page = write_report(evil_run).read_text("utf-8")
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert is_clean(page.replace("\t", ""))


def test_a_model_card_has_neither_markup_nor_control_sequences(evil_run: Path) -> None:
    from trainer.card import card
    from trainer.record import RunRecord

    text = card(RunRecord.read(evil_run / "record.json"))
    body = text.split("---", 2)[2]
    assert is_clean(text)
    assert "<script" not in body
    assert "[red]" not in body
    assert all(line.count("|") - line.count("\\|") in (0, 3) for line in body.splitlines())


@pytest.fixture
def evil_history() -> None:
    run = PastRun(
        folder=EVIL, ended_at=EVIL, status=EVIL + MARKUP, name=EVIL, model=MARKUP + EVIL, seconds=5.0,
        actual_seconds=6.0, not_counted=EVIL, versions=EVIL,
    )  # fmt: skip
    History().add_run(run)


@pytest.mark.parametrize("arguments", [["history"], ["history", "--json"], ["history", "--accuracy"]])
def test_a_history_shows_no_control_sequence(
    arguments: list[str], evil_history: None, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, arguments)
    assert is_clean(text)
    if "--json" in arguments:
        assert json.loads(text)["runs"][0]["name"] == EVIL  # the same text, spelled otherwise


@pytest.mark.parametrize("form", ["table", "markdown", "csv", "json", "html"])
def test_a_preset_shows_no_control_sequence_and_no_markup_in_any_form(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    table = (REPOSITORY / "presets" / "recommended.toml").read_text("utf-8")
    texts = {"summary": EVIL, "published_quality": EVIL + MARKUP, "published_risk": "=1+1", "published_vram": EVIL}
    kept = [line for line in table.splitlines() if line.split(" ")[0] not in texts]
    kept += [f"{key} = {json.dumps(value)}" for key, value in texts.items()]
    name = f"=cmd [red]{EVIL.replace('/', '')}<b>|.toml"
    Path(name).write_text("\n".join(kept), "utf-8")
    text = shown(capsys, ["--preset", f"./{name}", "--dataset", "100", "--step-time", "1", "--format", form])
    assert "x1b" in text or "u001b" in text
    assert is_clean(text)
    assert "[red]" in text  # shown as it is, not obeyed
    if form == "html":
        assert "<script" not in text
        assert "<b>" not in text
    if form == "markdown":
        assert len({line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    if form == "csv":
        import csv

        cells = [cell for row in csv.reader(text.splitlines()[1:]) for cell in row]
        assert cells[0].startswith("'=cmd")
        assert "'=1+1" in cells
        assert not [cell for cell in cells if cell[:1] in "=+@" and cell]
    if form == "json":
        json.loads(text)


def test_presets_that_are_broken_are_listed_without_control_sequences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from presets.user import user_folder

    user_folder().mkdir(parents=True)
    (user_folder() / "mine.toml").write_text(f"{json.dumps(EVIL)} = {json.dumps(EVIL)}\nsummary = 3", "utf-8")
    (user_folder() / "fine.toml").write_text(
        f"# A \u202e \x9b\nsummary = {json.dumps(EVIL)}\ngradient_accumulation_steps = 1\n"
        'learning_rate = 1e-4\nprecision = "fp32"\n'.replace("\x7f", ""),
        "utf-8",
    )
    for arguments in (["presets"], ["presets", "show", "mine"], ["presets", "show", "fine"]):
        text = shown(capsys, arguments)
        assert is_clean(text)
        assert "A" in text


def errors_about_evil_names(folder: Path) -> Iterator[list[str]]:
    yield ["--dataset", f"{folder}/{EVIL}.jsonl"]
    yield ["--dataset", "100", "--columns", f"{EVIL}=a"]
    yield ["--model", f"./{EVIL}"]
    yield ["--preset", EVIL]
    yield ["--device", EVIL]
    yield ["--resume", EVIL]
    yield ["watch", EVIL]
    yield [EVIL]
    yield [f"--{EVIL}"]
    yield ["presets", "new", EVIL]
    yield ["--accelerate-config", EVIL]
    yield ["advise", "--deadline", EVIL]
    yield ["--run", "recommended", "--tracker", EVIL]


@pytest.mark.parametrize("number", range(13))
def test_an_error_repeats_a_name_without_its_control_sequences(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = shown(capsys, list(errors_about_evil_names(tmp_path))[number])
    assert is_clean(text)
    assert "[31mA" in text


def test_a_dotenv_shows_no_control_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text(f"MODEL='{EVIL}'\nEPOCHS={EVIL}\nLEARNING_RATES{EVIL}=3\n", "utf-8", newline="")
    text = shown(capsys, ["--dataset", "100"])
    assert "EPOCHS is" in text
    assert is_clean(text)


def test_what_a_model_writes_is_shown_as_text(make_job: Callable[..., Job]) -> None:
    from planner.outcome import check_text
    from trainer.evaluate import EvaluationResult, SampleAnswer
    from trainer.finished import Check

    result = EvaluationResult(loss=1.0, num_examples=1, num_tokens=1)
    answer = SampleAnswer(example=0, prompt=EVIL, expected=EVIL, answer=EVIL)
    text = check_text(Check(result, result, ((answer, answer),)), make_job(), num_steps=1000)
    assert is_clean(text)
    assert r"\x1b[31mA" in text


def test_a_chat_passes_on_text_and_ends_of_lines_only(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    from trainer import finished

    monkeypatch.setattr(finished, "open_finished", lambda run: None)
    monkeypatch.setattr(finished, "reply", lambda *a, **k: iter(["one\n\x1b", "[31m", "\u202etwo"]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    cli.main(["chat", str(make_run())], standalone_mode=False)
    assert capsys.readouterr().out == "you> model> one\n\\x1b[31m\\u202etwo\nyou> "


def test_what_the_trainer_says_of_the_data_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    from trainer.monitor import Monitor

    monitor = Monitor(tmp_path, EVIL, np.ones(1), is_time=False, done=0)
    monitor.say(EVIL)
    monitor.step(1, 1.0, {"loss": 1.0, "tokens_per_second": 1.0})
    monitor.close()
    told = capsys.readouterr()
    assert is_clean(told.out + told.err)
    assert r"\x1b[31mA" in told.err
    assert is_clean((tmp_path / "train.log").read_text("utf-8"))


def test_the_trainers_own_error_is_text(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    told = json.loads((run / "job.json").read_text("utf-8")) | {"device": EVIL, EVIL: EVIL}
    (run / "job.json").write_text(json.dumps(told), "utf-8")
    command = [sys.executable, "-P", "-m", "trainer", str(run / "job.json")]
    done = subprocess.run(
        command, capture_output=True, cwd=REPOSITORY, env={**os.environ, "PYTHONSAFEPATH": ""}, timeout=120
    )
    assert done.returncode == 1
    assert is_clean(done.stderr.decode())
    assert r"\x1b[31mA" in done.stderr.decode()


@pytest.mark.parametrize("text", ["plain ünïcode 日本 שלום 🙂", EVIL, "a\nb\t", "\ud83d", "\U000e0001", "\u2028"])
def test_json_without_control_characters_says_the_same(text: str) -> None:
    told = json.dumps({text: [text]}, ensure_ascii=False, indent=1)
    for ascii_only in (False, True):
        clean = jsonio.harmless(told, ascii_only=ascii_only)
        assert json.loads(clean) == {text: [text]}
        assert is_clean(clean)
        assert clean.isascii() or not ascii_only
    assert printable(text).isprintable()


def test_a_name_that_is_no_utf_8_goes_through_a_job_and_the_history(
    make_job: Callable[..., Job], capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.job import DataSpec

    name = os.fsdecode(b"caf\xe9.jsonl")
    job = make_job(data=DataSpec(source=name))
    text = job.to_json()
    assert text.encode("utf-8")
    assert Job.from_json(text).data.source == name
    history = History()
    history.add_run(PastRun(folder=name, ended_at=str(datetime.now()), status="finished", name="a", model="b"))
    assert history.runs() == []
    assert "cannot hold a name that is not UTF-8" in history.notes[0]


def test_a_terminal_of_few_characters_gets_escapes_instead_of_an_error(tmp_path: Path) -> None:
    code = (
        "from planner.terminal import out, out_json, say\n"
        "say('\\u00e9 \\U0001f642')\nout('\\u00e9 – →')\nout_json('{\"a\": \"\\u00e9\"}')"
    )
    environment: dict[str, Any] = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stderr == "\\xe9 \\U0001f642\n"
    assert done.stdout == '\\xe9 - ->\n{"a": "\\u00e9"}\n'
