"""Which earlier measurement may stand for a new one, and whether it may. numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np

from planner.conditions import UNCALIBRATED, beside_ours, is_told, summarise
from planner.estimate import of_a_run
from planner.hardware import DeviceFacts
from planner.history import History
from planner.keys import Keys
from planner.measurement import Busier, Measurement, Measurements, PlannedRow, RowVerdict, StepSignature
from planner.stored import CachedMeasurement, CachedRow, Sharpness, accumulates, layout_of, named
from planner.supervised import is_near
from planner.works import Extremes, Works
from presets import jsonio
from presets.errors import PlanError
from trainer.evaluate import answerable
from trainer.tokens import TokenizedDataset

LIKE = 2.0  # a class of micro-batches may lie on average this factor from those timed for it; the fit bridges that much
MOST_OF_DATA = 0.25  # of the peak: data that are larger or smaller by more are measured with anew
SMALL_SHARE = 0.02  # of the plan's padded tokens: a class below it moves the sum too little to ask for that
GONE = 0.5  # of what others took of a CPU while it was timed: below it they are as good as gone
FASTER = 1.5  # times as fast would a run be now, beside those that are left: that is other company
BUSIER = 1.4  # times as long would a run take now, beside those who have come: that is said
# Seconds of looking at others. The kernel counts in hundredths: a glance tells two cores to a tenth, and is what a
# table from the history can spare.
GLANCE, LOOK = 0.1, 0.7
FEW_MORE = 1.05  # times the tokens learnt from in one micro-batch: a shuffle brings others together
NEAR = 0.95  # of the micro-batch whose memory is shown: below it, a note says so


@dataclass(frozen=True, kw_only=True, slots=True)
class Reused:
    """Measurements for new rows, made from stored ones."""

    measurements: Measurements
    measured_at: datetime


class _Unfit(Exception):
    """Why the stored measurement cannot stand for these rows."""


def reuse(
    history: History,
    made: Keys,
    rows: Sequence[PlannedRow],
    data: TokenizedDataset,
    asked: Sharpness,
    disk: str,
    works: Works | None = None,
    look: Callable[[float], float | None] = lambda seconds: None,
) -> Reused | str | None:
    """Stored measurements for these rows, or why those that are stored do not do, or None where there are none.

    Those of this very data come first, then the latest of any: other data of the same model does not push out what was
    measured of this.

    They do where the rows' micro-batches lie within what was measured: the same micro-batch sizes, every class that has
    work was timed with micro-batches like the plan's, about as large a share of the tokens is learnt from, and each
    row's worst micro-batch is no larger than one that fitted (or no smaller than one that did not). All step signatures
    must come from one call, in which they were timed in turns: the speed factor compares them. What was timed beside
    others that are gone now says nothing of the device as it is.

    Args:
        look: what others want of the device just now, looked at for so many seconds at the least: threads per core of a
            CPU, the share of a GPU's time; None where it is not known.
    """
    wanted: dict[StepSignature, list[PlannedRow]] = {}
    for row in rows:
        wanted.setdefault(StepSignature.of(row.job), []).append(row)
    keyed: dict[StepSignature, str] = {}
    for signature, members in wanted.items():
        key = made.of_measurement(members[0].job, disk)
        if key is None:
            return None
        keyed[signature] = key
    of_data = made.of_data(data)
    works = works or Works(data)
    own = history.measurements(f"{key}.{of_data}" for key in keyed.values())
    why: str | None = None
    for stored in ({name.partition(".")[0]: content for name, content in own.items()}, None):
        contents = history.latest_measurements(keyed.values()) if stored is None else stored
        if len(contents) < len(set(keyed.values())):
            continue
        try:
            entries = {one: jsonio.from_json(CachedMeasurement, contents[key]) for one, key in keyed.items()}
            return _checked(entries, wanted, data, asked, made.facts, works, look)
        except PlanError:  # of another form than today's
            continue
        except _Unfit as reason:
            why = why or str(reason)
    return why


def _checked(
    entries: dict[StepSignature, CachedMeasurement],
    wanted: dict[StepSignature, list[PlannedRow]],
    data: TokenizedDataset,
    asked: Sharpness,
    facts: DeviceFacts,
    works: Works,
    look: Callable[[float], float | None],
) -> Reused:
    first = next(iter(entries.values()))
    if any(entry.call != first.call for entry in entries.values()):
        raise _Unfit("the configurations were not measured together")
    verdicts: list[RowVerdict] = []
    notes: list[str] = []
    warnings: list[str] = []
    for signature, rows in wanted.items():
        entry = entries[signature]
        notes += _renamed(entry.notes, entry, rows)
        warnings += _renamed(entry.warnings, entry, rows)
        _check_sharpness(entry, asked)
        for row in rows:
            extremes = works.extremes(row.plan)
            cached = _judged(entry, row, works, data, facts)
            if row.job.device == "cpu":
                cached = replace(cached, verdict=_with_data(cached.verdict, data.num_bytes - entry.data_bytes))
            verdicts.append(replace(cached.verdict, name=row.name, signature=signature))
            if cached.verdict.fits:
                _check_strata(entry, row, works)
                _check_supervised(entry, row, works)
                if not row.is_reference:
                    _check_fixed(entry.measurement, row, data)
                    notes += _memory_note(cached, extremes)
    # Last: it takes a tenth of a second.
    busier = _company(list(entries.values()), look, on_cpu=next(iter(wanted)).device == "cpu")
    return Reused(
        measurements=Measurements(
            strata=first.strata,
            measurements=tuple(replace(entry.measurement, signature=signature) for signature, entry in entries.items()),
            rows=tuple(verdicts),
            in_turns=first.in_turns,
            call=first.call,
            busier=busier,
            notes=tuple(dict.fromkeys(notes)),
            warnings=tuple(dict.fromkeys(warnings)),
        ),
        measured_at=datetime.fromisoformat(min(entry.measured_at for entry in entries.values())),
    )


def _company(
    entries: Sequence[CachedMeasurement], look: Callable[[float], float | None], *, on_cpu: bool
) -> Busier | None:
    """Whether others take plainly more of the CPU's time now than while it was timed.

    Less is another matter: what they took then made it longer, and a run without them will not be. A glance has to be
    borne out by a longer look: what is there for a tenth of a second is no company for a run.
    """
    readings = [one.conditions for entry in entries for one in entry.measurement.rounds if one.conditions is not None]
    summary = summarise(readings, on_cpu=on_cpu)
    then = summary.others if on_cpu else summary.gpu_others  # what the host takes shows only while somebody computes
    if (on_cpu and not is_told(readings)) or (not on_cpu and then <= UNCALIBRATED):
        return None
    found: Busier | None = None
    why = ""
    for seconds in (GLANCE, LOOK):
        now = look(seconds)
        if now is None:
            return None
        beside = beside_ours(now) if on_cpu else now
        slower = (1 - then) / (1 - beside)
        is_gone = then > UNCALIBRATED and (beside < GONE * then or slower < 1 / FASTER)
        if not (is_gone or (on_cpu and slower > BUSIER)):
            return None
        of = "CPU" if on_cpu else "GPU"
        why = f"other programs took {then:.0%} of the {of}'s time while it was timed, and would take {beside:.0%} now"
        found = None if is_gone else Busier(share=min(1.0, now), slower=slower)
    if found is None:
        raise _Unfit(why)
    return found


def _check_sharpness(entry: CachedMeasurement, asked: Sharpness) -> None:
    """A request for more time or a narrower range is not answered with what was there before it."""
    if not entry.measurement.rounds:
        return
    sharp = entry.measurement.ended_by == "precision"
    if entry.precision_target <= asked.precision_target if sharp else entry.budget_seconds >= asked.budget_seconds:
        return
    then = f"±{entry.precision_target:.1%}" if sharp else f"{entry.budget_seconds:g} s"
    now = f"±{asked.precision_target:.1%}" if sharp else f"{asked.budget_seconds:g} s"
    raise _Unfit(f"the one that is stored was timed for {then}, and {now} are asked for")


def _judged(
    entry: CachedMeasurement, row: PlannedRow, works: Works, data: TokenizedDataset, facts: DeviceFacts
) -> CachedRow:
    """The stored verdict that covers a row: of those that fitted the smallest, so that its memory is the nearest."""
    extremes, layout = works.extremes(row.plan), layout_of(row, data)
    padded, width = extremes.worst_padded, extremes.worst_width
    holds_gradients = accumulates(row.plan)
    load = entry.measurement.load
    is_lean = row.job.loss == "lean" and (load is None or load.lean_refused is None)
    alike = [one for one in entry.rows if one.layout == layout]
    wide = [
        one
        for one in alike
        if one.verdict.fits and _padded(one) >= padded and one.verdict.worst_width >= width
        if one.accumulates or not holds_gradients
    ]
    covering = [
        one
        for one in wide
        if is_lean or FEW_MORE * one.most_learnt >= works.most_learnt(row.plan)
        if FEW_MORE * one.most_spread >= works.most_spread(row.plan)
    ]
    if covering:
        return _with_what_is_free(min(covering, key=_padded), entry, row, facts)
    if wide:
        raise _Unfit("one of the micro-batches holds more logits, or more of what rows share, than those measured")
    beyond = [
        one
        for one in alike
        if one.verdict.fits is False and _padded(one) <= padded and one.verdict.worst_width <= width
        if holds_gradients or not one.accumulates
    ]
    if not beyond:
        raise _Unfit(f"the longest micro-batch ({padded:,} tokens) lies outside what was measured")
    if entry.free_bytes is not None and facts.free_bytes is not None and facts.free_bytes > 1.02 * entry.free_bytes:
        raise _Unfit("more memory is free than when it did not fit")
    return beyond[0]


def _with_what_is_free(found: CachedRow, entry: CachedMeasurement, row: PlannedRow, facts: DeviceFacts) -> CachedRow:
    """The verdict with what stays free at the peak now; what no allocator counts (a CUDA context) is needed as then."""
    verdict = found.verdict
    if facts.free_bytes is None:
        return found
    if verdict.headroom_bytes is not None and entry.free_bytes is not None:
        left = verdict.headroom_bytes + facts.free_bytes - entry.free_bytes
        verdict = replace(verdict, headroom_bytes=max(0, left))
        fits = left >= 0 and of_a_run(verdict, row.job).fits
    else:
        needed = of_a_run(verdict, row.job).peak_reserved_bytes
        fits = needed is None or needed <= facts.free_bytes
    if not fits:
        raise _Unfit("less memory is free than was needed then")
    return replace(found, verdict=verdict)


def _with_data(verdict: RowVerdict, more: int) -> RowVerdict:
    """The verdict on a CPU with so many more bytes of data in memory.

    The 63,000 messages of the published example hold 33 MB more than the 3,000 bundled ones, beside a model of 530 MB.
    """
    reserved, allocated, left = verdict.peak_reserved_bytes, verdict.peak_allocated_bytes, verdict.headroom_bytes
    if not verdict.fits or reserved is None or allocated is None:
        return verdict
    if abs(more) > MOST_OF_DATA * reserved or (left is not None and left < more):
        raise _Unfit("the data are of another size, which matters to the memory")
    return replace(
        verdict,
        peak_reserved_bytes=reserved + more,
        peak_allocated_bytes=allocated + more,
        headroom_bytes=None if left is None else left - more,
    )


def _padded(row: CachedRow) -> int:
    return row.verdict.worst_rows * row.verdict.worst_width


def _check_strata(entry: CachedMeasurement, row: PlannedRow, works: Works) -> None:
    if not entry.strata.numbers(row.kind):
        raise _Unfit(f"micro-batches of {row.job.micro_batch_size} were not measured")
    work = works.of(row, entry.strata)
    timed: dict[int, list[int]] = {}
    for one in entry.measurement.rounds:
        for sample in one.samples:
            if sample.seconds is not None:
                timed.setdefault(sample.stratum, []).append(sample.rows * sample.width)
    total = float(work.padded.sum())
    for stratum in np.flatnonzero(work.count).tolist():
        if stratum not in timed:
            raise _Unfit("there are micro-batches of a size that was not timed")
        mean = float(work.padded[stratum] / work.count[stratum])
        mean_timed = sum(timed[stratum]) / len(timed[stratum])
        unlike = mean > LIKE * mean_timed or mean < mean_timed / LIKE
        if unlike and work.padded[stratum] > SMALL_SHARE * total:
            raise _Unfit("the lengths lie too far from those that were timed")


def _check_supervised(entry: CachedMeasurement, row: PlannedRow, works: Works) -> None:
    share, least, most = works.supervised_share(row.plan), entry.least_supervised, entry.most_supervised
    if not is_near(least, most, share, entry.measurement):
        timed = f"{least:.0%}" if f"{least:.0%}" == f"{most:.0%}" else f"{least:.0%} to {most:.0%}"
        raise _Unfit(
            f"{share:.0%} of the tokens are learnt from, and of those that were timed {timed}; the loss's time depends "
            "on it"
        )


def _check_fixed(measurement: Measurement, row: PlannedRow, data: TokenizedDataset) -> None:
    """What the run does beside its steps must have been timed, where this row does it."""
    held_out, spec, fixed = row.plan.evaluation, row.job.evaluation, measurement.fixed
    if len(held_out) == 0:
        return
    if not fixed.evaluation:
        raise _Unfit("evaluation was not timed")
    answers = spec.num_samples and spec.max_new_tokens and measurement.load and measurement.load.has_tokenizer
    if answers and not fixed.answer_tokens and len(answerable(data, held_out, 1)):
        raise _Unfit("sample answers were not timed")


def _memory_note(cached: CachedRow, extremes: Extremes) -> list[str]:
    largest = extremes.largest_padded
    if largest >= NEAR * _padded(cached):
        return []
    return [
        f"memory is that of a longer micro-batch ({_padded(cached):,} tokens) than this data's longest ({largest:,}); "
        "--fresh measures this one"
    ]


def _renamed(texts: tuple[str, ...], entry: CachedMeasurement, rows: list[PlannedRow]) -> list[str]:
    """What was said of an entry's rows, now of these: another table may name them otherwise, or not at all."""
    then = {one.verdict.name for one in entry.rows}
    now = [row.name for row in rows if not row.is_reference] or [rows[0].name]
    found = []
    for text in texts:
        about = named(then, text)
        if about is None or set(about[0]) <= set(now):
            found.append(text)
        else:
            found.append(f"{', '.join(now if len(about[0]) > 1 else now[:1])}: {about[1]}")
    return found
