"""The chain of a search: the baseline as published, then one change after the other. Its fastest link is the twin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from planner.student import t_quantile
from planner.twin import TOO_SHORT, Change, Link, Twin, Wanted, changed, split_text
from presets.errors import MeasurementError
from trainer.job import Job
from trainer.tokens import FloatArray

WORTH = 0.02  # a change that saves less than this of the time is not kept: it would not be seen in a run
LEAST_ROUNDS = 3  # from fewer, no gain can be told from chance


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """A job with some changes, and its loop's seconds; compiling, where it is compiled, counts as a part of them."""

    job: Job
    changes: tuple[Change, ...]
    seconds: float
    # (rounds,) the loop's seconds as each round alone would have it, the last round last; none of an earlier search
    replicates: FloatArray = field(default_factory=lambda: np.zeros(0))

    @property
    def layout(self) -> Change | None:
        """Its split or packing, where that is not as written. Before it may stand what makes it fit."""
        return next((one for one in self.changes if one.is_layout), None)

    @property
    def relief(self) -> tuple[Change, ...]:
        """What makes it fit, where it does not without."""
        return tuple(one for one in self.changes if not one.is_layout)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One link before it is timed."""

    name: str
    job: Job
    changes: tuple[Change, ...] = ()  # of the preset as written, up to here


def is_faster(new: FloatArray, old: FloatArray) -> bool:
    """Whether what was timed in turns with something else takes less of the time, by `WORTH` and beyond chance.

    Round by round, so that what slows a whole round slows both: the mean log-ratio must lie under -`WORTH`, and its
    95 % upper bound (Student's t, one-sided) under 0. Warm-up dropped from one of them is dropped from both: rounds are
    matched from the last one back.
    """
    found = _log_ratio(new, old)
    return found is not None and found[0] < -WORTH and sum(found) < 0


def _log_ratio(new: FloatArray, old: FloatArray) -> tuple[float, float] | None:
    """Mean of log(new / old) over the rounds of both, and half of its 90 % interval; None from too few rounds."""
    count = min(len(new), len(old))
    if count < LEAST_ROUNDS:
        return None
    ratio = np.log(new[-count:] / old[-count:])
    error = float(ratio.std(ddof=1)) / math.sqrt(count)
    return float(ratio.mean()), t_quantile(count - 1) * error


def _range(before: FloatArray, now: FloatArray) -> tuple[float | None, float | None]:
    """The 90 % range of seconds before / seconds now, as `is_faster` judges it."""
    found = _log_ratio(now, before)
    if found is None:
        return None, None
    mean, half = found
    return math.exp(-mean - half), math.exp(-mean + half)


def make_chain(
    wanted: Wanted, timed: Sequence[Timed], steps: Sequence[Change], *, is_direct: bool = False
) -> list[Step]:
    """From the baseline as written over the preset as written to its fastest layout and the changes of the step.

    Args:
        timed: the preset's layouts, the fastest first; as written is among them where it fits.
        is_direct: packed rows are reached in one link, for want of time.
    """
    written = wanted.job
    chain = [Step(name="baseline", job=wanted.baseline)]
    plain = replace(written, compile=wanted.baseline.compile)
    half = replace(plain, precision=wanted.baseline.precision, base_precision=wanted.baseline.base_precision)
    if wanted.name != wanted.baseline.name:
        is_whole = written.preset.sampling.takes_all and not written.preset.phases and written.preset.num_epochs == 1
        chain.append(Step(name="accumulation" if is_whole else "schedule and sampling", job=half))
        asked = written.preset.precision
        if asked != wanted.baseline.preset.precision or half != plain:
            if half.precision != plain.precision:
                chain.append(Step(name=asked, job=plain))
            elif half != plain:
                chain.append(Step(name=f"base in {plain.base_precision}", job=plain))
            else:
                chain.append(Step(name=f"{asked} (not on this device)", job=plain))
    if written.compile != wanted.baseline.compile:
        chain.append(Step(name="compiled", job=written))
    best = timed[0]
    fits = next((one for one in timed if not one.relief), None)
    changes: tuple[Change, ...] = ()
    if best.relief and fits is not None:
        # Larger than what fits without: that one first, so that it is kept where the larger one does not hold.
        chain += _reach(written, (), fits.changes, () if is_direct else timed)
        changes = fits.changes
    chain += _reach(written, changes, best.changes, () if is_direct else timed)
    changes, job = best.changes, best.job
    for step in steps:
        if all(step.name != one.name for one in changes):
            changes, job = (*changes, step), step.applied(job)
            chain.append(Step(name=step.text, job=job, changes=changes))
    return chain


def _reach(written: Job, before: tuple[Change, ...], changes: tuple[Change, ...], timed: Sequence[Timed]) -> list[Step]:
    """From a layout to another one with less memory, or from the preset as written to a layout, change by change.

    Args:
        before: changes of the layout that is come from: its split is left at the end, for the new one.
    """
    found: list[Step] = []
    job, done = changed(written, before), before
    for change in changes:
        if change.is_layout:
            done = tuple(one for one in done if not one.is_layout)
            job = changed(written, done)
            if change.packed_length is not None and not before:
                found += _rows_together([one for one in timed if one.relief == done])
        done, job = (*done, change), change.applied(job)
        found.append(Step(name=change.text, job=job, changes=done))
    if done != changes:  # back to the split as written
        found.append(Step(name=split_text(written), job=changed(written, changes), changes=changes))
    return found


def _rows_together(timed: Sequence[Timed]) -> list[Step]:
    """A packed layout is reached in two links where rows together already help: what each gives is seen."""
    split = next((one for one in timed if one.layout is not None and one.layout.packed_length is None), None)
    written = next((one for one in timed if one.layout is None), None)
    if split is None or split.layout is None or written is None or split.seconds >= (1 - WORTH) * written.seconds:
        return []
    return [Step(name=split.layout.text, job=split.job, changes=split.changes)]


def twin_of(
    wanted: Wanted, chain: Sequence[Step], replicates: Sequence[FloatArray], refused: Sequence[str] = ()
) -> Twin:
    """The fastest link from the preset as written on; what came after it was tried and left out.

    Args:
        replicates: of each link the loop's seconds by round; none of a link that does not fit.

    Raises:
        MeasurementError: neither the preset as written nor any change of it could be timed.
    """
    seconds = [float(one.mean()) if len(one) else None for one in replicates]
    written = max(number for number, step in enumerate(chain) if not step.changes)
    timed = [number for number in range(written, len(chain)) if seconds[number] is not None]
    if not timed:
        raise MeasurementError(f"'{wanted.name}' could not be timed, as written or with any change.")
    best = timed[0]
    said = list(refused)
    if len(timed) > 1 and len(replicates[best]) < LEAST_ROUNDS:
        said.append(TOO_SHORT)
    for number in timed[1:]:
        if is_faster(replicates[number], replicates[best]):
            best = number
    links: list[Link] = []
    before: int | None = None  # the last link that is kept and was timed
    for number, now in enumerate(seconds):
        if now is None:
            continue
        is_kept = number <= best
        if before is not None:
            factor = (seconds[before] or 0.0) / now
            low, high = _range(replicates[before], replicates[number])
            links.append(Link(name=chain[number].name, seconds=now, factor=factor, is_kept=is_kept, low=low, high=high))
        if is_kept:
            before = number
    fastest = seconds[best]
    assert fastest is not None
    return Twin(
        preset=wanted.name,
        changes=chain[best].changes,
        links=tuple(links),
        written_seconds=seconds[written],
        seconds=fastest,
        baseline_seconds=seconds[0],
        refused=tuple(dict.fromkeys(said)),
    )
