"""How many times faster one run is than another: whole runs, predicted over predicted, the same parts of both."""

from __future__ import annotations

from dataclasses import fields

from planner.estimate import Estimate, FixedSeconds


def speedup(before: Estimate | None, after: Estimate) -> float | None:
    """Predicted seconds of one whole run / those of another; None where one of them is not known.

    A part that is not known of one of the two (its evaluation, its checkpoints) is counted of neither.
    """
    if before is None or not before.train_seconds or not after.train_seconds:
        return None
    known = [
        one.name
        for one in fields(FixedSeconds)
        if getattr(before.fixed, one.name) is not None and getattr(after.fixed, one.name) is not None
    ]
    seconds = (one.train_seconds + sum(getattr(one.fixed, name) for name in known) for one in (before, after))
    return next(seconds) / next(seconds)


def speedup_by_loops(ratio: float | None, after: Estimate) -> float | None:
    """The same over a run that has no estimate, from the ratio of both training loops as a search timed them in turns.

    Compiling is a part of a loop there. All else takes that run what it takes this one.
    """
    if ratio is None or not after.train_seconds:
        return None
    loop = after.train_seconds + (after.fixed.compile or 0.0)
    rest = after.fixed.total - (after.fixed.compile or 0.0)
    return (ratio * loop + rest) / (loop + rest)
