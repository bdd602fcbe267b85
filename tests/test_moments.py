"""Times as people write them are understood and told, or refused with the forms that are."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from planner.cli import cli
from planner.figures import full_clock
from planner.moments import FORMS, START_FORMS, parse_deadline, parse_start, parse_within
from presets.errors import OptionError

NOW = datetime(2026, 11, 25, 18, 0).astimezone()  # a Wednesday
HOUR = 3600.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("8h", 8 * HOUR), ("90min", 5400), ("90 m", 5400), ("1d 4h", 28 * HOUR), ("2h30", 2.5 * HOUR), ("1.5h", 5400),
        ("45s", 45), ("3 hours", 3 * HOUR), ("1 hour and 30 minutes", 5400), ("2 days", 48 * HOUR),
        ("1 week", 168 * HOUR), ("2 hrs 5 mins", 7500),
    ],
)  # fmt: skip
def test_spans_of_time(text: str, seconds: float) -> None:
    assert parse_within(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "", "8", "h", "8 hours ago", "-3h", "0h", "nan h", "1e9d", "8h tomorrow", "9999 weeks", "30 2h", "2h 5 3",
        "500ms", "3 hs",
    ],
)  # fmt: skip
def test_what_is_no_span_of_time_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--within"):
        parse_within(text)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("18:30", (25, 18, 30)),
        ("9:00", (26, 9, 0)),
        ("at 18:30", (25, 18, 30)),
        ("6:30 pm", (25, 18, 30)),
        ("6pm", (26, 18, 0)),
        ("12am", (26, 0, 0)),
        ("noon", (26, 12, 0)),
        ("tomorrow noon", (26, 12, 0)),
        ("today", (25, 23, 59)),
        ("tonight", (25, 23, 59)),
        ("tonight 9pm", (25, 21, 0)),
        ("tomorrow", (26, 23, 59)),
        ("today 23:59", (25, 23, 59)),
        ("tomorrow 09:00", (26, 9, 0)),
        ("Tomorrow at 9", (26, 9, 0)),
        ("friday", (27, 23, 59)),
        ("by Friday", (27, 23, 59)),
        ("on fri, 6 pm", (27, 18, 0)),
        ("Fri 09:00", (27, 9, 0)),
        ("fri 18", (27, 18, 0)),
        ("wednesday", (25, 23, 59)),
        ("2026-11-27", (27, 23, 59)),
        ("2026-11-27 09:00", (27, 9, 0)),
        ("2026-11-27T09:00", (27, 9, 0)),
        ("2026-11-27T09:00:00", (27, 9, 0)),
        ("2026-11-27 09:00:30", (27, 9, 0, 30)),
        ("in 3 hours", (25, 21, 0)),
        ("in 90 min", (25, 19, 30)),
        ("in 2 days", (27, 18, 0)),
    ],
)
def test_moments(text: str, moment: tuple[int, ...]) -> None:
    assert parse_deadline(text, NOW, NOW) == datetime(2026, 11, *moment).astimezone()


def test_a_weekday_whose_time_is_over_is_that_of_next_week() -> None:
    assert parse_deadline("wednesday 12:00", NOW, NOW) == datetime(2026, 12, 2, 12, 0).astimezone()
    assert parse_deadline("wed", NOW.replace(hour=23, minute=59), NOW).day == 2


@pytest.mark.parametrize(
    "text",
    [
        "", "soon", "25:00", "24:00", "someday 09:00", "someday", "9", "13pm", "0pm", "6 30 pm", "18:00 friday",
        "next friday", "friday morning", "fr 9:00", "2026-13-01", "2026-11-27 25:00", "in", "in a bit", "in 0 hours",
        "in 99999 days", "\x1b[31m", "fri 6pm pm", "99999-01-01", "midnight", "09:00:60", "09:00:0",
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_with_the_forms_that_are(text: str) -> None:
    with pytest.raises(OptionError, match=re.escape(f"'; write it like {FORMS}.")):
        parse_deadline(text, NOW, NOW)


def test_a_bare_span_is_pointed_to_its_option() -> None:
    with pytest.raises(OptionError, match=r"For a span of time: --within 3h\.$"):
        parse_deadline("3h", NOW, NOW)
    with pytest.raises(OptionError, match=r"For a span of time: --within '1d 4h'\.$"):
        parse_deadline(" 1d 4h", NOW, NOW)


@pytest.mark.parametrize("text", ["today 17:59", "2020-01-01 09:00", "2026-11-24"])
def test_what_is_past_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=f"--deadline is '{text}', which is past"):
        parse_deadline(text, NOW, NOW)


def test_a_deadline_before_the_start_is_refused_with_the_start() -> None:
    with pytest.raises(OptionError, match=r"which is not after the start \(Fri 09:00\)"):
        parse_deadline("tomorrow", NOW, parse_start("fri 09:00", NOW))


def test_a_time_without_a_day_is_the_next_one_after_the_start() -> None:
    start = parse_start("tomorrow 20:00", NOW)
    assert parse_deadline("19:00", NOW, start) == datetime(2026, 11, 27, 19, 0).astimezone()


def test_a_start_needs_a_time() -> None:
    assert parse_start("now", NOW) == NOW
    assert parse_start("in 2 hours", NOW) == NOW + timedelta(hours=2)
    for text in ("friday", "tonight", "2026-11-27", "soon"):
        with pytest.raises(OptionError, match=re.escape(f"--start is '{text}'; write it like {START_FORMS}.")):
            parse_start(text, NOW)
    with pytest.raises(OptionError, match="--start is 'today 12:00', which is past"):
        parse_start("today 12:00", NOW)


def test_what_was_understood_is_told_with_its_date_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(Exception):
        pass

    def stop(*given: Any, **more: Any) -> None:
        raise Enough

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("planner.commands_choice.settings_of", stop)
    done = CliRunner().invoke(cli, ["advise", "--deadline", "in 3 days"])
    assert isinstance(done.exception, Enough)
    said = re.fullmatch(r"to be done by (\w{3} \d+ \w{3} \d{4} \d\d:\d\d), started (.*)\n", done.stderr)
    assert said is not None, done.stderr
    begin, until = (datetime.strptime(one, "%a %d %b %Y %H:%M").astimezone() for one in (said[2], said[1]))
    assert until - begin == timedelta(days=3)


def test_the_whole_date_is_told() -> None:
    assert full_clock(parse_deadline("friday", NOW, NOW)) == "Fri 27 Nov 2026 23:59"
