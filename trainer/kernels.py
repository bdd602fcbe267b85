"""Which of PyTorch's attention kernels a process takes on a GPU. For the whole process, in worker and trainer."""

from __future__ import annotations

import functools
from typing import Any

_grouped = {"half": True, "full": True}  # whether a fused kernel takes fewer key-value heads, by precision


def settle_kernels() -> None:
    """Take kernels that suit micro-batches of many shapes; called where a model is loaded onto a GPU."""
    import torch

    avoid_plans_for_each_shape()
    if torch.version.hip is None:  # AMD's kernels are others
        # Asked once and kept: where layers are compiled, a question to the driver would break their graph.
        _grouped.update(half=torch.cuda.get_device_capability() >= (8, 0), full=False)
    register()


def avoid_plans_for_each_shape() -> None:
    """Leave out cuDNN's attention, which builds a plan for each new shape, forward and backward.

    PyTorch asks it first on Hopper and Blackwell. Micro-batches of text come in hundreds of shapes, and few come twice:
    on an H200 a width not met before cost 0.13 s, one met before 0.001 s, and packed rows of a 1 B model trained 26,000
    tokens a second instead of 64,000 (torch 2.11, 2026-11-26); on a B200 others saw a second for each shape
    (modelscope/FunASR#3704). FlashAttention's kernels, next in PyTorch's order, need no plan.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


@functools.cache
def register() -> None:
    """Make `attention` what transformers calls "sdpa"; once is enough."""
    from transformers import AttentionInterface

    AttentionInterface.register("sdpa", attention)


def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **named: Any) -> tuple[Any, None]:
    """transformers' "sdpa", but that key-value heads are repeated where no kernel takes fewer of them than query heads.

    Only FlashAttention and cuDNN do: in fp32, and on cards before Ampere (an RTX 2080 Ti), PyTorch is left with plain
    products that hold tokens x tokens for each head to the backward pass. Of repeated heads the memory-efficient kernel
    makes, for 1,024 tokens and 32 heads in fp32 on an H200, 0.8 ms and 64 MiB of 1.4 ms and 536 (2026-11-26).

    Args:
        query: (rows, heads, tokens, head size); key and value: (rows, key-value heads, tokens, head size).
        attention_mask: where there is one, transformers repeats the heads by itself.

    Returns:
        (rows, tokens, heads, head size), None.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    times = query.shape[1] // key.shape[1]
    if attention_mask is None and times > 1 and has_no_grouped_kernel(query):
        module = _Ungrouped(getattr(module, "is_causal", True))
        key, value = (_repeated(tensor, times) for tensor in (key, value))
    found: tuple[Any, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **named)
    return found


class _Ungrouped:
    """A module without groups, as far as transformers looks at it. No SimpleNamespace: it breaks a compiled graph."""

    def __init__(self, is_causal: bool) -> None:
        self.is_causal = is_causal


def has_no_grouped_kernel(query: Any) -> bool:
    """Whether no fused kernel on this GPU takes fewer key-value heads than query heads, in the precision it will have.

    That is autocast's where it is on: with fp32 weights rotary positions leave queries in fp32, which attention casts.
    """
    import torch

    kind = query.device.type
    if kind != "cuda":
        return False
    is_cast = query.dtype == torch.float32 and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if is_cast else query.dtype
    return not _grouped["half" if dtype.itemsize == 2 else "full"]


def _repeated(tensor: Any, times: int) -> Any:
    """(rows, heads, tokens, size) -> (rows, heads * times, tokens, size), each head `times` times in a row."""
    rows, heads, tokens, size = tensor.shape
    return tensor[:, :, None].expand(rows, heads, times, tokens, size).reshape(rows, heads * times, tokens, size)
