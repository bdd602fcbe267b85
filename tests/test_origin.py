"""A run goes on over what it was started from: the same examples, the same base."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import make_data, make_job
from small_runs import StopAfter

from presets.errors import RunError
from trainer import origin
from trainer.checkpoint import SUMMED
from trainer.job import DataSpec
from trainer.loop import Stopped, train
from trainer.planning import plan_job
from trainer.sums import write_sums


@pytest.fixture
def stopped(make_run: Any, tmp_path: Path, tiny_model: Path, chat_file: Path) -> Path:
    """A run with a checkpoint, over a model and a data file of its own."""
    shutil.copytree(tiny_model, tmp_path / "base")
    shutil.copy(chat_file, tmp_path / "chats.jsonl")
    run = Path(make_run(model=str(tmp_path / "base"), data=DataSpec(source=str(tmp_path / "chats.jsonl"))))
    with pytest.MonkeyPatch.context() as patch:
        StopAfter(patch, 20)
        with pytest.raises(Stopped):
            train(run)
    return run


def lines_of(run: Path) -> list[str]:
    return (run.parent / "chats.jsonl").read_text().splitlines(keepends=True)


def write(run: Path, lines: list[str]) -> None:
    (run.parent / "chats.jsonl").write_text("".join(lines))


def refusal(run: Path) -> str:
    before = {path: path.read_bytes() for path in run.rglob("step-*/*")}
    with pytest.raises(RunError) as caught:
        train(run, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("step-*/*")} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_data_in_another_order_is_refused_and_put_back_it_goes_on(stopped: Path) -> None:
    lines = lines_of(stopped)
    write(stopped, lines[::-1])
    assert "chats.jsonl: the examples are not those that the run was started with" in refusal(stopped)
    write(stopped, lines)
    record = train(stopped, resume=True)
    assert record is not None
    assert record.status == "finished"


def test_a_record_that_was_edited_is_refused_and_one_that_was_added_is_not(stopped: Path) -> None:
    lines = lines_of(stopped)
    record = json.loads(lines[40])
    record["messages"][1]["content"] += " night"
    write(stopped, [*lines[:40], json.dumps(record) + "\n", *lines[41:]])
    assert "the examples are not those" in refusal(stopped)
    write(stopped, [*lines, lines[0]])
    assert train(stopped, resume=True) is not None


def test_other_weights_under_the_adapter_are_refused(stopped: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = stopped.parent / "base" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "q_proj" in name)
    weights[name] = weights[name] * np.float32(1.001)
    save_file(weights, path, metadata={"format": "pt"})
    said = refusal(stopped)
    assert said.startswith(f"model '{stopped.parent / 'base'}': its weights are not those that the adapter was trained")


def edit_config(run: Path, **changes: Any) -> None:
    path = run.parent / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_config_that_makes_the_same_weights_compute_otherwise_is_refused(stopped: Path) -> None:
    before = (stopped.parent / "base" / "config.json").read_text()
    assert json.loads(before)["hidden_act"] == "silu"
    edit_config(stopped, hidden_act="gelu")
    said = refusal(stopped)
    assert said.startswith(f"model '{stopped.parent / 'base'}': its config.json does not say what it said when the run")
    (stopped.parent / "base" / "config.json").write_text(before)
    assert train(stopped, resume=True) is not None


def test_what_a_config_says_beside_the_computation_may_change(stopped: Path) -> None:
    path = stopped.parent / "base" / "config.json"
    content = json.loads(path.read_text())
    noise = {"transformers_version": "0.0.0", "_name_or_path": "elsewhere", "dtype": "float16", "use_cache": False}
    path.write_text(json.dumps(dict(reversed([*content.items(), *noise.items()]))))
    assert train(stopped, resume=True) is not None


def test_a_checkpoint_from_before_the_config_was_kept_resumes_and_keeps_it_from_then_on(stopped: Path) -> None:
    for state in (stopped / "checkpoints").glob("*/state.json"):
        content = json.loads(state.read_text())
        assert content["progress"].pop("config_digest")
        state.write_text(json.dumps(content))
        (state.parent / "SHA256SUMS").unlink()
        content["format"] = 1
        state.write_text(json.dumps(content))
    edit_config(stopped, initializer_range=0.03)
    assert train(stopped, resume=True) is not None
    last = max((stopped / "checkpoints").glob("step-*")) / "state.json"
    assert json.loads(last.read_text())["progress"]["config_digest"] == origin.config_digest(
        str(stopped.parent / "base")
    )


@pytest.mark.parametrize(
    ("change", "is_noise"),
    [
        ({"transformers_version": "6"}, True),
        ({"torch_dtype": "bfloat16"}, True),
        ({"text_config": {"dtype": "float16", "rope_theta": 1e4}}, True),
        ({"text_config": {"rope_theta": 10_001}}, False),
        ({"eos_token_id": [2, 7]}, True),
        ({"text_config": {"bos_token_id": 1, "rope_theta": 10_000}}, True),
        ({"transformers.js_config": {"kv_cache_dtype": {}}}, True),
        ({"pad_token_id": 0}, False),
        ({"architectures": ["LlamaForCausalLM"]}, False),
        ({"attention_dropout": 0.1}, False),
        ({"layers": [2, 1]}, False),
        ({"tie": 1}, False),
        ({"another": None}, False),
    ],
)
def test_the_digest_of_a_config_is_of_what_it_says_of_the_computation(
    tmp_path: Path, change: dict[str, Any], is_noise: bool
) -> None:
    content = {"attention_dropout": 0.0, "text_config": {"rope_theta": 10_000}, "layers": [1, 2], "tie": True}
    (tmp_path / "config.json").write_text(json.dumps(content))
    before = origin.config_digest(str(tmp_path))
    assert before is not None
    (tmp_path / "config.json").write_text(json.dumps(content | change, indent=1))
    assert (origin.config_digest(str(tmp_path)) == before) == is_noise


def test_a_config_that_cannot_be_told_is_not_compared(tmp_path: Path) -> None:
    assert origin.config_digest(str(tmp_path)) is None
    assert origin.config_digest("owner/nothing-of-that-name") is None
    for content in (b"\xff", b"{", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        assert origin.config_digest(str(tmp_path)) is None


def test_a_checkpoint_of_the_format_before_is_not_asked_for_its_digest_of_the_config(stopped: Path) -> None:
    for state in (stopped / "checkpoints").glob("*/state.json"):
        content = json.loads(state.read_text())
        content["format"] = 2
        content["progress"]["config_digest"] = "0" * 64  # over more than is digested now
        state.write_text(json.dumps(content))
        write_sums(state.parent, SUMMED)
    assert train(stopped, resume=True) is not None


def test_a_checkpoint_without_digests_still_resumes(stopped: Path) -> None:
    for state in (stopped / "checkpoints").glob("*/state.json"):
        content = json.loads(state.read_text())
        assert content["progress"].pop("data_digest")
        assert content["progress"].pop("base_digest")
        assert content["progress"].pop("config_digest")
        state.write_text(json.dumps(content))
        (state.parent / "SHA256SUMS").unlink()
        content["format"] = 1
        state.write_text(json.dumps(content))
    write(stopped, lines_of(stopped)[::-1])
    assert train(stopped, resume=True) is not None


@pytest.mark.parametrize("at_once", [1, 50, 1 << 22])
def test_the_digest_of_the_data_is_of_what_the_plan_names(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(origin, "_TOKENS_AT_ONCE", at_once)
    data = make_data(np.arange(3, 103))
    plan = plan_job(make_job(sample_size=40), data).plan
    named = {*plan.order.tolist(), *plan.evaluation.tolist()}
    whole = origin.data_digest(data, plan)
    for example in range(len(data)):
        ids, supervised = data.token_ids.copy(), data.supervised.copy()
        last = data.offsets[example + 1] - 1
        ids[last] += 1
        supervised[last] = False
        for changed in ({"token_ids": ids}, {"supervised": supervised}):
            found = origin.data_digest(dataclasses.replace(data, **changed), plan)
            assert (found != whole) == (example in named), example
    longer = make_data(np.arange(3, 123))
    assert origin.data_digest(longer, plan) == whole


def save(folder: Path, name: str, **tensors: np.ndarray) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)


def test_the_digest_of_a_base_is_of_the_files_that_are_loaded(tmp_path: Path) -> None:
    one, two = np.zeros(100_000, dtype=np.float32), np.ones(10, dtype=np.float32)
    save(tmp_path, "a.safetensors", one=one)
    save(tmp_path, "b.safetensors", two=two)
    (tmp_path / origin.INDEX).write_text(json.dumps({"weight_map": {"one": "a.safetensors", "two": "b.safetensors"}}))
    before = origin.base_digest(str(tmp_path))
    save(tmp_path, "adapter_model.safetensors", three=two)
    assert origin.base_digest(str(tmp_path)) == before
    for place in (0, 50_100, 99_999):
        changed = one.copy()
        changed[place] = 1.0
        save(tmp_path, "a.safetensors", one=changed)
        assert origin.base_digest(str(tmp_path)) not in (before, None)
    save(tmp_path, "a.safetensors", one=one)
    assert origin.base_digest(str(tmp_path)) == before


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants, file_download

    for module in (constants, file_download):
        if hasattr(module, "HF_HUB_CACHE"):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_what_can_be_done_where_a_hub_name_has_another_revision_since(hub_cache: Path) -> None:
    repo = hub_cache / "models--owner--name"
    before, now = "a" * 40, "b" * 40
    for revision, theta in ((before, 1e4), (now, 1e6)):
        (repo / "snapshots" / revision).mkdir(parents=True)
        (repo / "snapshots" / revision / "config.json").write_text(json.dumps({"rope_theta": theta}))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(now)
    kept = origin.config_digest(str(repo / "snapshots" / before))
    assert kept is not None
    assert kept != origin.config_digest("owner/name")
    said = origin.way_back("owner/name", origin.config_digest, kept)
    assert f"write {before} into '{repo / 'refs' / 'main'}' in place of {now}" in said
    assert "HF_HUB_OFFLINE=1" in said
    (repo / "refs" / "main").write_text(before)
    assert origin.config_digest("owner/name") == kept
    shutil.rmtree(repo / "snapshots" / before)
    (repo / "refs" / "main").write_text(now)
    gone = origin.way_back("owner/name", origin.config_digest, kept)
    assert f"The cache holds revision {now} of it, and no longer the one" in gone
    folder = str(repo / "snapshots" / now)
    assert origin.way_back(folder, origin.config_digest, kept) == "Put it back as it was, or start a new run."


def test_a_hub_names_weights_are_found_in_the_cache(hub_cache: Path) -> None:
    assert origin.base_digest("owner/name") is None
    repo = hub_cache / "models--owner--name"
    save(repo / "snapshots" / ("0" * 40), origin.WEIGHTS, one=np.zeros(4, dtype=np.float32))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    found = origin.base_digest("owner/name")
    assert found is not None
    assert found == origin.base_digest(str(repo / "snapshots" / ("0" * 40)))


def test_weights_that_cannot_be_told_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / origin.WEIGHTS).write_bytes(b"\xff" * 20)
    assert origin.base_digest(str(tmp_path)) is None
