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
from planner.group import rows_of, shape_of
from planner.prober import MicroRows
from planner.strata import key_of
from trainer.batching import BatchPlan
from trainer.tokens import TokenizedDataset
from trainer.widths import shared_width

SHORT = 2  # micro-batches of a window that is run as it is


@dataclass(slots=True, eq=False)
class Sequence:
    """What a worker is asked to run, and where in it what was drawn is."""

    micro_batches: list[MicroRows] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)  # of each, as a GPU is given it
    longest_rows: list[int] = field(default_factory=list)  # of the plan of each
    begins: list[int] = field(default_factory=list)  # places where a window begins
    places: list[int] = field(default_factory=list)  # of what was drawn


def sequence(
    drawn: list[Drawn], order: Iterable[int], data: TokenizedDataset, *, in_windows: bool, most: float
) -> Sequence:
    """These micro-batches, each in the company that it has in its window.

    One whose window is itself and another follows that other. Those of longer windows are put together into windows of
    their own, as many as they would fill, each from its longest to its shortest: behind a long one a GPU hides what the
    host launches for a short one, and a run has so many short ones to a long one.

    Args:
        order: in which they are asked for, as far as windows leave a choice; numbers of `drawn`.
        in_windows: wait where a window begins; else they follow each other in the order as it is.
        most: key (see `planner.strata.keys`) of the largest that may be run.
    """
    found = Sequence(places=[0] * len(drawn))

    def add(plan: BatchPlan, rows: MicroRows, longest_row: int) -> None:
        found.micro_batches.append(rows)
        count, width = shape_of(plan, rows, data)
        found.shapes.append((count, shared_width(width, longest_row)))
        found.longest_rows.append(longest_row)

    for window in _windows(drawn, list(order)) if in_windows else [[number] for number in order]:
        if in_windows:
            found.begins.append(len(found.micro_batches))
            first = drawn[window[0]]
            before = first.micro - first.plan.num_devices
            if len(window) == 1 and place_in_window(first.plan, first.micro) == (1, 2):
                rows = rows_of(first.plan, before)
                if key_of(*shape_of(first.plan, rows, data)) <= most:
                    add(first.plan, rows, first.longest_row)
        for number in window:
            found.places[number] = len(found.micro_batches)
            one = drawn[number]
            add(one.plan, rows_of(one.plan, one.micro), one.longest_row)
    return found


def _windows(drawn: list[Drawn], order: list[int]) -> list[list[int]]:
    """Numbers of what was drawn, window by window."""
    sizes = {number: place_in_window(drawn[number].plan, drawn[number].micro)[1] for number in order}
    found = [[number] for number in order if sizes[number] <= SHORT]
    others = sorted((number for number in order if sizes[number] > SHORT), key=lambda one: -drawn[one].key)
    if others:
        count = max(1, round(len(others) / float(np.median([sizes[number] for number in others]))))
        found += [others[first::count] for first in range(count)]
    when = {number: place for place, number in enumerate(order)}
    return sorted(found, key=lambda window: min(when[number] for number in window))


def place_in_window(plan: BatchPlan, micro: int) -> tuple[int, int]:
    """How many micro-batches its device executes before this one in its window, and how many in all."""
    window = int(np.searchsorted(plan.window_offsets, micro, side="right")) - 1
    first, last = int(plan.window_offsets[window]), int(plan.window_offsets[window + 1])
    return (micro - first) // plan.num_devices, -(-(last - first) // plan.num_devices)
