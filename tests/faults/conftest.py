"""One server for all faults: importing what a run needs takes longer than most of the runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import SHORT, Server, build_shim, calls_of, short_data, why_no_shim
from small_runs import small_job


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    refused = why_no_shim()
    if refused is not None:
        pytest.skip(refused)
    made = Server(folder, build_shim(folder))
    yield made
    made.close()


@pytest.fixture
def make_short(make_run: Any, chat_file: Path) -> Any:
    """A run folder with a job of six steps in it."""
    return lambda name="run": make_run(name, data=short_data(chat_file), **SHORT)


@pytest.fixture(scope="session")
def whole(
    server: Server, tiny_model: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[str, bool, str]]]:
    """A short run that nothing happened to, and every change that it made to its folder."""
    folder = tmp_path_factory.mktemp("whole")
    run = folder / "run"
    run.mkdir()
    job = small_job(tiny_model, chat_file, data=short_data(chat_file), **SHORT)
    (run / "job.json").write_text(job.to_json(), encoding="utf-8")
    return run, calls_of(server, run, folder / "calls")
