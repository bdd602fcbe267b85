"""Is packing right for this model? Its packed and separate logits are compared before packing is offered."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer import documents
from trainer.job import Job
from trainer.tokens import IntArray, TokenizedDataset

if TYPE_CHECKING:
    import torch

    from trainer.collate import MicroBatch
    from trainer.lean import LeanHead

# Largest difference at any position, relative to the typical size of a position's logits around their mean. A packed
# row is computed with other shapes and masks than a document alone, hence rounded differently in every layer: some 1e-5
# in fp32, some 1e-2 with 8 bits of mantissa (bf16) or in 8-bit products, which also find their outliers over the whole
# row. A document that sees its neighbour moves its logits by about their own size.
TOLERANCES = {"fp32": 1e-3, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}
# Rounding must also be small beside what mixing the documents really does to this model: one whose logits hardly depend
# on context (random weights, say) would hide a leak under the tolerance.
LEAK_SHARE = 0.1
MAX_DOCUMENTS = 4
NO_COMPANY = "no two examples fit into one row"
FAILURES = (RuntimeError, TypeError, ValueError, IndexError)  # of a model that is not made for what it is given


def settle_packing(model: Any, data: TokenizedDataset, job: Job, *, tell_leaks: bool = False) -> str | None:
    """Choose how this very model keeps packed documents apart; None, or why packed rows are not for it.

    With "sdpa" documents are attended to apart (`trainer.documents`) where that gives the separate logits; else a mask
    over the whole row is compared. On an H100 that mask made rows of 16,384 tokens slower than padded micro-batches:
    13,600 tokens a second instead of 27,000 (a 1 B model, bf16, documents of 490 tokens; one run each, 2026-11-26).
    """
    arguments: dict[str, Any] = {
        "device": job.device,
        "precision": job.precision,
        "base_precision": job.base_precision,
        "packed_length": job.packed_length or job.preset.max_length,
        "tell_leaks": tell_leaks,
    }
    if job.attends_apart:
        try:
            documents.use(model, apart=True)
        except (ValueError, AttributeError) as reason:  # a model that takes no attention but its own
            logging.getLogger(__name__).debug("attention document by document: %s", reason)
        else:
            if packing_agrees(model, data, **arguments) is None:
                return None
            documents.use(model, apart=False)
    return packing_agrees(model, data, **arguments)


def packing_agrees(
    model: Any,
    data: TokenizedDataset,
    *,
    device: str,
    precision: str,
    base_precision: str = "fp32",
    packed_length: int | None = None,
    examples: IntArray | None = None,
    tell_leaks: bool = True,
) -> str | None:
    """None where packed and separate logits agree on this very model, else the reason why packing is not for it.

    Compared are a few examples in one row against each of them alone, in evaluation mode, as a run would feed them:
    `position_ids` that start at 0 with each document, no attention mask, no cache; what they begin with in common only
    once where the data's packed rows hold it so (`trainer.beginning`). The same row without `position_ids`
    mixes its documents on purpose and shows how much that changes. Logits are made and compared a chunk of positions at
    a time where the model can be cut before its output layer: those of four documents of 1,024 tokens are 2.5 GB, held
    several times over, with 150,000 words.

    Args:
        packed_length: tokens in a packed row; examples are taken while they fit.
        examples: which to take from, all by default.
        tell_leaks: also refuse where mixing documents would hardly show, as with random weights.
    """
    import torch

    from trainer.model import is_out_of_memory
    from trainer.step import autocast

    chosen = _documents(data, np.arange(len(data)) if examples is None else examples, packed_length)
    if len(chosen) < 2:
        return NO_COMPANY
    tolerance = TOLERANCES["bf16" if base_precision == "8bit" else precision]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device, precision):
            packed, mixed = _differences(model, data, chosen, device=device, precision=precision)
    except FAILURES as reason:
        if is_out_of_memory(reason):
            raise
        return f"packed rows fail on this model ({type(reason).__name__}: {str(reason).strip().splitlines()[0][:200]})"
    finally:
        model.train(was_training)
    if not packed <= tolerance:
        return f"packed logits differ from separate ones by {packed:.1e} of their size, more than {tolerance:.0e}"
    if tell_leaks and not packed <= LEAK_SHARE * mixed:
        return (
            f"packed logits differ from separate ones by {packed:.1e} of their size, and mixing the documents on "
            f"purpose changes them by no more than {mixed:.1e}: a leak could not be told from rounding"
        )
    return None


def _differences(
    model: Any, data: TokenizedDataset, chosen: IntArray, *, device: str, precision: str
) -> tuple[float, float]:
    """By how much the logits of a packed row differ at most from those of its documents alone: kept apart, and mixed.

    Relative to the typical size of a position's logits.
    """
    from trainer.lean import find_lean_head
    from trainer.model import is_out_of_memory

    try:
        head = find_lean_head(model, precision=precision)
        if not isinstance(head, str):
            return _compared(model, data, chosen, device, head)
    except FAILURES as reason:  # what makes logits of hidden states here wants something else
        if is_out_of_memory(reason):
            raise
    return _compared(model, data, chosen, device, None)


def _compared(
    model: Any, data: TokenizedDataset, chosen: IntArray, device: str, head: LeanHead | None
) -> tuple[float, float]:
    import torch

    from trainer.collate import collate
    from trainer.lean import CHUNK_BYTES
    from trainer.step import model_arguments

    def outputs(row: IntArray, *, apart: bool = True) -> torch.Tensor:
        """Last hidden states, (tokens, hidden); logits where the model is not cut."""
        batch = collate([row], data).to(device)
        named = model_arguments(model, batch if apart else replace(batch, position_ids=None))
        found: torch.Tensor = model(**named).logits if head is None else head.hidden_states(model, named)
        return found[0]

    def logits(some: torch.Tensor) -> torch.Tensor:
        found = (some if head is None else head.logits(some)).float()
        return found - found.mean(dim=-1, keepdim=True)  # what softmax does not see does not count

    alone = torch.cat([outputs(chosen[index : index + 1]) for index in range(len(chosen))])
    places = torch.from_numpy(_places(collate([chosen], data))).to(alone.device)
    together, across = outputs(chosen)[places], outputs(chosen, apart=False)[places]
    vocabulary = alone.shape[-1] if head is None else head.vocabulary
    rows = max(1, CHUNK_BYTES.get(alone.device.type, CHUNK_BYTES["cuda"]) // (4 * vocabulary))
    squares, packed, mixed = (torch.zeros((), device=alone.device) for _ in range(3))
    for start in range(0, len(alone), rows):
        part = slice(start, start + rows)
        each = logits(alone[part])
        squares += each.norm(dim=-1).square().sum()
        # The maximum of tensors, and not Python's, keeps what is not a number.
        packed = torch.maximum(packed, (logits(together[part]) - each).norm(dim=-1).max())
        mixed = torch.maximum(mixed, (logits(across[part]) - each).norm(dim=-1).max())
    typical = (squares / len(alone)).sqrt().clamp_min(1e-12)
    return float(packed / typical), float(mixed / typical)


def _places(row: MicroBatch) -> IntArray:
    """Where in a row each position of each document is, one document after the other, each as a whole."""
    assert row.documents is not None
    return np.concatenate(
        [
            np.concatenate([np.arange(begin, begin + before), np.arange(start, end)])
            for _, start, end, begin, before in row.documents
        ]
    )


def _documents(data: TokenizedDataset, examples: IntArray, packed_length: int | None) -> IntArray:
    """A few examples that fit into one row, the longest that have company: sliding windows need long ones to act."""
    usable = examples[data.lengths[examples] > 1]
    usable = usable[np.argsort(-data.lengths[usable], kind="stable")]
    lengths = data.lengths[usable]
    # What is saved behind one of the same family, see trainer.beginning.
    families, common = np.zeros_like(usable), np.zeros_like(usable)
    if data.beginnings is not None:
        families, common = data.beginnings.families[usable].astype(np.int64), data.beginnings.common(usable)
    if len(usable) < 2:
        return usable
    # What the cheapest company of each would take: another of its family, or any other.
    cheapest = _least_of_others(lengths)
    for family in np.unique(families[common > 0]).tolist():
        members = np.flatnonzero(families == family)
        cheapest[members] = np.minimum(cheapest[members], _least_of_others((lengths - common)[members]))
    left = packed_length if packed_length is not None else int(lengths[:MAX_DOCUMENTS].sum())
    chosen: list[int] = []

    def take(among: IntArray, most: int) -> None:
        nonlocal left
        while len(chosen) < most:
            takes = lengths[among] - np.where(np.isin(families[among], families[chosen]), common[among], 0)
            fitting = np.flatnonzero(takes + (0 if chosen else cheapest[among]) <= left)
            if not len(fitting):
                return
            left -= int(takes[fitting[0]])
            chosen.append(int(among[fitting[0]]))
            among = among[fitting[0] + 1 :]

    # Two of a family first, and company of any kind: the hardest rows that there are.
    largest = int(np.bincount(families, weights=common).argmax())
    take(np.flatnonzero(families == largest), 2 if largest else MAX_DOCUMENTS)
    take(np.setdiff1d(np.arange(len(usable)), chosen), MAX_DOCUMENTS)
    return usable[chosen]


def _least_of_others(values: IntArray) -> IntArray:
    """For each value the least of all others."""
    if len(values) < 2:
        return np.full(len(values), np.iinfo(np.int32).max, dtype=np.int64)
    found = np.full(len(values), values.min())
    least = int(values.argmin())
    found[least] = np.delete(values, least).min()
    return found
