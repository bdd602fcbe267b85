"""Tuned twins of presets: found in the history, or searched for and kept there."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from planner.halfway import Halfway
from planner.history import History
from planner.keys import Keys
from planner.measurement import StepSignature
from planner.prober import ProberFactory
from planner.twin import Twin, Untimed, Wanted
from presets import jsonio
from presets.errors import MeasurementError, PlanError
from trainer.job import Job
from trainer.tokens import TokenizedDataset

if TYPE_CHECKING:
    from planner.measure import Progress

FORM = 3  # of what is stored: another one is searched again
HALFWAY_FOR = timedelta(days=1)  # what an interrupted search found is gone on with for so long


def twin_key(
    keys: Keys, job: Job, data: TokenizedDataset, *, quantized: bool = False, what: str = "twin"
) -> str | None:
    """Under which a job's twin is kept: machine, versions, model shape, step, preset, and what each example holds.

    A search that may quantize keeps its twins apart: nobody gets another training who did not ask for it.

    None where the model's shape is not known. The fastest split depends on the lengths, and what the output layer takes
    on the tokens that are learnt from, so other data is tuned anew.
    """
    key = keys.of_measurement(job)
    if key is None:
        return None
    parts = [
        FORM,
        key,
        keys.of_data(data),
        jsonio.to_plain(job.preset),
        job.micro_batch_size,
        job.num_devices,
        quantized,
    ]
    if job.group_by_length:  # other batches, and so another fastest split
        parts.append("grouped by length")
    sha = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    return f"{what} {sha.hexdigest()[:32]}"


def known_twin(
    history: History, keys: Keys, job: Job, data: TokenizedDataset, *, quantized: bool = False
) -> Twin | None:
    """The twin that an earlier search found for this job; None where there was none."""
    key = twin_key(keys, job, data, quantized=quantized)
    stored = None if key is None else history.measurements([key]).get(key)
    if stored is None:
        return None
    try:
        twin = jsonio.from_json(Twin, stored)
        twin.job(job)
    except PlanError:  # of another form than today's, or a split that this job cannot have
        return None
    timed = (twin.seconds, twin.written_seconds, twin.baseline_seconds)
    return twin if all(one > 0 for one in timed if one is not None) else None


class _Kept:
    """What a search finds before its end, in the history."""

    def __init__(
        self,
        history: History | None,
        keys: Keys,
        wanted: Sequence[Wanted],
        data: TokenizedDataset,
        quantized: bool,
        budget_seconds: float,
        now: datetime,
    ) -> None:
        self._history = history
        self._budget = budget_seconds
        self._now = now
        self._keys = {
            one.name: key
            for one in wanted
            if (key := twin_key(keys, one.job, data, quantized=quantized, what="halfway")) is not None
        }

    def found(self) -> list[Halfway]:
        """Of an earlier search that was interrupted, and not long ago: the machine may be another one by now."""
        if self._history is None:
            return []
        read = []
        for stored in self._history.measurements(self._keys.values()).values():
            try:
                one = jsonio.from_json(Halfway, stored)
                age = self._now - datetime.fromisoformat(one.found_at).astimezone(UTC)
            except (PlanError, ValueError):  # of another form than today's: searched again
                continue
            if timedelta(0) <= age <= HALFWAY_FOR and one.budget_seconds >= self._budget:
                read.append(one)
        return read

    def keep(self, found: list[Halfway]) -> None:
        at = self._now.isoformat(timespec="seconds")
        dated = (replace(one, budget_seconds=self._budget, found_at=at) for one in found)
        contents = {self._keys[one.preset]: jsonio.to_json(one) for one in dated if one.preset in self._keys}
        if self._history is not None and contents:
            self._history.keep_measurements(contents)


def find_twins(
    wanted: Sequence[Wanted],
    data: TokenizedDataset,
    factory: Callable[[Path], ProberFactory],
    *,
    history: History | None,
    keys: Keys,
    budget_seconds: float,
    quantized: bool = False,
    fresh: bool = False,
    now: datetime,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Twin | Untimed]:
    """Search for the twins of some presets over the same data, and keep them. By preset.

    Presets with the same step share their search, so eight presets take little longer than one. A search that was
    interrupted goes on after the last stage that it ended.

    Args:
        fresh: do not go on with what an interrupted search found.

    Raises:
        MeasurementError: nothing of any preset could be timed.
    """
    # With all that measures, which a table from the history does without.
    from planner.nursery import nursery
    from planner.prober import ProcessProber, worker_environment
    from planner.tune import tune

    groups: dict[StepSignature, list[Wanted]] = {}
    for one in wanted:
        groups.setdefault(StepSignature.of(one.job), []).append(one)
    found: dict[str, Twin | Untimed] = {}
    failed: list[MeasurementError] = []
    with tempfile.TemporaryDirectory(prefix="plan-") as folder, nursery(worker_environment()) as nearby:
        saved = Path(folder) / "data"
        saved.mkdir()
        data.save(saved)
        # A search starts ten workers and more, and their starts are no part of what it finds.
        forked = ProcessProber.factory(saved, nursery=nearby)
        for members in groups.values():
            kept = _Kept(history, keys, members, data, quantized, budget_seconds, now)
            try:
                twins = tune(
                    members,
                    data,
                    forked if factory == ProcessProber.factory else factory(saved),
                    budget_seconds=budget_seconds / len(groups),
                    quantized=quantized,
                    progress=progress,
                    clock=clock,
                    earlier=() if fresh else kept.found(),
                    keep=kept.keep,
                )
            except MeasurementError as reason:  # the other groups may still be timed
                failed.append(reason)
                found |= {one.name: Untimed(preset=one.name, reason=str(reason).rstrip(".")) for one in members}
                continue
            jobs = {one.name: one.job for one in members}
            contents = {}
            for twin in twins:
                if isinstance(twin, Untimed):
                    found[twin.preset] = twin
                    continue
                dated = replace(twin, tuned_at=now.isoformat(timespec="seconds"), budget_seconds=budget_seconds)
                found[twin.preset] = dated
                key = twin_key(keys, jobs[twin.preset], data, quantized=quantized)
                if key is not None:
                    contents[key] = jsonio.to_json(dated)
            if history is not None and contents:
                history.keep_measurements(contents)
    if failed and all(isinstance(one, Untimed) for one in found.values()):
        raise failed[0]
    return found
