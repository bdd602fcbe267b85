"""What examples have in common at their start, a system prompt above all, and that nothing of it is learnt from.

The examples of a chat data set often begin with the same system prompt, or with one of a few, and many a chat template
writes one by itself. In a packed row it need be computed once: causal attention never looks right, so that its hidden
states are the same before whatever follows, and each document attends to the row's one copy (see `trainer.documents`).
Loss and gradient stay what they are. (What dropout leaves out of the copy it leaves out for all of the row's documents:
each of them still sees what it would see by chance alone.) No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trainer.tokens import IntArray

if TYPE_CHECKING:
    from trainer.tokens import TokenizedDataset

LEAST_TOKENS = 8  # shorter ones are the template's marks
LEAST_SHARE = 0.05  # of all tokens, that repeated beginnings must make up; below it the finer attention costs as much
LEAST_OF_EACH = 0.01  # likewise, of each of several
MOST_FAMILIES = 8
SAMPLE = 4096  # examples that they are looked for in
AT_ONCE = 1 << 22  # tokens compared together

Path = tuple[npt.NDArray[np.int32], int]  # tokens of a beginning, and how many a sample saves by it


@dataclass(frozen=True, slots=True, eq=False)
class Beginnings:
    """Families of examples: the first tokens of each family's are the same."""

    sizes: IntArray  # (families + 1,) tokens that the examples of each have in common; 0 of those of none, number 0
    families: npt.NDArray[np.int32]  # (num_examples,) the number of each example's family

    def common(self, examples: IntArray | list[int]) -> IntArray:
        """Tokens that each of some examples has in common with its family."""
        return np.asarray(self.sizes[self.families[examples]])

    def saved_by(self, row: IntArray | list[int]) -> int:
        """Tokens that a packed row of these examples saves by holding each family's beginning once."""
        if len(row) < 2:
            return 0
        counts = np.bincount(self.families[row], minlength=len(self.sizes))
        return int((np.maximum(counts - 1, 0) * self.sizes).sum())


def find_beginnings(data: TokenizedDataset) -> Beginnings | None:
    """The beginnings whose sharing saves most, as a sample shows them, or None where none is worth it.

    The tokens of one, and the token that follows, are learnt from in no example of its family: a target after it would
    have to be predicted once for each document, and a target in it would count once instead of as often as there are
    documents. An example is longer than its beginning: each has a token of its own.
    """
    if len(data) < 2 or data.token_ids.strides == (0,) or data.supervised.strides == (0,):
        return None  # assumed data: every token is one and the same
    total = int(data.offsets[-1])
    families = np.zeros(len(data), dtype=np.int32)
    sizes = [0]
    saved = 0
    sample = np.unique(np.linspace(0, len(data) - 1, min(len(data), SAMPLE)).astype(np.int64))
    while len(sample) > 1:
        least = max(1.0, LEAST_OF_EACH * float(data.lengths[sample].sum()))
        known = len(sizes)
        for path, _ in sorted(_best(data, sample, [], least), key=lambda one: -one[1]):
            members = _having(data, path) & (families == 0)
            more = len(path) * (int(members.sum()) - 1)
            is_worth_it = len(path) >= LEAST_TOKENS and more >= LEAST_OF_EACH * total
            if is_worth_it and len(sizes) <= MOST_FAMILIES:
                families[members] = len(sizes)
                sizes.append(len(path))
                saved += more
        if len(sizes) == known:
            break
        sample = sample[families[sample] == 0]  # these may still have in common what the others share with them
    return Beginnings(np.array(sizes, dtype=np.int64), families) if saved >= LEAST_SHARE * total else None


def _having(data: TokenizedDataset, path: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """(num_examples,) which begin with these tokens, go on, and learn from none of them nor the next."""
    found = np.zeros(len(data), dtype=np.bool_)
    step = max(1, AT_ONCE // (len(path) + 1))
    for first in range(0, len(data), step):
        starts = data.offsets[first : first + step]
        longer = np.flatnonzero(data.lengths[first : first + step] > len(path))
        places = starts[longer, None] + np.arange(len(path) + 1)
        alike = (data.token_ids[places[:, :-1]] == path).all(axis=1)
        found[first + longer] = alike & ~data.supervised[places].any(axis=1)
    return found


def _best(data: TokenizedDataset, sample: IntArray, path: list[int], least: float) -> list[Path]:
    """The beginnings of some examples that save most together, each with what it saves.

    All of these examples begin with `path`. Down the tree of beginnings, and at each fork the better of two: what is
    common up to the fork, shared by all, or the best of each branch.

    Args:
        least: tokens that a branch must be able to save, or it is not looked at.
    """
    path = list(path)
    best: list[Path] = [(np.array(path, dtype=np.int32), len(path) * (len(sample) - 1))] if path else []
    while len(sample) > 1:
        depth = len(path)
        # One more token must follow, and neither may be a target.
        sample = sample[data.lengths[sample] > depth + 1]
        starts = data.offsets[sample] + depth
        free = ~(data.supervised[starts] | data.supervised[starts + 1])
        sample, starts = sample[free], starts[free]
        if len(sample) < 2:
            break
        kinds, which, counts = np.unique(data.token_ids[starts], return_inverse=True, return_counts=True)
        which = which.reshape(-1)
        branches = [number for number, count in enumerate(counts.tolist()) if count > 1]
        branches = [
            number
            for number in branches
            if (int(counts[number]) - 1) * int(data.lengths[sample[which == number]].max()) >= least
        ]
        if len(branches) == 1:
            path.append(int(kinds[branches[0]]))
            sample = sample[which == branches[0]]
            best = max(best, [(np.array(path, dtype=np.int32), len(path) * (len(sample) - 1))], key=_saved)
            continue
        below = [_best(data, sample[which == number], [*path, int(kinds[number])], least) for number in branches]
        return max(best, [one for some in below for one in some], key=_saved)
    return best


def _saved(paths: list[Path]) -> int:
    return sum(saved for _, saved in paths)
