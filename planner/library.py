"""The planner from Python: the same measuring and the same rows as the command line, without its printing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.report import PlanReport


def plan(
    dataset: str | int | Path | None = None,
    model: str | Path | None = None,
    *,
    presets: str | Sequence[str] = (),
    budget_seconds: float | None = None,
    precision_target: float = 0.02,
    fresh: bool = False,
    tuned: bool = False,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> PlanReport:
    """Measure how long each configuration takes on this machine, whether it fits and what it risks.

    As `plan --dataset ... --model ...` does: it starts worker processes, keeps measurements for the next time, reads
    `.env` in the working folder, and trains nothing.

    Args:
        dataset: a file, a saved folder, a hub name, or a count of examples. None: `.env`'s, else the bundled messages.
        model: a folder or a hub name. None: `.env`'s, else the bundled model.
        presets: names, or paths of TOML files; all where none is named.
        budget_seconds: spent timing; process starts come on top. None: `PLAN_BUDGET`'s, else 60.
        precision_target: stop timing when the 90 % range is this narrow (half of it, relative).
        fresh: measure again, though an earlier measurement would do.
        tuned: also search for each preset's tuned twin, which takes about three times the budget.
        progress: told what is being done, one line each; None: nobody is.
        options: fields of `planner.resolve.Options` by name, such as `max_length=512`, `device="cpu"`, `limit=1000`.

    Returns:
        `planner.report.PlanReport`: `rows` in seconds and bytes, None where unknown; `to_json()` as with `--json`.

    Raises:
        presets.errors.PlanError: what a user can mend; the message says how.
        TypeError: an option that does not exist.

    Example:
        >>> import planner
        >>> report = planner.plan(dataset=63000)  # doctest: +SKIP
        >>> min(report.rows, key=lambda row: row.seconds or float("inf")).name  # doctest: +SKIP
    """
    from planner.candidates import MeasureSettings
    from planner.compare import compare
    from planner.history import History
    from planner.resolve import Options, option_fields
    from presets.env import read_settings
    from presets.errors import did_you_mean

    known = option_fields()
    for name in options:
        if name not in known:
            said = did_you_mean(name, (*known, "budget_seconds", "presets", "precision_target"))
            raise TypeError(f"planner.plan() has no option '{name}'.{said}")
    say = progress or (lambda text: None)
    budget = budget_seconds if budget_seconds is not None else _usual_budget()
    settings = read_settings(Path.cwd(), os.environ)
    for warning in settings.warnings:
        say(warning)
    comparison = compare(
        Options(
            dataset=None if dataset is None else str(dataset), model=None if model is None else str(model), **options
        ),
        settings,
        MeasureSettings(budget_seconds=budget, precision_target=precision_target, fresh=fresh),
        names=(presets,) if isinstance(presets, str) else tuple(presets),
        say=say,
        history=History(say=say),
        tuned=tuned,
    )
    return comparison.report


def _usual_budget() -> float:
    """Seconds, as the command line takes them: from the environment, else its default."""
    from planner.candidates import MeasureSettings
    from presets.errors import SettingsError

    given = os.environ.get("PLAN_BUDGET", "").strip()
    try:
        seconds = float(given) if given else MeasureSettings().budget_seconds
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 86_400:
        raise SettingsError(f"PLAN_BUDGET is {given!r}; it must be a number of seconds above 0 and at most 86,400.")
    return seconds
