"""Which documents of a window share a packed row: best-fit decreasing. numpy only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainer.beginning import Beginnings
from trainer.tokens import IntArray

# What a packed row's documents come to at most, each as a whole, in rows: of what they share attention holds keys and
# values for each of them, and memory has to have a bound.
MOST_SPREAD = 8


def pack(lengths: IntArray, packed_length: int, alike: tuple[Beginnings, IntArray] | None = None) -> IntArray:
    """Row number of each document: best-fit decreasing, in all windows at once.

    Best fit puts a document into the row it leaves least room in; it needs at most 11/9 of the fewest rows, plus one
    (Johnson, 1973). A document longer than a row gets a row of its own.

    Args:
        lengths: (windows, documents), each window's longest first.
        alike: what rows hold once, and the examples, (windows, documents): a document takes less of a row that holds
            its beginning already.

    Returns:
        Row of each document, (windows, documents), counted from 0 in each window without gaps.
    """
    num_windows, num_documents = lengths.shape
    room = np.full((num_windows, num_documents), packed_length, dtype=np.int64)
    held = None if alike is None else _Held(lengths, packed_length, *alike)
    used = np.zeros(num_windows, dtype=np.int64)  # rows opened
    rows = np.empty((num_windows, num_documents), dtype=np.int64)
    here = np.arange(num_windows)
    for column in range(num_documents):  # a loop over a window's documents, never over all examples
        length = lengths[:, column]
        most = int(used.max()) if column else 0
        left = room[:, :most] - length[:, None]
        if held is not None:
            left = held.left(column, left)
        closed = (left < 0) | (np.arange(most) >= used[:, None])
        left = np.where(closed, np.iinfo(np.int64).max, left)
        best = left.argmin(axis=1) if most else np.zeros(num_windows, dtype=np.int64)
        fits = ~closed[here, best] if most else np.zeros(num_windows, dtype=bool)
        target = np.where(fits, best, used)
        rows[:, column] = target
        room[here, target] = (
            np.where(fits, left[here, best], packed_length - length) if most else packed_length - length
        )
        if held is not None:
            held.take(column, target)
        used += ~fits
    return rows


class _Held:
    """Which beginnings rows hold already, and what their documents come to as a whole."""

    def __init__(self, lengths: IntArray, packed_length: int, beginnings: Beginnings, examples: IntArray) -> None:
        self._lengths, self._most = lengths, MOST_SPREAD * packed_length
        self._families: npt.NDArray[np.int32] = beginnings.families[examples]
        self._common = beginnings.common(examples)
        windows, documents = lengths.shape
        self._here = np.arange(windows)
        self._known = np.zeros((windows, len(beginnings.sizes), documents), dtype=bool)
        self._spread = np.zeros((windows, documents), dtype=np.int64)

    def left(self, column: int, left: IntArray) -> IntArray:
        """What is left of each row behind a document that stands there as far as it must; below 0 where it may not."""
        most = left.shape[1]
        known = self._known[self._here, self._families[:, column], :most]
        found = left + self._common[:, column, None] * known
        is_full = self._spread[:, :most] + self._lengths[:, column, None] > self._most
        return np.where(is_full, -1, found)

    def take(self, column: int, target: IntArray) -> None:
        """The document stands in these rows now."""
        self._known[self._here, self._families[:, column], target] = True
        self._spread[self._here, target] += self._lengths[:, column]
