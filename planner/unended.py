"""Runs whose end nobody told, since the planner beside them was killed: taken in from their records."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from planner.history import History, PastRun
from presets.errors import PlanError

if TYPE_CHECKING:
    from trainer.record import RunRecord


def settle(history: History) -> list[Path]:
    """Take in runs whose trainer ended after its planner was killed, by their records: later estimates count them.

    Returns:
        The folders of runs that are training on this machine now.
    """
    from trainer.alive import still_there
    from trainer.record import RunRecord

    training = []
    for run in history.unended_runs():
        folder = Path(run.folder)
        try:
            if still_there(folder):
                training.append(folder)
                continue
            written = (folder / "record.json").stat().st_mtime
            # An older one is of the stop that this run went on from: the trainer removes it, but a moment later.
            if written >= datetime.fromisoformat(run.ended_at).timestamp():
                history.add_run(of_record(RunRecord.read(folder / "record.json"), folder))
        except (PlanError, OSError, ValueError, OverflowError):  # it was killed, or is gone, moved or damaged
            continue
    return training


def of_record(record: RunRecord, folder: Path) -> PastRun:
    """The entry of a run that ended, as of when its record was written."""
    return PastRun.of(record, folder, datetime.fromtimestamp((folder / "record.json").stat().st_mtime).astimezone())
