"""Micro-batches in the order in which a GPU is given them, as near to the windows of a run as single draws can be.

A run waits for the GPU where a window ends. The first micro-step of the next one then finds nothing behind which the
host could launch: what it launches slowly, a new shape above all, shows in the forward pass. Behind a micro-step that
the GPU is busy with nothing of it shows. On an H200 packed rows of a new width took 10 to 18 ms of 115 to 190 longer
than known ones in the run, where each was a window, and not in micro-steps that followed each other without a wait (1
to 3 B, 2026-11-27).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from planner.decks import Drawn
from planner.first_times import Shape
from planner.group import rows_of
from planner.prober import MicroRows
from trainer.batching import BatchPlan
from trainer.widths import shared_width


@dataclass(slots=True, eq=False)
class Sequence:
    """What a worker is asked to run, and where in it what was drawn is."""

    micro_batches: list[MicroRows] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)  # of each, as a GPU is given it
    longest_rows: list[int] = field(default_factory=list)  # of the plan of each
    begins: list[int] = field(default_factory=list)  # places where a window begins
    places: list[int] = field(default_factory=list)  # of what was drawn, in the order in which it was asked for


def sequence(drawn: Iterable[Drawn], lengths: np.ndarray, *, in_windows: bool, most: float) -> Sequence:
    """These micro-batches one after another.

    Args:
        lengths: of the examples, in tokens.
        in_windows: wait before each that is the first of its window; the second of a window of two follows the first.
        most: key (see `planner.strata.keys`) of the largest that may be run.
    """
    found = Sequence()

    def add(one: Drawn, micro: int) -> None:
        rows, width = _shape(one.plan, micro, lengths)
        found.micro_batches.append(rows_of(one.plan, micro))
        found.shapes.append((rows, shared_width(width, one.longest_row)))
        found.longest_rows.append(one.longest_row)

    for one in drawn:
        number, size = place_in_window(one.plan, one.micro)
        if in_windows and number == 0:
            found.begins.append(len(found.micro_batches))
        elif in_windows and size == 2:
            rows, width = _shape(one.plan, one.micro - one.plan.num_devices, lengths)
            if rows * width + width / 2.0**20 <= most:
                found.begins.append(len(found.micro_batches))
                add(one, one.micro - one.plan.num_devices)
        found.places.append(len(found.micro_batches))
        add(one, one.micro)
    return found


def place_in_window(plan: BatchPlan, micro: int) -> tuple[int, int]:
    """How many micro-batches its device executes before this one in its window, and how many in all."""
    window = int(np.searchsorted(plan.window_offsets, micro, side="right")) - 1
    first, last = int(plan.window_offsets[window]), int(plan.window_offsets[window + 1])
    return (micro - first) // plan.num_devices, -(-(last - first) // plan.num_devices)


def _shape(plan: BatchPlan, micro: int, lengths: np.ndarray) -> Shape:
    rows = rows_of(plan, micro)
    return len(rows), max((int(lengths[row].sum()) for row in rows), default=0)
