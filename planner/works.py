"""What batch plans over the same data come to, each summed up once: a table asks the same of many rows. numpy only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from planner.estimator import PlanWork, plan_work
from planner.measurement import PlannedRow
from planner.strata import Kind, Strata, keys
from trainer.batching import BatchPlan, MicroShapes
from trainer.evaluate import answerable, evaluation_batches
from trainer.tokens import IntArray, TokenizedDataset
from trainer.widths import shared_width


@dataclass(frozen=True, kw_only=True, slots=True)
class Extremes:
    """The micro-batches of a plan that decide whether it fits."""

    worst_padded: int  # padded tokens of the worst micro-batch, the widest among equals
    worst_width: int
    largest_padded: int


class Works:
    """Sums over plans, kept by the plan's identity; of what they are made from only the last plan's shapes are kept.

    Ten million micro-batches take 80 MB and more a plan, and a table has eight plans.
    """

    def __init__(self, data: TokenizedDataset) -> None:
        self._data = data
        self._plans: dict[int, BatchPlan] = {}  # held, so that an identity stands for one plan only
        self._last: tuple[BatchPlan, MicroShapes] | None = None
        self._extremes: dict[int, Extremes] = {}
        self._works: dict[tuple[int, Kind, Strata], PlanWork] = {}
        self._evaluations: dict[tuple[bytes, str, int, int], IntArray] = {}
        self._learnt: dict[int, float] = {}
        self._most_learnt: dict[int, int] = {}
        self._new_shapes: dict[tuple[int, Kind, Strata], dict[int, int]] = {}

    @property
    def num_examples(self) -> int:
        return len(self._data)

    def of(self, row: PlannedRow, strata: Strata) -> PlanWork:
        """As `plan_work`."""
        key = (id(row.plan), row.kind, strata)
        if key not in self._works:
            self._works[key] = plan_work(row, self._shapes(row.plan), strata)
        return self._works[key]

    def extremes(self, plan: BatchPlan) -> Extremes:
        if id(plan) not in self._extremes:
            worst, largest = (-1.0, 0, 0), 0
            for some in self._shapes(plan).blocks():
                key, padded = keys(some), some.padded_tokens
                at = int(key.argmax())
                worst = max(worst, (float(key[at]), int(padded[at]), int(some.width[at])))
                largest = max(largest, int(padded.max()))
            self._extremes[id(plan)] = Extremes(worst_padded=worst[1], worst_width=worst[2], largest_padded=largest)
        return self._extremes[id(plan)]

    def most_learnt(self, plan: BatchPlan) -> int:
        """The most tokens of a micro-batch that are learnt from, and so go through the output layer."""
        if id(plan) not in self._most_learnt:
            self._plans[id(plan)] = plan
            supervised = self._data.num_supervised
            # An example each: of ten million, half a second is saved.
            is_one_each = all(
                np.diff(offsets).max(initial=0) <= 1 for offsets in (plan.micro_offsets, plan.row_offsets)
            )
            each = supervised[plan.order] if is_one_each else plan.per_micro_batch(supervised)
            self._most_learnt[id(plan)] = int(each.max(initial=0))
        return self._most_learnt[id(plan)]

    def most_spread(self, plan: BatchPlan) -> int:
        """The most tokens of a micro-batch's documents, each as a whole; 0 where none shares its beginning."""
        return int(plan.per_micro_batch(self._data.lengths).max(initial=0)) if plan.shares_beginnings else 0

    def new_shapes(self, row: PlannedRow, strata: Strata) -> dict[int, int]:
        """How many different shapes the micro-batches of one device have in each stratum, at most, as made on a GPU."""
        key = (id(row.plan), row.kind, strata)
        if key not in self._new_shapes:
            shapes, devices = self._shapes(row.plan), row.plan.num_devices
            longest = shapes.longest_row(row.job.packing)
            widest = shared_width(shapes.widest, longest)
            met = np.zeros((strata.count, int(shapes.rows.max(initial=0)) + 1, widest + 1), dtype=bool)
            micros = np.zeros(strata.count, dtype=np.int64)
            for some in shapes.blocks():
                of = strata.of(row.kind, some)
                counted = (of >= 0) & (some.rows > 0)
                met[of[counted], some.rows[counted], shared_width(some.width[counted], longest)] = True
                micros += np.bincount(of[counted], minlength=strata.count)
            most = np.minimum(met.sum(axis=(1, 2)), -(-micros // devices))
            self._new_shapes[key] = {int(one): int(most[one]) for one in np.flatnonzero(most)}
        return self._new_shapes[key]

    def evaluation(self, examples: IntArray, device: str, num_devices: int, at_once: int) -> IntArray:
        """Padded tokens of each batch of one forward pass over some examples, on the device with the most.

        Several devices take the batches in turns, and wait for the one with the most work.

        Args:
            at_once: see `trainer.evaluate.evaluation_batches`.
        """
        key = (hashlib.sha256(examples.tobytes()).digest(), device, num_devices, at_once)
        if key not in self._evaluations:
            lengths = self._data.lengths
            batches = evaluation_batches(self._data, examples, device, at_once)
            each = [len(batch) * int(lengths[batch].max()) for batch in batches]
            shares = [each[first::num_devices] for first in range(num_devices)]
            self._evaluations[key] = np.array(max(shares, key=sum), dtype=np.int64)
        return self._evaluations[key]

    def num_answers(self, examples: IntArray, most: int) -> int:
        """How many of some examples, at most so many, a run writes answers to: those with a prompt to be read."""
        return len(answerable(self._data, examples, most))

    def supervised_share(self, plan: BatchPlan) -> float:
        """Of the tokens in a plan, those that are learnt from, 0 to 1."""
        if id(plan) not in self._learnt:
            self._plans[id(plan)] = plan
            data, order = self._data, plan.order
            computed = data.lengths[order].sum() - plan.saved.sum()
            self._learnt[id(plan)] = float(data.num_supervised[order].sum() / max(1, computed))
        return self._learnt[id(plan)]

    def _shapes(self, plan: BatchPlan) -> MicroShapes:
        self._plans[id(plan)] = plan
        if self._last is None or self._last[0] is not plan:
            self._last = None  # frees those before the next are made
            self._last = (plan, plan.micro_shapes(self._data.lengths))
        return self._last[1]
