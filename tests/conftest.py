"""Shared fixtures: a tiny real model with its tokenizer, a small data file, and a home of its own for each run."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import save_tiny_model, small_job, write_chats

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
    # Tests run beside each other, now more and now fewer: what was timed in one may be reused all the same.
    monkeypatch.setattr("planner.compare.watch_others", lambda device: lambda seconds: None)


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
            if "preloaded: ready" in line:  # a library says "already" before
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
    folder = tmp_path_factory.mktemp("tiny-model")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 chats of unequal lengths, with engagement and dates."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    write_chats(path)
    return path


@pytest.fixture
def make_job(tiny_model: Path, chat_file: Path) -> Callable[..., Any]:
    """A job over the tiny model; fields of the preset and of the job by name."""
    return functools.partial(small_job, tiny_model, chat_file)


@pytest.fixture
def make_run(tmp_path: Path, make_job: Callable[..., Any]) -> Callable[..., Path]:
    """A run folder with a job in it, ready to train."""

    def make(name: str = "run", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "job.json").write_text(make_job(**changes).to_json(), encoding="utf-8")
        return folder

    return make


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    """A `planned.Bench` with the bundled model's shape and an empty history."""
    from planned import Bench

    from presets.demo import demo_folder

    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(demo_folder() / "config.json", model)
    (tmp_path / "home").mkdir()
    return Bench(home=tmp_path / "home", model=model)
