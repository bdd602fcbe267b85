"""Estimates for a GPU whose host launches its work: some micro-steps wait for the host, and others hide it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_host import HostedDevice
from fakes import make_data, make_job, make_row

from planner.estimate import Estimate, estimate
from planner.measure import measure
from planner.measurement import Measurements

LENGTHS = np.clip(np.round(np.exp(np.random.default_rng(3).normal(6.1, 0.4, 4000))), 60, 1024).astype(np.int64)
DATA = make_data(LENGTHS)
# The host's seconds and the GPU's for a token are those of a 1 B and a 3 B model on an H200 (2026-11-27).
SMALL: dict[str, Any] = {"launch": 0.07, "launch_new": 0.025, "per_token": 13e-6}
LARGE: dict[str, Any] = {"launch": 0.10, "launch_new": 0.04, "per_token": 34e-6}
PACKED: dict[str, Any] = {"packing": True, "packed_length": 8192}


def measured(cost: dict[str, Any], changes: dict[str, Any], *, seed: int = 0) -> tuple[Any, Measurements, float]:
    """A row, what was measured of it, and what a run of it takes."""
    device = HostedDevice(LENGTHS, noise=0.05, seed=seed, **cost)
    row = make_row(make_job(device="cuda", precision="bf16", **changes), DATA)
    found = measure([row], DATA, device.factory, budget_seconds=60, clock=device.clock, seed=seed)
    return row, found, HostedDevice(LENGTHS, noise=0.05, **cost).run_seconds(row.plan, seed + 100)


def error(row: Any, found: Measurements, truth: float) -> float:
    one: Estimate = estimate(row, DATA, found)
    assert one.train_seconds is not None
    return one.train_seconds / truth - 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("cost", "changes"),
    [
        pytest.param(SMALL, {"micro_batch_size": 4}, id="the host sets the pace"),
        pytest.param(SMALL, {"micro_batch_size": 16}, id="the GPU does"),
        pytest.param(LARGE, {"micro_batch_size": 8}, id="a larger one does"),
        pytest.param(LARGE, PACKED, id="packed, with short rows left over"),
    ],
)
def test_what_the_host_and_what_the_gpu_sets_the_pace_of_is_foreseen(
    cost: dict[str, Any], changes: dict[str, Any], seed: int
) -> None:
    assert abs(error(*measured(cost, changes, seed=seed))) < 0.02


def test_what_new_shapes_take_is_told_apart_by_class_since_long_rows_hide_it() -> None:
    """Of packed rows most are long, and the host is done before the GPU. The short ones left over wait for it."""
    errors, without = [], []
    for seed in range(5):
        row, found, truth = measured(LARGE, PACKED, seed=seed)
        (one,) = found.measurements
        assert one.new_shape_seconds == 0
        errors.append(error(row, found, truth))
        pooled = replace(found, measurements=(replace(one, new_shapes_apart=()),))
        without.append(error(row, pooled, truth))
    assert np.median(without) < -0.018
    assert abs(np.median(errors)) < 0.012
