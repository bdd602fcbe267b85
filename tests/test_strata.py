"""Classes of micro-batches: what is unlike does not stand for each other."""

from __future__ import annotations

import numpy as np

from planner.strata import Kind, make_strata
from trainer.batching import MicroShapes


def shapes(rows: list[int], width: list[int]) -> MicroShapes:
    made = np.array(rows), np.array(width)
    return MicroShapes(rows=made[0], width=made[1], tokens=made[0] * made[1])


def test_a_window_s_small_remainder_is_no_class_with_the_largest_micro_batches() -> None:
    """Six of 32 rows are nearly all of the work: the only cut fell among them, and one of 4 rows was drawn for all."""
    kind = Kind(micro_batch_size=32)
    some = shapes([32] * 6 + [4], [1000] * 6 + [609])
    assert make_strata([(kind, some)], 2).of(kind, some).tolist() == [1] * 6 + [0]
    equal = shapes([32] * 6, [1000] * 6)
    assert make_strata([(kind, equal)], 2).count == 1
