"""The fastest way to train on the same batches: another split, packing, and what else leaves the gradient as it is.

The search goes through these stages, each one call of `measure`, so that what is compared was timed in turns (on a GPU
the first takes two: all layouts briefly, and again those that may be the best):

1. Layouts. Every split of the global batch into micro-batches, and packed rows of several lengths, under the step as it
   is. Memory is proven from the smallest up, to the first that does not fit. Where none fits they are tried again with
   what takes less memory: the lean loss, checkpointing, both. Where memory alone bounds the fastest layout, the next
   larger ones are tried with each of these too, beside the fastest that fits without.
2. Steps. With the fastest layout: the lean loss, the other attention, fewer threads, no checkpointing, no compiling.
   Each alone. Presets whose layouts are not alike are looked at apart, where time allows (`planner.step_changes`).
3. The chain. The baseline as published, then one change after the other in the order in which they are listed, all in
   turns. What is kept is the fastest link; each link's share is its ratio to the one before.

Only changes that leave the window's gradient the same up to float tolerance are tried (`trainer.agreement` and
`trainer.lean` compare on the model itself). Quantized bases train something else and are tried only when asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from planner.chain import LEAST_ROUNDS, Step, Timed, is_faster, make_chain, twin_of
from planner.halfway import Halfway, Layout, usable
from planner.larger import bounded_by_memory, reliefs
from planner.measure import Progress
from planner.measurement import PlannedRow, StepSignature
from planner.prober import ProberFactory
from planner.step_changes import leaders, step_changes
from planner.strata import LEAST_STRATA, Kind
from planner.trials import Changes, Trials, row_name
from planner.twin import TOO_SHORT, Change, Twin, Untimed, Wanted, split_text
from presets.errors import MeasurementError
from presets.text import listed
from trainer.packing import MOST_SPREAD
from trainer.tokens import TokenizedDataset

CPU_MICRO_BATCHES = (1, 2, 4, 8)
GPU_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
PACKED_ROWS = (1, 2, 4, 8)  # times the longest example, rounded up to a power of two
MOST_PACKED_TOKENS = {"cpu": 4096, "cuda": 32768, "mps": 8192}
WINDOW_MULTIPLE = 256  # tokens, to which a window's longest row is rounded up
DOES_NOT_FIT = "it does not fit"
LEAST_MEMORY = "with the lean loss, checkpointing, or both"
STAGE_SHARES = (0.45, 0.25, 0.30)  # of the time budget
# On a GPU a small micro-step takes as long as a large one, so the layouts that are many times slower than the best take
# nearly all of the time: they are timed in a first heat only, which goes on to no more than two rounds.
HEAT_SHARE = 0.4  # of the layouts' time, at most, and one round in any case
HEAT_ROUNDS = 2
HEAT_SLOWER = 1.5  # what takes so many times the best in the heat is not timed again: noise makes no such difference
CHAIN_ROUNDS = 6  # that a GPU has to have time for in the chain, or the link that is needed least is left out
LARGER_SHARE = 0.15  # what it takes beyond what the layouts left of theirs, the later stages have less


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
        budget_seconds: bounds the seconds spent timing, over all stages.
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
        self.budget = budget
        self.quantized = quantized
        self.keep = keep
        self.trials = Trials(wanted, data, factory, progress, clock, seed)
        self.refused = self.trials.refused
        self.untimed: dict[str, str] = {}  # preset -> why nothing of it can be timed
        self.bounded: dict[str, list[Changes]] = {}  # layouts to be tried with less memory
        self.is_gpu = wanted[0].job.device != "cpu"
        self.saved = 0.0  # seconds that the stage before left of its time; on a GPU the next has them
        self.later = 1.0  # share of their time that the stages after the layouts have

    def tune(self, earlier: Sequence[Halfway]) -> tuple[Twin | Untimed, ...]:
        try:
            best, steps = self._interrupted(earlier)
            if not best:
                best = self._first_stage(self._layouts())
                self._keep(best, None)
            if any(self.bounded.values()):
                best = self._larger(best)
                self._keep(best, None)
            if steps is None:
                steps = self._second_stage(best)
                if TOO_SHORT not in self.refused:
                    self._keep(best, steps)
            return self._third_stage(best, steps)
        finally:
            self.trials.close()

    def _interrupted(
        self, earlier: Sequence[Halfway]
    ) -> tuple[dict[str, list[Timed]], dict[str, tuple[Change, ...]] | None]:
        """Layouts and changes of the step that an earlier search found before it was interrupted."""
        found = usable(earlier, self.wanted)
        if not found:
            return {}, None
        by_name = {one.preset: one for one in earlier if one.preset in found}
        for name, one in by_name.items():
            self.refused += one.refused
            self.bounded[name] = list(one.bounded)
        steps = {name: one.steps for name, one in by_name.items() if one.steps is not None}
        is_whole = len(steps) == len(found)
        self.trials.tell(f"{'layouts, steps' if is_whole else 'layouts'}: known from a search that was interrupted")
        best = {
            name: [Timed(job=job, changes=layout.changes, seconds=layout.seconds) for job, layout in layouts]
            for name, layouts in found.items()
        }
        return best, steps if is_whole else None

    def _keep(self, best: dict[str, list[Timed]], steps: Mapping[str, Sequence[Change]] | None) -> None:
        if self.keep is None or self.untimed:
            return
        self.keep(
            [
                Halfway(
                    preset=name,
                    layouts=tuple(Layout(changes=one.changes, seconds=one.seconds) for one in timed),
                    bounded=tuple(self.bounded.get(name, ())),
                    steps=None if steps is None else tuple(steps[name]),
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
            found.append(Change(name="micro-batch", micro_batch_size=size))
        longest = int(self.data.lengths.max())
        least = 1 << max(5, math.ceil(math.log2(max(2, longest))))
        lengths = [least * rows for rows in PACKED_ROWS if least * rows <= MOST_PACKED_TOKENS[first.device]]
        if first.device == "cuda" and not first.packing:
            lengths = sorted({*lengths, *self._whole_windows(MOST_PACKED_TOKENS[first.device])})
        if lengths and not first.packing:
            reason = self.trials.packing_refused(first, lengths[-1])
            shares = first.share_beginnings
            if reason is not None and first.shares_beginnings and self.data.beginnings is not None:
                shares = False
                reason = self.trials.packing_refused(replace(first, share_beginnings=False), lengths[-1])
            if reason is None:
                whole = None if shares == first.share_beginnings else False
                found += [
                    Change(name="packing", packed_length=length, micro_batch_size=1, share_beginnings=whole)
                    for length in lengths
                ]
            else:
                self.refused.append(f"packing: {reason}")
        return found

    def _whole_windows(self, most: int) -> set[int]:
        """Tokens of rows that each hold a window of each preset as a whole, or an even part where that is too long.

        A window that is little longer than a row leaves a second, nearly empty one, which costs a GPU a third of a full
        one or more: launching its kernels takes as long. On an H200 windows took 0.20 to 0.23 s as one row, and 0.31 to
        0.34 s as a row of up to 16,384 tokens and a rest (a 1 B model, 2026-11-26).
        """
        found = set()
        most -= most % WINDOW_MULTIPLE
        for wanted in self.wanted:
            plan = self.trials.row(wanted.name, wanted.job).plan
            own, once, least = self.data.lengths, 0, 0
            beginnings = self.data.beginnings if wanted.job.shares_beginnings else None
            if beginnings is not None:
                least = -(-int(plan.per_window(own).max()) // MOST_SPREAD)
                own, once = own - beginnings.sizes[beginnings.families], int(beginnings.sizes.sum())
            longest = max(least, int(plan.per_window(own).max()) + once)
            part = longest / -(-longest // most)
            found.add(math.ceil(part / WINDOW_MULTIPLE) * WINDOW_MULTIPLE)
        return found

    def _first_stage(self, layouts: list[Change]) -> dict[str, list[Timed]]:
        """The layouts of each preset, the fastest first; as written is among them where it fits.

        Presets of which nothing can be timed are left out from here on.

        Raises:
            MeasurementError: nothing is left.
        """
        timed = self._with_relief((), layouts, self.wanted)
        for relief in reliefs(self.wanted[0].job):
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
        self.saved = max(0.0, STAGE_SHARES[0] * self.budget - self.trials.spent)
        return {one.name: timed[one.name] for one in self.wanted}

    def _with_relief(self, relief: Changes, layouts: list[Change], wanted: Sequence[Wanted]) -> dict[str, list[Timed]]:
        """Each preset's layouts with these changes, the fastest first. What fails for another reason than memory is
        not tried again."""
        rows = self.trials.rows({one.name: [relief, *((*relief, layout) for layout in layouts)] for one in wanted})
        what = f"layouts, {' and '.join(change.text for change in relief)}" if relief else "layouts"
        optional = [row.name for row in rows if " + " in row.name]  # never what is as written
        seconds = STAGE_SHARES[0] * self.budget
        before = self.trials.spent
        if self.is_gpu:
            heat = HEAT_SHARE * seconds
            found = self.trials.measure(rows, heat, what, optional=optional, most_rounds=HEAT_ROUNDS)
        else:
            found = self.trials.measure(rows, seconds, what, optional=optional)
        timed = self.trials.timed(rows, found)
        if self.is_gpu:
            timed = self._final(rows, timed, seconds - (self.trials.spent - before), what)
        too_large = {} if relief else self.trials.too_large(rows, found)
        by_name = {row.name: row for row in rows}
        for one in wanted:
            row = by_name.get(row_name(one.name, relief))
            judged = None if row is None else self.trials.judged(row, found)
            if not timed[one.name] and (judged is None or judged.fits is not False):
                self.untimed[one.name] = (judged.error if judged else None) or "no verdict"
            if timed[one.name] and one.name in too_large:
                self.bounded[one.name] = bounded_by_memory(timed[one.name], too_large[one.name])
        return {one.name: timed[one.name] for one in wanted}

    def _final(
        self, rows: list[PlannedRow], heat: dict[str, list[Timed]], seconds: float, what: str
    ) -> dict[str, list[Timed]]:
        """Each preset's layouts, the fastest first: those not plainly slower in the heat as they are timed again.

        The others have what they took in the heat, as if timed with these: as written may be one, and the chain times
        that again in any case.
        """
        near = {
            name: [one for one in ones if one.seconds < HEAT_SLOWER * ones[0].seconds] for name, ones in heat.items()
        }
        names = {row_name(name, one.changes) for name, ones in near.items() if len(ones) > 1 for one in ones}
        again = [row for row in rows if row.name in names]
        if not again or seconds <= 0:  # the heat's one round took it all: another would tell no more than that one
            return heat
        timed = self.trials.timed(again, self.trials.measure(again, seconds, what, optional=names))
        merged = dict(heat)
        for name, anew in timed.items():
            known = {one.changes: one for one in heat[name]}
            if not anew:
                continue
            factor = sum(one.seconds for one in anew) / sum(known[one.changes].seconds for one in anew)
            left = {one.changes for one in near[name]}  # one that failed now is none
            others = [replace(one, seconds=one.seconds * factor) for one in heat[name] if one.changes not in left]
            merged[name] = sorted([*anew, *others], key=lambda one: one.seconds)
        return merged

    def _larger(self, best: dict[str, list[Timed]]) -> dict[str, list[Timed]]:
        """The layouts again, and before them the larger ones that are faster with less memory than those that fit."""
        asked: dict[str, list[Changes]] = {}
        for one in self.wanted:
            tried = [(*relief, *layout) for relief in reliefs(one.job) for layout in self.bounded.get(one.name, ())]
            if tried:
                asked[one.name] = [best[one.name][0].changes, *tried]
        self.bounded = {}
        if not asked:
            return best
        rows = self.trials.rows(asked)
        needed = {row_name(name, changes[0]) for name, changes in asked.items()}
        optional = [row.name for row in rows if row.name not in needed]
        share = LARGER_SHARE * self.budget
        left = max(0.0, STAGE_SHARES[0] * self.budget - self.trials.spent)
        before = self.trials.spent
        found = self.trials.measure(rows, share, "larger splits", optional=optional)
        beyond = max(0.0, self.trials.spent - before - left)
        self.saved = max(0.0, left - (self.trials.spent - before))
        self.later = 1 - min(share, beyond) / (sum(STAGE_SHARES[1:]) * self.budget)
        timed = self.trials.timed(rows, found)
        merged = dict(best)
        for name in asked:
            fastest = best[name][0]
            base = next((one for one in timed[name] if one.changes == fastest.changes), None)
            if base is None:
                continue
            if len(base.replicates) < LEAST_ROUNDS:
                self.refused.append(TOO_SHORT)
            faster = [
                replace(one, seconds=one.seconds * fastest.seconds / base.seconds)  # as if timed with the others
                for one in timed[name]
                if one is not base and is_faster(one.replicates, base.replicates)
                if self.trials.lean_is_real(found, name, one)
            ]
            merged[name] = sorted([*best[name], *faster], key=lambda one: one.seconds)
        return merged

    # --- 2: steps -----------------------------------------------------------------------------------------------------

    def _second_stage(self, best: dict[str, list[Timed]]) -> dict[str, tuple[Change, ...]]:
        """Of each preset the changes of the step that save time with its fastest layout, or a like one, the best first.

        What gains with one layout is in the chain of every preset that it leads, and so timed with theirs.
        """
        seconds = self._seconds(1)
        tried = {one.name: self._step_changes(best[one.name][0], one) for one in self.wanted}
        plans = {one.name: self.trials.row(one.name, best[one.name][0].job).plan for one in self.wanted}
        micro_batches = {name: plan.num_micro_batches // plan.num_devices for name, plan in plans.items()}
        counts = {name: len(changes) for name, changes in tried.items()}
        led_by = leaders(self.wanted, best, micro_batches, counts, seconds)
        asked = {}
        for name in dict.fromkeys(led_by.values()):
            fastest = best[name][0].changes
            if tried[name]:
                asked[name] = [fastest, *((*fastest, change) for change in tried[name])]
        micro = {name: best[name][0].seconds / max(1, micro_batches[name]) for name in asked}
        each_round = 2 * LEAST_STRATA * sum(micro[name] * len(variants) for name, variants in asked.items())
        if self.is_gpu and (LEAST_ROUNDS - 0.5) * each_round > seconds:  # the last round may end late by a half
            # Too few rounds to tell any from chance would be run all the same, in time that the chain needs.
            asked = {}
            self.refused.append(TOO_SHORT)
        gains: dict[str, tuple[Change, ...]] = {}
        before = self.trials.spent
        if asked:
            rows = self.trials.rows(asked)
            found = self.trials.measure(rows, seconds, "steps")
            timed = self.trials.timed(rows, found)
            for name, variants in asked.items():
                base = next((one for one in timed[name] if one.changes == variants[0]), None)
                if base is None:
                    continue
                if len(base.replicates) < LEAST_ROUNDS:
                    self.refused.append(TOO_SHORT)
                gains[name] = tuple(
                    one.changes[-1]
                    for one in timed[name]  # the fastest first
                    if one is not base and self.trials.lean_is_real(found, name, one)
                    if is_faster(one.replicates, base.replicates)
                )
        self.saved = seconds - (self.trials.spent - before)  # all of it where there is nothing to try
        for leader in asked:
            splits = {name: split_text(best[name][0].job) for name, led in led_by.items() if led == leader}
            others = [f"'{name}' ({text})" for name, text in splits.items() if text != splits[leader]]
            if others:
                self.refused.append(
                    f"changes of the step that gain with the split of {listed(others)} alone: they were looked for "
                    f"with that of '{leader}' ({splits[leader]})"
                )
        return {
            name: tuple(change for change in gains.get(leader, ()) if change in tried[name])
            for name, leader in led_by.items()
        }

    def _seconds(self, stage: int) -> float:
        """What a later stage may take: its share, and on a GPU what those before it left, down to half of its share."""
        share = STAGE_SHARES[stage] * self.later * self.budget
        return max(share / 2, share + self.saved) if self.is_gpu else share

    def _step_changes(self, fastest: Timed, wanted: Wanted) -> list[Change]:
        job = fastest.job
        found = []
        for change in step_changes(job, wanted.job, quantized=self.quantized):
            reason = None
            if change.attention is not None and job.packing:
                asked = change.applied(job)
                reason = self.trials.packing_refused(asked, job.packed_length or job.preset.max_length)
            if reason is None:
                found.append(change)
            else:
                self.refused.append(f"{change.text} with packing: {reason}")
        return found

    # --- 3: the chain -------------------------------------------------------------------------------------------------

    def _third_stage(
        self, best: dict[str, list[Timed]], steps: Mapping[str, Sequence[Change]]
    ) -> tuple[Twin | Untimed, ...]:
        seconds = self._seconds(2)
        chains = self._chains(best, steps, seconds)
        rows = {
            name: [self.trials.row(f"{name} #{number}", step.job) for number, step in enumerate(chain)]
            for name, chain in chains.items()
        }
        found = self.trials.measure([row for some in rows.values() for row in some], seconds, "the chain")
        twins: list[Twin | Untimed] = [Untimed(preset=name, reason=reason) for name, reason in self.untimed.items()]
        for one in self.wanted:
            chain = chains[one.name]
            replicates = [
                self.trials.usable(row, found, _link_name(one, step))
                for row, step in zip(rows[one.name], chain, strict=True)
            ]
            twins.append(twin_of(one, chain, replicates, self.refused))
        return tuple(twins)

    def _chains(
        self, best: Mapping[str, Sequence[Timed]], steps: Mapping[str, Sequence[Change]], seconds: float
    ) -> dict[str, list[Step]]:
        """Each preset's chain; on a GPU without links that would leave too little time to tell any from chance."""
        chains = {one.name: make_chain(one, best[one.name], steps[one.name]) for one in self.wanted}
        if self.is_gpu and CHAIN_ROUNDS * self._round_seconds(chains, best) > seconds:
            # The link of rows that stand together only tells what packing adds to it, and costs as much as all others.
            chains = {one.name: make_chain(one, best[one.name], steps[one.name], is_direct=True) for one in self.wanted}
            if any(steps.values()) and (LEAST_ROUNDS + 1) * self._round_seconds(chains, best) > seconds:
                chains = {one.name: make_chain(one, best[one.name], (), is_direct=True) for one in self.wanted}
                self.refused.append(TOO_SHORT)
        return chains

    def _round_seconds(self, chains: Mapping[str, Sequence[Step]], best: Mapping[str, Sequence[Timed]]) -> float:
        """About what one round over chains takes on a GPU, by what their layouts took."""
        of_kind: dict[tuple[StepSignature, Kind], float] = {}
        for name, chain in chains.items():
            micro = {}
            for one in best[name]:
                plan = self.trials.row(name, one.job).plan
                micro[split_text(one.job)] = one.seconds * plan.num_devices / plan.num_micro_batches
            for step in chain:
                key = (StepSignature.of(step.job), self.trials.row(name, step.job).kind)
                of_kind[key] = max(of_kind.get(key, 0.0), micro.get(split_text(step.job), 0.0))
        return 2 * LEAST_STRATA * sum(of_kind.values())  # each is run twice


def _link_name(wanted: Wanted, step: Step) -> str:
    return (
        f"{wanted.name} {step.name}" if step.name == "baseline" and wanted.name == wanted.baseline.name else step.name
    )
