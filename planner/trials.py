"""Trials of a search: presets with some changes as rows, what `measure` finds of them, and which of it can be used."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from planner.chain import WORTH, Timed
from planner.estimate import Estimate, estimate
from planner.estimator import Estimator, plan_work
from planner.group import Group
from planner.measure import MOST_ROUNDS, Progress, measure
from planner.measurement import LEFT_OUT, Measurements, PlannedRow, StepSignature
from planner.prober import DoesNotFit, ProberFactory
from planner.standing import Standing
from planner.twin import Change, Wanted, changed
from presets.errors import MeasurementError, PlanError, SettingsError
from trainer.job import Job
from trainer.planning import Plans, stand_in
from trainer.tokens import FloatArray, TokenizedDataset

Changes = tuple[Change, ...]
NOT_IN_TURNS = (
    "what only timing in turns tells from a machine that changes its speed: not all workers fit into memory together, "
    "and so they were timed one after another"
)


class Trials:
    """All trials of one search: they share batch plans, and workers where those can stand. Close it at the end."""

    def __init__(
        self,
        wanted: Sequence[Wanted],
        data: TokenizedDataset,
        factory: ProberFactory,
        progress: Progress | None,
        clock: Callable[[], float] | None,
        seed: int,
    ) -> None:
        self.data = data
        self.refused: list[str] = []  # what is not offered, and why
        self.spent = 0.0  # seconds of timing
        self._jobs = {one.name: one.job for one in wanted}
        self._factory = factory
        self._progress = progress
        self._clock = clock or time.perf_counter
        self._seed = seed
        self._plans = Plans(data)
        self._standing = Standing()
        self._variants: dict[str, tuple[str, Changes]] = {}  # row -> preset and changes

    def close(self) -> None:
        self._standing.close()

    def tell(self, text: str) -> None:
        if self._progress:
            self._progress(text, 0.0)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def rows(self, asked: Mapping[str, Sequence[Changes]]) -> list[PlannedRow]:
        """A row for each preset with each of its variants, as far as its global batch can be split so.

        A variant whose last change changes nothing is no row of its own: it is that without the change.
        """
        rows = []
        for name, variants in asked.items():
            for changes in variants:
                try:
                    job = changed(self._jobs[name], changes)
                except SettingsError:
                    continue
                if changes and job == changed(self._jobs[name], changes[:-1]):
                    continue
                rows.append(self.row(row_name(name, changes), job))
                self._variants[rows[-1].name] = (name, changes)
        return rows

    def row(self, name: str, job: Job) -> PlannedRow:
        """A row and its batch plan; jobs that differ only in their step share a plan."""
        return PlannedRow(name=name, job=job, plan=self._plans.of(stand_in(job)).plan)

    # --- measuring ----------------------------------------------------------------------------------------------------

    def measure(
        self,
        rows: list[PlannedRow],
        seconds: float,
        what: str,
        *,
        optional: Collection[str] = (),
        most_rounds: int = MOST_ROUNDS,
    ) -> Measurements:
        """Time rows in turns for at most so many seconds. `optional` ones may be left out where plainly slower."""

        def tell(text: str, spent: float) -> None:
            if self._progress:
                self._progress(f"{what}: {text}", spent)

        found = measure(
            rows,
            self.data,
            self._factory,
            budget_seconds=seconds,
            precision_target=WORTH / 2,
            progress=tell,
            clock=self._clock,
            with_fixed=False,
            optional=frozenset(optional),
            standing=self._standing,
            most_rounds=most_rounds,
            seed=self._seed,
        )
        self.spent += sum(one.seconds_spent for one in found.measurements)
        if not found.in_turns and sum(bool(one.rounds) for one in found.measurements) > 1:
            self.refused.append(NOT_IN_TURNS)
        return found

    def packing_refused(self, job: Job, packed_length: int) -> str | None:
        """Why packing is not for this model; asked of the model itself."""
        self.tell("check: packed rows against separate ones")
        group = Group(StepSignature.of(job), [])
        self._standing.give([group])
        try:
            if group.prober is None:
                group.prober = self._factory(job)
                group.load = group.prober.load()
            return group.prober.packing_refused(packed_length)
        except DoesNotFit as reason:
            group.error = f"out of memory in the comparison of packed and separate rows ({reason})"
            return group.error
        except PlanError as reason:
            group.error = str(reason)
            return group.error
        finally:
            self._standing.keep(group)

    # --- what was found -----------------------------------------------------------------------------------------------

    def timed(self, rows: list[PlannedRow], found: Measurements) -> dict[str, list[Timed]]:
        """Per preset what could be timed, the fastest first."""
        timed: dict[str, list[Timed]] = {name: [] for name in self._jobs}
        for row in rows:
            name, changes = self._variants[row.name]
            what = ", ".join(change.text for change in changes)
            replicates = self.usable(row, found, what or f"{name} as written")
            if len(replicates):
                seconds = float(replicates.mean())
                timed[name].append(Timed(job=row.job, changes=changes, seconds=seconds, replicates=replicates))
        return {name: sorted(ones, key=lambda one: one.seconds) for name, ones in timed.items()}

    def too_large(self, rows: list[PlannedRow], found: Measurements) -> dict[str, list[tuple[Changes, Job]]]:
        """Per preset what does not fit."""
        left: dict[str, list[tuple[Changes, Job]]] = {name: [] for name in self._jobs}
        for row in rows:
            one = self.judged(row, found)
            if one is not None and one.fits is False:
                name, changes = self._variants[row.name]
                left[name].append((changes, row.job))
        return left

    def usable(self, row: PlannedRow, found: Measurements, what: str) -> FloatArray:
        """The row's replicates; none where it does not fit, or where its worker failed: then `refused` says so."""
        one = self.judged(row, found)
        if one is not None and one.error not in (None, LEFT_OUT) and one.fits is not False:
            self.refused.append(f"{what}: {one.error}")
            return np.zeros(0)
        return self._replicates(row, found) if one is not None and one.fits else np.zeros(0)

    def lean_is_real(self, found: Measurements, name: str, one: Timed) -> bool:
        """Whether a lean loss that was asked for was also used; the worker falls back to the plain one and says why."""
        if all(change.loss != "lean" for change in one.changes):
            return True
        verdict = found.verdict(row_name(name, one.changes))
        measured = found.of(verdict.signature) if verdict is not None else None
        reason = measured.load.lean_refused if measured is not None and measured.load is not None else None
        if reason:
            self.refused.append(f"lean loss: {reason}")
        return not reason

    def judged(self, row: PlannedRow, found: Measurements) -> Estimate | None:
        """The row's estimate, which fits or not by what a whole run will need; None where nothing is known of it."""
        try:
            return estimate(row, self.data, found)
        except MeasurementError:
            return None

    def _replicates(self, row: PlannedRow, found: Measurements) -> FloatArray:
        """The loop's seconds by round, without rare slow micro-steps: they hit one candidate and miss another.

        With the seconds of compiling, which is a part of a compiled run.
        """
        measured = found.of(StepSignature.of(row.job))
        if measured is None or not measured.rounds:
            return np.zeros(0)
        work = plan_work(row, row.plan.micro_shapes(self.data.lengths), found.strata)
        try:
            once = measured.load.compile_seconds if measured.load is not None else 0.0
            return Estimator(measured.rounds, found.strata, row.kind).total(work).replicates + once
        except MeasurementError:  # nothing of this kind: it did not fit
            return np.zeros(0)


def row_name(preset: str, changes: Changes) -> str:
    return " + ".join((preset, *(change.text for change in changes)))
