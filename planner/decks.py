"""Which micro-batches a round times: one of each class, dealt like cards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.measurement import MicroSample, PlannedRow
from planner.strata import Kind, Strata, key_of, keys
from trainer.batching import BatchPlan, MicroShapes
from trainer.tokens import IntArray

POOL = 50_000  # micro-batches of a plan that a draw can come from, plus its longest
LONGEST = 200


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """One micro-batch of a round."""

    plan: BatchPlan
    micro: int
    kind: Kind
    key: float
    sample: MicroSample
    longest_row: int = 0  # tokens in the longest packed row of its plan; 0: its rows are not packed


class Decks:
    """For each stratum the micro-batches of all plans, shuffled and dealt without repeats until all were dealt.

    Every signature of a round gets the same micro-batches, so that their ratio is one of like with like.
    """

    def __init__(self, rows: list[PlannedRow], shapes: dict[int, MicroShapes], strata: Strata, draws: int) -> None:
        """
        Args:
            shapes: of each plan, by the plan's identity.
            draws: micro-batches of each stratum in a round.
        """
        self._rows, self._shapes, self._draws = rows, shapes, draws
        self._longest = [shapes[id(row.plan)].longest_row(row.job.packing) for row in rows]
        parts = []
        for number, row in enumerate(rows):
            chosen, some = part_of(shapes[id(row.plan)])
            parts.append(np.stack([strata.of(row.kind, some), np.full(len(chosen), number), chosen]))
        members = np.concatenate(parts, axis=1)  # stratum, number of the row, number of the micro-batch
        self._members = {int(one): members[1:, members[0] == one].T for one in np.unique(members[0]) if one >= 0}
        self._left: dict[int, list[int]] = {}

    def draw(self, random: np.random.Generator) -> list[Drawn]:
        """One micro-batch of each stratum, or several where strata are few, in random order."""
        drawn = []
        for stratum in random.permutation(sorted(self._members) * self._draws).tolist():
            members = self._members[stratum]
            left = self._left.get(stratum) or random.permutation(len(members)).tolist()
            number, micro = members[left.pop()].tolist()
            self._left[stratum] = left
            row = self._rows[number]
            sample = sample_of(self._shapes[id(row.plan)], micro, stratum)
            key = key_of(sample.rows, sample.width)
            drawn.append(Drawn(row.plan, micro, row.kind, key, sample, self._longest[number]))
        return drawn


def part_of(shapes: MicroShapes) -> tuple[IntArray, MicroShapes]:
    """Indices and shapes of a random part of a plan, its longest micro-batches always among them."""
    total = len(shapes.rows)
    if total <= POOL + LONGEST:
        return np.arange(total), shapes
    longest = np.argpartition(keys(shapes), total - LONGEST)[total - LONGEST :]
    part = np.random.default_rng([total, 0x50]).choice(total, POOL, replace=False)
    chosen = np.union1d(part, longest)
    return chosen, shapes.part(chosen)


def sample_of(shapes: MicroShapes, micro: int, stratum: int) -> MicroSample:
    """One micro-batch of a plan as it is written down, not yet timed."""
    return MicroSample(
        stratum=stratum, rows=int(shapes.rows[micro]), width=int(shapes.width[micro]), tokens=int(shapes.tokens[micro])
    )
