"""Where the documents of packed rows go for attention: side by side, in padded groups of similar length. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.tokens import IntArray

if TYPE_CHECKING:
    import torch

Document = tuple[int, int, int]  # row, first position, end

SHORTEST = 0.5  # of a group's longest document: shorter ones start a group of their own
MULTIPLE = 16  # a group's width is rounded up to it: fewer shapes, and tiles that are full


@dataclass(frozen=True, slots=True, eq=False)
class Arrangement:
    """Which position of the rows stands where in the groups, and the way back.

    A handful of calls do for any number of documents. A group is as wide as its longest document; padding stands on the
    right, where causal attention never looks.
    """

    places: torch.Tensor  # (padded,) int64: for each place in the groups a position in the flattened (rows * width)
    back: torch.Tensor  # (rows * width,) int64: for each position its place in the groups
    groups: tuple[tuple[int, int], ...]  # (documents, width) of each, one after the other in `places`

    @property
    def sizes(self) -> list[int]:
        """Places of each group."""
        return [count * width for count, width in self.groups]


def arrange(documents: tuple[Document, ...], width: int) -> Arrangement:
    """The groups of some documents that fill their rows without gaps, each `width` wide."""
    import torch

    starts = np.array([row * width + start for row, start, _ in documents], dtype=np.int64)
    lengths = np.array([end - start for _, start, end in documents], dtype=np.int64)
    places: list[IntArray] = []
    groups: list[tuple[int, int]] = []
    back = np.empty(int(lengths.sum()), dtype=np.int64)
    at = 0
    for members in _alike(lengths):
        wide = -(-int(lengths[members[0]]) // MULTIPLE) * MULTIPLE
        column = np.arange(wide)
        own = lengths[members, None]
        found = starts[members, None] + np.minimum(column, own - 1)  # padding repeats the document's last position
        is_real = column < own
        back[found[is_real]] = at + np.flatnonzero(is_real)
        places.append(found.ravel())
        groups.append((len(members), wide))
        at += found.size
    return Arrangement(torch.from_numpy(np.concatenate(places)), torch.from_numpy(back), tuple(groups))


def _alike(lengths: IntArray) -> Iterator[IntArray]:
    """Indices of documents of similar length, the longest first."""
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        count = int((lengths[order] >= SHORTEST * lengths[order[0]]).sum())
        yield order[:count]
        order = order[count:]
