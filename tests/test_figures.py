"""Single figures as a reader sees them: durations, sizes, numbers, finish times."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from planner.figures import GIB, clock, duration, duration_range, figure, finish_at, gib, hours_text

ZONE = timezone(timedelta(hours=1))
NOW = datetime(2026, 11, 23, 10, 0, tzinfo=ZONE)  # a Monday


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "unknown"), (float("nan"), "unknown"), (float("inf"), "unknown"), (-1.0, "unknown"),
        (0.0, "0.0 s"), (0.44, "0.4 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"),
        (125, "2 min 05 s"), (3599.6, "1 h 00 min"), (7_500, "2 h 05 min"), (118_140, "32 h 49 min"),
        (48 * 3600 - 31, "47 h 59 min"), (48 * 3600 - 1, "2 d 00 h"), (48 * 3600, "2 d 00 h"), (1e6, "11 d 14 h"),
        (1e9, "11,574 d 02 h"),
    ],
)  # fmt: skip
def test_durations_round_to_two_units_and_carry(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_a_range_leaves_out_the_last_unit() -> None:
    assert duration_range(7_080, 7_920) == "1 h 58 – 2 h 12"
    assert duration_range(58, 65) == "58 s – 1 min 05"
    assert duration_range(None, 65) == "unknown"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (10**400, "unknown"),
        (-(10**400), "unknown"),
        (None, "unknown"),
        (0, "0.00 GiB"),
        (GIB // 2, "0.50 GiB"),
        (GIB, "1.0 GiB"),
        (11 * GIB, "11.0 GiB"),
    ],
)
def test_memory_is_in_gib(num_bytes: int | None, text: str) -> None:
    assert gib(num_bytes) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "unknown"), (0.000123, "0.000123"), (0.7312, "0.731"), (0.9999, "1.00"), (3.546, "3.55"), (23.08, "23.1"),
     (99.96, "100"), (1234.5, "1,234")],
)  # fmt: skip
def test_figures_have_three_digits(value: float | None, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(118_140, "32.8 h"), (715, "12 min"), (12.0, "12 s"), (3_590, "1.0 h")])
def test_published_times_are_in_hours_like_the_guides(seconds: float, text: str) -> None:
    assert hours_text(seconds) == text


@pytest.mark.parametrize(
    ("after", "text"),
    [
        (timedelta(minutes=125), "Mon 12:05"),
        (timedelta(days=5), "Sat 10:00"),
        (timedelta(days=6), "Sun 10:00"),
        (timedelta(days=7), "Mon 30 Nov 10:00"),
        (timedelta(days=40), "Sat 2 Jan 2027 10:00"),
    ],
)
def test_a_finish_time_has_its_date_when_the_weekday_does_not_suffice(after: timedelta, text: str) -> None:
    assert clock(NOW + after, NOW) == text


def test_a_finish_time_is_shown_in_the_readers_zone() -> None:
    assert clock(datetime(2026, 11, 23, 11, 5, tzinfo=UTC), NOW) == "Mon 12:05"


def test_finish_at_is_local_time_with_offset_or_unknown() -> None:
    text = finish_at(NOW, 7_500.0)
    assert text is not None
    moment = datetime.fromisoformat(text)
    assert moment == NOW + timedelta(seconds=7_500)
    assert moment.utcoffset() is not None
    assert finish_at(NOW, None) is None
    assert finish_at(NOW, float("nan")) is None
    assert finish_at(NOW, 1e15) is None
