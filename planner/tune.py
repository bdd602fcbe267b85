"""The fastest way to train on the same batches: another split, packing, and what else leaves the gradient as it is.

The search goes through three stages, each one call of `measure`, so that what is compared was timed in turns:

1. Layouts. Every split of the global batch into micro-batches, and packed rows of several lengths, under the step as it
   is. Memory is proven from the smallest up, to the first that does not fit.
2. Steps. With the fastest layout: the lean loss, the other attention, fewer threads, no checkpointing. Each alone.
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
from dataclasses import dataclass, field, replace

import numpy as np

from planner.estimate import Estimate, estimate
from planner.estimator import Estimator, plan_work
from planner.group import Group
from planner.halfway import Halfway, Layout, common_steps, usable
from planner.measure import Progress, measure
from planner.measurement import Measurements, PlannedRow, StepSignature
from planner.prober import DoesNotFit, ProberFactory
from planner.standing import Standing
from planner.student import t_quantile
from planner.twin import Change, Link, Twin, Wanted, changed
from presets.errors import MeasurementError, PlanError, SettingsError
from trainer.job import Job
from trainer.planning import plan_job, stand_in
from trainer.tokens import FloatArray, TokenizedDataset

CPU_MICRO_BATCHES = (1, 2, 4, 8)
GPU_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
PACKED_ROWS = (1, 2, 4, 8)  # times the longest example, rounded up to a power of two
MOST_PACKED_TOKENS = {"cpu": 4096, "cuda": 32768, "mps": 8192}
WINDOW_MULTIPLE = 256  # tokens, to which a window's longest row is rounded up
WORTH = 0.02  # a change that saves less than this of the time is not kept: it would not be seen in a run
LEAST_ROUNDS = 3  # from fewer, no gain can be told from chance
TOO_SHORT = "what the time did not suffice to tell from chance: give more with --budget"
STAGE_SHARES = (0.45, 0.25, 0.30)  # of the time budget


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """A job with some changes, and its loop's seconds."""

    job: Job
    changes: tuple[Change, ...]
    seconds: float
    # (rounds,) the loop's seconds as each round alone would have it, the last round last; none of an earlier search
    replicates: FloatArray = field(default_factory=lambda: np.zeros(0))


def is_faster(new: FloatArray, old: FloatArray) -> bool:
    """Whether what was timed in turns with something else takes less of the time, by `WORTH` and beyond chance.

    Round by round, so that what slows a whole round slows both: the mean log-ratio must lie under -`WORTH`, and its
    95 % upper bound (Student's t, one-sided) under 0. Warm-up dropped from one of them is dropped from both: rounds are
    matched from the last one back.
    """
    count = min(len(new), len(old))
    if count < LEAST_ROUNDS:
        return False
    ratio = np.log(new[-count:] / old[-count:])
    mean = float(ratio.mean())
    error = float(ratio.std(ddof=1)) / math.sqrt(count)
    return mean < -WORTH and mean + t_quantile(count - 1) * error < 0


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
) -> tuple[Twin, ...]:
    """The tuned twin of each preset.

    Args:
        wanted: presets with the same step as written (adapter, precision, model): they share every timing.
        budget_seconds: bounds the seconds spent timing, over all three stages.
        quantized: also try 8-bit and 4-bit bases, which are not the same training.
        earlier: what an interrupted search found; its stages are not repeated where it knows each wanted preset.
        keep: told after each stage but the last what is found so far, one for each preset.

    Raises:
        MeasurementError: nothing could be measured as written, so there is nothing to compare with.
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
        self.plans: dict[tuple[object, ...], PlannedRow] = {}
        self.standing = Standing()
        self.variants: dict[str, tuple[str, tuple[Change, ...]]] = {}  # row -> preset and changes

    def tune(self, earlier: Sequence[Halfway]) -> tuple[Twin, ...]:
        try:
            best, steps = self._interrupted(earlier)
            if not best:
                best = self._first_stage(self._layouts())
                self._keep(best, None)
            if steps is None:
                steps = self._second_stage(best)
                if TOO_SHORT not in self.refused:
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
        """The layouts of each preset, the fastest first; as written is among them."""
        rows = self._rows({wanted.name: [(), *((layout,) for layout in layouts)] for wanted in self.wanted})
        found = self._measure(rows, STAGE_SHARES[0], "layouts")
        timed = self._timed(rows, found)
        for wanted in self.wanted:
            if not any(one.changes == () for one in timed[wanted.name]):
                verdict = found.verdict(_row_name(wanted.name, ()))
                raise MeasurementError(
                    f"'{wanted.name}' as written cannot be timed here: {verdict.error if verdict else 'no verdict'}."
                )
        return timed

    # --- 2: steps -----------------------------------------------------------------------------------------------------

    def _second_stage(self, best: dict[str, list[Timed]]) -> list[Change]:
        """Changes of the step that save time with the fastest layout of the first preset, the best first."""
        wanted = self.wanted[0]
        fastest = best[wanted.name][0]
        tried = self._step_changes(fastest.job)
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

    def _step_changes(self, job: Job) -> list[Change]:
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
        if preset.gradient_checkpointing:
            found.append(Change(name="checkpointing", gradient_checkpointing=False))
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

    def _third_stage(self, best: dict[str, list[Timed]], steps: list[Change]) -> tuple[Twin, ...]:
        chains: dict[str, list[tuple[str, Job, tuple[Change, ...]]]] = {}
        for wanted in self.wanted:
            chains[wanted.name] = self._chain(wanted, best[wanted.name], steps)
        rows = []
        for name, chain in chains.items():
            rows += [self._row(f"{name} #{number}", job) for number, (_, job, _) in enumerate(chain)]
        found = self._measure(rows, STAGE_SHARES[2], "the chain")
        return tuple(self._twin(wanted, chains[wanted.name], rows, found) for wanted in self.wanted)

    def _chain(
        self, wanted: Wanted, timed: list[Timed], steps: list[Change]
    ) -> list[tuple[str, Job, tuple[Change, ...]]]:
        """(name of the link, job, changes so far), from the baseline as written."""
        written = wanted.job
        chain: list[tuple[str, Job, tuple[Change, ...]]] = [("baseline", wanted.baseline, ())]
        half = replace(written, precision=wanted.baseline.precision, base_precision=wanted.baseline.base_precision)
        if wanted.name != wanted.baseline.name:
            plain = written.preset.sampling.takes_all and not written.preset.phases and written.preset.num_epochs == 1
            chain.append(("accumulation" if plain else "schedule and sampling", half, ()))
            asked = written.preset.precision
            if asked != wanted.baseline.preset.precision or half != written:
                if half.precision != written.precision:
                    chain.append((asked, written, ()))
                elif half != written:
                    chain.append((f"base in {written.base_precision}", written, ()))
                else:
                    chain.append((f"{asked} (not on this device)", written, ()))
        changes: tuple[Change, ...] = ()
        job = written
        layout = timed[0]
        if layout.changes:
            # A packed layout is reached in two links where rows together already help: what each gives is seen.
            change = layout.changes[0]
            if change.packed_length is not None:
                plain_split = next((one for one in timed if one.changes and one.changes[0].packed_length is None), None)
                as_written = next(one for one in timed if not one.changes)
                if plain_split is not None and plain_split.seconds < (1 - WORTH) * as_written.seconds:
                    chain.append((plain_split.changes[0].text, plain_split.job, plain_split.changes))
            changes, job = layout.changes, layout.job
            chain.append((change.text, job, changes))
        for step in steps:
            changes, job = (*changes, step), step.applied(job)
            chain.append((step.text, job, changes))
        return chain

    def _twin(
        self,
        wanted: Wanted,
        chain: list[tuple[str, Job, tuple[Change, ...]]],
        rows: list[PlannedRow],
        found: Measurements,
    ) -> Twin:
        """The fastest link from the preset as written on; what came after it was tried and left out."""
        by_name = {row.name: row for row in rows}
        seconds: list[float | None] = []
        replicates: list[FloatArray] = []
        for number in range(len(chain)):
            row = by_name[f"{wanted.name} #{number}"]
            one = self._estimate(row, found)
            replicates.append(self._replicates(row, found))
            is_timed = one is not None and one.fits and len(replicates[-1]) > 0
            seconds.append(float(replicates[-1].mean()) if is_timed else None)
        written = next(number for number, (_, job, _) in reversed(list(enumerate(chain))) if job == wanted.job)
        first, as_written = seconds[0], seconds[written]
        if first is None or as_written is None:
            raise MeasurementError(f"'{wanted.name}' as written could not be timed beside its changes.")
        best = written
        if len(chain) > written + 1 and len(replicates[written]) < LEAST_ROUNDS:
            self.refused.append(TOO_SHORT)
        for number in range(written + 1, len(chain)):
            if seconds[number] is not None and is_faster(replicates[number], replicates[best]):
                best = number
        links, before = [], first
        for number in range(1, len(chain)):
            now = seconds[number]
            if now is None:
                continue
            is_kept = number <= best
            links.append(Link(name=chain[number][0], seconds=now, factor=before / now, is_kept=is_kept))
            if is_kept:
                before = now
        fastest = seconds[best]
        assert fastest is not None
        return Twin(
            preset=wanted.name,
            changes=chain[best][2] if best > written else (),
            links=tuple(links),
            written_seconds=as_written,
            seconds=fastest,
            baseline_seconds=first,
            refused=tuple(dict.fromkeys(self.refused)),
        )

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
        key = (job.preset.sampling, job.preset.phases, job.preset.num_epochs, job.global_batch_sizes,
               job.micro_batch_size, job.packing, job.packed_length, job.group_by_length)  # fmt: skip
        known = self.plans.get(key)
        if known is None:
            known = PlannedRow(name=name, job=job, plan=plan_job(stand_in(job), self.data).plan)
            self.plans[key] = known
        return PlannedRow(name=name, job=job, plan=known.plan)

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
        """The loop's seconds by round, without rare slow micro-steps: they hit one candidate and miss another."""
        measured = found.of(StepSignature.of(row.job))
        if measured is None or not measured.rounds:
            return np.zeros(0)
        work = plan_work(row, row.plan.micro_shapes(self.data.lengths), found.strata)
        try:
            return Estimator(measured.rounds, found.strata, row.kind).total(work).replicates
        except MeasurementError:  # nothing of this kind: it did not fit
            return np.zeros(0)

    def _timed(self, rows: list[PlannedRow], found: Measurements) -> dict[str, list[Timed]]:
        """Per preset what could be timed, the fastest first."""
        timed: dict[str, list[Timed]] = {wanted.name: [] for wanted in self.wanted}
        for row in rows:
            one, replicates = self._estimate(row, found), self._replicates(row, found)
            if one is None or not one.fits or not len(replicates):
                continue
            name, changes = self.variants[row.name]
            seconds = float(replicates.mean())
            timed[name].append(Timed(job=row.job, changes=changes, seconds=seconds, replicates=replicates))
        return {name: sorted(ones, key=lambda one: one.seconds) for name, ones in timed.items()}


def _row_name(preset: str, changes: tuple[Change, ...]) -> str:
    return " + ".join((preset, *(change.text for change in changes)))


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
