"""The model's own loss per example, for `sample_score = "loss"`: taken before the batch plan, before any training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from presets.errors import NonFiniteLossError
from trainer.collate import batch_on
from trainer.evaluate import evaluation_batches
from trainer.tokens import FloatArray, IntArray, TokenizedDataset

if TYPE_CHECKING:
    import torch


def example_losses(
    model: Any,
    data: TokenizedDataset,
    *,
    device: str,
    precision: str,
    examples: IntArray | None = None,
    share: slice = slice(None),
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> FloatArray:
    """Mean token loss of each example, (num_examples,). Weights, gradients and random state are left alone.

    Args:
        examples: which to score, all by default; the others get NaN.
        share: which of the batches this process takes.
        reduce: sums a tensor over the processes.

    Raises:
        NonFiniteLossError: the model gives no usable number for some example.
    """
    import torch

    from trainer.step import autocast, token_losses

    wanted = np.arange(len(data)) if examples is None else examples
    losses = torch.zeros(len(data), dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device, precision):
            for members in evaluation_batches(data, wanted, device)[share]:
                batch = batch_on(device, [members[i : i + 1] for i in range(len(members))], data)
                each = token_losses(model, batch, reduction="none").double()
                row = batch.predicts // batch.input_ids.shape[1]
                sums = torch.zeros(len(members), dtype=torch.float64, device=each.device).index_add_(0, row, each)
                losses[torch.from_numpy(members)] = (sums / torch.bincount(row, minlength=len(members))).cpu()
    finally:
        model.train(was_training)
    if reduce is not None:
        losses = reduce(losses)
    found = np.full(len(data), np.nan)
    found[wanted] = losses.numpy()[wanted]
    bad = wanted[~np.isfinite(found[wanted])]
    if len(bad):
        named = ", ".join(str(example) for example in bad[:10].tolist()) + (" ..." if len(bad) > 10 else "")
        raise NonFiniteLossError(
            f"sampling by the model's own loss: it is not a number for example(s) {named} of the data, counted from 0. "
            "Look at these examples" + (", or use bf16 or fp32 instead of fp16." if precision == "fp16" else ".")
        )
    return found
