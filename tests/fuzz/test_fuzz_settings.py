"""Preset files, `.env` and job files: whatever stands in them, it is sound or one PlanError says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from budget import MUTANTS, SEEDS, any_value, changed, fuzzed, mutants
from hypothesis import given
from hypothesis import strategies as st

from presets import jsonio
from presets.env import Settings, _fields, read_settings, yours_preset
from presets.errors import PlanError
from presets.schema import Phase, Preset, parse_preset
from presets.user import find_preset
from trainer.job import DataSpec, EvaluationSpec, Job

BUNDLED = [path.read_bytes() for path in sorted((Path(__file__).parents[2] / "presets").glob("*.toml"))]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def is_sound(preset: Preset) -> bool:
    numbers = [value for value in dataclasses.astuple(preset) if isinstance(value, float)]
    return not preset.problems() and all(map(math.isfinite, numbers)) and preset.global_batch_size >= 1


def refusal(make: Callable[[], Preset | Settings | Job]) -> tuple[Any, str]:
    """(what is made, ""), or (None, why it is refused)."""
    try:
        return make(), ""
    except PlanError as reason:
        return None, str(reason)


@fuzzed()
@given(st.sampled_from(BUNDLED), SEEDS)
def test_a_preset_file_is_sound_or_refused(folder: Path, content: bytes, seed: int) -> None:
    path = folder / "mine.toml"
    for one in mutants(content, seed):
        path.write_bytes(one)
        preset, why = refusal(lambda: find_preset(str(path)))
        assert "mine" in why if preset is None else is_sound(preset), one
        if preset is not None:
            assert jsonio.from_json(Preset, jsonio.to_json(preset)) == preset, one


_KEYS = [*(one.name for one in dataclasses.fields(Preset)), "published_hours_low", "nonsense"]
_PHASE_KEYS = [one.name for one in dataclasses.fields(Phase)]


def _table(chance: random.Random) -> str:
    table = {"summary": "a", "gradient_accumulation_steps": 4, "learning_rate": 1e-4, "precision": "fp32"}
    table |= {chance.choice(_KEYS): any_value(chance) for _ in range(chance.randint(0, 3))}
    lines = [f"{key} = {toml(value)}" for key, value in table.items()]
    for _ in range(chance.choice((0, 0, 1, 2))):
        phase = {"gradient_accumulation_steps": 4, "learning_rate": 1e-4}
        phase |= {chance.choice(_PHASE_KEYS): any_value(chance) for _ in range(chance.randint(0, 3))}
        lines += ["[[phase]]", *(f"{key} = {toml(value)}" for key, value in phase.items())]
    return "\n".join(lines)


@fuzzed(2 * MUTANTS)
@given(SEEDS)
def test_a_preset_of_any_values_is_sound_or_refused(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(MUTANTS):
        text = _table(chance)
        preset, why = refusal(lambda text=text: parse_preset("mine", text))  # type: ignore[misc]
        assert why.startswith("preset 'mine': ") if preset is None else is_sound(preset), text


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return '"none"' if value is None else json.dumps(value)


_DOTENV = "".join(f"{name.upper()}={value}\n" for name, value in {
    "gradient_accumulation_steps": 32, "use_fp16": "true", "learning_rate": 2e-4, "epochs": 2, "sample_ratio": 0.5,
    "sampling_strategy": "top", "model": "'a b'", "dataset": '"${HOME}/a"', "output": "x # y", "seed": 7,
}.items()).encode()  # fmt: skip
_TEXTS = ["1", "0.5", "2e-4", "true", "top", "nan", "inf", "9" * 30, "-1", "''", '"a']
_LINES = st.lists(st.tuples(st.sampled_from(_fields()), st.sampled_from(_TEXTS)), max_size=6).map(
    lambda found: "".join(f"{key.upper()}={text}\n" for key, text in found).encode()
)


@fuzzed()
@given(st.one_of(st.just(_DOTENV), _LINES), SEEDS)
def test_a_dotenv_gives_settings_or_one_error_and_nothing_else(folder: Path, content: bytes, seed: int) -> None:
    for one in mutants(content, seed):
        (folder / ".env").write_bytes(one)
        settings, why = refusal(lambda: read_settings(folder, {}))
        if settings is None:
            assert why, one
            continue
        preset = yours_preset(settings)
        assert preset is None or is_sound(preset), one


def _job() -> Job:
    return Job(
        name="mine", preset=parse_preset("mine", BUNDLED[0].decode()), model="a", data=DataSpec(source="b"),
        device="cpu", precision="fp32", base_precision="fp32", micro_batch_size=1,
    )  # fmt: skip


JOB = _job().to_json()
PLACES: list[tuple[str, ...]] = [
    *((one.name,) for one in dataclasses.fields(Job)),
    *(("data", one.name) for one in dataclasses.fields(DataSpec)),
    *(("evaluation", one.name) for one in dataclasses.fields(EvaluationSpec)),
    *(("preset", one.name) for one in dataclasses.fields(Preset)),
    ("extra",),
]


def check_job(text: str) -> None:
    job, why = refusal(lambda: Job.from_json(text))
    if job is None:
        assert why.startswith("job.json: "), text
        return
    again = job.to_json()
    assert Job.from_json(again) == job, text
    again.encode("utf-8")
    sizes = zip(job.global_batch_sizes, job.gradient_accumulation_steps, strict=True)
    assert all(size == steps * job.micro_batch_size * job.num_devices for size, steps in sizes), text
    assert is_sound(job.preset), text


@fuzzed()
@given(SEEDS)
def test_a_job_of_any_values_comes_back_the_same_or_is_refused(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(MUTANTS):
        check_job(json.dumps(changed(json.loads(JOB), PLACES, chance)))


@fuzzed()
@given(st.sampled_from([JOB.encode(), b"{}", b"[]", b"null"]), SEEDS)
def test_a_damaged_job_file_is_a_job_or_refused(folder: Path, content: bytes, seed: int) -> None:
    path = folder / "job.json"
    for one in mutants(content, seed):
        path.write_bytes(one)
        job, why = refusal(lambda: Job.read(path))
        assert "job.json" in why if job is None else Job.from_json(job.to_json()) == job, one
