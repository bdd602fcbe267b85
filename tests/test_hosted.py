"""Estimates for a GPU whose host launches its work: some micro-steps wait for the host, and others hide it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_host import HostedDevice
from fakes import make_data, make_job, make_row

import planner.measure
from planner.estimate import Estimate, estimate
from planner.measure import measure
from planner.measurement import Measurements
from planner.sequence import Sequence
from trainer.tokens import TokenizedDataset
from trainer.widths import shared_width

LENGTHS = np.clip(np.round(np.exp(np.random.default_rng(3).normal(6.1, 0.4, 4000))), 60, 1024).astype(np.int64)
# The host's seconds and the GPU's for a token are those of models of 1, 1.7 and 3 B on an H200 (2026-11-27).
SMALL: dict[str, Any] = {"launch": 0.055, "launch_new": 0.04, "per_token": 14.5e-6}
MIDDLE: dict[str, Any] = {"launch": 0.10, "launch_new": 0.065, "per_token": 22e-6}
LARGE: dict[str, Any] = {"launch": 0.10, "launch_new": 0.09, "per_token": 33e-6}
PACKED: dict[str, Any] = {"packing": True, "packed_length": 8192}  # rows of a whole window, some with a rest
WHOLE: dict[str, Any] = {"packing": True, "packed_length": 16384}


def measured(
    cost: dict[str, Any], changes: dict[str, Any], *, seed: int = 0, examples: int = 4000, budget: float = 60.0
) -> tuple[Any, TokenizedDataset, Measurements, float]:
    """A row, its data, what was measured of it, and what a run of it takes."""
    lengths = LENGTHS[:examples]
    data = make_data(lengths)
    device = HostedDevice(lengths, noise=0.05, seed=seed, **cost)
    row = make_row(make_job(device="cuda", precision="bf16", **changes), data)
    found = measure([row], data, device.factory, budget_seconds=budget, clock=device.clock, seed=seed)
    run = HostedDevice(lengths, noise=0.05, **cost).run_seconds(row.plan, seed + 100, packed=row.job.packing)
    return row, data, found, run


def error(row: Any, data: TokenizedDataset, found: Measurements, truth: float) -> float:
    one: Estimate = estimate(row, data, found)
    assert one.train_seconds is not None
    return one.train_seconds / truth - 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("cost", "changes"),
    [
        pytest.param(SMALL, {"micro_batch_size": 4}, id="the host sets the pace"),
        pytest.param(MIDDLE, {"micro_batch_size": 16}, id="the GPU does"),
        pytest.param(LARGE, {"micro_batch_size": 8}, id="a larger one does"),
        pytest.param(LARGE, PACKED, id="packed, with short rows left over"),
        pytest.param(MIDDLE, PACKED, id="a smaller one, packed"),
        pytest.param(SMALL, WHOLE, id="a packed row is a window"),
    ],
)
def test_what_the_host_and_what_the_gpu_sets_the_pace_of_is_foreseen(
    cost: dict[str, Any], changes: dict[str, Any], seed: int
) -> None:
    assert abs(error(*measured(cost, changes, seed=seed))) < 0.02


@pytest.mark.parametrize(("cost", "changes"), [(SMALL, WHOLE), (MIDDLE, PACKED)])
def test_what_a_window_s_first_micro_step_waits_for_is_timed_as_it_is_in_the_run(
    cost: dict[str, Any], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another without a wait, a new shape is chosen for behind the GPU's back: too short for a short run."""

    def errors() -> list[float]:
        return [error(*measured(cost, changes, seed=seed, examples=1500, budget=25.0)) for seed in range(5)]

    as_in_the_run = errors()
    of = planner.measure.sequence

    def without_windows(drawn: Any, order: Any, lengths: Any, *, in_windows: bool, most: float) -> Sequence:
        return of(drawn, order, lengths, in_windows=False, most=most)

    monkeypatch.setattr(planner.measure, "sequence", without_windows)
    assert np.median(errors()) < -0.015
    assert abs(np.median(as_in_the_run)) < 0.018


def test_after_few_rounds_neighbouring_classes_tell_together_what_new_shapes_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of one class there are two or three, and half of all show nothing: the GPU hides it."""

    def errors() -> list[float]:
        return [
            error(*measured(LARGE, {"micro_batch_size": 8}, seed=seed, examples=1000, budget=18.0)) for seed in range(8)
        ]

    together = errors()
    assert max(map(abs, together)) < 0.05
    assert abs(np.median(together)) < 0.015
    monkeypatch.setattr("planner.first_times._neighbours", lambda of: [[stratum] for stratum in of])
    assert sorted(errors())[1] < -0.05


def test_a_rest_of_a_window_has_a_shape_that_comes_again() -> None:
    """Else it is new in nearly every window, and a run is longer than it need be."""
    row, data, _, run = measured(LARGE, PACKED, examples=1500, budget=25.0)
    apart = HostedDevice(LENGTHS[:1500], noise=0.05, **LARGE).run_seconds(row.plan, 100)
    assert apart > 1.04 * run
    shapes = row.plan.micro_shapes(data.lengths)
    rests = shapes.width[shapes.width <= 2048]
    assert len(np.unique(shared_width(rests, shapes.widest))) <= 8 < len(np.unique(shared_width(rests)))


def test_what_new_shapes_take_is_told_apart_by_class_since_long_ones_hide_it() -> None:
    errors, without = [], []
    for seed in range(5):
        row, data, found, truth = measured(SMALL, {"micro_batch_size": 8}, seed=seed, examples=1500, budget=90.0)
        (one,) = found.measurements
        errors.append(error(row, data, found, truth))
        pooled = replace(found, measurements=(replace(one, new_shapes_apart=()),))
        without.append(error(row, data, pooled, truth))
    assert np.median(without) > 0.04
    assert np.median(np.abs(errors)) < 0.02
