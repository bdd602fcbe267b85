"""What is secret in the environment or in `.env` stays there: in no file of a run, no history, no output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from planner.history import History, PastRun
from planner.launch import make_run_folder
from presets.home import plan_home
from trainer.job import DataSpec, Job

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "MLFLOW_TRACKING_PASSWORD",
    "NEPTUNE_API_TOKEN", "CLEARML_API_SECRET_KEY", "SWANLAB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY",
)  # fmt: skip
SECRETS = {name: f"hf_secret{number}Value{'x' * 12}" for number, name in enumerate(NAMES)}


def leaks(*folders: Path, text: str = "") -> list[str]:
    found = [name for name, value in SECRETS.items() if value in text]
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                found += [f"{name} in {path}" for name, value in SECRETS.items() if value.encode() in content]
    return found


def test_no_file_of_a_run_and_no_word_of_its_output_holds_a_secret(
    tmp_path: Path,
    make_job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from planner.run_report import write_report
    from trainer.data import prepare_data
    from trainer.loop import train
    from trainer.planning import plan_job
    from trainer.record import Predicted, RunRecord

    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    job = make_job(tracker="tensorboard")
    data = prepare_data(job.data, model=job.model, max_length=job.preset.max_length)
    run = make_run_folder(tmp_path / "run", job, plan_job(job, data).plan, Predicted(), datetime.now())
    train(run, resume=False)
    record = RunRecord.read(run / "record.json")
    History().add_run(PastRun.of(record, run, datetime.now()))
    write_report(run)
    told = capfd.readouterr()
    written = {path.name for path in run.rglob("*") if path.is_file()}
    for name in ("job.json", "record.json", "train.log", "metrics.jsonl", "README.md", "report.html"):
        assert name in written  # what is searched is there
    assert leaks(run, plan_home(), text=told.out + told.err) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dataset", "missing.jsonl", "--debug"],
        ["--dataset", "100", "--model", "./none", "--debug"],
        ["doctor", "--json"],
        ["history", "--json"],
        ["--dataset", "100", "--step-time", "1", "--format", "json"],
    ],
)
def test_no_command_prints_a_secret_not_even_with_debug(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in SECRETS.items()), "utf-8")
    command = [sys.executable, "-c", "from planner.cli import main; main()", *arguments]
    environment = {**os.environ, **SECRETS, "PYTHONPATH": str(REPOSITORY), "PLAN_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)
    (tmp_path / ".env").unlink()
    assert done.stdout + done.stderr
    assert leaks(tmp_path, text=done.stdout + done.stderr) == []


def test_a_secret_that_was_put_into_a_setting_is_not_repeated(tmp_path: Path) -> None:
    from presets.env import read_settings
    from presets.errors import SettingsError

    for key in ("EPOCHS", "SEED", "LEARNING_RATE"):
        (tmp_path / ".env").write_text(f"HF_TOKEN={SECRETS['HF_TOKEN']}\n{key}=${{HF_TOKEN}}\n", "utf-8")
        with pytest.raises(SettingsError) as caught:
            read_settings(tmp_path, {})
        assert leaks(text=str(caught.value)) == []
        assert f"{key} is " in str(caught.value)


def test_a_job_holds_no_part_of_the_environment(make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    text = make_job(data=DataSpec(source="a.jsonl")).to_json()
    assert leaks(text=text) == []
    assert json.loads(text)["model"]
