"""A run folder as it stands now, whoever writes it: settings, promise, steps so far, evaluations, end. No torch."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.launch import open_run, read_record
from presets import jsonio
from presets.rules import MOST_STEPS
from trainer.alive import NAME as PROCESS
from trainer.alive import still_there
from trainer.batching import BatchPlan
from trainer.job import Job
from trainer.record import Predicted, RunRecord, read_predicted

LARGEST_SHOWN = 1e18  # more is no seconds, bytes or loss
SILENT_SECONDS = 60.0  # beyond this, and ten usual steps, a run without an end is called silent
STARTING_SECONDS = 60.0  # taken for a usual step before the first: a large model loads for minutes


@dataclass(frozen=True, kw_only=True, slots=True)
class RunView:
    """One look at a run folder."""

    folder: Path
    job: Job
    predicted: Predicted
    record: RunRecord | None  # None: it has not ended
    steps: tuple[dict[str, Any], ...]  # lines of metrics.jsonl, ascending and each step once
    evaluations: tuple[tuple[int, float], ...]  # (step, held-out loss)
    num_steps: int | None  # planned; None where the plan is made by the run and is not yet
    seconds_since_sign: float | None  # since the run last wrote something
    seconds_since_step: float | None = None  # since its last step; None where that was another process's
    is_gone: bool = False  # its process is known to exist no more

    @property
    def state(self) -> str:
        """ "finished", "stopped", "failed", "starting", "running" or "silent"."""
        if self.record is not None:  # a resume takes the record of its stop away
            return self.record.status
        if self.is_gone:
            return "stopped"
        usual = float(self.steps[-1].get("seconds") or 0.0) if self.steps else STARTING_SECONDS
        if (self.seconds_since_sign or 0.0) > max(SILENT_SECONDS, 10 * usual):
            return "silent"
        return "running" if self.steps else "starting"


def look_at(folder: Path) -> RunView:
    """Read a run folder; lines that are half-written or damaged are left out.

    Raises:
        RunError: it is not a run folder, or its job, estimate or record is damaged.
    """
    folder = folder.absolute()
    job = open_run(folder)
    is_gone = still_there(folder) is False  # before the record is looked for: else it may end in between
    plan_file = folder / "batch_plan.npz"
    metrics = folder / "metrics.jsonl"
    signs = [_written(path) for path in (metrics, folder / "train.log", folder / PROCESS, folder / "job.json")]
    return RunView(
        folder=folder,
        job=job,
        predicted=read_predicted(folder),
        record=read_record(folder),
        steps=tuple(_by_step(metrics).values()),
        evaluations=tuple(
            (step, float(line["loss"]))
            for step, line in _by_step(folder / "evaluations.jsonl").items()
            if isinstance(line.get("loss"), (int, float)) and math.isfinite(line["loss"])
        ),
        num_steps=BatchPlan.load(plan_file).num_steps if plan_file.is_file() else None,
        seconds_since_sign=max(0.0, time.time() - max(sign for sign in signs if sign is not None)),
        seconds_since_step=_since_step(metrics, folder / PROCESS),
        is_gone=is_gone,
    )


def _since_step(metrics: Path, process: Path) -> float | None:
    """Seconds since the last line of metrics; None where a process that was started since has not come so far."""
    written, begun = _written(metrics), _written(process)  # a run of an earlier version has no note of its process
    if written is None or (begun is not None and begun > written):
        return None
    return max(0.0, time.time() - written)


def _written(path: Path) -> float | None:
    """When a file was last written; None where there is none: a resume takes some away."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _by_step(path: Path) -> dict[int, dict[str, Any]]:
    """The lines of a JSONL file by step, ascending; of two of one step the later."""
    found: dict[int, dict[str, Any]] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    for line in text.splitlines():
        try:
            one = jsonio.loads(line)
            found[_whole(one["step"])] = {name: _number(value) for name, value in one.items()}
        except (ValueError, KeyError, TypeError, OverflowError, AttributeError):
            continue
    return dict(sorted(found.items()))


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MOST_STEPS:
        raise ValueError
    return int(value)


def _number(value: Any) -> Any:
    """A value of a line where it is a number that can be shown; None for what else may stand there."""
    is_number = isinstance(value, (int, float)) and abs(value) < LARGEST_SHOWN
    return value if is_number else None
