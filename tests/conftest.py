"""Shared fixtures: a tiny real model with its tokenizer, a small data file, and a home of its own for each run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.process import quiet_waiting

quiet_waiting()  # before any test imports torch, as the trainer and the worker do


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's own cache and history, nor the measurements and runs of another test."""
    home = tmp_path_factory.mktemp("plan-home")
    tokens = tmp_path_factory.getbasetemp() / "tokens"  # tokenised data is the same for all: seconds saved each time
    tokens.mkdir(exist_ok=True)
    with contextlib.suppress(OSError):  # links need a right of their own on Windows
        (home / "tokens").symlink_to(tokens, target_is_directory=True)
    monkeypatch.setenv("PLAN_HOME", str(home))


@pytest.fixture(scope="session")
def _fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The socket of a process that has torch and its friends imported, and forks."""
    script = Path(__file__).resolve().parent.parent / "bench" / "preloaded.py"
    path = str(tmp_path_factory.mktemp("fork-server") / "socket")
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    with subprocess.Popen(
        [sys.executable, str(script), "serve", path], stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stderr is not None
        for line in server.stderr:
            if "ready" in line:
                break
        yield path
        server.kill()


@pytest.fixture(scope="module")
def preloaded(request: pytest.FixtureRequest) -> Iterator[None]:
    """In this module, processes started with `sys.executable`, and those that they start, skip seconds of imports.

    For tests of what a program does, not of how it starts. Each still runs in a process of its own.
    """
    if not hasattr(os, "fork"):
        yield  # Windows: they start as they always do
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRELOADED", request.getfixturevalue("_fork_server"))
        patch.setattr(sys, "executable", str(Path(__file__).resolve().parent.parent / "bench" / "preloaded.py"))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of about 150,000 parameters with random weights and a ChatML tokenizer, saved as users save theirs."""
    import torch
    from small_tokenizer import CHATML, make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>", pad="<|endoftext|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 chats of unequal lengths, with engagement and dates."""
    random_words = random.Random(5)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "home", "by", "night"]

    def text(low: int, high: int) -> str:
        return " ".join(random_words.choice(words) for _ in range(random_words.randint(low, high)))

    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(80):
            messages = [{"role": "user", "content": text(2, 12)}, {"role": "assistant", "content": text(1, 30)}]
            record = {"messages": messages, "engagement": number % 17, "created_at": 1.7e9 + number * 86_400}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture
def make_job(tiny_model: Path, chat_file: Path) -> Callable[..., Any]:
    """A job over the tiny model; fields of the preset and of the job by name."""
    import dataclasses

    from presets.schema import Preset, load_preset
    from trainer.job import DataSpec, EvaluationSpec, Job

    preset_fields = {field.name for field in dataclasses.fields(Preset)}

    def make(base: str = "recommended", **changes: Any) -> Job:
        in_preset = {name: changes.pop(name) for name in list(changes) if name in preset_fields - {"name"}}
        micro = changes.pop("micro", 1)
        defaults: dict[str, Any] = {
            "gradient_accumulation_steps": 8,
            "learning_rate": 2e-3,
            "precision": "fp32",
            "lora_rank": 4,
            "max_length": 128,
        }
        preset = dataclasses.replace(load_preset(base), **{**defaults, **in_preset})
        return Job(
            **{
                "name": base,
                "preset": preset,
                "model": str(tiny_model),
                "data": DataSpec(source=str(chat_file)),
                "device": "cpu",
                "precision": preset.precision,
                "base_precision": "fp32" if preset.base_precision == "auto" else preset.base_precision,
                "micro_batch_size": micro,
                "num_threads": 1,
                "evaluation": EvaluationSpec(num_samples=1, max_new_tokens=4),
                **changes,
            }
        )

    return make


@pytest.fixture
def make_run(tmp_path: Path, make_job: Callable[..., Any]) -> Callable[..., Path]:
    """A run folder with a job in it, ready to train."""

    def make(name: str = "run", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "job.json").write_text(make_job(**changes).to_json(), encoding="utf-8")
        return folder

    return make
