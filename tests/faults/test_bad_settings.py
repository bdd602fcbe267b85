"""Bad settings: every field of a preset, of `.env`, of a job and of the command line against every kind of bad value.

The fields are found, not listed: a new one is tested as soon as it is there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from planner.cli import cli
from planner.options import OPTIONS
from presets import env
from presets.env import read_settings
from presets.errors import DataError, PlanError, PresetError, SettingsError
from presets.schema import Phase, Preset, Published, load_preset, parse_preset
from trainer.job import DataSpec, EvaluationSpec, Job

HUGE = 10**30
NUMBERS: dict[str, Any] = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "-1": -1, "0": 0, "huge": HUGE}
NUMBERS |= {"-1.5": -1.5, "beyond every float": 10**400}
OTHERS: dict[str, Any] = {"text": "many", "empty text": "", "a list": [1], "a table": {"a": 1}, "truth": True}

# Where 0 says something: none of it.
ZERO_IS_FINE = {
    "lora_dropout", "warmup_ratio", "weight_decay", "max_grad_norm", "hours_low", "hours_high", "seed", "fraction",
    "minimum", "maximum", "times_during_training", "num_samples",
}  # fmt: skip
# Texts that are told to people and may be missing.
EMPTY_IS_FINE = {"summary", "quality", "vram", "risk", "note"}


def kinds_of(cls: type, name: str) -> set[type]:
    """The types that a field takes, None aside; a Literal counts as itself."""
    hint = typing.get_type_hints(cls)[name]
    options = typing.get_args(hint) if typing.get_origin(hint) not in (None, typing.Literal, tuple) else (hint,)
    return {option for option in options if option is not type(None)}


def bad_values(cls: type, name: str) -> Iterator[tuple[str, Any]]:
    kinds = kinds_of(cls, name)
    is_number, is_text, is_truth = bool(kinds & {int, float}), str in kinds, bool in kinds
    for label, value in NUMBERS.items():
        if not (is_number and label == "0" and name in ZERO_IS_FINE):
            yield label, value
    for label, value in OTHERS.items():
        if label == "text" and is_text:
            continue
        if label == "empty text" and is_text and name in EMPTY_IS_FINE:
            continue
        if label == "truth" and is_truth:
            continue
        yield label, value


def toml(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return "{ a = 1 }" if isinstance(value, dict) else json.dumps(value)


SMALLEST = {"summary": "a test", "gradient_accumulation_steps": 16, "learning_rate": 2e-4, "precision": "fp32"}
SMALLEST_PHASE = {"gradient_accumulation_steps": 16, "learning_rate": 2e-4}
IN_TOML = [
    *(
        (Preset, field.name)
        for field in dataclasses.fields(Preset)
        if field.name not in ("name", "phases", "published")
    ),
    *((Phase, field.name) for field in dataclasses.fields(Phase)),
    *((Published, field.name) for field in dataclasses.fields(Published)),
]


@pytest.mark.parametrize(("cls", "name"), IN_TOML, ids=lambda value: getattr(value, "__name__", value))
def test_every_field_of_a_preset_refuses_every_bad_value_by_name(cls: type, name: str) -> None:
    for label, value in bad_values(cls, name):
        table: dict[str, Any] = dict(SMALLEST)
        phase = dict(SMALLEST_PHASE) if cls is Phase else {}
        key = f"published_{name}" if cls is Published else name
        (phase if cls is Phase else table)[key] = value
        lines = [f"{key} = {toml(value)}" for key, value in table.items()]
        lines += ["[[phase]]", *(f"{key} = {toml(value)}" for key, value in phase.items())] if phase else []
        with pytest.raises(PresetError) as caught:
            pytest.fail(f"{name} = {label} was taken: {parse_preset('mine', chr(10).join(lines))}")
        text = str(caught.value)
        assert f"{key} is " in text, (label, text)
        assert len(text) < 400, label


@pytest.fixture(scope="module")
def job() -> Job:
    preset = load_preset("recommended")
    data = DataSpec(source="chats.jsonl")
    return Job(
        name="recommended", preset=preset, model="demo", data=data, device="cpu", precision="fp32",
        base_precision="fp32", micro_batch_size=1,
    )  # fmt: skip


IN_JOB: list[tuple[type, str, tuple[str, ...]]] = [
    *((Job, f.name, ()) for f in dataclasses.fields(Job) if f.name not in ("preset", "data", "evaluation")),
    *((DataSpec, f.name, ("data",)) for f in dataclasses.fields(DataSpec) if f.name != "columns"),
    *((EvaluationSpec, f.name, ("evaluation",)) for f in dataclasses.fields(EvaluationSpec)),
    *((Preset, f.name, ("preset",)) for f in dataclasses.fields(Preset) if f.name not in ("phases", "published")),
]


@pytest.mark.parametrize(("cls", "name", "inside"), IN_JOB, ids=lambda value: getattr(value, "__name__", str(value)))
def test_every_field_of_a_job_refuses_every_bad_value_by_name(
    job: Job, cls: type, name: str, inside: tuple[str, ...]
) -> None:
    for label, value in bad_values(cls, name):
        plain = json.loads(job.to_json())
        place = plain
        for step in inside:
            place = place[step]
        place[name] = value
        with pytest.raises(SettingsError) as caught:
            pytest.fail(f"{name} = {label} was taken: {Job.from_json(json.dumps(plain))}")
        text = str(caught.value)
        assert name in text or "JSON does not have" in text, (label, text)
        assert len(text) < 500, label


@pytest.mark.parametrize("setting", env._fields())
def test_every_setting_of_dotenv_refuses_every_bad_value_by_name(tmp_path: Path, setting: str) -> None:
    is_text = setting in ("model", "dataset", "output")
    for value in ["nan", "inf", "-inf", "-1", str(HUGE), "9" * 5000, "many", "[1]", "0x10", "1e400", "a\x1b[31mb"]:
        if is_text and value.isprintable():
            continue
        (tmp_path / ".env").write_text(f"{setting.upper()}={value}\n", "utf-8")
        with pytest.raises(SettingsError) as caught:
            pytest.fail(f"{value} was taken: {read_settings(tmp_path, {})}")
        assert str(caught.value).startswith(f"{setting.upper()} is ")
        assert str(caught.value).isprintable()


def numeric_options() -> list[tuple[str, str]]:
    """(command, flag) of every option of every command that takes a number."""
    found = []
    commands: dict[str, click.Command] = {"": cli, **cli.commands}
    for command, one in commands.items():
        for param in one.params:
            is_number = isinstance(param.type, (click.types.IntParamType, click.types.FloatParamType))
            if isinstance(param, click.Option) and (is_number or type(param.type).__name__ == "_Epochs"):
                found.append((command, param.opts[0]))
    return found


def test_the_options_that_take_numbers_are_found() -> None:
    flags = {flag for command, flag in numeric_options() if not command}
    assert {"--budget", "--epochs", "--seed", "--eval-fraction", "--devices", "--step-time"} <= flags
    # Whoever declares a number without a type declares text: each option with a default of a number has one.
    assert not [names for _, names, given in OPTIONS if isinstance(given.get("default"), float) and "type" not in given]


@pytest.mark.parametrize(("command", "flag"), numeric_options())
def test_every_number_of_the_command_line_refuses_every_bad_value_and_starts_nothing(
    command: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    arguments = [command] if command else []
    if command in ("check", "merge", "chat", "report", "watch"):
        arguments.append("runs/none")
    for value in ["nan", "inf", "-inf", "-1", str(HUGE), "1e400", "9" * 5000, "many", "", "1_0x", "٣x"]:
        with pytest.raises(click.UsageError) as caught:
            cli.main([*arguments, f"{flag}={value}"], standalone_mode=False)
        assert flag in caught.value.format_message()
    assert list(tmp_path.iterdir()) == []


def test_all_wrong_options_are_told_at_once() -> None:
    with pytest.raises(click.UsageError) as caught:
        cli.main(["--budget=nan", "--epochs=0", "--device=gpu", "--seed=-1"], standalone_mode=False)
    for flag in ("--budget", "--epochs", "--device", "--seed"):
        assert f"Invalid value for '{flag}'" in caught.value.format_message()


# -- contradictions --------------------------------------------------------------------------------------------------


def test_all_problems_of_settings_presets_data_and_model_are_told_at_once_and_nothing_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    (tmp_path / ".env").write_text("EPOCHS=none\nSAMPLE_SIZE=5\nSAMPLE_RATIO=0.5\n", "utf-8")
    (tmp_path / "mine.toml").write_text("summary = 3\nlora_rank = 0\n", "utf-8")
    told = _refused(["--run", "mine.toml", "--columns", "prompt", "--model", "./none", "--dataset", "chats.jsonl"])
    for text in ("EPOCHS is 'none'", "SAMPLE_RATIO", "summary is 3", "--columns has 'prompt'", "no such folder"):
        assert text in told
    assert sorted(path.name for path in tmp_path.iterdir()) == [".env", "mine.toml"]


def _refused(arguments: list[str]) -> str:
    with pytest.raises(PlanError) as caught:
        cli.main(arguments, standalone_mode=False)
    return str(caught.value)


def test_four_bits_without_bitsandbytes_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util
    import subprocess

    found = importlib.util.find_spec
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    told = _refused(["--run", "recommended", "--base-precision", "4bit", "--device", "cpu"])
    assert "base_precision is '4bit', which needs bitsandbytes. Install it (pip install bitsandbytes)" in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("lora_rank = 0", "lora_rank is 0 with adapter 'lora'; it must be at least 1"),
        ("max_length = 1", "a sequence needs at least 2 tokens"),
        ("sample_size = 5\nsample_ratio = 0.5", "sample_size and sample_ratio are both set"),
        ('adapter = "full"\nbase_precision = "4bit"', "quantized weights cannot be trained"),
    ],
)
def test_a_contradiction_is_told_with_every_other_problem(lines: str, said: str) -> None:
    table = "".join(f"{key} = {toml(value)}\n" for key, value in SMALLEST.items())
    with pytest.raises(PresetError) as caught:
        parse_preset("mine", f"{table}{lines}\nnum_epochs = 0\npublished_hours_low = -1\n")
    assert said in str(caught.value)
    assert "num_epochs is 0" in str(caught.value)
    assert "published_hours_low is -1" in str(caught.value)


def test_an_evaluation_larger_than_the_data_leaves_two_thirds_to_train_on_and_says_so(job: Job) -> None:
    from small_models import random_data

    from trainer.planning import plan_job

    data = random_data([9] * 90)
    greedy = dataclasses.replace(job, evaluation=EvaluationSpec(fraction=0.99))
    planned = plan_job(greedy, data)
    assert (len(planned.plan.evaluation), planned.plan.num_examples) == (30, 60)
    assert "held out are 30 of 90 examples, fewer than the share of 0.99 that was asked for" in " ".join(planned.notes)
    assert plan_job(job, data).notes == ()


def test_a_plan_that_no_memory_holds_is_refused_in_words(job: Job) -> None:
    from small_models import random_data

    from trainer.planning import plan_job

    endless = dataclasses.replace(job, preset=dataclasses.replace(job.preset, num_epochs=1_000_000))
    with pytest.raises(DataError, match=r"the batch plan would hold 392,000,000 examples.*Choose fewer --epochs"):
        plan_job(endless, random_data([9] * 400))


TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "invalid UTF-8": lambda text: text + b"\xff",
    "a NUL byte": lambda text: text + b"\x00",
    "deep nesting": lambda text: b"summary = " + b"[" * 100_000,
    "a number of 5,000 digits": lambda text: b"seed = " + b"9" * 5000,
    "a date that no calendar has": lambda text: b"summary = 2025-02-30",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_preset_file_that_cannot_be_read_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    from presets.user import find_preset

    path = tmp_path / "mine.toml"
    path.write_bytes(TEXTS[kind](b'summary = "a"\n'))
    with pytest.raises(PresetError) as caught:
        find_preset(str(path))
    assert "mine" in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))
