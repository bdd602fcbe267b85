"""Adapter layers that are given the same input (q, k and v; gate and up), computed when the first of them is asked.

Each for itself reads the input for its product with A, and again for the gradient of A, and makes a gradient of the
input that autograd adds to the others'. Together they take one such product in place of three, and nothing is left to
add. Which layers are such siblings is seen, not guessed from names: in a forward pass over two tokens, those called one
after the other with the very same tensor. Later, too, a result made ahead is only given out for that tensor, unchanged;
a layer that is asked for anything else computes by itself.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from trainer.fused import FusedLayer, in_one


class Siblings:
    """Layers in the order of their calls, and what the first one's call has made ahead for the others."""

    def __init__(self, layers: tuple[FusedLayer, ...]) -> None:
        self.layers = layers
        self._ahead: dict[int, torch.Tensor] = {}  # by the layer's id
        self._x: torch.Tensor | None = None
        self._version = 0

    def result(self, layer: FusedLayer, x: torch.Tensor) -> torch.Tensor | None:
        """What `layer` makes of `x`, or None: it is to compute by itself."""
        if layer is not self.layers[0]:
            if x is not self._x or x._version != self._version:
                return None
            found = self._ahead.pop(id(layer), None)
            if not self._ahead:
                self._x = None
            return found
        self.forget()
        scaling = layer.scaling()
        if not all(one.is_on() and one.scaling() == scaling for one in self.layers):
            return None
        together = in_one(self.layers, x)
        if together is None:
            return None
        own, *others = together
        self._x, self._version = x, x._version
        self._ahead = {id(one): result for one, result in zip(self.layers[1:], others, strict=True)}
        return own

    def forget(self) -> None:
        """Drop what was made ahead and not asked for: it would keep the whole forward pass in memory."""
        self._ahead.clear()
        self._x = None


def join_siblings(model: Any) -> int:
    """Let adapter layers with the same input compute together; the number of such groups."""
    fused = {id(module): found for module in model.modules() if isinstance(found := _forward_of(module), FusedLayer)}
    if len(fused) < 2:
        return 0
    calls: list[tuple[FusedLayer, torch.Tensor | None]] = []

    def note(module: Any, positional: tuple[Any, ...]) -> None:
        calls.append((fused[id(module)], positional[0] if positional else None))

    hooks = [module.register_forward_pre_hook(note) for module in model.modules() if id(module) in fused]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[0, 1]], device=next(model.parameters()).device), use_cache=False)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as reason:
        from trainer.model import is_out_of_memory

        if is_out_of_memory(reason):
            raise
        logging.getLogger(__name__).debug("adapter layers compute each for itself: %s", reason)
        return 0
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    groups = [Siblings(run) for run in _runs(calls) if len(run) > 1]
    for group in groups:
        for layer in group.layers:
            layer.siblings = group
    return len(groups)


def siblings_of(model: Any) -> list[Siblings]:
    """The groups of a model, each once."""
    layers = (_forward_of(module) for module in model.modules())
    groups = {id(one.siblings): one.siblings for one in layers if isinstance(one, FusedLayer) and one.siblings}
    return list(groups.values())


def _forward_of(module: Any) -> Any:
    return vars(module).get("forward")


def _runs(calls: list[tuple[FusedLayer, torch.Tensor | None]]) -> list[tuple[FusedLayer, ...]]:
    """Layers called one after the other with the same tensor; one called more than once in a pass stays alone."""
    counts: dict[int, int] = {}
    for layer, _ in calls:
        counts[id(layer)] = counts.get(id(layer), 0) + 1
    runs: list[list[FusedLayer]] = []
    last = None
    for layer, x in calls:
        if counts[id(layer)] > 1:
            last = None
            continue
        if x is None or x is not last:
            runs.append([])
        runs[-1].append(layer)
        last = x
    return [tuple(run) for run in runs]
