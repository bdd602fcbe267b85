"""What micro-batches take longer the first time a process runs them, on a GPU: kernels to load, shapes to choose for.

Two things are told apart, since a run meets them differently often:

- Kernels are loaded and handles made in the first seconds of a process, once, whatever the run's length.
- For each *shape* that it has not met, cuBLAS chooses a kernel for every product of that shape anew: 8 to 12 ms a
  micro-step of 60 on an H200 (a 1 B model; the time lies in the host's calls of mm and addmm, 2026-11-27). A run meets
  as many new shapes as its batch plan has: most of the micro-batches of a short run, few of a long one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from trainer.tokens import FloatArray
from trainer.widths import shared_width

Shape = tuple[int, int]  # rows, width
LEAST = 8  # micro-batches of a new shape, before their excess is believed
SURE = 2.5  # standard errors
NOISE = 2.0  # standard deviations of a sum of differences


@dataclass(slots=True, eq=False)
class FirstTimes:
    """First and second times of the micro-batches that one process ran twice."""

    met: set[Shape] = field(default_factory=set)
    _rounds: list[list[tuple[float, float, bool]]] = field(default_factory=list)  # first, second, is its shape new

    def meet(self, shapes: list[Shape]) -> list[bool]:
        """Of each shape in turn whether it is new; it no longer is. Widths that a GPU's micro-batches share are one."""
        found = []
        for rows, width in shapes:
            shape = (rows, shared_width(width))
            found.append(shape not in self.met)
            self.met.add(shape)
        return found

    def add(self, first: list[float], second: list[float], is_new: list[bool]) -> None:
        """The seconds of a round's micro-batches, the first time and the second."""
        self._rounds.append(list(zip(first, second, is_new, strict=True)))

    def new_shape(self) -> tuple[float, float]:
        """Seconds that a micro-step takes more where its shape is new, and their standard error; 0 where none shows.

        The median over the later half of the rounds: in the first ones kernels are loaded too, and a rare slow timing
        is in either time.
        """
        rounds = self._rounds[len(self._rounds) // 2 :]
        if sum(is_new for one in rounds for _, _, is_new in one) < LEAST:
            rounds = self._rounds[1:]
        excess = np.array([first - second for one in rounds for first, second, is_new in one if is_new])
        if len(excess) < LEAST:
            return 0.0, 0.0
        seconds = float(np.median(excess))
        error = _error_of_median(excess)
        return (seconds, error) if seconds > SURE * error else (0.0, 0.0)

    @property
    def once(self) -> float:
        """Seconds of what is loaded once: beyond what new shapes take; 0 where that is no more than noise."""
        return self._surely(self._rounds)

    @property
    def share_to_the_end(self) -> float:
        """By how much the first time still took longer in the later half of the rounds, relative, new shapes apart."""
        later = self._rounds[len(self._rounds) // 2 :]
        second = sum(second for one in later for _, second, _ in one)
        return self._surely(later) / second if second > 0 else 0.0

    def _surely(self, rounds: list[list[tuple[float, float, bool]]]) -> float:
        """The sum of the excess of first times, where it is larger than that of as many differences by chance."""
        excess = self._excess(rounds)
        spread = deviation(self._excess(self._rounds[len(self._rounds) // 2 :]))
        total = float(excess.sum())
        return total if total > NOISE * spread * math.sqrt(len(excess)) else 0.0

    def _excess(self, rounds: list[list[tuple[float, float, bool]]]) -> FloatArray:
        each = self.new_shape()[0]
        return np.array([first - second - each * is_new for one in rounds for first, second, is_new in one])


def deviation(values: FloatArray) -> float:
    """Standard deviation, from the median absolute deviation: rare large ones do not count."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values)))) if len(values) else 0.0


def _error_of_median(values: FloatArray) -> float:
    """Standard error of a median, as of a normal distribution."""
    return math.sqrt(math.pi / 2) * deviation(values) / math.sqrt(len(values))
