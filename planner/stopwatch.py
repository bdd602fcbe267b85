"""Seconds of micro-steps that follow each other on a device: begin, a mark after each, the seconds between marks.

`begin` again where others follow that did not come right after: what lies between is no micro-step's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any


class ClockMeter:
    """By the host's clock, waiting for the device at each mark."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._rows: list[list[float]] = []

    def begin(self) -> None:
        self._rows.append([])
        self.mark()

    def mark(self) -> None:
        self._synchronize()
        self._rows[-1].append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [after - before for marks in self._rows for before, after in itertools.pairwise(marks)]


class EventMeter:
    """By the GPU's own clock. The host is not held up at the marks: as in a window, it launches the next micro-step
    while the GPU still works at this one. Who waits at each takes that for a part of every micro-step: on an H200 six
    per cent, where launching takes about as long as computing (4 x 500 tokens of a 1 B model, 2026-11-27).
    """

    def __init__(self) -> None:
        self._rows: list[list[Any]] = []

    def begin(self) -> None:
        import torch

        torch.cuda.synchronize()  # what came before is not a part of the first one
        self._rows.append([])
        self.mark()

    def mark(self) -> None:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._rows[-1].append(event)

    def seconds(self) -> list[float]:
        import torch

        torch.cuda.synchronize()
        return [
            before.elapsed_time(after) / 1000 for marks in self._rows for before, after in itertools.pairwise(marks)
        ]
