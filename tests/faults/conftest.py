"""One server for all faults: importing what a run needs takes longer than most of the runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import SHORT, Server, build_shim, short_data, why_no_shim


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
