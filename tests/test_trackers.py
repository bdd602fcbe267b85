"""Trackers: one that cannot work is refused at once, and one that breaks costs no run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from presets.errors import SettingsError
from trainer import trackers
from trainer.loop import train
from trainer.record import RunRecord
from trainer.trackers import PACKAGES, check_tracker


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type:
    """A tracker "wandb" of our own in Accelerate, that fails where it is told to."""
    from accelerate import tracking
    from accelerate.tracking import GeneralTracker

    class Fake(GeneralTracker):  # type: ignore[misc,unused-ignore]
        name = "wandb"
        requires_logging_directory = False
        failing: tuple[str, ...] = ()
        seen: list[str] = []  # noqa: RUF012  # a new class for each test

        def __init__(self, project: str, **_: Any) -> None:
            super().__init__()

        @property
        def tracker(self) -> None:
            return None

        def _told(self, what: str) -> None:
            self.seen.append(what)
            if what in self.failing:
                raise ConnectionError("no route\nto host")

        def start(self) -> None:
            self._told("start")

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            pass

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            self._told(f"eval {step}" if "eval_loss" in values else f"step {step}")

        def finish(self) -> None:
            self._told("finish")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.WANDB])
    monkeypatch.setattr(trackers, "PACKAGES", {"wandb": ("json",)})
    return Fake


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_tracker_that_fails_in_mid_run_is_told_of_once_and_the_run_goes_on(
    make_run: Any, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.failing = ("step 3",)
    run = make_run(tracker="wandb")
    record = train(run)
    assert record is not None
    assert record.status == "finished"
    assert steps(run) == list(range(1, 10))
    assert fake.seen == ["start", "eval 0", "step 1", "step 2", "eval 2", "step 3"]
    said = "step 3: the tracker wandb failed (ConnectionError: no route to host). The run goes on without it"
    assert capsys.readouterr().err.count(said) == 1
    assert sum(said in note for note in record.notes) == 1
    assert (run / "train.log").read_text().count(said) == 1


def test_a_tracker_that_fails_at_its_end_leaves_a_finished_run(
    make_run: Any, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.failing = ("finish",)
    run = make_run(tracker="wandb")
    assert train(run) is not None
    assert RunRecord.read(run / "record.json").status == "finished"
    assert [one for one in fake.seen if "step" in one] == [f"step {step}" for step in range(1, 10)]
    assert [one for one in fake.seen if "eval" in one] == ["eval 0", "eval 2", "eval 4", "eval 7", "eval 9"]
    assert (fake.seen[0], fake.seen[-1]) == ("start", "finish")
    assert "the tracker wandb failed" in capsys.readouterr().err


def test_a_tracker_that_does_not_start_stops_a_new_run_before_its_first_step_but_no_resumed_one(
    make_run: Any, fake: Any
) -> None:
    fake.failing = ("start",)
    run = make_run(tracker="wandb")
    with pytest.raises(SettingsError, match=r"'wandb' does not start \(ConnectionError: no route to host\)\. Mend"):
        train(run)
    assert not (run / "metrics.jsonl").exists()
    record = train(run, resume=True)
    assert record is not None
    assert record.status == "finished"
    assert any("does not start" in note for note in record.notes)


def test_a_tracker_that_is_not_installed_stops_the_trainer_before_it_loads_anything(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGES, "wandb", ("no_such_package",))
    run = make_run(tracker="wandb")
    with pytest.raises(
        SettingsError, match=r"tracker 'wandb' needs the package no-such-package, which is not"
    ) as caught:
        train(run)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in run.iterdir()) == [".lock", "job.json"]


def test_all_needs_one_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "PACKAGES", {"wandb": ("no_such_package",)})
    with pytest.raises(SettingsError, match="none of them is installed"):
        check_tracker("all")
    monkeypatch.setattr(trackers, "PACKAGES", {"wandb": ("json",)})
    check_tracker("all")


def test_the_known_trackers_are_those_of_accelerate() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(LOGGER_TYPE_TO_CLASS) <= set(PACKAGES)
