"""Micro-batches as tensors: documents -> padded or packed rows, and the positions whose loss counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.arrangement import Arrangement, Document, arrange
from trainer.tokens import IntArray, TokenizedDataset
from trainer.widths import shared_width

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """One forward and backward pass.

    Rows are padded on the right and carry no attention mask: causal attention never looks right, so a real token does
    not see padding, and without a mask the fastest kernels apply. Packed rows carry `position_ids` that start at 0
    with each document; the model keeps documents apart by them, or by `documents` (see `trainer.documents`). Where
    documents of a row begin alike (`trainer.beginning`), the first of them holds the beginning and the others only what
    follows it, whose positions go on from there.
    """

    input_ids: torch.Tensor  # (rows, width) int64
    position_ids: torch.Tensor | None  # (rows, width) int64, only when a row holds several documents
    predicts: torch.Tensor  # (num_targets,) positions in the flattened (rows * width) that predict a target
    targets: torch.Tensor  # (num_targets,) token ids
    num_tokens: int  # real ones
    # Where each document of a packed row lies, row by row without gaps; padding is one too, or the end of the last.
    documents: tuple[Document, ...] | None = None
    arrangement: Arrangement | None = None  # of the documents; set by `to` where they are attended to in groups

    def to(self, device: str) -> MicroBatch:
        """The same batch on a device; copies run beside the computation where the memory is pinned."""
        if device == "cpu":
            return self

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.pin_memory() if device.startswith("cuda") else tensor).to(device, non_blocking=True)

        arrangement = None
        if self.documents is not None:
            arrangement = arrange(self.documents, self.input_ids.shape[1]).moved(move)
        return MicroBatch(
            input_ids=move(self.input_ids),
            position_ids=None if self.position_ids is None else move(self.position_ids),
            predicts=move(self.predicts),
            targets=move(self.targets),
            num_tokens=self.num_tokens,
            documents=self.documents,
            arrangement=arrangement,
        )


def batch_on(device: str, rows: list[IntArray], data: TokenizedDataset, longest_row: int = 0) -> MicroBatch:
    """The micro-batch of these rows as it is run on a device: on all but a CPU as wide as others of about its width.

    Args:
        longest_row: see `trainer.widths.shared_width`.
    """
    return collate(rows, data, shared=device != "cpu", longest_row=longest_row).to(device)


def collate(
    rows: list[IntArray], data: TokenizedDataset, *, pad_token_id: int = 0, shared: bool = False, longest_row: int = 0
) -> MicroBatch:
    """The micro-batch whose rows hold these examples.

    Args:
        rows: example indices, one array a row. None at all (a process that has no share of a partial window) gives one
            padding token and no target, so that every process still takes part in the exchange of gradients.
        shared: round the width up, see `trainer.widths`; of rows of one document never beyond the longest there is,
            for which alone the model is known to have positions.
        longest_row: of the packed rows of a batch plan, for that.
    """
    import torch

    offsets, beginnings = data.offsets, data.beginnings
    spans = [[(int(offsets[i]), int(offsets[i + 1])) for i in row] for row in rows] or [[]]
    packed = any(len(row) > 1 for row in spans)
    families = [[0] * len(row) if beginnings is None else beginnings.families[row].tolist() for row in rows] or [[]]
    sizes = (0,) if beginnings is None else beginnings.sizes
    width = max((data.row_tokens(row) for row in rows), default=0) or 1
    if shared:
        most = shared_width(width, longest_row)
        width = most if packed else max(width, min(most, data.longest))
    ids = np.full((len(spans), width), pad_token_id, dtype=np.int64)
    counts = np.zeros((len(spans), width), dtype=bool)
    positions = np.zeros((len(spans), width), dtype=np.int64) if packed else None
    longest = max((end - start for row in spans for start, end in row), default=1)
    documents: list[Document] = []
    num_tokens = 0
    for index, row in enumerate(spans):
        at = 0
        firsts: dict[int, int] = {}  # family -> where the row holds what its documents begin with
        for (start, end), family in zip(row, families[index], strict=True):
            begin, before = (firsts[family], int(sizes[family])) if family in firsts else (0, 0)
            if family:
                firsts.setdefault(family, at)
            start += before
            size = end - start
            ids[index, at : at + size] = data.token_ids[start:end]
            counts[index, at : at + size] = data.supervised[start:end]
            counts[index, at] = False  # nothing before a document's first token predicts it
            if positions is not None:
                positions[index, at : at + size] = np.arange(before, before + size)
                documents.append((index, at, at + size, begin, before))
            at += size
        if positions is not None and at < width:
            # Padding is a document of its own, or several: a position that none of these documents has would choose
            # other frequencies for all of them where a model goes by the largest (LongRoPE).
            positions[index, at:] = np.arange(width - at) % longest
            last = documents[-1] if documents and documents[-1][0] == index else None
            if last is not None and width - at < at - last[1]:
                # For attention a little of it is the end of the last one, which never looks right: a call less.
                documents[-1] = (index, last[1], width, *last[3:])
            else:
                documents.append((index, at, width, 0, 0))
        num_tokens += at
    target_positions = np.flatnonzero(counts.ravel())
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=None if positions is None else torch.from_numpy(positions),
        predicts=torch.from_numpy(target_positions - 1),
        targets=torch.from_numpy(ids.ravel()[target_positions]),
        num_tokens=num_tokens,
        documents=tuple(documents) if packed else None,
    )
