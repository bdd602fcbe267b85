"""Strata of work: micro-batches of a batch plan, in classes of like cost, so that few timings stand for all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.batching import MicroShapes
from trainer.tokens import FloatArray, IntArray

LEAST_STRATA = 2  # of each kind
TAIL_SHARE = 0.01  # the longest micro-batches, by number, that are a stratum of their own
WIDTH_OF_DOUBLE_WORK = 8192.0  # tokens; where attention is taken to cost as much as the rest (a rough guess will do)


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Kind:
    """What micro-batches must have in common to stand for each other beside their size in tokens."""

    micro_batch_size: int  # rows
    packed: bool = False  # rows hold several examples, kept apart by a mask that costs time of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class StrataOfKind:
    """The strata of one kind: stratum h holds keys above upper[h - 1] up to upper[h]; the last is open."""

    kind: Kind
    first: int  # number of its first stratum
    upper: tuple[float, ...]

    @property
    def count(self) -> int:
        return len(self.upper) + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Strata:
    """Strata of all kinds in play, numbered through."""

    kinds: tuple[StrataOfKind, ...]

    @property
    def count(self) -> int:
        return sum(one.count for one in self.kinds)

    def numbers(self, kind: Kind) -> range:
        """The numbers of a kind's strata; none where it has no strata."""
        return next((range(one.first, one.first + one.count) for one in self.kinds if one.kind == kind), range(0))

    def of(self, kind: Kind, shapes: MicroShapes) -> IntArray:
        """Stratum of each micro-batch; -1 for empty ones and for a kind that has no strata."""
        found = np.full(len(shapes.rows), -1, dtype=np.int64)
        for one in self.kinds:
            if one.kind == kind:
                found = one.first + np.searchsorted(np.array(one.upper), keys(shapes), side="left")
        return np.where(shapes.rows > 0, found, -1)


def keys(shapes: MicroShapes) -> FloatArray:
    """One number per micro-batch that sorts by padded tokens, then by width."""
    return shapes.padded_tokens + shapes.width / 2.0**20


def key_of(rows: int, width: int) -> float:
    """The same of a single one."""
    return rows * width + width / 2.0**20


def make_strata(populations: list[tuple[Kind, MicroShapes]], count: int) -> Strata:
    """Strata over the union of some plans' micro-batches.

    They are cut so that each holds a like share of the *work*, not of the micro-batches: with noise in proportion to
    the seconds, a stratum's part in the error of the sum goes with its work (Neyman's allocation at one draw each). A
    constant added to the work keeps the many short ones from sharing a single stratum. The longest 1 % stand alone: a
    timing that is off there moves the sum most.

    Args:
        populations: (kind, shapes) of each plan, or of a random part of it.
        count: strata in all, about; each kind gets at least two.
    """
    kinds = sorted({kind for kind, _ in populations})
    per_kind = max(LEAST_STRATA, count // max(1, len(kinds)))
    made: list[StrataOfKind] = []
    first = 0
    for kind in kinds:
        shapes = [one for of, one in populations if of == kind]
        key = np.concatenate([keys(one)[one.rows > 0] for one in shapes])
        width = np.concatenate([one.width[one.rows > 0] for one in shapes])
        order = np.argsort(key, kind="stable")
        key, width = key[order], width[order]
        work = key * (1 + width / WIDTH_OF_DOUBLE_WORK) + 0.25 * key.mean()
        running = np.cumsum(work)
        bulk = max(1, per_kind - 1) if per_kind > 2 else per_kind
        cuts = np.searchsorted(running, running[-1] * np.arange(1, bulk) / bulk)
        upper = [float(key[cut]) for cut in cuts]
        if per_kind > 2:
            upper.append(float(key[int(len(key) * (1 - TAIL_SHARE)) - 1]))
        distinct = sorted({value for value in upper if value < key[-1]})
        if not distinct and key[0] < key[-1]:
            # The largest hold more than the rest: a window's small remainder must not be drawn to stand for them.
            distinct = [float(key[key < key[-1]][-1])]
        made.append(StrataOfKind(kind=kind, first=first, upper=tuple(distinct)))
        first += made[-1].count
    return Strata(kinds=tuple(made))
