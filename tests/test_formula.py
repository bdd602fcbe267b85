"""The published formula reproduces the published figures, and its slips are explained rather than copied."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest

from planner import formula
from planner.published import published_rows
from presets.schema import load_preset

FP32 = formula.speed_factor(fp16=False)
FP16 = formula.speed_factor(fp16=True)


@pytest.mark.parametrize(
    ("gradient_accumulation_steps", "factor", "steps", "seconds", "hours"),
    [(16, FP32, 3938, 118_140, 32.8), (32, FP16, 1969, 45_438, 12.6), (64, FP16, 984, 22_708, 6.3)],
    ids=["baseline", "recommended", "aggressive"],
)
def test_the_three_worked_examples_follow_from_the_formula(
    gradient_accumulation_steps: int, factor: float, steps: int, seconds: int, hours: float
) -> None:
    assert formula.steps(63_000, gradient_accumulation_steps) == steps
    time = formula.seconds(steps, 30.0, factor)
    assert round(time) == seconds
    assert round(formula.hours(time), 1) == hours


def test_the_guides_45414_is_a_slip_of_24_seconds() -> None:
    """1,969 x 30 / 1.3 = 45,438.46. The guide prints 45,414, which no whole number of steps gives:

    one step is 23.08 s, so 1,968 steps take 45,415.4 s, and 24 s is not a rounding of 1.3 either. In hours both are
    12.6, so nothing else in the guide rests on the slip. The project uses the formula's number.
    """
    exact = formula.seconds(1969, 30.0, 1.3)
    assert exact == pytest.approx(45_438.46, abs=0.01)
    assert round(exact) - 45_414 == 24
    assert round(formula.seconds(1968, 30.0, 1.3)) != 45_414
    assert round(formula.hours(exact), 1) == round(formula.hours(45_414), 1) == 12.6


def test_steps_round_halves_up_and_never_to_none() -> None:
    assert 63_000 / 16 == 3937.5
    assert formula.steps(63_000, 16) == 3938
    assert formula.steps(40, 16) == 3  # 2.5, which round() would send to 2
    assert formula.steps(63_000, 64) == 984  # 984.375
    assert formula.steps(63_000, 8, batch_size=4) == 1969
    assert formula.steps(1, 64) == 1
    assert formula.steps(10**18 + 8, 16) == (10**18 + 16) // 16  # exact where a float is not


@pytest.mark.parametrize(
    ("gradient_accumulation_steps", "factor", "low", "high", "printed"),
    [(16, FP32, 34.2, 35.0, 35), (32, FP16, 14.0, 14.8, 14), (64, FP16, 7.7, 8.5, 8)],
    ids=["baseline", "recommended", "aggressive"],
)
def test_overhead_range_holds_the_printed_hours(
    gradient_accumulation_steps: int, factor: float, low: float, high: float, printed: float
) -> None:
    time = formula.seconds(formula.steps(63_000, gradient_accumulation_steps), 30.0, factor)
    overhead = tuple(formula.hours(bound) for bound in formula.with_overhead(time))
    assert (round(overhead[0], 1), round(overhead[1], 1)) == (low, high)
    assert low <= printed <= high


@pytest.mark.parametrize(
    ("preset", "formula_hours", "published_hours"),
    [
        ("today", 3.2, (4, 5)),
        ("two-stage", 8.3, (12, 12)),
        ("progressive", 9.4, (20, 20)),
        ("prioritized", 12.6, (18, 18)),
    ],
)
def test_the_other_published_times_do_not_follow_from_the_formula(
    preset: str, formula_hours: float, published_hours: tuple[float, float]
) -> None:
    """They are data beside the formula's hours: even with its overhead, most stay below the printed time."""
    [row] = published_rows(63_000, 30.0, [load_preset(preset)])
    assert round(formula.hours(row.seconds), 1) == formula_hours
    assert (row.hours_low, row.hours_high) == published_hours
    assert row.hours_low is not None
    assert formula_hours < row.hours_low


def test_the_published_learning_rates_are_a_quarter_of_the_base_per_doubling() -> None:
    rates = [formula.learning_rate_by_doubling(2e-4, 16, batch) for batch in (16, 32, 64)]
    assert rates == pytest.approx([2.0e-4, 2.5e-4, 3.0e-4])
    assert formula.learning_rate_by_doubling(2e-4, 16, 8) == pytest.approx(1.5e-4)


def test_the_square_root_rule_gives_what_the_guide_calls_linear() -> None:
    rate = formula.learning_rate_by_square_root(2e-4, 16, 32)
    assert rate == pytest.approx(2.83e-4, abs=0.005e-4)
    assert math.floor(rate * 1e5) / 1e5 == 2.8e-4  # as the guide prints it
    assert rate != pytest.approx(2e-4 * 32 / 16)  # linear would be 4e-4
    assert formula.learning_rate_by_square_root(2e-4, 16, 64) == pytest.approx(4e-4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: formula.steps(0, 16),
        lambda: formula.steps(-63_000, 16),
        lambda: formula.steps(63_000, 0),
        lambda: formula.steps(63_000, 16, batch_size=-1),
        lambda: formula.steps(63_000.5, 16),  # type: ignore[arg-type]
        lambda: formula.steps(True, 16),
        lambda: formula.steps(math.inf, 16),  # type: ignore[arg-type]
        lambda: formula.seconds(0, 30.0),
        lambda: formula.seconds(10, 0.0),
        lambda: formula.seconds(10, math.nan),
        lambda: formula.seconds(10, math.inf),
        lambda: formula.seconds(10, 30.0, -1.3),
        lambda: formula.hours(-1.0),
        lambda: formula.with_overhead(math.nan),
        lambda: formula.learning_rate_by_doubling(0.0, 16, 32),
        lambda: formula.learning_rate_by_doubling(2e-4, 16, 1),
        lambda: formula.learning_rate_by_square_root(math.nan, 16, 32),
        lambda: formula.learning_rate_by_square_root(2e-4, 0, 32),
    ],
)
def test_numbers_without_meaning_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r" is .+; (it must be|the rule needs)"):
        call()


def test_the_published_mode_imports_nothing_heavy() -> None:
    code = (
        "import sys, planner.report, planner.published, planner.formula, presets.env; "
        "print(sorted({'torch', 'numpy', 'rich', 'transformers', 'wcwidth'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
