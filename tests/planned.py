"""A machine with a fake device, on which plans are made one after another, and runs that it remembers."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fakes
import numpy as np

from planner.candidates import MeasureSettings
from planner.compare import Comparison, compare
from planner.estimate import HEAP_GROWTH
from planner.hardware import DeviceFacts
from planner.history import (
    FILE_NAME,
    History,
    PastRun,
)
from planner.resolve import Options
from presets.env import read_settings
from trainer.tokens import TokenizedDataset

NOW = datetime(2026, 11, 23, 10, 0, tzinfo=UTC)
DISK = "a disk"
FACTS = DeviceFacts(
    name="a processor", kind="cpu", memory_bytes=16 << 30, free_bytes=8 << 30, driver="1.0", torch_version="2.13.0"
)


@dataclass
class Bench:
    """A machine with a fake device, on which plans are made one after another."""

    home: Path
    model: Path
    device: dict[str, Any] = field(default_factory=dict)
    starts: int = 0  # workers started: 0 where a plan was answered from the history
    said: list[str] = field(default_factory=list)
    scratch: list[Path | None] = field(default_factory=list)  # folders that workers were given to try out the disk

    @property
    def history(self) -> History:
        return History(home=self.home)

    def plan(
        self,
        dataset: str = "400",
        *,
        facts: DeviceFacts = FACTS,
        names: tuple[str, ...] = ("baseline", "aggressive"),
        measuring: MeasureSettings | None = None,
        fresh: bool = False,
        minutes: float = 0.0,
        output: Path | None = None,
        tuned: bool = False,
        **options: Any,
    ) -> Comparison:
        self.starts = 0
        self.said.clear()

        devices: list[fakes.FakeDevice] = []

        def factory(folder: Path, scratch: Path | None = None) -> Callable[..., Any]:
            device = fakes.FakeDevice(TokenizedDataset.load(folder).lengths, **self.device)
            devices.append(device)
            self.scratch.append(scratch)

            def start(job: Any) -> Any:
                self.starts += 1
                return device.factory(job)

            return start

        return compare(
            Options(dataset=dataset, **{"model": str(self.model), **options}),
            read_settings(self.home, {}),
            measuring or MeasureSettings(fresh=fresh),
            names=names,
            say=self.said.append,
            factory=factory,
            facts=facts,
            now=NOW + timedelta(minutes=minutes),
            history=self.history,
            clock=lambda: devices[-1].clock(),
            output=output,
            tuned=tuned,
        )


def past_run(number: int = 0, **changes: Any) -> PastRun:
    """A run that was predicted to take 100 s (90 to 110) and took 130."""
    plain: dict[str, Any] = {
        "folder": f"/runs/{number}",
        "ended_at": (NOW + timedelta(hours=number)).isoformat(timespec="seconds"),
        "status": "finished",
        "name": "recommended",
        "model": "/models/small",
        "num_examples": 1000,
        "raw_seconds": 100.0,
        "raw_train_seconds": 80.0,
        "seconds": 100.0,
        "seconds_low": 90.0,
        "seconds_high": 110.0,
        "train_seconds": 80.0,
        "actual_seconds": 130.0,
        "actual_train_seconds": 104.0,
        "signature_key": "k",
    }
    return PastRun(**{**plain, **changes})


def forget_company(home: Path) -> None:
    """Tests run beside each other, now more and now fewer: what others took while it was timed is not to matter."""
    with contextlib.closing(sqlite3.connect(home / FILE_NAME)) as database, database:
        for key, content in database.execute("SELECT key, content FROM measurements").fetchall():
            found = json.loads(content)
            for one in found["measurement"]["rounds"]:
                one["conditions"] = None
            database.execute("UPDATE measurements SET content = ? WHERE key = ?", (json.dumps(found), key))


def learnt_from(share: float) -> TokenizedDataset:
    """400 examples of 100 tokens, of which this share are learnt from; of the first all, so that logits fit."""
    data = fakes.make_data(np.full(400, 100))
    at = np.arange(len(data.token_ids))
    return replace(data, supervised=(at % 100 >= 100 - round(100 * share)) | (at < 100))


def peak_of(tokens: int) -> int:
    """Bytes that are shown where the device took a MiB a token and the heap of a run grows on."""
    return round(HEAP_GROWTH * (tokens << 20))
