"""Whether what replaces a part of a model gives the part's own numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

# Largest difference, relative to the size of what is compared. Half precisions: both round once or twice on the way,
# each by half a unit in the last place. Models compute much in fp32 for double weights too.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

Numbers = Callable[[], list[torch.Tensor]]


def gives_the_same(ours: Numbers, own: Numbers, dtype: torch.dtype, what: str) -> bool:
    """Whether all tensors agree. A part that cannot be called as ours is no part of that kind; the log says why.

    Raises:
        What running out of memory raises: it says nothing about the part.
    """
    if dtype not in TOLERANCES:
        return False
    try:
        with torch.enable_grad():
            pairs = [(one.detach().double(), other.detach().double()) for one, other in zip(ours(), own(), strict=True)]
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as reason:
        from trainer.model import is_out_of_memory

        if is_out_of_memory(reason):
            raise
        logging.getLogger(__name__).debug("%s stays as the model has it: %s", what, reason)
        return False
    return all(float((one - other).norm()) <= TOLERANCES[dtype] * float(other.norm()) for one, other in pairs)
