"""The decision guide: which row to take for a purpose or until a deadline, from rows that were measured. No I/O.

A row is said to be done "surely" by the upper end of its range, and "probably" where that is not a 90 % range. Of two
rows the one with the better published quality comes first; a preset's tuned twin comes right after it, since it trains
the same batches; samples come last.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from datetime import datetime, timedelta

from planner.figures import clock, duration
from planner.report import Row

GOALS = {
    "first": ("recommended", "a first training"),
    "again": ("aggressive", "a further training, after one was tested"),
    "best": ("baseline", "the best quality there is"),
    "today": ("today", "results today"),
    "prompts": ("iterate", "trying out prompts"),
}
QUESTIONS = {
    "first": "train for the first time",
    "again": "train again, after testing",
    "best": "reach the best quality",
    "today": "have results today",
    "prompts": "iterate on prompts",
}
# By the guide's quality figures; of two that say the same the smaller global batch first, those without a figure after
# those with one. The sampled ones come last.
BY_QUALITY = ("baseline", "recommended", "aggressive", "progressive", "two-stage", "prioritized", "today", "iterate")
LEAST_SHARE = 0.05  # of the examples: a smaller sample is no training of this data
MEASURING_SECONDS = 120.0  # that a run takes before it starts, where its sample was not measured yet
HEADROOM = 0.95  # of the time, for a sample whose own range is not measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """What to run. `row` is None where nothing can be run in the time."""

    row: Row | None
    why: tuple[str, ...]
    given_up: tuple[str, ...] = ()  # what was passed over, and what that costs
    extra: str = ""  # options beside `--run PRESET`

    def command(self, tail: str) -> str | None:
        """The command that runs it; `tail`: the options of data and model."""
        if self.row is None:
            return None
        twin = " --tuned" if self.row.tuned_from else ""
        return f"plan --run {shlex.quote(self.row.run_name)}{twin}{self.extra}{tail}"


def for_goal(rows: tuple[Row, ...], goal: str) -> Advice:
    """The guide's answer for a purpose, as its tuned twin where that is known; the next best where it cannot run."""
    wanted, purpose = GOALS[goal]
    others = [row.tuned_from or row.name for row in rows if (row.tuned_from or row.name) not in BY_QUALITY]
    order = [wanted, *(name for name in BY_QUALITY[_place(wanted) + 1 :]), *dict.fromkeys(others)]
    compared = bool(_of(rows, wanted))
    given_up: list[str] = []
    for name in order:
        usable = [row for row in _of(rows, name) if _can_run(row)]
        if usable:
            row = min(usable, key=lambda one: one.seconds or float("inf"))
            why = [f"for {purpose} the guide takes '{wanted}'" + ("" if compared else ", which was not compared")]
            why += [] if name == wanted else [f"the next that can run is '{name}'"]
            if row.tuned_from:
                why.append("tuned: the same batches in less time")
            return Advice(row=row, why=(*why, *_quality(row)), given_up=tuple(given_up))
        given_up += [f"{row.name}: {_why_not(row)}" for row in _of(rows, name)]
    return Advice(row=None, why=("no configuration can run here",), given_up=tuple(given_up))


def for_deadline(rows: tuple[Row, ...], start: datetime, deadline: datetime, num_examples: int | None) -> Advice:
    """The best quality that is surely done in time; where none is, a sample that is; else the nearest.

    Args:
        num_examples: training examples, for the size of a sample; None where the rows do not share one.
    """
    available = (deadline - start).total_seconds()
    given_up: list[str] = []
    for row in _ordered(rows):
        if not _can_run(row):
            given_up.append(f"{row.name}: {_why_not(row)}")
            continue
        latest = row.seconds_high or row.seconds or 0.0
        if latest <= available:
            spare = duration(available - latest)
            surely = (
                "surely done by then" if row.calibrated else "probably done by then (its range is not a 90 % range)"
            )
            why = (f"{surely}, with {spare} to spare", *_quality(row))
            return Advice(row=row, why=why, given_up=tuple(given_up))
        given_up.append(f"{row.name}: up to {duration(latest)}, {duration(latest - available)} too long")
    timed = [row for row in rows if _can_run(row)]
    if not timed:
        return Advice(row=None, why=("no configuration can run here",), given_up=tuple(given_up))
    sample = _sample(timed, available, num_examples)
    if sample is not None:
        return Advice(row=sample[0], why=sample[1], given_up=tuple(given_up), extra=sample[2])
    nearest = min(timed, key=lambda row: row.seconds_high or row.seconds or 0.0)
    latest = nearest.seconds_high or nearest.seconds or 0.0
    done = clock(latest_minute(start, latest), start)
    told = f"done by {done} at the latest" if nearest.calibrated else f"probably done by {done} (not a 90 % range)"
    return Advice(
        row=None,
        why=(f"nothing is surely done by then; the nearest is '{nearest.name}', {told}",),
        given_up=tuple(given_up),
    )


def at_the_latest(row: Row, moment: str) -> str:
    """What the upper end of a row's range says: only that of a 90 % range is a latest."""
    return f"at the latest {moment}" if row.calibrated else f"probably by {moment} (not a 90 % range)"


def latest_minute(start: datetime, seconds: float) -> datetime:
    """The first whole minute at which something is over: a clock without seconds must not promise too much."""
    done = start + timedelta(seconds=seconds)
    whole = done.replace(second=0, microsecond=0)
    return whole if whole == done else whole + timedelta(minutes=1)


def _sample(rows: list[Row], available: float, num_examples: int | None) -> tuple[Row, tuple[str, ...], str] | None:
    """(row, why, options) of a random sample that fits into the time, of the fastest row over all the data.

    As written: a twin would be searched for anew, since it belongs to its data. The run measures before it starts.
    """
    whole = [row for row in rows if row.tuned_from is None and not row.is_sampled and not row.phases and row.breakdown]
    available -= MEASURING_SECONDS
    if num_examples is None or not whole:
        return None
    row = min(whole, key=lambda one: one.seconds_high or float("inf"))
    assert row.breakdown is not None
    loop = row.breakdown.forward_backward + row.breakdown.optimizer
    fixed = (row.seconds or 0.0) - loop
    slower = (row.seconds_high or row.seconds or 0.0) / max(row.seconds or 0.0, 1e-9)
    share = (HEADROOM * available / slower - fixed) / max(loop, 1e-9)
    size = int(share * num_examples)
    if share < LEAST_SHARE or share >= 1:
        return None
    options = f" --sample-size {size} --sampling-strategy random"
    return (
        row,
        (
            f"no configuration is surely done by then; '{row.name}' on {size:,} of {num_examples:,} examples, drawn at "
            f"random, is{'' if row.calibrated else ' probably (its range is not a 90 % range)'}",
            "its time is scaled from the whole; the run itself measures it again before it starts",
        ),
        options,
    )


def _ordered(rows: tuple[Row, ...]) -> list[Row]:
    """By published quality, a preset's twin after it, samples last; a user's own presets before the samples."""

    def key(row: Row) -> tuple[bool, int, bool]:
        name = row.tuned_from or row.name
        return row.is_sampled, _place(name), row.tuned_from is not None

    return sorted(rows, key=key)


def _place(name: str) -> int:
    return BY_QUALITY.index(name) if name in BY_QUALITY else BY_QUALITY.index("aggressive")


def _of(rows: tuple[Row, ...], preset: str) -> list[Row]:
    return [row for row in rows if (row.tuned_from or row.name) == preset]


def _can_run(row: Row) -> bool:
    return row.error is None and row.fits is not False and row.seconds is not None and not row.blocked_by


def _why_not(row: Row) -> str:
    return row.error or (row.blocked_by[0] if row.blocked_by else "does not fit")


def _quality(row: Row) -> tuple[str, ...]:
    if row.quality.text is None:
        return ("its quality is unknown: the guide gives no figure",)
    return (f"quality {row.quality.text} ({row.quality.source})",)
