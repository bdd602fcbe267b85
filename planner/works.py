"""What batch plans over the same data come to, each summed up once: a table asks the same of many rows. numpy only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from planner.estimator import PlanWork, plan_work
from planner.measurement import PlannedRow
from planner.strata import Kind, Strata, keys
from trainer.batching import BatchPlan, MicroShapes
from trainer.evaluate import evaluation_batches
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
        self._padded: dict[tuple[bytes, str, int], int] = {}
        self._learnt: dict[int, float] = {}
        self._num_shapes: dict[int, int] = {}

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

    def num_shapes(self, plan: BatchPlan) -> int:
        """How many different shapes the micro-batches of one device have, at most, as they are made on a GPU."""
        if id(plan) not in self._num_shapes:
            shapes = self._shapes(plan)
            widest = shared_width(int(shapes.width.max(initial=0)))
            met = np.zeros((int(shapes.rows.max(initial=0)) + 1, widest + 1), dtype=bool)
            for some in shapes.blocks():
                met[some.rows, shared_width(some.width)] = True
            share = -(-plan.num_micro_batches // plan.num_devices)
            self._num_shapes[id(plan)] = min(int(np.count_nonzero(met[1:])), share)
        return self._num_shapes[id(plan)]

    def evaluation_padded(self, examples: IntArray, device: str, num_devices: int) -> int:
        """Padded tokens of one forward pass over some examples, on the device with the most.

        Several devices take the batches in turns, and wait for the one with the most work.
        """
        key = (hashlib.sha256(examples.tobytes()).digest(), device, num_devices)
        if key not in self._padded:
            lengths = self._data.lengths
            batches = evaluation_batches(self._data, examples, device)
            each = [len(batch) * int(lengths[batch].max()) for batch in batches]
            self._padded[key] = max(sum(each[first::num_devices]) for first in range(num_devices))
        return self._padded[key]

    def supervised_share(self, plan: BatchPlan) -> float:
        """Of the tokens in a plan, those that are learnt from, 0 to 1."""
        if id(plan) not in self._learnt:
            self._plans[id(plan)] = plan
            data, order = self._data, plan.order
            self._learnt[id(plan)] = float(data.num_supervised[order].sum() / max(1, data.lengths[order].sum()))
        return self._learnt[id(plan)]

    def _shapes(self, plan: BatchPlan) -> MicroShapes:
        self._plans[id(plan)] = plan
        if self._last is None or self._last[0] is not plan:
            self._last = None  # frees those before the next are made
            self._last = (plan, plan.micro_shapes(self._data.lengths))
        return self._last[1]
