"""Single figures as people read them: durations, moments, bytes, numbers. None is "unknown"."""

from __future__ import annotations

import math
from datetime import datetime, timedelta

UNKNOWN = "unknown"
NOT_APPLICABLE = "–"
DOUBT = "? after a range: not a 90 % range, but what was seen or feared"  # what "?" says
GIB = 1024**3
MOST_SECONDS = 1e15  # 30 million years; what is longer comes from a damaged file
MOST_BYTES = 1e300
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def finish_at(now: datetime, seconds: float | None) -> str | None:
    """When a run that starts `now` (with offset) is done, as ISO local time with offset; None where that is unknown."""
    if seconds is None or not math.isfinite(seconds):
        return None
    try:
        # Through UTC and back to this machine's zone, so that a change to summer time in between is counted.
        return (now + timedelta(seconds=seconds)).astimezone().isoformat(timespec="seconds")
    except OverflowError:  # beyond the year 9999
        return None


def duration(seconds: float | None, *, short: bool = False) -> str:
    """Seconds as text: "0.4 s", "45 s", "12 min 05 s", "2 h 05 min", from 48 h on "3 d 04 h". Short: no last unit."""
    if seconds is None or not 0 <= seconds < MOST_SECONDS:  # nor what is not a number
        return UNKNOWN
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = math.floor(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _two_units(whole, 60, "min", "s", short)
    minutes = math.floor(seconds / 60 + 0.5)
    if minutes < 48 * 60:
        return _two_units(minutes, 60, "h", "min", short)
    return _two_units(math.floor(seconds / 3600 + 0.5), 24, "d", "h", short)


def _two_units(amount: int, ratio: int, large: str, small: str, short: bool) -> str:
    text = f"{amount // ratio:,} {large} {amount % ratio:02d}"
    return text if short else f"{text} {small}"


def duration_range(low: float | None, high: float | None) -> str:
    """ "1 h 58 – 2 h 12", or "unknown" where a bound is."""
    if low is None or high is None:
        return UNKNOWN
    return f"{duration(low, short=True)} – {duration(high, short=True)}"


def promised_range(low: float | None, high: float | None, calibrated: bool | None) -> str:
    """`duration_range` with "?" after one that is known to be no 90 % range."""
    doubt = "?" if calibrated is False and low is not None and high is not None else ""
    return duration_range(low, high) + doubt


def hours_text(seconds: float | None) -> str:
    """Seconds as the guide prints times: "32.8 h"; under one hour "12 min", under one minute as `duration`."""
    if seconds is None or not math.isfinite(seconds) or seconds < 59.5:
        return duration(seconds)
    return f"{seconds / 60:.0f} min" if seconds < 59.5 * 60 else f"{seconds / 3600:,.1f} h"


def gib(num_bytes: float | None) -> str:
    """Bytes as GiB (1024^3): "0.15 GiB", "11.0 GiB"."""
    if num_bytes is None or not abs(num_bytes) < MOST_BYTES:  # nor a whole number that no float can hold
        return UNKNOWN
    amount = num_bytes / GIB
    return f"{amount:.2f} GiB" if amount < 0.995 else f"{amount:,.1f} GiB"


def clock(moment: datetime, now: datetime) -> str:
    """A moment as "Mon 12:05"; with the date if it is over six days away, with the year if that is another one."""
    moment = moment.astimezone(now.tzinfo) if now.tzinfo else moment.astimezone().replace(tzinfo=None)
    text = f"{WEEKDAYS[moment.weekday()]} {moment:%H:%M}"
    # Six days, not seven: a week later has the same weekday, and "Mon" would mean two days.
    if abs(moment - now) <= timedelta(days=6):
        return text
    date = f"{moment.day} {MONTHS[moment.month - 1]}" + (f" {moment.year}" if moment.year != now.year else "")
    return f"{WEEKDAYS[moment.weekday()]} {date} {moment:%H:%M}"


def full_clock(moment: datetime) -> str:
    """A moment with its whole date, on its own clock: "Fri 27 Nov 2026 18:00"."""
    return f"{WEEKDAYS[moment.weekday()]} {moment.day} {MONTHS[moment.month - 1]} {moment.year} {moment:%H:%M}"


def ago(moment: datetime, now: datetime) -> str:
    """How long something lies back, in its largest unit: "12 s ago", "3 min ago", "5 h ago", "9 d ago"."""
    seconds = max(0.0, (now - moment).total_seconds())  # a clock that was set back does not make it the future
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= (2 if unit == "d" else 1) * size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{int(seconds)} s ago"


def figure(value: float | None) -> str:
    """A measured number with three significant digits: "0.731", "3.55", "23.1", "1,234"."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    for limit, digits in ((0.9995, 3), (9.995, 2), (99.95, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}g}" if limit < 1 else f"{value:.{digits}f}"
    return f"{value:,.0f}"


def off_by(error: float, *, sign: str = "+") -> str:
    """Actual / predicted, less 1, as "+4.2%"; what is ten times off and more need not be told to the digit.

    Args:
        sign: "+" or "-" as in a format: whether a plus is shown.
    """
    return f">{sign.strip('-')}999%" if error >= 10 else f"{error:{sign}.1%}"
