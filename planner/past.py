"""Past runs as text and JSON: a list, and how good the predictions were. Standard library and tabulate only."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from planner.figures import DOUBT, NOT_APPLICABLE, UNKNOWN, clock, duration, off_by, promised_range
from planner.history import RUNNING, PastRun
from presets import jsonio
from presets.text import printable

SCHEMA = 1
NO_RUNS = "no finished runs yet"
_LONGEST_NAME = 28  # characters of a model in the table


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """How far predictions of whole runs were off (actual / predicted - 1), and how often their range held."""

    num_runs: int
    median_absolute: float
    percentile_90_absolute: float
    worst: float  # signed
    median: float  # signed
    num_inside: int  # of those with a 90 % range; earlier versions did not keep whether it was one, and count here
    num_with_range: int
    inside_low: float | None  # Wilson's 95 % interval for the share inside
    inside_high: float | None
    num_inside_uncalibrated: int  # of those whose range was what was seen or feared, not a 90 % one
    num_with_range_uncalibrated: int
    num_other_company: int  # of all: beside which others took plainly more, or less, than while it was timed
    worst_else: float | None  # signed, of those that are not among them


def accuracy(runs: Sequence[PastRun]) -> Accuracy | None:
    """The accuracy over all runs that finished without interruption; None where there are none."""
    errors = [run.error for run in runs if run.error is not None]
    if not errors:
        return None
    absolute = sorted(abs(error) for error in errors)
    held = [run.is_inside for run in runs if run.is_inside is not None and run.calibrated is not False]
    others = [run.is_inside for run in runs if run.is_inside is not None and run.calibrated is False]
    low, high = wilson(sum(held), len(held)) if held else (None, None)
    alike = [run.error for run in runs if run.error is not None and not run.has_other_company]
    return Accuracy(
        num_runs=len(errors),
        median_absolute=statistics.median(absolute),
        percentile_90_absolute=_quantile(absolute, 0.9),
        worst=max(errors, key=abs),
        median=statistics.median(errors),
        num_inside=sum(held),
        num_with_range=len(held),
        inside_low=low,
        inside_high=high,
        num_inside_uncalibrated=sum(others),
        num_with_range_uncalibrated=len(others),
        num_other_company=len(errors) - len(alike),
        worst_else=max(alike, key=abs, default=None),
    )


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval for a share (95 % by default); unlike the plain one it stays sensible at 0 of n and n of n."""
    share = successes / trials
    middle = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two nearest."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def accuracy_text(found: Accuracy | None) -> str:
    if found is None:
        return NO_RUNS
    lines = [
        f"Predicted against actual wall-clock of {found.num_runs:,} run(s) that finished without interruption:",
        f"  median error (absolute)   {off_by(found.median_absolute, sign='-')}",
        f"  90th percentile           {off_by(found.percentile_90_absolute, sign='-')}",
        f"  worst                     {off_by(found.worst)}",
        f"  median error (signed)     {off_by(found.median)}   above 0: runs took longer than predicted",
    ]
    if found.num_with_range and found.inside_low is not None and found.inside_high is not None:
        lines.append(
            f"The 90 % range held the actual time in {found.num_inside:,} of {found.num_with_range:,} "
            f"({found.num_inside / found.num_with_range:.0%}; 95 % interval {found.inside_low:.0%} – "
            f"{found.inside_high:.0%})."
        )
    if found.num_with_range_uncalibrated:
        lines.append(
            "A range that was not a 90 % range (the machine was not steady, or too little was timed to tell) held "
            f"it in {found.num_inside_uncalibrated:,} of {found.num_with_range_uncalibrated:,}."
        )
    if found.num_other_company:
        best = "" if found.worst_else is None else f"; without them the worst is {off_by(found.worst_else)}"
        lines.append(
            f"Beside {found.num_other_company:,} of them others took plainly more of the CPU, or less, than while it "
            f"was timed{best}."
        )
    return "\n".join(lines)


def accuracy_json(found: Accuracy | None) -> str:
    plain = {"schema": SCHEMA, "accuracy": None if found is None else jsonio.to_plain(found)}
    return json.dumps(plain, indent=2, allow_nan=False)


COLUMNS = ("ended", "preset", "model", "examples seen", "predicted", "actual", "error", "in range", "status")
_RIGHT = ("examples seen", "actual", "error")
_LEFT_OUT = ("examples seen", "model", "in range")  # one after the other, where the table is too wide


def runs_text(runs: Sequence[PastRun], now: datetime, *, width: int | None = None) -> str:
    """A table of runs, in the order given, if it can be at most `width` characters wide (None: as wide as it gets).

    A narrow one has fewer columns, at last no range, each run still on one line.
    """
    if not runs:
        return NO_RUNS
    from tabulate import tabulate

    cells = [dict(zip(COLUMNS, _cells(run, now), strict=True)) for run in runs]
    points = [one | {"predicted": duration(run.seconds)} for one, run in zip(cells, runs, strict=True)]
    forms = [(_LEFT_OUT[:count], cells) for count in range(len(_LEFT_OUT) + 1)]
    table, has_ranges = "", True
    for dropped, rows in (*forms, (_LEFT_OUT, points)):
        shown = [column for column in COLUMNS if column not in dropped]
        has_ranges = rows is cells
        table = tabulate(
            [[one[column] for column in shown] for one in rows],
            headers=shown,
            tablefmt="simple",
            disable_numparse=True,
            colalign=["right" if column in _RIGHT else "left" for column in shown],
        )
        if width is None or max(map(len, table.splitlines())) <= width:
            break
    doubted = has_ranges and any(run.calibrated is False and run.seconds_high is not None for run in runs)
    return f"{table}\n{DOUBT}." if doubted else table


def _cells(run: PastRun, now: datetime) -> tuple[str, ...]:
    predicted = duration(run.seconds)
    if run.seconds_low is not None and run.seconds_high is not None:
        predicted += f" ({promised_range(run.seconds_low, run.seconds_high, run.calibrated)})"
    if run.correction_factor is not None:
        predicted += f", x{run.correction_factor:.2f}"
    resumed = ", resumed" if run.num_resumes and run.status == "finished" else ""
    company = ", other load" if run.has_other_company else ""
    inside = run.is_inside
    return (
        NOT_APPLICABLE if run.status == RUNNING else _when(run.ended_at, now),
        printable(run.name),
        _model(run.model),
        UNKNOWN if run.num_examples is None else f"{run.num_examples:,}",
        predicted,
        duration(run.actual_seconds),
        NOT_APPLICABLE if run.error is None else off_by(run.error),
        NOT_APPLICABLE if inside is None else "yes" if inside else "NO",
        printable(run.status) + resumed + company,
    )


def _when(text: str, now: datetime) -> str:
    try:
        moment = datetime.fromisoformat(text)
        return clock(moment if moment.tzinfo else moment.astimezone(), now)
    except (ValueError, OverflowError):  # no moment, or one that no calendar has in this zone
        return printable(text)


def _model(name: str) -> str:
    """The last part of a folder, a hub name whole; the end of a long one, since that is where names differ."""
    absolute = name.startswith(("/", "\\")) or name[1:3] in (":\\", ":/")
    shown = printable(name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] if absolute else name)
    return shown if len(shown) <= _LONGEST_NAME else "…" + shown[-_LONGEST_NAME + 1 :]


def runs_json(runs: Sequence[PastRun]) -> str:
    """The runs as one JSON object; `error` and `inside` are null where a run cannot be compared, `tuned_from` where it
    is not of a tuned twin."""
    plain: list[dict[str, Any]] = [
        {**jsonio.to_plain(run), "tuned_from": run.tuned_from, "error": run.error, "inside": run.is_inside}
        for run in runs
    ]
    return json.dumps({"schema": SCHEMA, "runs": plain}, indent=2, ensure_ascii=False, allow_nan=False)
