"""Decides what to time and gathers samples: which worker, which micro-batches, in which order, until when."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from planner.decks import Decks, Drawn, sample_of
from planner.estimate import with_references as with_references
from planner.estimator import Estimator, PlanWork, plan_work
from planner.first_times import First, FirstTimes
from planner.fixed import measure_fixed
from planner.group import Group, rows_of
from planner.measured import measurement_of, what_to_tell
from planner.measurement import (
    Conditions,
    Measurement,
    Measurements,
    PlannedRow,
    Round,
    RowVerdict,
    StepSignature,
    WindowSample,
)
from planner.memory import SAME_SHAPE, MemoryProbe
from planner.prober import DoesNotFit, Prober, ProberFactory
from planner.rounds import LEAST_ROUNDS, REFERENCE_EVERY, choose_classes, turn_of
from planner.sequence import sequence
from planner.standing import Standing
from planner.steadiness import is_slow_to_start, split_warmup
from planner.strata import Strata, keys
from presets.errors import MeasurementError, PlanError
from trainer.batching import MicroShapes
from trainer.tokens import FloatArray, TokenizedDataset
from trainer.widths import shared_width

# Who looks briefly sees neither a machine that changes nor rare slow micro-steps, and finds the interval narrow. So
# half of the budget is always used, and three quarters unless the interval is much narrower than asked.
LEAST_SHARE = 0.5
USUAL_SHARE = 0.75
MUCH_NARROWER = 0.25  # of the target
MOST_ROUNDS = 1000
SEARCH_LEAST = 3  # rounds that tell two apart: as few are kept with the first, and one more may end a little late
WINDOW_MICROS = 16  # micro-batches of a window timed as a whole; a longer window is cut
WINDOW_AFTER = (2, 5, 10, 20, 40)  # rounds after which one is timed
WINDOW_SHARE = 0.2  # of the budget that is left, at most, for one window

Progress = Callable[[str, float], None]  # (what is being done, share of the budget spent)
Meter = Callable[[], Conditions]  # what went on since it was last asked


def measure(
    plans: list[PlannedRow],
    data: TokenizedDataset,
    prober_factory: ProberFactory,
    budget_seconds: float = 60.0,
    precision_target: float = 0.02,
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
    meter: Meter | None = None,
    with_fixed: bool = True,
    optional: frozenset[str] = frozenset(),
    standing: Standing | None = None,
    most_rounds: int = MOST_ROUNDS,
    seed: int = 0,
) -> Measurements:
    """Time the step signatures of some rows over their own batch plans.

    Args:
        plans: the rows, with distinct names; see `with_references` for the speed factor.
        budget_seconds: bounds the seconds spent timing. Process starts, memory and fixed parts come on top.
        precision_target: stop once the 90 % interval of every row's total is this narrow (half of it, relative).
        progress: told what is being done and the share of the budget spent.
        with_fixed: also time what a run does beside its steps.
        optional: names of rows that may be left out where they are plainly slower than others.
        standing: workers that earlier calls left; this one leaves its own there.
        most_rounds: stop after so many, for a first look at many rows.
        meter: asked after each round what else went on; see planner.conditions.

    Raises:
        MeasurementError: nothing could be measured, for a reason other than memory.
    """
    return _Measuring(
        plans,
        data,
        prober_factory,
        budget_seconds,
        precision_target,
        clock,
        progress,
        meter,
        with_fixed,
        optional,
        standing,
        most_rounds,
        seed,
    ).measure()


class _Measuring:
    """One call of `measure`: its settings, and what it has found so far."""

    def __init__(
        self,
        rows: list[PlannedRow],
        data: TokenizedDataset,
        prober_factory: ProberFactory,
        budget: float,
        target: float,
        clock: Callable[[], float],
        progress: Progress | None,
        meter: Meter | None,
        with_fixed: bool,
        optional: frozenset[str],
        standing: Standing | None,
        most_rounds: int,
        seed: int,
    ) -> None:
        if not rows:
            raise MeasurementError("there is nothing to measure: no configuration was given.")
        self.data = data
        self.factory = prober_factory
        self.budget = budget
        self.target = target
        self.clock = clock
        self.meter = meter
        self.with_fixed = with_fixed
        # A search on a GPU: micro-steps take long there, however small, and its budget is short for all that it tries.
        self.is_search = not with_fixed and rows[0].job.device != "cpu"
        self.most_rounds = most_rounds
        self.standing = standing
        self.tell = progress or (lambda text, share: None)
        self.random = np.random.default_rng([seed, 0x4D])
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.spent = 0.0
        self.shapes: dict[int, MicroShapes] = {}  # by the plan's identity: rows can share one
        lengths = data.lengths
        for row in rows:
            if id(row.plan) not in self.shapes:
                self.shapes[id(row.plan)] = row.plan.micro_shapes(lengths)
        groups: dict[StepSignature, list[PlannedRow]] = {}
        for row in rows:
            groups.setdefault(StepSignature.of(row.job), []).append(row)
        self.groups = [Group(signature, members) for signature, members in groups.items()]
        self.memory = MemoryProbe(
            self.groups,
            data,
            self.shapes,
            start=self._start,
            tell=self.tell,
            warnings=self.warnings,
            budget=budget,
            optional=optional,
            thorough=with_fixed,  # without: what matters is what is fastest, not what it holds to the byte
        )
        self.rows = rows
        self.strata = Strata(kinds=())
        self.next_look = LEAST_ROUNDS  # rounds after which the interval is looked at again
        self.draws = 1  # micro-batches of each stratum in a round
        self.work: dict[str, PlanWork] = {}
        self.warmup: dict[StepSignature, tuple[int, int]] = {}  # of so many rounds, so many are warm-up

    def measure(self) -> Measurements:
        together = False
        try:
            if self.standing is not None:
                self.standing.give(self.groups)
            for group in self.groups:
                self.memory.probe(group)
                if self.with_fixed:
                    self.memory.probe_evaluation(group)
            live = [group for group in self.groups if group.is_live]
            if live:
                self._stratify(live)
                together = len(live) > 1 and self._fit_together(live)
                if together or len(live) == 1:
                    self._time([group for group in live if self._ensure_worker(group)], self.budget)
                    for group in live:
                        self._measure_fixed(group)
                else:
                    self.notes.append(
                        "the configurations do not fit on the device together: timed one after another, not in turns"
                    )
                    self._one_after_another(live)
                postponed = [group for group in live if group.is_postponed]
                if postponed:
                    names = ", ".join(group.rows[0].name for group in postponed)
                    self.notes.append(f"{names}: ran out of memory beside another configuration; timed alone")
                    for group in live:
                        group.is_postponed = False
                        group.close()
                    self._one_after_another(postponed)
        except BaseException:
            for group in self.groups:
                group.close()
            raise
        for group in self.groups:
            if self.standing is None:
                group.close()
            else:
                self.standing.keep(group)
        errors = [group.error for group in self.groups if group.error is not None]
        if errors and len(errors) == len(self.groups):
            raise MeasurementError(errors[0])
        measurements = tuple(self._result(group) for group in self.groups)  # adds notes and warnings
        return Measurements(
            strata=self.strata,
            measurements=measurements,
            rows=tuple(self._verdict(group, row) for group in self.groups for row in group.rows),
            in_turns=together,
            notes=tuple(self.notes),
            warnings=tuple(self.warnings),
        )

    def _start(self, group: Group) -> None:
        if group.prober is None:
            self.tell(f"start: {group.rows[0].name}", 0.0)
            group.prober = self.factory(group.rows[0].job)
            group.first_seconds = 0.0  # a new process loads its kernels again, and a run has one
            group.first_times = FirstTimes()
            reply = group.prober.load()
            group.load = group.load or reply

    def _ensure_worker(self, group: Group) -> bool:
        """Whether the group has a worker; starts one where it was stopped for room."""
        try:
            self._start(group)
        except (PlanError, DoesNotFit) as reason:
            self._give_up(group, reason, of=group.rows)
        return group.is_live

    def _fit_together(self, live: list[Group]) -> bool:
        """Whether all workers may stand on the device at once: reserved peaks still to come against what is free."""
        standing = [group for group in live if group.prober is not None]
        if not standing:
            return False
        try:
            assert standing[0].prober is not None
            free = standing[0].prober.free()
        except (PlanError, DoesNotFit) as reason:
            self._give_up(standing[0], reason, of=standing[0].rows)
            return False
        # On a GPU a worker that stands holds its peak: the allocator keeps what it reserved. On a CPU it gave it back.
        holds = live[0].signature.device == "cuda"
        return sum(group.reserved for group in live if not (holds and group.prober is not None)) < free

    # --- timing -------------------------------------------------------------------------------------------------------

    def _one_after_another(self, live: list[Group]) -> None:
        """Time each alone, with an equal share of what is left of the budget, references with less."""

        def weight(group: Group) -> float:
            return 1 / REFERENCE_EVERY if group.is_reference else 1.0

        live = sorted(live, key=lambda group: group.prober is None)
        for number, group in enumerate(live):
            for other in live:
                if other is not group:
                    other.close()
            if self._ensure_worker(group):
                share = weight(group) / sum(map(weight, live[number:]))
                self._time([group], max(0.0, self.budget - self.spent) * share)
                self._measure_fixed(group)
            group.close()

    def _stratify(self, live: list[Group]) -> None:
        chosen = choose_classes(live, self.shapes, self.budget, is_search=self.is_search)
        self.strata, self.draws = chosen.strata, chosen.draws
        self.warnings += chosen.warnings
        self.work = {
            row.name: plan_work(row, self.shapes[id(row.plan)], self.strata) for group in live for row in group.fitting
        }

    def _time(self, groups: list[Group], budget: float) -> None:
        """Rounds until every row's interval is narrow enough, or the budget is spent. In turns: A B, B A, A B ..."""
        groups = [group for group in groups if group.is_live and group.prober is not None]
        if not groups:
            return
        decks = self._decks(groups)
        begun = self.spent
        self.next_look = LEAST_ROUNDS
        for number in range(MOST_ROUNDS):
            if any(group.prober is None for group in groups):
                # One that dropped its largest rows goes on with the others, in a new process.
                groups = [group for group in groups if group.is_live and self._ensure_worker(group)]
                if not groups:
                    return
                decks = self._decks(groups)
            left = budget - (self.spent - begun)
            turn = turn_of(groups, number)
            if number and not self._another_round(groups, turn, budget, left, number):
                break
            if all(len(group.rounds) >= self.most_rounds for group in groups):
                break
            draw = decks.draw(self.random)
            for group in turn if number % 2 == 0 else turn[::-1]:
                self._guarded(group, functools.partial(self._round, group, draw))
            if number + 1 in WINDOW_AFTER and not self.is_search:  # which needs none
                for group in groups:
                    if group.prober is None or group.is_reference:
                        continue
                    self._guarded(group, functools.partial(self._window, group, budget - (self.spent - begun)))
            self.tell(f"timing, round {number + 1}", min(1.0, self.spent / max(self.budget, 1e-9)))
        else:
            for group in groups:
                group.ended_by = "rounds"

    def _decks(self, groups: list[Group]) -> Decks:
        rows = {id(row.plan): row for group in groups for row in group.fitting}
        return Decks(list(rows.values()), self.shapes, self.strata, self.draws)

    def _another_round(self, groups: list[Group], turn: list[Group], budget: float, left: float, done: int) -> bool:
        """Whether to go on with the round of `turn`, and if not, why: written to the groups."""
        if done >= max(LEAST_ROUNDS, self.next_look) and left <= (1 - LEAST_SHARE) * budget:
            allowed = self.target * (1 if left <= (1 - USUAL_SHARE) * budget else MUCH_NARROWER)
            excess = max((self._width(group) for group in groups if not group.is_reference), default=0.0) / allowed
            if excess <= 1:
                for group in groups:
                    group.ended_by = "precision"
                return False
            # Widths go with 1 / sqrt(rounds): look again when it should do. Who looks after every round stops where a
            # few happen to agree, or before the first rare slow one, and the interval then holds too seldom.
            growth = min(2.0, max(1.2, excess**2)) if allowed == self.target else USUAL_SHARE / (1 - left / budget)
            self.next_look = math.ceil(done * growth)
        expected = sum(group.round_seconds for group in turn if group.rounds)
        if left < expected and (done >= (SEARCH_LEAST + 1 if self.is_search else 2) or left < 0.5 * expected):
            for group in groups:
                group.ended_by = "budget"
            return False
        return True

    def _width(self, group: Group, least: int = LEAST_ROUNDS) -> float:
        """Relative half-width of the interval, of the row where it is the widest; infinite from too few rounds."""
        rounds = self._kept(group)
        if len(rounds) < least:
            return math.inf
        estimators = {kind: Estimator(rounds, self.strata, kind) for kind in {row.kind for row in group.fitting}}
        return max(estimators[row.kind].total(self.work[row.name]).relative_half_width for row in group.fitting)

    def _kept(self, group: Group) -> tuple[Round, ...]:
        """The rounds without warm-up."""
        rounds = tuple(group.rounds)
        known = self.warmup.get(group.signature)
        if known is None or known[0] != len(rounds):
            row = group.fitting[0]

            def totals(first: int) -> FloatArray:
                return Estimator(rounds[first:], self.strata, row.kind).total(self.work[row.name]).raw_replicates

            # The first round meets every class of shapes for the first time; where that does not show, it counts.
            # A search would decide nothing from fewer. With a slow first round they scatter more, and it asks for more.
            is_enough = not self.is_search or len(rounds) > SEARCH_LEAST
            first = 1 if is_enough and is_slow_to_start(totals(0)) else 0
            if len(rounds) - first > LEAST_ROUNDS:
                first += split_warmup(totals(first), LEAST_ROUNDS)
            known = self.warmup[group.signature] = (len(rounds), first)
        return rounds[known[1] :]

    def _round(self, group: Group, draw: list[Drawn]) -> None:
        prober = group.prober
        assert prober is not None
        kinds = {row.kind for row in group.fitting}
        drawn = [one for one in draw if one.kind in kinds and one.key <= group.largest_key]
        started = self.clock()
        on_gpu = group.signature.device != "cpu"
        # On a GPU twice, the second time in another order, and that time counts.
        seconds, is_new, places = self._run(group, prober, drawn, list(range(len(drawn))))
        if on_gpu:
            first = seconds
            seconds, _, places = self._run(group, prober, drawn, self.random.permutation(len(drawn)).tolist())
            each = zip(first, seconds, is_new, drawn, strict=True)
            group.first_times.add([First(before, again, new, one.sample.stratum) for before, again, new, one in each])
        optimizer = prober.optimizer(1)
        group.round_seconds = self._spend(group, started)
        # In the order of time, in which a machine that changes shows.
        in_order = sorted(range(len(drawn)), key=places.__getitem__)
        samples = tuple(replace(drawn[number].sample, seconds=seconds[number]) for number in in_order)
        group.rounds.append(
            Round(
                started=started,
                samples=samples,
                optimizer_seconds=tuple(optimizer),
                conditions=self.meter() if self.meter else None,
            )
        )

    def _run(
        self, group: Group, prober: Prober, drawn: list[Drawn], order: list[int]
    ) -> tuple[list[float], list[bool], list[int]]:
        """Of each of what was drawn, run in an order: seconds, whether its shape was new to the process, its place."""
        asked = sequence(
            drawn,
            order,
            self.data,
            in_windows=group.signature.device != "cpu",
            most=group.largest_key,
        )
        taken = prober.run(asked.micro_batches, asked.begins, asked.longest_rows)
        is_new = group.first_times.meet(asked.shapes)
        return [taken[place] for place in asked.places], [is_new[place] for place in asked.places], asked.places

    def _window(self, group: Group, left: float) -> None:
        """Time one window as a whole, where it takes no more than its share of what is left of the budget."""
        prober = group.prober
        assert prober is not None
        row = group.fitting[int(self.random.integers(len(group.fitting)))]
        plan, shapes = row.plan, self.shapes[id(row.plan)]
        window = int(self.random.integers(plan.num_steps))
        first, last = int(plan.window_offsets[window]), int(plan.window_offsets[window + 1])
        micros = [micro for micro in range(first, last, plan.num_devices) if shapes.rows[micro] > 0]
        if len(micros) > WINDOW_MICROS:  # evenly over the window: its longest stand first
            micros = [micros[i * len(micros) // WINDOW_MICROS] for i in range(WINDOW_MICROS)]
        of = self.strata.of(row.kind, shapes.part(np.array(micros, dtype=np.int64)))
        samples = tuple(sample_of(shapes, micro, int(stratum)) for micro, stratum in zip(micros, of, strict=True))
        if Estimator(self._kept(group), self.strata, row.kind).window_seconds(samples) > WINDOW_SHARE * left:
            return
        started = self.clock()
        longest = shapes.longest_row(row.job.packing)
        seconds = prober.window([rows_of(plan, micro) for micro in micros], longest)
        self._spend(group, started)
        is_new = group.first_times.meet([(one.rows, shared_width(one.width, longest)) for one in samples])
        on_gpu = group.signature.device != "cpu"
        new = tuple(one.stratum for one, is_one in zip(samples, is_new, strict=True) if is_one and on_gpu)
        group.windows.append((len(group.rounds), WindowSample(samples=samples, seconds=seconds, new_shapes=new)))

    def _spend(self, group: Group, started: float) -> float:
        seconds = self.clock() - started
        group.spent += seconds
        self.spent += seconds
        return seconds

    def _guarded(self, group: Group, action: Callable[[], None]) -> None:
        """Run an action of one group so that its failure is its own, and running out of memory that of its largest."""
        try:
            action()
        except (PlanError, DoesNotFit) as reason:
            self._give_up(group, reason, of=self._largest(group))

    def _largest(self, group: Group) -> list[PlannedRow]:
        """The rows whose worst micro-batch is the worst of all, or nearly so."""
        worst = {row.name: float(keys(self.shapes[id(row.plan)]).max()) for row in group.fitting}
        return [row for row in group.fitting if worst[row.name] >= SAME_SHAPE * max(worst.values())]

    def _give_up(self, group: Group, reason: Exception, *, of: list[PlannedRow]) -> None:
        """After a failure: `of` these rows where memory ran out, else of all.

        A micro-batch that just fitted by itself may no longer do so among others, whose shapes leave holes between the
        blocks of memory. Smaller ones still do.
        """
        group.close()
        self.warmup.pop(group.signature, None)
        if isinstance(reason, DoesNotFit) and any(other.prober is not None for other in self.groups):
            group.is_postponed = True
            group.rounds.clear()
            group.windows.clear()
        elif isinstance(reason, DoesNotFit):
            for row in of:
                group.verdicts[row.name] = replace(
                    group.verdicts[row.name], fits=False, error=f"does not fit: {reason}"
                )
            left = group.fitting
            group.largest_key = max((float(keys(self.shapes[id(row.plan)]).max()) for row in left), default=0.0)
            group.reserved = max((group.verdicts[row.name].peak_reserved_bytes or 0 for row in left), default=0)
        else:
            group.error = str(reason)

    def _measure_fixed(self, group: Group) -> None:
        if group.prober is None or not group.is_live or group.is_reference or not self.with_fixed:
            return
        self.tell("evaluation and checkpoint", 1.0)
        try:
            measure_fixed(group, group.prober, self.data, self.memory)
        except (PlanError, DoesNotFit) as reason:
            self.notes.append(f"{group.fitting[0].name}: not every fixed part could be measured ({reason})")

    # --- results ------------------------------------------------------------------------------------------------------

    def _result(self, group: Group) -> Measurement:
        kept = self._kept(group) if group.rounds and group.is_live else tuple(group.rounds)
        width = self._width(group, least=1) if group.is_live and kept else 0.0
        told = what_to_tell(group, kept, width, budget=self.budget, target=self.target)
        self.notes += told.notes
        self.warnings += told.warnings
        return measurement_of(group, kept)

    def _verdict(self, group: Group, row: PlannedRow) -> RowVerdict:
        verdict = group.verdicts[row.name]
        return verdict if group.error is None else replace(verdict, error=group.error)
