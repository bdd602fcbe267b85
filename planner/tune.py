"""The fastest way to train on the same batches: another split, packing, and what else leaves the gradient as it is.

The search goes through three stages, each one call of `measure`, so that what is compared was timed in turns:

1. Layouts. Every split of the global batch into micro-batches, and packed rows of several lengths, under the step as it
   is. Memory is proven from the smallest up, to the first that does not fit. Where none fits they are tried again with
   what takes less memory: the lean loss, checkpointing, both.
2. Steps. With the fastest layout: the lean loss, the other attention, fewer threads, no checkpointing, no compiling.
   Each alone.
3. The chain. The baseline as published, then one change after the other in the order in which they are listed, all in
   turns. What is kept is the fastest link; each link's share is its ratio to the one before.

Only changes that leave the window's gradient the same up to float tolerance are tried (`trainer.agreement` and
`trainer.lean` compare on the model itself). Quantized bases train something else and are tried only when asked for.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from planner.chain import LEAST_ROUNDS, WORTH, Step, Timed, is_faster, make_chain, twin_of
from planner.estimate import Estimate, estimate
from planner.estimator import Estimator, plan_work
from planner.group import Group
from planner.halfway import Halfway, Layout, common_steps, usable
from planner.measure import Progress, measure
from planner.measurement import LEFT_OUT, Measurements, PlannedRow, StepSignature
from planner.prober import DoesNotFit, ProberFactory
from planner.standing import Standing
from planner.twin import TOO_SHORT, Change, Twin, Untimed, Wanted, changed
from presets.errors import MeasurementError, PlanError, SettingsError
from trainer.job import Job
from trainer.planning import Plans, stand_in
from trainer.tokens import FloatArray, TokenizedDataset

CPU_MICRO_BATCHES = (1, 2, 4, 8)
GPU_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
PACKED_ROWS = (1, 2, 4, 8)  # times the longest example, rounded up to a power of two
MOST_PACKED_TOKENS = {"cpu": 4096, "cuda": 32768, "mps": 8192}
WINDOW_MULTIPLE = 256  # tokens, to which a window's longest row is rounded up
DOES_NOT_FIT = "it does not fit"
LEAST_MEMORY = "with the lean loss, checkpointing, or both"
STAGE_SHARES = (0.45, 0.25, 0.30)  # of the time budget


def tune(
    wanted: Sequence[Wanted],
    data: TokenizedDataset,
    factory: ProberFactory,
    *,
    budget_seconds: float = 180.0,
    quantized: bool = False,
    progress: Progress | None = None,
    clock: Callable[[], float] | None = None,
    seed: int = 0,
    earlier: Sequence[Halfway] = (),
    keep: Callable[[list[Halfway]], None] | None = None,
) -> tuple[Twin | Untimed, ...]:
    """The tuned twin of each preset, or why nothing of it could be timed.

    Args:
        wanted: presets with the same step as written (adapter, precision, model): they share every timing.
        budget_seconds: bounds the seconds spent timing, over all three stages.
        quantized: also try 8-bit and 4-bit bases, which are not the same training.
        earlier: what an interrupted search found; its stages are not repeated where it knows each wanted preset.
        keep: told after each stage but the last what is found so far, one for each preset.

    Raises:
        MeasurementError: of none of the presets anything could be timed.
    """
    return _Tuning(wanted, data, factory, budget_seconds, quantized, progress, clock, seed, keep).tune(earlier)


class _Tuning:
    """One call of `tune`."""

    def __init__(
        self,
        wanted: Sequence[Wanted],
        data: TokenizedDataset,
        factory: ProberFactory,
        budget: float,
        quantized: bool,
        progress: Progress | None,
        clock: Callable[[], float] | None,
        seed: int,
        keep: Callable[[list[Halfway]], None] | None,
    ) -> None:
        if not wanted:
            raise MeasurementError("there is nothing to tune: no configuration was given.")
        self.wanted = wanted
        self.data = data
        self.factory = factory
        self.budget = budget
        self.quantized = quantized
        self.progress = progress
        self.clock = clock
        self.seed = seed
        self.keep = keep
        self.refused: list[str] = []
        self.untimed: dict[str, str] = {}  # preset -> why nothing of it can be timed
        self.plans = Plans(data)
        self.standing = Standing()
        self.variants: dict[str, tuple[str, tuple[Change, ...]]] = {}  # row -> preset and changes

    def tune(self, earlier: Sequence[Halfway]) -> tuple[Twin | Untimed, ...]:
        try:
            best, steps = self._interrupted(earlier)
            if not best:
                best = self._first_stage(self._layouts())
                if not self.untimed:
                    self._keep(best, None)
            if steps is None:
                steps = self._second_stage(best)
                if TOO_SHORT not in self.refused and not self.untimed:
                    self._keep(best, steps)
            return self._third_stage(best, steps)
        finally:
            self.standing.close()

    def _interrupted(self, earlier: Sequence[Halfway]) -> tuple[dict[str, list[Timed]], list[Change] | None]:
        """Layouts and changes of the step that an earlier search found before it was interrupted."""
        found = usable(earlier, self.wanted)
        if not found:
            return {}, None
        by_name = {one.preset: one for one in earlier if one.preset in found}
        for one in by_name.values():
            self.refused += one.refused
        steps = common_steps(by_name)
        if self.progress:
            stages = "layouts" if steps is None else "layouts, steps"
            self.progress(f"{stages}: known from a search that was interrupted", 0.0)
        best = {
            name: [Timed(job=job, changes=layout.changes, seconds=layout.seconds) for job, layout in layouts]
            for name, layouts in found.items()
        }
        return best, None if steps is None else list(steps)

    def _keep(self, best: dict[str, list[Timed]], steps: list[Change] | None) -> None:
        if self.keep is None:
            return
        self.keep(
            [
                Halfway(
                    preset=name,
                    layouts=tuple(Layout(changes=one.changes, seconds=one.seconds) for one in timed),
                    steps=None if steps is None else tuple(steps),
                    refused=tuple(dict.fromkeys(self.refused)),
                )
                for name, timed in best.items()
            ]
        )

    # --- 1: layouts ---------------------------------------------------------------------------------------------------

    def _layouts(self) -> list[Change]:
        """Splits and packed rows that every preset can take or some can; packing only where the model keeps apart."""
        first = self.wanted[0].job
        found: list[Change] = []
        for size in CPU_MICRO_BATCHES if first.device == "cpu" else GPU_MICRO_BATCHES:
            if size != first.micro_batch_size:
                found.append(Change(name="micro-batch", micro_batch_size=size))
        longest = int(self.data.lengths.max())
        least = 1 << max(5, math.ceil(math.log2(max(2, longest))))
        lengths = [least * rows for rows in PACKED_ROWS if least * rows <= MOST_PACKED_TOKENS[first.device]]
        if first.device == "cuda" and not first.packing:
            lengths = sorted({*lengths, *self._whole_windows(MOST_PACKED_TOKENS[first.device])})
        if lengths and not first.packing:
            reason = self._ask_packing(first, lengths[-1])
            if reason is None:
                found += [Change(name="packing", packed_length=length, micro_batch_size=1) for length in lengths]
            else:
                self.refused.append(f"packing: {reason}")
        return found

    def _whole_windows(self, most: int) -> set[int]:
        """Tokens of rows that each hold a window as a whole, of each preset where they are not too long.

        A window that is little longer than a row leaves a second, nearly empty one, which costs a GPU a third of a full
        one or more: launching its kernels takes as long. On an H200 windows took 0.20 to 0.23 s as one row, and 0.31 to
        0.34 s as a row of up to 16,384 tokens and a rest (a 1 B model, 2026-11-26).
        """
        found = set()
        for wanted in self.wanted:
            plan = self._row(wanted.name, wanted.job).plan
            longest = int(plan.per_window(self.data.lengths).max())
            found.add(-(-longest // WINDOW_MULTIPLE) * WINDOW_MULTIPLE)
        return {tokens for tokens in found if tokens <= most}

    def _ask_packing(self, job: Job, packed_length: int) -> str | None:
        """Why packing is not for this model; asked of the model itself."""
        if self.progress:
            self.progress("check: packed rows against separate ones", 0.0)
        group = Group(StepSignature.of(job), [])
        self.standing.give([group])
        try:
            if group.prober is None:
                group.prober = self.factory(job)
                group.load = group.prober.load()
            return group.prober.packing_refused(packed_length)
        except (PlanError, DoesNotFit) as reason:
            group.error = str(reason)
            return group.error
        finally:
            self.standing.keep(group)

    def _first_stage(self, layouts: list[Change]) -> dict[str, list[Timed]]:
        """The layouts of each preset, the fastest first; as written is among them where it fits.

        Presets of which nothing can be timed are left out from here on.

        Raises:
            MeasurementError: nothing is left.
        """
        timed = self._with_relief((), layouts, self.wanted)
        for relief in self._reliefs():
            tight = [one for one in self.wanted if not timed[one.name] and one.name not in self.untimed]
            if tight:
                timed |= self._with_relief(relief, layouts, tight)
        for one in self.wanted:
            if not timed[one.name]:
                self.untimed.setdefault(one.name, f"{DOES_NOT_FIT}, as written or in any split, {LEAST_MEMORY}")
        if len(self.untimed) == len(self.wanted):
            name, reason = next(iter(self.untimed.items()))
            raise MeasurementError(f"'{name}' cannot be timed here: {reason}.")
        self.wanted = [one for one in self.wanted if timed[one.name]]
        return {one.name: timed[one.name] for one in self.wanted}

    def _reliefs(self) -> list[tuple[Change, ...]]:
        """What makes a step fit at the same gradient, the cheapest first."""
        job = self.wanted[0].job
        lean = [Change(name="lean loss", loss="lean")] if job.loss == "plain" else []
        checkpointing = [Change(name="checkpointing", gradient_checkpointing=True)]
        if job.preset.gradient_checkpointing:
            checkpointing = []
        return list(dict.fromkeys(tuple(one) for one in (lean, checkpointing, lean + checkpointing) if one))

    def _with_relief(
        self, relief: tuple[Change, ...], layouts: list[Change], wanted: Sequence[Wanted]
    ) -> dict[str, list[Timed]]:
        """Each preset's layouts with these changes, the fastest first. What fails for another reason than memory is
        not tried again."""
        rows = self._rows({one.name: [relief, *((*relief, layout) for layout in layouts)] for one in wanted})
        what = f"layouts, {' and '.join(change.text for change in relief)}" if relief else "layouts"
        found = self._measure(rows, STAGE_SHARES[0], what)
        timed = self._timed(rows, found)
        for one in wanted:
            verdict = found.verdict(_row_name(one.name, relief))
            if not timed[one.name] and (verdict is None or verdict.fits is not False):
                self.untimed[one.name] = (verdict.error if verdict else None) or "no verdict"
        return {one.name: timed[one.name] for one in wanted}

    # --- 2: steps -----------------------------------------------------------------------------------------------------

    def _second_stage(self, best: dict[str, list[Timed]]) -> list[Change]:
        """Changes of the step that save time with the fastest layout of the first preset, the best first."""
        wanted = self.wanted[0]
        fastest = best[wanted.name][0]
        tried = self._step_changes(fastest.job, wanted.job)
        if not tried:
            return []
        rows = self._rows({wanted.name: [fastest.changes, *((*fastest.changes, change) for change in tried)]})
        found = self._measure(rows, STAGE_SHARES[1], "steps")
        timed = self._timed(rows, found)[wanted.name]
        base = next((one for one in timed if one.changes == fastest.changes), None)
        if base is None:
            return []
        if len(base.replicates) < LEAST_ROUNDS:
            self.refused.append(TOO_SHORT)
        return [
            one.changes[-1]
            for one in timed  # the fastest first
            if one is not base and self._lean_is_real(found, wanted.name, one)
            if is_faster(one.replicates, base.replicates)
        ]

    def _step_changes(self, job: Job, written: Job) -> list[Change]:
        preset = job.preset
        found: list[Change] = []
        if job.loss == "plain":
            found.append(Change(name="lean loss", loss="lean"))
        other = Change(name="attention", attention="eager" if preset.attention == "sdpa" else "sdpa")
        # Eager attention knows no documents: it does the whole packed row, tokens x tokens, under a mask.
        if not (job.packing and other.attention == "eager"):
            asked = other.applied(job)
            reason = self._ask_packing(asked, job.packed_length or preset.max_length) if job.packing else None
            if reason is None:
                found.append(other)
            else:
                self.refused.append(f"{other.text} with packing: {reason}")
        if written.preset.gradient_checkpointing:  # not where it was added to make it fit
            found.append(Change(name="checkpointing", gradient_checkpointing=False))
        if job.compile:
            found.append(Change(name="compiled", compile=False))
        if job.device == "cpu":
            now = job.num_threads or _cores()
            found += [Change(name="threads", num_threads=number) for number in sorted({_cores(), now // 2} - {now, 0})]
        if self.quantized and preset.adapter == "lora":
            found += [
                Change(name="quantized base", base_precision=kind, is_neutral=False)
                for kind in ("8bit", "4bit")
                if job.base_precision != kind
            ]
        return found

    def _lean_is_real(self, found: Measurements, name: str, one: Timed) -> bool:
        """Whether a lean loss that was asked for was also used; the worker falls back to the plain one and says why."""
        if one.changes[-1].loss != "lean":
            return True
        verdict = found.verdict(_row_name(name, one.changes))
        measured = found.of(verdict.signature) if verdict is not None else None
        reason = measured.load.lean_refused if measured is not None and measured.load is not None else None
        if reason:
            self.refused.append(f"lean loss: {reason}")
        return not reason

    # --- 3: the chain -------------------------------------------------------------------------------------------------

    def _third_stage(self, best: dict[str, list[Timed]], steps: list[Change]) -> tuple[Twin | Untimed, ...]:
        chains = {one.name: make_chain(one, best[one.name], steps) for one in self.wanted}
        rows = {
            name: [self._row(f"{name} #{number}", step.job) for number, step in enumerate(chain)]
            for name, chain in chains.items()
        }
        found = self._measure([row for some in rows.values() for row in some], STAGE_SHARES[2], "the chain")
        twins: list[Twin | Untimed] = [Untimed(preset=name, reason=reason) for name, reason in self.untimed.items()]
        for one in self.wanted:
            chain = chains[one.name]
            replicates = [
                self._usable(row, found, _link_name(one, step)) for row, step in zip(rows[one.name], chain, strict=True)
            ]
            twins.append(twin_of(one, chain, replicates, self.refused))
        return tuple(twins)

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _rows(self, asked: dict[str, list[tuple[Change, ...]]]) -> list[PlannedRow]:
        jobs = {wanted.name: wanted.job for wanted in self.wanted}
        rows = []
        for name, variants in asked.items():
            for changes in variants:
                try:
                    job = changed(jobs[name], changes)
                except SettingsError:
                    continue  # this global batch has no such split
                rows.append(self._row(_row_name(name, changes), job))
                self.variants[rows[-1].name] = (name, changes)
        return rows

    def _row(self, name: str, job: Job) -> PlannedRow:
        """A row and its batch plan; jobs that differ only in their step share a plan."""
        return PlannedRow(name=name, job=job, plan=self.plans.of(stand_in(job)).plan)

    def _measure(self, rows: list[PlannedRow], share: float, what: str) -> Measurements:
        def tell(text: str, spent: float) -> None:
            if self.progress:
                self.progress(f"{what}: {text}", spent)

        return measure(
            rows,
            self.data,
            self.factory,
            budget_seconds=share * self.budget,
            precision_target=WORTH / 2,
            progress=tell,
            clock=self.clock or time.perf_counter,
            with_fixed=False,
            optional=frozenset(row.name for row in rows if " + " in row.name),  # never what is as written
            standing=self.standing,
            seed=self.seed,
        )

    def _estimate(self, row: PlannedRow, found: Measurements) -> Estimate | None:
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

    def _usable(self, row: PlannedRow, found: Measurements, what: str) -> FloatArray:
        """The row's replicates; none where it does not fit, or where its worker failed: then `refused` says so."""
        one = self._estimate(row, found)
        if one is not None and one.error not in (None, LEFT_OUT) and one.fits is not False:
            self.refused.append(f"{what}: {one.error}")
            return np.zeros(0)
        return self._replicates(row, found) if one is not None and one.fits else np.zeros(0)

    def _timed(self, rows: list[PlannedRow], found: Measurements) -> dict[str, list[Timed]]:
        """Per preset what could be timed, the fastest first."""
        timed: dict[str, list[Timed]] = {wanted.name: [] for wanted in self.wanted}
        for row in rows:
            name, changes = self.variants[row.name]
            replicates = self._usable(row, found, changes[-1].text if changes else f"{name} as written")
            if len(replicates):
                seconds = float(replicates.mean())
                timed[name].append(Timed(job=row.job, changes=changes, seconds=seconds, replicates=replicates))
        return {name: sorted(ones, key=lambda one: one.seconds) for name, ones in timed.items()}


def _link_name(wanted: Wanted, step: Step) -> str:
    return (
        f"{wanted.name} {step.name}" if step.name == "baseline" and wanted.name == wanted.baseline.name else step.name
    )


def _row_name(preset: str, changes: tuple[Change, ...]) -> str:
    return " + ".join((preset, *(change.text for change in changes)))


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
