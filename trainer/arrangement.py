"""Where the documents of packed rows go for attention: side by side, in padded groups of similar length. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.tokens import IntArray

if TYPE_CHECKING:
    import torch

# Row, first position, end; then where the row holds what comes before the first position, and how many tokens that is:
# 0 where the document stands there as a whole, else what it has in common with an earlier one.
Document = tuple[int, int, int, int, int]

SHORTEST = 0.5  # of a group's longest document: shorter ones start a group of their own
MULTIPLE = 16  # a group's width is rounded up to it: fewer shapes, and tiles that are full


@dataclass(frozen=True, slots=True, eq=False)
class Arrangement:
    """Which position of the rows stands where in the groups, and the way back.

    A handful of calls do for any number of documents. A group is as wide as its longest document; padding stands on the
    right, where causal attention never looks. What documents of a row have in common stands in front of each.
    """

    places: torch.Tensor  # (padded,) int64: for each place in the groups a position in the flattened (rows * width)
    back: torch.Tensor  # (rows * width,) int64: for each position its place in the groups, of several the first
    groups: tuple[tuple[int, int], ...]  # (documents, width) of each, one after the other in `places`
    # Of each beginning that a row holds once, where it starts in the flattened rows, and the other places of it:
    # (documents but the first, tokens) int64.
    repeated: tuple[tuple[int, torch.Tensor], ...] = ()

    @property
    def sizes(self) -> list[int]:
        """Places of each group."""
        return [count * width for count, width in self.groups]

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Arrangement:
        """The same with its tensors elsewhere."""
        repeated = tuple((start, move(places)) for start, places in self.repeated)
        return Arrangement(move(self.places), move(self.back), self.groups, repeated)


def arrange(documents: tuple[Document, ...], width: int) -> Arrangement:
    """The groups of some documents that fill their rows without gaps, each `width` wide."""
    import torch

    rows, firsts, ends, begins, before = np.array(documents, dtype=np.int64).T
    starts, begins, own = rows * width + firsts, rows * width + begins, ends - firsts
    lengths = before + own
    places: list[IntArray] = []
    groups: list[tuple[int, int]] = []
    back = np.empty(int(own.sum()), dtype=np.int64)
    of_documents = np.empty(len(documents), dtype=np.int64)  # place of each one's first token
    at = 0
    for members in _alike(lengths):
        wide = -(-int(lengths[members[0]]) // MULTIPLE) * MULTIPLE
        column = np.arange(wide)
        # Padding repeats the document's last position.
        inside = np.minimum(column, lengths[members, None] - 1)
        common = before[members, None]
        found = np.where(inside < common, begins[members, None], starts[members, None] - common) + inside
        is_own = (column >= common) & (column < lengths[members, None])
        back[found[is_own]] = at + np.flatnonzero(is_own)
        of_documents[members] = at + wide * np.arange(len(members))
        places.append(found.ravel())
        groups.append((len(members), wide))
        at += found.size
    repeated = []
    for begin in np.unique(begins[before > 0]).tolist():
        others = (begins == begin) & (before > 0)
        tokens = np.arange(int(before[others].max()))
        repeated.append((begin, torch.from_numpy(of_documents[others, None] + tokens)))
    return Arrangement(torch.from_numpy(np.concatenate(places)), torch.from_numpy(back), tuple(groups), tuple(repeated))


def _alike(lengths: IntArray) -> Iterator[IntArray]:
    """Indices of documents of similar length, the longest first."""
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        count = int((lengths[order] >= SHORTEST * lengths[order[0]]).sum())
        yield order[:count]
        order = order[count:]
