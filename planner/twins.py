"""Tuned twins of presets: found in the history, or searched for and kept there."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from planner.history import History
from planner.measure import Progress
from planner.measurement import StepSignature
from planner.nursery import nursery
from planner.prober import ProberFactory, ProcessProber, worker_environment
from planner.reuse import Keys
from planner.tune import tune
from planner.twin import Twin, Wanted
from presets import jsonio
from presets.errors import PlanError
from trainer.job import Job
from trainer.tokens import TokenizedDataset

FORM = 1  # of what is stored: another one is searched again


def twin_key(keys: Keys, job: Job, data: TokenizedDataset, *, quantized: bool = False) -> str | None:
    """Under which a job's twin is kept: machine, versions, model shape, step, preset and the lengths of the data.

    A search that may quantize keeps its twins apart: nobody gets another training who did not ask for it.

    None where the model's shape is not known. The fastest split depends on the lengths, so other data is tuned anew.
    """
    key = keys.of_measurement(job)
    if key is None:
        return None
    parts = [FORM, key, jsonio.to_plain(job.preset), job.micro_batch_size, job.num_devices, quantized]
    if job.group_by_length:  # other batches, and so another fastest split
        parts.append("grouped by length")
    sha = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    sha.update(data.lengths.tobytes())
    return f"twin {sha.hexdigest()[:32]}"


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
    return twin if min(twin.seconds, twin.written_seconds, twin.baseline_seconds) > 0 else None


def find_twins(
    wanted: Sequence[Wanted],
    data: TokenizedDataset,
    factory: Callable[[Path], ProberFactory],
    *,
    history: History | None,
    keys: Keys,
    budget_seconds: float,
    quantized: bool = False,
    now: datetime,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Twin]:
    """Search for the twins of some presets over the same data, and keep them. By preset.

    Presets with the same step share their search, so eight presets take little longer than one.

    Raises:
        MeasurementError: a preset cannot be timed as written.
    """
    groups: dict[StepSignature, list[Wanted]] = {}
    for one in wanted:
        groups.setdefault(StepSignature.of(one.job), []).append(one)
    found: dict[str, Twin] = {}
    with tempfile.TemporaryDirectory(prefix="plan-") as folder, nursery(worker_environment()) as nearby:
        saved = Path(folder) / "data"
        saved.mkdir()
        data.save(saved)
        # A search starts ten workers and more, and their starts are no part of what it finds.
        forked = ProcessProber.factory(saved, nursery=nearby)
        for members in groups.values():
            twins = tune(
                members,
                data,
                forked if factory == ProcessProber.factory else factory(saved),
                budget_seconds=budget_seconds / len(groups),
                quantized=quantized,
                progress=progress,
                clock=clock,
            )
            jobs = {one.name: one.job for one in members}
            contents = {}
            for twin in twins:
                dated = replace(twin, tuned_at=now.isoformat(timespec="seconds"))
                found[twin.preset] = dated
                key = twin_key(keys, jobs[twin.preset], data, quantized=quantized)
                if key is not None:
                    contents[key] = jsonio.to_json(dated)
            if history is not None and contents:
                history.keep_measurements(contents)
    return found
