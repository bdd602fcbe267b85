"""Warm-up, drift, jumps: is the machine the same from the first timing to the last?"""

from __future__ import annotations

import numpy as np
import pytest

from planner.intervals import half_width, lopsided
from planner.outliers import MOST_UNSEEN, UNSEEN, set_apart
from planner.slope import Movement, movement
from planner.steadiness import (
    HAS_TO_SHOW,
    Steadiness,
    drift,
    has_changed,
    is_slow_to_start,
    judge,
    split_warmup,
    surely,
    too_few,
    two_levels,
)
from planner.student import t_quantile, t_quantile_99

NORMAL = np.random.default_rng(1)


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 6.314), (4, 2.132), (5, 2.015), (9, 1.833), (30, 1.697)])
def test_t_quantiles_are_the_table_s(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees) == pytest.approx(quantile, abs=2e-3)


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 31.82), (5, 3.365), (7, 2.998), (10, 2.764), (30, 2.457)])
def test_t_quantiles_at_99_are_the_table_s(degrees: int, quantile: float) -> None:
    assert t_quantile_99(degrees) == pytest.approx(quantile, abs=4e-3)


def moved(random: np.random.Generator, count: int, *, by: float = 0.0, scatter: float = 0.1) -> Movement:
    """Timings of two classes over a minute, whose speed moves by so much."""
    times = np.linspace(0.0, 60.0, count)
    return movement(times, random.normal(0, scatter, count) + by * times / 60, np.arange(count) % 2)


def test_single_timings_show_a_movement_that_is_said_to_be_visible_and_noise_hardly_ever() -> None:
    random = np.random.default_rng(3)
    visible = moved(random, 60).visible
    assert visible == pytest.approx((2.39 + 1.67) * 0.1 * np.sqrt(12 / 60), rel=0.3)
    seen = [moved(random, 60, by=4.06 * 0.1 * np.sqrt(12 / 60)) for _ in range(400)]
    assert np.mean([one.stands_out for one in seen]) == pytest.approx(0.95, abs=0.03)
    assert np.mean([one.by for one in seen]) == pytest.approx(4.06 * 0.1 * np.sqrt(12 / 60), rel=0.05)
    assert np.mean([moved(random, 60).stands_out for _ in range(1000)]) == pytest.approx(0.02, abs=0.013)


def test_a_class_that_comes_late_is_no_slope_and_a_slow_timing_hides_none() -> None:
    random = np.random.default_rng(4)
    timings = random.normal(0, 0.05, 60) + np.repeat([0.0, 0.5], 30)
    assert not movement(np.arange(60.0), timings, np.repeat([0, 1], 30)).stands_out
    timings = random.normal(0, 0.05, 60) + np.linspace(0, 0.2, 60)
    timings[5] = 3.0
    found = movement(np.arange(60.0), timings, np.zeros(60, dtype=np.int64))
    assert found.stands_out
    assert found.by == pytest.approx(0.2, abs=0.08)


def test_a_movement_of_single_timings_is_warned_of_where_rounds_are_few_and_seem_alike() -> None:
    rounds = np.array([10.0, 10.1, 9.9, 10.0, 10.05])
    along = Movement(by=0.15, error=0.03, degrees=30, scatter=0.08, count=33)
    found = judge(rounds, rounds, np.zeros(33), along)
    assert found.moved == 0.15
    assert "its speed moved by 15%" in str(found.warning)
    assert judge(rounds, rounds, np.zeros(33), Movement(by=0.15, error=0.1, degrees=30, count=33)).is_steady


def test_few_timings_are_said_to_be_too_few_with_number_threshold_and_remedy() -> None:
    random = np.random.default_rng(5)
    rounds = np.array([10.0, 10.1, 9.9, 10.0])
    enough = judge(rounds, rounds, np.zeros(9), moved(random, 90))
    assert enough.can_tell
    assert enough.hidden == 0.0
    assert too_few(enough, 60.0) is None
    few = judge(rounds, rounds, np.zeros(9), moved(random, 20))
    assert not few.can_tell
    assert HAS_TO_SHOW / 2 < few.hidden < 0.5
    text = too_few(few, 60.0)
    assert text is not None
    assert "with 20 micro-steps" in text
    assert "20% has to" in text
    assert "with --fresh --budget 2" in text or "with --fresh --budget 1" in text
    none = judge(rounds[:2], rounds[:2], np.zeros(2), movement(np.array([0.0, 9]), np.zeros(2), np.array([0, 1])))
    assert not none.can_tell
    assert none.hidden == 1.0
    assert "with --fresh and a much longer --budget" in str(too_few(none, 60.0))


def test_a_first_round_counts_unless_it_lies_above_the_fence_of_the_later_ones() -> None:
    assert not is_slow_to_start(np.array([10.4, 10.0, 10.1, 9.9]))
    assert is_slow_to_start(np.array([12.0, 10.0, 10.1, 9.9]))
    assert not is_slow_to_start(np.array([8.0, 10.0, 10.1, 9.9]))
    assert not is_slow_to_start(np.array([12.0, 10.0]))  # nothing to go by


def test_correlated_rounds_widen_the_interval() -> None:
    alternating = np.array([99.0, 101.0] * 6)
    blocks = np.array([99.0] * 3 + [101.0] * 3 + [99.0] * 3 + [101.0] * 3)
    assert half_width(blocks) > 1.5 * half_width(alternating)


def test_a_drift_is_told_from_noise() -> None:
    noise = np.random.default_rng(1).normal(0, 1, 20)
    assert drift(100 + noise) == 0.0
    assert drift(100 + noise + np.arange(20)) == pytest.approx(19, rel=0.15)
    assert half_width(100 + noise + np.arange(20)) > 9


def test_a_single_round_claims_no_precision() -> None:
    assert half_width(np.array([10.0])) == 5.0


def test_warmup_is_what_lies_above_the_fence_of_the_later_rounds() -> None:
    steady = np.random.default_rng(2).normal(10, 0.1, 30)
    assert split_warmup(steady) == 0
    assert split_warmup(np.concatenate([[30, 14], steady])) == 2
    assert split_warmup(np.array([30.0, 10, 10, 10])) == 0  # too few would be left


def test_many_slow_rounds_are_a_machine_that_changed_and_not_warmup() -> None:
    steady = np.random.default_rng(2).normal(10, 0.1, 12)
    assert split_warmup(np.concatenate([[14] * 4, steady])) == 0


def test_timings_of_one_level_are_called_changed_once_in_a_hundred() -> None:
    alarms = sum(has_changed(NORMAL.normal(0, 0.1, 300)) for _ in range(1000))
    assert 2 <= alarms <= 20


def test_a_slow_timing_here_and_there_is_no_change_of_level() -> None:
    timings = NORMAL.normal(0, 0.05, 300)
    timings[40:43] = 1.5
    assert not has_changed(timings)


@pytest.mark.parametrize("gap", [0.08, 0.3])
def test_levels_that_take_turns_are_seen(gap: float) -> None:
    timings = NORMAL.normal(0, 0.05, 300)
    timings[60:140] += gap
    timings[220:] += gap
    assert has_changed(timings)


def test_two_levels_are_the_means_of_the_groups() -> None:
    assert two_levels(np.array([1.0, 2.1, 0.9, 1.9, 1.1])) == pytest.approx((1.0, 2.0))


def test_a_jump_is_warned_of_with_number_threshold_and_remedy() -> None:
    rounds = np.array(([10.0] * 5 + [13.0] * 5) * 2) + NORMAL.normal(0, 0.1, 20)
    found = judge(rounds, rounds, np.log(np.repeat(rounds / 11.5, 10)) + NORMAL.normal(0, 0.05, 200))
    assert found.jumped == pytest.approx(0.3, abs=0.02)
    assert found.fast < 1 < found.slow
    assert found.warning is not None
    assert "30%" in found.warning
    assert "more than 5%" in found.warning
    assert "measure again" in found.warning


def test_a_share_just_over_its_limit_reads_as_over_it() -> None:
    assert "two levels 5.1% apart while it was timed, more than 5%" in str(Steadiness(jumped=0.05001).warning)
    assert "moved by 10.1% while it was timed, more than 10%" in str(Steadiness(moved=0.1001).warning)
    assert "two levels 6% apart" in str(Steadiness(jumped=0.06).warning)


def test_a_steady_machine_is_not_warned_of() -> None:
    rounds = NORMAL.normal(10, 0.3, 20)
    assert judge(rounds, rounds, NORMAL.normal(0, 0.1, 200)).warning is None
    few = np.array([9.0, 11.0, 8.9, 11.1])  # 12 %, as few rounds have it by chance
    assert judge(few, few, np.zeros(3)).is_steady
    many = np.tile(few, 5)
    scattered = judge(many * 1.2 - 2, many * 1.2 - 2, np.zeros(3))
    assert "the rounds scatter by at least 10.3% while it was timed, more than 10%" in str(scattered.warning)
    two = np.array([10.0, 12.0])
    assert judge(two, two, np.zeros(3)).is_steady  # two rounds say nothing


def test_noise_that_leans_upwards_pushes_the_upper_end_outwards() -> None:
    even = NORMAL.normal(0, 0.05, 400)
    leaning = NORMAL.exponential(0.3, 400)
    assert lopsided(even) < 0.1 < lopsided(leaning)


def test_what_slow_timings_add_is_set_apart_and_spread_over_all() -> None:
    stratum = np.tile([0, 1], 100)
    expected = np.where(stratum == 0, 1.0, 8.0)
    noise = np.exp(NORMAL.normal(0, 0.05, 200))
    seconds = expected * noise
    seconds[[20, 57, 140]] *= [3.0, 2.0, 4.0]
    found = set_apart(seconds, expected, stratum)
    slow = np.flatnonzero(found.clean != seconds)
    assert slow.tolist() == [20, 57, 140]
    assert found.clean[slow] == pytest.approx(expected[slow], rel=0.02)  # what their class takes
    # Weights by the root of the seconds: 1 and 2.83, each in a hundred timings.
    weights = np.sqrt(expected) / np.sqrt(expected).sum()
    assert found.share == pytest.approx(float(weights[[20, 57, 140]] @ (np.array([3.0, 2.0, 4.0]) - 1)), rel=0.15)
    assert found.down < found.share < found.up


@pytest.mark.parametrize(("degrees", "quantile"), [(2, 5.991), (3, 7.815), (10, 18.307), (30, 43.773)])
def test_a_deviation_s_lower_limit_is_that_of_the_chi_square_table(degrees: int, quantile: float) -> None:
    assert surely(0.12, degrees) == pytest.approx(0.12 / np.sqrt(quantile / degrees), rel=5e-3)


@pytest.mark.parametrize("adds", [False, True])
def test_what_slow_timings_add_is_right_on_average(adds: bool) -> None:
    """Whether what slows a timing multiplies its seconds, or adds some in proportion to how long it is exposed."""
    expected = np.tile([1.0, 8.0], 60)
    shares = []
    for _ in range(400):
        hit = NORMAL.random(120) < (0.004 * expected if adds else 0.02)
        excess = 5.0 / expected if adds else np.full(120, 2.0)
        found = set_apart(
            expected * np.exp(NORMAL.normal(0, 0.03, 120)) * (1 + hit * excess), expected, np.tile([0, 1], 60)
        )
        shares.append(found.share)
    truth = 0.004 * 5.0 if adds else 0.02 * 2.0
    assert np.mean(shares) == pytest.approx(truth, rel=0.12)


def test_what_was_not_seen_may_have_been_missed_the_less_the_more_was_timed() -> None:
    few, many = (set_apart(np.ones(count), np.ones(count), np.zeros(count, dtype=np.int64)) for count in (30, 3000))
    assert few.share == many.share == few.down == 0
    assert few.up == MOST_UNSEEN
    assert many.up == pytest.approx(UNSEEN * (1 + 1.6449) / 3000, rel=1e-3)


def test_a_class_of_two_timings_has_no_outlier() -> None:
    found = set_apart(np.array([1.0, 1.0, 1.0, 1.0, 9.0]), np.ones(5), np.array([0, 0, 0, 1, 1]))
    assert found.share == 0


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Steadiness(spread=0.04, moved=0.09, jumped=0.06), "two levels 6% apart"),
        (Steadiness(spread=0.04, moved=0.12, jumped=0.06), "moved by 12%"),
        (Steadiness(spread=0.12, moved=0.0, jumped=0.0), "scatter by at least 12%"),
    ],
)
def test_the_warning_names_what_is_over_its_own_threshold(found: Steadiness, text: str) -> None:
    assert found.warning is not None
    assert text in found.warning


def test_a_slow_start_that_is_a_tenth_of_the_timing_is_a_mode_and_not_warmup() -> None:
    steady = np.random.default_rng(2).normal(10, 0.1, 8)
    assert split_warmup(np.concatenate([[13], steady])) == 0
