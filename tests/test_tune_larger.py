"""The search where memory bounds the split, and where presets end with layouts that are not alike."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from fakes import make_job
from tuning import DATA, Device, Saving, device_of, saving, tuned

from planner.trials import Trials
from planner.tune import tune
from planner.twin import Twin, Untimed, Wanted


def searched(wanted: Wanted, device: Saving, told: list[str]) -> tuple[Twin | Untimed, ...]:
    """A search of one preset; what it says goes to `told`."""
    return tune(
        [wanted],
        DATA,
        device.factory,
        budget_seconds=300,
        clock=device.clock,
        progress=lambda text, _: told.append(text),
    )


def test_checkpointing_is_tried_for_a_larger_split_and_the_chain_tells_both() -> None:
    told: list[str] = []
    wanted = Wanted(name="recommended", job=make_job("recommended"), baseline=make_job("baseline"))
    device = saving(base=0.2)
    (twin,) = searched(wanted, device, told)
    assert isinstance(twin, Twin)
    assert any(text.startswith("larger splits: timing") for text in told)
    job = twin.job(wanted.job)
    assert job.preset.gradient_checkpointing
    assert job.micro_batch_size == 8
    kept = {link.name: link.factor for link in twin.links if link.is_kept}
    names = list(kept)
    place = names.index("micro-batch 2")
    assert names[place : place + 3] == ["micro-batch 2", "checkpointing", "micro-batch 8"]
    assert kept["checkpointing"] == pytest.approx(0.8, rel=0.05)
    assert kept["micro-batch 8"] > 2
    assert math.prod(kept.values()) == pytest.approx(twin.loop_speedup)


def test_a_split_as_written_that_fits_with_checkpointing_alone_is_reached_over_the_one_that_fits() -> None:
    (twin,) = tuned(saving(base=0.2), budget=300.0, micro_batch_size=8)
    assert [change.text for change in twin.changes] == ["checkpointing"]
    assert [link.name for link in twin.links if link.is_kept][-3:] == [
        "micro-batch 2",
        "checkpointing",
        "micro-batch 8",
    ]
    assert twin.written_seconds is None


def test_checkpointing_is_left_out_where_it_costs_more_than_a_larger_split_gains() -> None:
    device = saving(base=0.2)
    device.slower = 6.0
    (twin,) = tuned(device, budget=300.0)
    assert twin.job(make_job("recommended")).micro_batch_size == 2
    assert not any(change.gradient_checkpointing for change in twin.changes)


def test_where_memory_does_not_bound_the_fastest_split_no_larger_one_is_tried() -> None:
    """Padding costs as much as tokens: micro-batches of one are the fastest, though those of eight do not fit."""
    told: list[str] = []
    wanted = Wanted(name="recommended", job=make_job("recommended"), baseline=make_job("baseline"))
    device = saving(base=0.0, optimizer=0.001)
    searched(wanted, device, told)
    assert not any(text.startswith("larger splits") for text in told)
    assert ("fp32", "load") in device.log


def test_larger_splits_take_their_time_from_the_later_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    given, spent = {}, {}
    measure = Trials.measure

    def watched(self: Trials, rows: Any, seconds: float, what: str, **more: Any) -> Any:
        before = self.spent
        found = measure(self, rows, seconds, what, **more)
        given[what], spent[what] = seconds, self.spent - before
        return found

    monkeypatch.setattr(Trials, "measure", watched)
    tuned(saving(base=0.2), budget=90.0)
    assert list(given) == ["layouts", "larger splits", "steps", "the chain"]
    done = min(spent["layouts"], given["layouts"]) + min(spent["larger splits"], given["larger splits"])
    assert done > given["layouts"]  # the layouts alone did not leave enough
    assert done + given["steps"] + given["the chain"] <= 90.0 + 1e-6


def separate_and_packed() -> list[Wanted]:
    """Two presets whose layouts cannot become alike: packing is not offered where a preset has none."""
    job = make_job("recommended")
    packed = replace(job, packing=True, packed_length=512)
    return [
        Wanted(name="packed", job=packed, baseline=make_job("baseline")),
        Wanted(name="separate", job=job, baseline=make_job("baseline")),
    ]


def eager_is_fast() -> Device:
    device = device_of(base=0.2, per_token=1e-5, per_token_width=0.0, eager_factor=0.5, memory=64 << 30)
    device.packing_refused = "it leaks"
    return device


def test_changes_of_the_step_are_looked_for_with_each_layout_where_time_allows() -> None:
    device = eager_is_fast()
    found = tune(separate_and_packed(), DATA, device.factory, budget_seconds=900, clock=device.clock)
    packed, separate = found
    assert isinstance(packed, Twin)
    assert isinstance(separate, Twin)
    assert any(change.attention == "eager" for change in separate.changes)
    assert all(change.attention is None for change in packed.changes)
    assert not any("were looked for with" in reason for reason in separate.refused)


@pytest.mark.parametrize("order", [1, -1])
def test_where_time_allows_one_layout_alone_it_is_said(order: int) -> None:
    device = eager_is_fast()
    wanted = separate_and_packed()[::order]
    twins = tune(wanted, DATA, device.factory, budget_seconds=240, clock=device.clock)
    first, second = (one.name for one in wanted)
    for twin in twins:
        assert isinstance(twin, Twin)
        assert any(f"the split of '{second}' (" in r and f"with that of '{first}' (" in r for r in twin.refused)
        # Eager attention knows no documents: what it gains for separate rows is not tried on packed ones.
        has_eager = any(link.name == "eager attention" for link in twin.links)
        assert has_eager is (first == twin.preset == "separate")


@pytest.mark.parametrize(("room", "packed"), [(1.10, True), (1.02, False)])
def test_a_layout_is_judged_by_what_a_run_s_heap_grows_to(room: float, packed: bool) -> None:
    """Its worst row fits by itself; 2 % more is not what a run of packed rows needs (5.5 %)."""
    longest = 8 * 512
    (twin,) = tuned(device_of(base=0.5, per_token=1e-6, per_token_width=0.0, memory=int(room * (longest << 20))))
    lengths = [change.packed_length for change in twin.changes if change.packed_length]
    assert (lengths == [longest]) is packed
    assert lengths
