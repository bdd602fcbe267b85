"""Attention of packed rows, each document by itself: no token ever meets one of another document, not even masked.

transformers keeps packed documents apart by a mask over the whole row, whose attention costs row x row. Here the linear
layers still see the long row, but each document is attended to by itself: the sum of squares instead of the square of
the sum, the kernel for plain causal attention, and no mask to build. It is registered as an attention implementation of
transformers, named `NAME`; whatever is not a packed row goes through "sdpa" as before.

On a CPU a loop goes over the documents. A GPU would wait for its many small calls: there the documents are laid side by
side in padded groups of similar length (`trainer.grouped`), a call a group. On two CPU cores groups took 1.3 times
as long as the loop (documents of 60 to 900 tokens; 2026-11-26).

What a model does beside causal and sliding-window attention (caps, biases, chunks) is not known here: like packing
itself, this is used only where `trainer.agreement` finds the same logits on the model at hand.
"""

from __future__ import annotations

import functools
from typing import Any

from trainer.arrangement import Arrangement, Document

NAME = "documents"


@functools.cache
def register() -> None:
    """Make `NAME` known to transformers; once is enough."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from trainer import kernels
    from trainer.grouped import in_groups

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **named: Any) -> tuple[Any, None]:
        documents = named.pop("documents", None)
        if documents is None or attention_mask is not None:
            return kernels.attention(module, query, key, value, attention_mask, **named)
        if not getattr(module, "is_causal", True):
            raise ValueError("attention that is not causal cannot be done document by document")
        attend = in_groups if isinstance(documents, Arrangement) else _one_by_one
        return attend(kernels.attention, documents, module, query, key, value, named), None

    def mask(*positional: Any, **named: Any) -> Any:
        # transformers forbids the shortcut to plain causal attention exactly where documents (or images) share a row.
        if not named.get("allow_is_causal_skip", True) and named.get("q_length") == named.get("kv_length"):
            return None
        return sdpa_mask(*positional, **named)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def use(model: Any, *, apart: bool) -> None:
    """Let the model attend to packed documents one by one, or by a mask over the whole row again.

    Raises:
        ValueError: the model does not take another attention.
    """
    register()
    model.set_attn_implementation(NAME if apart else "sdpa")


def are_used(model: Any) -> bool:
    """Whether the model's packed rows want `documents` beside their positions."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME


def _one_by_one(
    sdpa: Any, documents: tuple[Document, ...], module: Any, query: Any, key: Any, value: Any, named: dict[str, Any]
) -> Any:
    """Causal attention of each document, put together again.

    Args:
        query, key, value: (rows, heads, width, head size).

    Returns:
        (rows, width, heads, head size).
    """
    import torch

    window = named.get("sliding_window")
    sizes: list[list[int]] = [[] for _ in range(query.shape[0])]
    for row, start, end in documents:
        sizes[row].append(end - start)
    attended = []
    for row, of_row in enumerate(sizes):
        # Split, not sliced: the gradient of a slice is as large as the whole row, that of a split is put together once.
        parts = (tensor[row : row + 1].split(of_row, dim=2) for tensor in (query, key, value))
        found = []
        for size, *one in zip(of_row, *parts, strict=True):
            local = None if window is None or size <= window else band(size, window, query.device)
            found.append(sdpa(module, *one, local, **named)[0])
        attended.append(torch.cat(found, dim=1))
    return torch.cat(attended) if len(attended) > 1 else attended[0]


def band(size: int, window: int, device: Any) -> Any:
    """Which tokens of a document see which: themselves and the `window - 1` before, (1, 1, size, size)."""
    import torch

    place = torch.arange(size, device=device)
    distance = place[:, None] - place[None]
    return ((distance >= 0) & (distance < window))[None, None]
