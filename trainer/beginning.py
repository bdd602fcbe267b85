"""What examples have in common at their start, a system prompt above all, and that nothing of it is learnt from.

Every example of a chat data set often begins with the same system prompt, and many a chat template writes one by
itself. In a packed row it need be computed once: causal attention never looks right, so that its hidden states are the
same before whatever follows, and each document attends to the row's one copy (see `trainer.documents`). Loss and
gradient stay what they are. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trainer.tokens import IntArray

if TYPE_CHECKING:
    from trainer.tokens import TokenizedDataset

LEAST_TOKENS = 8  # shorter ones are the template's marks: not worth rows of another kind
LEAST_SHARE = 0.05  # of all tokens, that the common beginning must make up
SAMPLE = 4096  # examples that it is looked for in
AT_ONCE = 1 << 22  # tokens compared together

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Beginning:
    """The first tokens that many examples have in common."""

    num_tokens: int
    has_it: BoolArray  # (num_examples,) which examples begin so, and go on

    def own(self, lengths: IntArray) -> IntArray:
        """Tokens of each example beyond the common beginning; of one without it all."""
        return np.asarray(lengths - self.num_tokens * self.has_it)

    def shared_by(self, row: IntArray | list[int]) -> int:
        """Tokens that the documents of a packed row share; 0 where it is one document, or not all begin so."""
        return self.num_tokens if len(row) > 1 and bool(self.has_it[row].all()) else 0


def find_beginning(data: TokenizedDataset) -> Beginning | None:
    """The beginning whose sharing saves most, as a sample shows it, or None where none is worth it.

    Its tokens, and the one that follows it, are learnt from in no example that has it: a target after it would have to
    be predicted once for each document, and a target in it would count once instead of as often as there are documents.
    An example must be longer: each has a token of its own.
    """
    if len(data) < 2 or data.token_ids.strides == (0,) or data.supervised.strides == (0,):
        return None  # assumed data: every token is one and the same
    path = _most_common(data)
    if len(path) < LEAST_TOKENS:
        return None
    has_it = np.zeros(len(data), dtype=np.bool_)
    step = max(1, AT_ONCE // (len(path) + 1))
    for first in range(0, len(data), step):
        starts = data.offsets[first : first + step]
        fits = np.flatnonzero(data.lengths[first : first + step] > len(path))
        places = starts[fits, None] + np.arange(len(path) + 1)
        alike = (data.token_ids[places[:, :-1]] == path).all(axis=1)
        has_it[first + fits] = alike & ~data.supervised[places].any(axis=1)
    saved = len(path) * (int(has_it.sum()) - 1)
    if saved < LEAST_SHARE * int(data.offsets[-1]):
        return None
    return Beginning(len(path), has_it)


def _most_common(data: TokenizedDataset) -> npt.NDArray[np.int32]:
    """The tokens of a beginning: down the tree of beginnings to where tokens x examples, of a sample, is largest.

    At each fork the way that most examples go.
    """
    sample = np.unique(np.linspace(0, len(data) - 1, min(len(data), SAMPLE)).astype(np.int64))
    path: list[int] = []
    best, best_saved = 0, 0
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
        common = int(counts.argmax())
        path.append(int(kinds[common]))
        sample = sample[which.reshape(-1) == common]
        saved = len(path) * (len(sample) - 1)
        if saved > best_saved:
            best, best_saved = len(path), saved
    return np.array(path[:best], dtype=np.int32)
