"""A part of bench/estimator.py: each cell judged for itself. The bench runs all of them, with more trials."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


estimator = load("estimator")


@pytest.mark.parametrize(("distribution", "preset"), [("chat", "two-stage"), ("constant", "aggressive")])
def test_with_stationary_noise_the_interval_holds_nine_in_ten_and_alarms_are_rare(
    distribution: str, preset: str
) -> None:
    cell = estimator.judge((distribution, preset, "stationary", estimator.CHECK_NOISE["stationary"], 120))
    assert 0.86 <= cell.held <= 0.97
    assert cell.median_error < 0.03
    assert cell.alarms <= 0.05


@pytest.mark.parametrize("kind", ["drift", "two modes"])
@pytest.mark.parametrize(("distribution", "preset"), [("long tail", "baseline"), ("uniform", "progressive")])
def test_drift_and_throttling_are_warned_of_and_the_range_is_not_called_calibrated(
    kind: str, distribution: str, preset: str
) -> None:
    cell = estimator.judge((distribution, preset, kind, estimator.CHECK_NOISE[kind], 40))
    assert cell.alarms >= 0.95


@pytest.mark.parametrize("preset", ["baseline", "two-stage"])
def test_drift_and_throttling_are_warned_of_where_micro_steps_are_long_and_few(preset: str) -> None:
    for changes in ({"drift": 0.24}, {"throttle": 1.35, "dwell": 8.0}):
        cell = estimator.judge(("mostly cut", preset, "drift", {"noise": 0.10, **changes}, 40))
        assert cell.unsteady >= 0.95


def test_a_range_from_few_micro_steps_is_not_called_calibrated_and_reaches_a_machine_that_drifts() -> None:
    steady = estimator.judge(("mostly cut", "baseline", "slow", estimator.CHECK_NOISE["slow"], 60))
    assert steady.held >= 0.86
    assert steady.unsteady <= 0.05
    drifting = estimator.judge(("mostly cut", "baseline", "slow drift", estimator.CHECK_NOISE["slow drift"], 60))
    assert drifting.alarms >= 0.95
    assert drifting.held >= 0.7


@pytest.mark.parametrize("distribution", list(estimator.distributions()))
def test_without_noise_the_error_is_under_a_hundredth(distribution: str) -> None:
    cell = estimator.judge((distribution, "recommended", "exact", {}, 1))
    assert cell.worst_error < 0.01
