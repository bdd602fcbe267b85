"""Attention of packed rows, each document by itself: no token ever meets one of another document, not even masked.

transformers keeps packed documents apart by a mask over the whole row, whose attention costs row x row. Here the linear
layers still see the long row, but each document is attended to by itself: the sum of squares instead of the square of
the sum, the kernel for plain causal attention, and no mask to build. It is registered as an attention implementation of
transformers, named `NAME`; whatever is not a packed row goes through "sdpa" as before.

Where documents of a row begin alike it holds that beginning once (`trainer.beginning`), and each is attended to with it
in front.

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
# What a document shares with its row need not ask again, but that takes a mask, with which the kernel no longer leaves
# out what lies in the future: worth it for short documents and long beginnings (1.1 to 4 times as fast; for others 0.75
# to 1.1 times; two CPU cores, torch 2.13, 2026-11-27).
SHORT = 256  # tokens of its own
MASKED_SHARE = 1.0  # tokens of its own, in parts of the common ones


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
    of_rows: list[list[Document]] = [[] for _ in range(query.shape[0])]
    for document in documents:
        of_rows[document[0]].append(document)
    attended = []
    for row, of_row in enumerate(of_rows):
        shared = {begin: before for *_, begin, before in of_row if before}
        # Split, not sliced: the gradient of a slice is as large as the whole row, that of a split is put together once.
        sizes = [
            part
            for _, start, end, *_ in of_row
            for part in ((shared[start], end - start - shared[start]) if start in shared else (end - start,))
        ]
        parts = iter(zip(*(tensor[row : row + 1].split(sizes, dim=2) for tensor in (query, key, value)), strict=True))
        beginnings: dict[int, tuple[Any, ...]] = {}
        found = []
        for _, start, end, begin, before in of_row:
            one = next(parts)
            if start in shared:
                beginnings[start] = one
                one = _after(one, next(parts))
            size = end - start
            if before:
                asks_once = size <= SHORT or size <= MASKED_SHARE * before
                first = beginnings[begin]
                one = (one[0], *_after(first[1:], one[1:])) if asks_once else _after(first, one)
            asked, seen = one[0].shape[2], one[1].shape[2]
            local = None
            if asked != seen:
                local = band(seen, window or seen, query.device, before)
            elif window is not None and seen > window:
                local = band(seen, window, query.device)
            outputs = sdpa(module, *one, local, **named)[0]
            found.append(outputs if asked == size else outputs[:, before:])
        attended.append(torch.cat(found, dim=1))
    return torch.cat(attended) if len(attended) > 1 else attended[0]


def _after(first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[Any, ...]:
    """Queries, keys and values of some positions after those of others."""
    import torch

    return tuple(torch.cat(both, dim=2) for both in zip(first, second, strict=True))


def mask(model: Any, documents: tuple[Document, ...], input_ids: Any) -> Any:
    """Which position sees which, (rows, 1, width, width), for a model that does not attend to documents apart.

    As its attention takes it: true or false for "sdpa", and otherwise what is added to the scores.
    """
    import torch

    rows, width = input_ids.shape
    number, begins, common = (torch.zeros(rows, width, dtype=torch.int64) for _ in range(3))
    for count, (row, start, end, begin, before) in enumerate(documents):
        number[row, start:end], begins[row, start:end], common[row, start:end] = count, begin, before
    number, begins, common = (one.to(input_ids.device) for one in (number, begins, common))
    place = torch.arange(width, device=input_ids.device)
    is_common = (place >= begins[:, :, None]) & (place < (begins + common)[:, :, None])
    seen = is_common | ((number[:, :, None] == number[:, None]) & (place[:, None] >= place))
    seen = seen[:, None]
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        return seen
    dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def band(size: int, window: int, device: Any, first: int = 0) -> Any:
    """Which tokens of a document see which: themselves and the `window - 1` before, (1, 1, size - first, size).

    Args:
        first: the first that asks.
    """
    import torch

    place = torch.arange(size, device=device)
    distance = place[first:, None] - place[None]
    return ((distance >= 0) & (distance < window))[None, None]
