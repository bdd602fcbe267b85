"""Adapters in half precision, cast all at once: what trains is fp32, what is multiplied is its rounded copy.

Autocast rounds each matrix of an adapter for itself in every micro-step, widens each gradient for itself, and adds each
to the last micro-batch's: with seven layers of two matrices a block, 42 of the some 200 kernels that a block launches.
Here one call rounds them all before the forward pass, and two take all gradients home after the backward pass. The
numbers are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainer.fused import FusedLayer

KINDS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class HalfCopies:
    """The fp32 matrices of the fused adapter layers, and a copy of each that takes its place in a micro-step."""

    def __init__(self, layers: list[FusedLayer], dtype: torch.dtype) -> None:
        self.layers = layers
        self.own: list[torch.Tensor] = [matrix for layer in layers for matrix in layer.matrices()]
        self.copies = [matrix.detach().to(dtype).requires_grad_() for matrix in self.own]
        self._wide = [torch.empty_like(matrix) for matrix in self.own]  # gradients on their way home

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the layers multiply the copies; at its end the gradients are added to the matrices' own."""
        with torch.no_grad():
            torch._foreach_copy_(self.copies, self.own)
        try:
            for layer, a, b in zip(self.layers, self.copies[::2], self.copies[1::2], strict=True):
                layer.halves = (a, b)
            yield
            self._take_home()
        finally:  # also where memory ran out in between
            for layer in self.layers:
                layer.halves = None
            for copy in self.copies:
                copy.grad = None

    @torch.no_grad()
    def _take_home(self) -> None:
        """A matrix that took no part (an expert that no token chose) keeps what it had, nothing or a sum."""
        first: list[tuple[Any, Any]] = []
        again: list[tuple[Any, Any, Any]] = []
        for matrix, copy, wide in zip(self.own, self.copies, self._wide, strict=True):
            if copy.grad is None:
                continue
            if matrix.grad is None:
                matrix.grad = torch.empty_like(matrix)
                first.append((matrix.grad, copy.grad))
            else:
                again.append((matrix.grad, wide, copy.grad))
        if first:
            torch._foreach_copy_([into for into, _ in first], [found for _, found in first])
        if again:
            wider = [wide for _, wide, _ in again]
            torch._foreach_copy_(wider, [found for _, _, found in again])
            torch._foreach_add_([into for into, _, _ in again], wider)


def half_copies(model: Any, precision: str, *, without: tuple[torch.nn.Parameter, ...] = ()) -> HalfCopies | None:
    """Copies for the fused adapter layers of a model that trains in half precision; None where there is no such layer.

    Args:
        without: parameters whose layers get no copies.
    """
    if precision not in KINDS:
        return None
    barred = {id(parameter) for parameter in without}
    found = [vars(module).get("forward") for module in model.modules()]
    layers = [
        one
        for one in found
        if isinstance(one, FusedLayer)
        and all(m.dtype == torch.float32 and m.requires_grad and id(m) not in barred for m in one.matrices())
    ]
    return HalfCopies(layers, KINDS[precision]) if layers else None
