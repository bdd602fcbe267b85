"""Trials of a search: which variants are timed, and what is said of those that could not be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fakes import FakeProber, make_job
from tuning import DATA, LENGTHS, Device, Prober, device_of, tuned

from planner.measure import measure
from planner.measurement import Measurements
from planner.prober import MicroRows
from planner.trials import NOT_IN_TURNS, Trials
from planner.tune import tune
from planner.twin import Change, Twin, Wanted
from presets.errors import MeasurementError
from trainer.job import Job

LEAN = Change(name="lean loss", loss="lean")


def test_what_failed_is_told_with_all_of_its_changes() -> None:
    """Its split may be why, and not the last change."""

    class Dies(Prober):
        def run(self, micro_batches: Any, begins: list[int], longest_rows: list[int]) -> list[float]:
            if self.job.loss == "lean":
                raise MeasurementError("the worker process ended by itself (exit code 1).")
            return super().run(micro_batches, begins, longest_rows)

    class Fragile(Device):
        def factory(self, job: Job) -> FakeProber:
            return Dies(self, job)

    device = Fragile(LENGTHS, base=0.2, per_token=1e-5, per_token_width=0.0, memory=64 << 30)
    (twin,) = tuned(device)
    assert any(reason.startswith(f"{twin.text}, lean loss: the worker process ended") for reason in twin.refused)


def test_workers_that_do_not_fit_together_are_said_to_be_timed_one_after_another_once() -> None:
    for memory, told in ((1 << 30, 1), (64 << 30, 0)):
        (twin,) = tuned(device_of(base=0.0, per_token=4e-4, per_token_width=4e-6, memory=memory), budget=300.0)
        assert twin.refused.count(NOT_IN_TURNS) == told
        assert sum("one after another" in reason for reason in twin.refused) == told


def test_a_preset_is_tried_at_the_split_that_another_is_written_with() -> None:
    baseline = make_job("baseline")
    wanted = [
        Wanted(name="recommended", job=make_job("recommended"), baseline=baseline),
        Wanted(name="aggressive", job=make_job("aggressive", micro_batch_size=8), baseline=baseline),
    ]
    device = device_of(base=0.0, per_token=4e-4, per_token_width=4e-6, optimizer=0.001, memory=64 << 30)
    twins = tune(wanted, DATA, device.factory, budget_seconds=300.0, clock=device.clock)
    assert [one.changes for one in twins if isinstance(one, Twin)] == [
        (),
        (Change(name="micro-batch", micro_batch_size=1),),
    ]


def test_a_change_that_changes_nothing_is_not_timed_beside_what_it_is_the_same_as() -> None:
    wanted = [Wanted(name="recommended", job=make_job("recommended"), baseline=make_job("baseline"))]
    trials = Trials(wanted, DATA, device_of().factory, None, None, 0)
    one, two = (Change(name="micro-batch", micro_batch_size=size) for size in (1, 2))
    rows = trials.rows({"recommended": [(), (one,), (two,), (LEAN,), (LEAN, one), (LEAN, two)]})
    assert [row.name for row in rows] == [
        "recommended", "recommended + micro-batch 2", "recommended + lean loss",
        "recommended + lean loss + micro-batch 2",
    ]  # fmt: skip


def test_where_only_a_run_s_heap_does_not_fit_less_memory_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halved(Prober):
        def memory(self, windows: list[list[MicroRows]], more: list[list[MicroRows]], seconds: float) -> Any:
            reply = super().memory(windows, more, seconds)
            if self.job.preset.gradient_checkpointing:
                self.held //= 2
            return replace(reply, allocated_bytes=self.held, reserved_bytes=self.held)

    class Saving(Device):
        def factory(self, job: Job) -> FakeProber:
            return Halved(self, job)

    device = Saving(LENGTHS, packing_refused="it leaks")
    limit = (int(LENGTHS.max()) << 20) + 1  # holds what a worker needs, and not the little more that a run does

    def measured(*given: Any, **more: Any) -> Measurements:
        found = measure(*given, **more)
        left = [None if one.peak_reserved_bytes is None else limit - one.peak_reserved_bytes for one in found.rows]
        rows = [
            replace(one, headroom_bytes=free, fits=one.fits if free is None else free >= 0)
            for one, free in zip(found.rows, left, strict=True)
        ]
        return replace(found, rows=tuple(rows))

    monkeypatch.setattr("planner.trials.measure", measured)
    (twin,) = tuned(device)
    assert twin.written_seconds is None
    assert twin.changes[0].gradient_checkpointing is True
