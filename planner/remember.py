"""What the history is told of a run: that it began, how it ended. And how those stand whose end nobody told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from planner.figures import UNKNOWN
from planner.history import RUNNING, PastRun
from planner.terminal import open_history, say
from planner.unended import of_record
from presets.errors import PlanError

if TYPE_CHECKING:
    from trainer.job import Job
    from trainer.record import RunRecord

KILLED = "killed"
STOPPED = (129, 130, 143)  # exit codes of a run that SIGHUP, SIGINT or SIGTERM has stopped


def begun(folder: Path, job: Job) -> None:
    """A trainer is about to start in a run folder: should nobody be there to tell of its end, the run is known."""
    _add(folder, job, RUNNING)


def ended(folder: Path, job: Job, record: RunRecord | None, code: int) -> None:
    """The trainer of a run folder left with this exit code, and this is its record; None where it wrote none."""
    from trainer.alive import still_there

    if record is not None:
        remember(record, folder)
    elif not still_there(folder):  # else it is another one, which this one found there
        known = {0: UNKNOWN, 1: "failed", **dict.fromkeys(STOPPED, "stopped")}  # 0: its record is damaged
        status = known.get(code, KILLED)
        _add(folder, job, status)


def remember(record: RunRecord, folder: Path) -> None:
    """The run in the history, as of when its record was written: told twice, it is the same entry."""
    open_history(say).add_run(of_record(record, folder))


def as_they_stand(runs: Sequence[PastRun]) -> list[PastRun]:
    """The runs; those that are not known to have ended as their folders show them. Nothing is written."""
    return [_as_it_stands(run) if run.status == RUNNING else run for run in runs]


def _as_it_stands(run: PastRun) -> PastRun:
    from planner.run_view import look_at  # with numpy, which a list of runs that ended does without

    folder = Path(run.folder)
    try:
        view = look_at(folder)
        if view.record is not None:
            return of_record(view.record, folder)
    except (PlanError, OSError, ValueError):  # moved, removed or damaged
        return replace(run, status=UNKNOWN)
    if view.state in ("starting", "running"):
        return run
    seen_at = datetime.now(UTC) - timedelta(seconds=view.seconds_since_sign or 0.0)
    return replace(
        run,
        ended_at=seen_at.isoformat(timespec="seconds"),
        status=KILLED if view.is_gone else view.state,
    )


def _add(folder: Path, job: Job, status: str) -> None:
    from trainer.record import Actual, Predicted, RunRecord, read_predicted

    try:
        predicted = read_predicted(folder)
    except PlanError:  # the trainer says what is wrong with it
        predicted = Predicted()
    record = RunRecord(status=status, job=job, predicted=predicted, actual=Actual(), versions={})
    open_history(say).add_run(PastRun.of(record, folder, datetime.now().astimezone()))
