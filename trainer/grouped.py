"""Attention of packed documents laid side by side in padded groups: see `trainer.documents` and `trainer.arrangement`.

Both ways there and back are plain selections, forward and backward: each position has one place among the groups, and
padding takes no part, so that nothing has to be added up. Only what a row's documents have in common stands in several
places: what comes out at all but the first is dropped, and its keys and values get the sum of their gradients. (Asked
only once, as on a CPU, the others would need a mask, which FlashAttention's kernels do not take.)
"""

from __future__ import annotations

from typing import Any

import torch

from trainer import documents
from trainer.arrangement import Arrangement

Repeated = tuple[tuple[int, torch.Tensor], ...]  # see Arrangement


class _Spread(torch.autograd.Function):
    """Positions of the rows -> places of the groups. Padding has no gradient: nothing looks at it."""

    @staticmethod
    def forward(
        ctx: Any, flat: torch.Tensor, places: torch.Tensor, back: torch.Tensor, repeated: Repeated
    ) -> torch.Tensor:
        ctx.save_for_backward(back, *(others for _, others in repeated))
        ctx.starts = [start for start, _ in repeated]
        return flat.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        back, *repeated = ctx.saved_tensors
        (of_places,) = upstream
        found = of_places.index_select(0, back)
        for start, others in zip(ctx.starts, repeated, strict=True):
            documents, tokens = others.shape
            more = of_places.index_select(0, others.view(-1)).view(documents, tokens, *of_places.shape[1:])
            # Not in half precision, where dozens of documents would be rounded one after the other.
            found[start : start + tokens] += more.sum(0, dtype=torch.promote_types(more.dtype, torch.float32))
        return found, None, None, None


class _Collect(torch.autograd.Function):
    """Places of the groups -> positions of the rows; padding is dropped."""

    @staticmethod
    def forward(ctx: Any, spread: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        ctx.shape = spread.shape
        return spread.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return upstream[0].new_zeros(ctx.shape).index_copy_(0, back, upstream[0]), None


def in_groups(
    sdpa: Any, found: Arrangement, module: Any, query: Any, key: Any, value: Any, named: dict[str, Any]
) -> Any:
    """Causal attention of each document, all of a group's at once.

    Args:
        sdpa: transformers' function for one group.
        query, key, value: (rows, heads, width, head size).

    Returns:
        (rows, width, heads, head size).
    """
    rows, heads, width, _ = query.shape
    window = named.get("sliding_window")
    spread = []
    for tensor, repeated in ((query, ()), (key, found.repeated), (value, found.repeated)):
        flat = tensor.transpose(1, 2).reshape(rows * width, *tensor.shape[1::2])  # (positions, heads, head size)
        spread.append(_Spread.apply(flat, found.places, found.back, repeated).split(found.sizes))
    attended = []
    for (count, wide), *parts in zip(found.groups, *spread, strict=True):
        group = (part.view(count, wide, *part.shape[1:]).transpose(1, 2) for part in parts)
        local = None if window is None or wide <= window else documents.band(wide, window, query.device)
        attended.append(sdpa(module, *group, local, **named)[0].reshape(count * wide, heads, -1))
    joined = torch.cat(attended) if len(attended) > 1 else attended[0]
    return _Collect.apply(joined, found.back).view(rows, width, heads, -1)
