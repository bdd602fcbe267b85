"""Cross-entropy with nothing as large as the logits but its own log-probabilities, which become the gradient in place.

PyTorch's own keeps the log-probabilities, fills a tensor of their size with zeros but for the targets, makes a third
one out of both, and for half-precision logits a fourth and a fifth for the conversions: with a vocabulary of 100,000
and more these are the largest tensors of a step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        likely = torch.log_softmax(logits, dim=-1, dtype=wide)
        at = targets[:, None]
        ctx.save_for_backward(likely, at)
        ctx.kept_as = logits.dtype
        return likely.gather(1, at).sum().neg()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        likely, at = ctx.saved_tensors  # of a second backward pass: an error of autograd's, since they have changed
        gradient = likely.exp_()
        gradient.scatter_add_(1, at, gradient.new_full((), -1.0).expand(at.shape))
        return gradient.mul_(upstream[0]).to(ctx.kept_as), None


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, *, reduction: str = "sum") -> torch.Tensor:
    """Cross-entropy in fp32 (fp64 for double logits) of each position, or the sum of all.

    Args:
        logits: (positions, vocabulary), of any precision. Good for one backward pass.
        targets: (positions,) token ids.
        reduction: "sum", or "none" for (positions,).
    """
    if reduction == "sum":
        return _Sum.apply(logits, targets)  # type: ignore[no-any-return]
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return F.cross_entropy(wide, targets, reduction=reduction)
