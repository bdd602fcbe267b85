"""Times as people write them: "8h", "18:00", "friday", "in 3 hours". No I/O; nothing is guessed that is not told."""

from __future__ import annotations

import re
import shlex
from datetime import datetime, time, timedelta

from planner.figures import clock
from presets.errors import OptionError

_UNITS = {
    "s": 1.0, "sec": 1.0, "second": 1.0, "m": 60.0, "min": 60.0, "minute": 60.0, "h": 3600.0, "hr": 3600.0,
    "hour": 3600.0, "d": 86400.0, "day": 86400.0, "w": 604800.0, "week": 604800.0,
}  # fmt: skip
_LONGEST_SECONDS = 3650 * 86400.0
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
FORMS = "18:00, 6pm, tonight, friday, 'tomorrow 09:00', '2026-11-27 09:00' or 'in 3 hours'"
START_FORMS = "now, 18:00, 6pm, 'tomorrow 09:00', 'fri 09:00', '2026-11-27 09:00' or 'in 3 hours'"
_DAY_END = time(23, 59)  # of a day without a time: its last minute, so that the date that is shown is the one meant
_TIME = re.compile(r"(?P<hour>[0-9]{1,2})(?::(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2}))?)?\s*(?P<half>am|pm)?")
_WORDS = re.compile(
    r"(?:(?:on )?(?P<day>[a-z]+|[0-9]{4}-[0-9]{2}-[0-9]{2}))?(?:(?:^|,? )(?:at )?(?P<time>[0-9][0-9: apm]*))?"
)


def parse_within(text: str) -> float:
    """ "8h", "90 min", "3 hours", "1d 4h", "2h30" -> seconds.

    Raises:
        OptionError: not of that form, or no time at all.
    """
    seconds = _span(text)
    if seconds is None:
        raise OptionError(f"--within is '{text}'; write it like 8h, 90min or '1d 4h'.")
    return seconds


def parse_start(text: str, now: datetime) -> datetime:
    """A moment from now on, in this machine's zone. A day needs a time: at its end nobody starts.

    Raises:
        OptionError: not of the forms that the message names, or past.
    """
    if text.strip().lower() == "now":
        return now
    moment = _moment(text, now, now, whole_days=False)
    if moment is None:
        raise OptionError(f"--start is '{text}'; write it like {START_FORMS}.")
    if moment <= now:
        raise OptionError(f"--start is '{text}', which is past.")
    return moment


def parse_deadline(text: str, now: datetime, after: datetime) -> datetime:
    """A moment in this machine's zone; of a day without a time its last minute.

    Args:
        now: what "today", "tomorrow" and "in 3 hours" count from.
        after: the moment must be later; a time without a day is the next one after it.

    Raises:
        OptionError: not of the forms that the message names, or too early.
    """
    moment = _moment(text, now, after, whole_days=True)
    if moment is None:
        span = f" For a span of time: --within {shlex.quote(text.strip())}." if _span(text) is not None else ""
        raise OptionError(f"--deadline is '{text}'; write it like {FORMS}.{span}")
    if moment <= after:
        when = "past" if after == now else f"not after the start ({clock(after, now)})"
        raise OptionError(f"--deadline is '{text}', which is {when}.")
    return moment


def _span(text: str) -> float | None:
    """Seconds, or None where the text is no span of time."""
    rest, seconds, last = text.strip().lower().replace(" and ", " "), 0.0, 0.0
    while rest:
        found = re.match(r" *([0-9]+(?:\.[0-9]+)?) *([a-z]*)", rest)
        if found is None:
            return None
        word = found[2].removesuffix("s") if len(found[2]) > 2 else found[2]  # "ms" are no minutes
        unit = _UNITS.get(found[2]) or _UNITS.get(word)
        if not found[2] and last == _UNITS["h"] and found.end() == len(rest):
            unit = _UNITS["min"]  # 2h30
        if unit is None:
            return None
        seconds += float(found[1]) * unit
        last, rest = unit, rest[found.end() :]
    return seconds if 0 < seconds < _LONGEST_SECONDS else None


def _moment(text: str, now: datetime, after: datetime, *, whole_days: bool) -> datetime | None:
    """The moment that a text names, or None where it names none that is understood."""
    words = " ".join(text.lower().split()).removeprefix("by ").removeprefix("at ")
    if words.startswith("in "):
        span = _span(words.removeprefix("in "))
        return None if span is None else (now + timedelta(seconds=span)).astimezone()
    words = re.sub(r"^([0-9]{4}-[0-9]{2}-[0-9]{2})t(?=[0-9])", r"\1 ", words)
    words = re.sub(r"\btonight\b", "today", re.sub(r"\bnoon\b", "12:00", words))
    found = _WORDS.fullmatch(words)
    if not words or found is None:
        return None
    day, at = found["day"], _DAY_END
    if found["time"] is None and (not whole_days or day is None):
        return None
    try:
        if found["time"] is not None:
            at = _time(found["time"], alone=day is None)
        # Without the zone and back, so that 09:00 is 09:00 on the day's own clock, summer time or not.
        if day is not None and day[0].isdigit():
            return datetime.combine(datetime.fromisoformat(day), at).astimezone()
        return _next(day, at, after if day is None else now)
    except (ValueError, OverflowError):
        return None


def _time(text: str, *, alone: bool) -> time:
    """ "18:00", "6pm", "6:30 pm". Raises: ValueError where it is none; "9" alone could be anything."""
    found = _TIME.fullmatch(text.strip())
    if found is None or (alone and text.strip().isdigit()):
        raise ValueError(text)
    hour = int(found["hour"])
    if found["half"]:
        if not 1 <= hour <= 12:
            raise ValueError(text)
        hour = hour % 12 + (12 if found["half"] == "pm" else 0)
    return time(hour, int(found["minute"] or 0), int(found["second"] or 0))


def _next(day: str | None, at: time, now: datetime) -> datetime | None:
    here = now.replace(tzinfo=None)
    today = datetime.combine(here.date(), at)
    if day in (None, "today"):
        ahead = 0 if day == "today" or today > here else 1
    elif day == "tomorrow":
        ahead = 1
    else:
        named = [number for number, name in enumerate(DAYS) if len(day or "") >= 3 and name.startswith(day or "-")]
        if len(named) != 1:
            return None
        ahead = (named[0] - now.weekday()) % 7
        if ahead == 0 and today <= here:
            ahead = 7
    return (today + timedelta(days=ahead)).astimezone()
