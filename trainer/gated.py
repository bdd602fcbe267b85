"""Gated MLPs, down(act(gate(x)) * up(x)), that keep less for the backward pass.

A model's own lines keep four tensors of the intermediate size: gate(x), act of it, up(x), and the product of both. In a
Llama of 1 B they are 16 of the some 23 hidden sizes that a block keeps of each token. Where all three layers are plain
adapters, here the whole MLP is one step of autograd that keeps gate(x) and up(x) and makes the rest again, two passes
over them; elsewhere what lies between the layers is one step, and act of gate(x) is not kept.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F

from trainer.alike import gives_the_same
from trainer.fused import FusedLayer, Layers, as_autocast, operands_of

PARTS = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS: dict[str, tuple[Any, Any]] = {  # of a tensor; and of the result's gradient and that tensor
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu by tanh": (
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}
PROBE = (2, 3, 8)  # rows, tokens and hidden size of what is compared
PROBE_INNER = 12


class _Product(torch.autograd.Function):
    """act(gate) * up, keeping those two."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.name = name
        return _gated(gate, up, name)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        act, slope = ACTIVATIONS[ctx.name]
        return slope(upstream[0] * up, gate), act(gate).mul_(upstream[0]), None


class _LoraMlp(torch.autograd.Function):
    """down(act(gate(x)) * up(x)) of three adapter layers, keeping x, gate(x) and up(x)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, scaling: float, *layers: torch.Tensor | None) -> torch.Tensor:
        """`layers`: weight, bias, A and B of gate, up and down."""
        inner, outer = Layers.of(layers[:8], x.dtype, scaling), Layers.of(layers[8:], x.dtype, scaling)
        (gate, up), low = inner.forward(x.reshape(-1, x.shape[-1]))
        (result,), outer_low = outer.forward(_gated(gate, up, name))
        ctx.save_for_backward(x, gate, up, low, outer_low, *inner.tensors, *outer.tensors)
        ctx.rests, ctx.name = (inner.rest, outer.rest), name
        return result.reshape(*x.shape[:-1], result.shape[-1])

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gate, up, low, outer_low, *tensors = ctx.saved_tensors
        inner, outer = Layers(tuple(tensors[:5]), ctx.rests[0]), Layers(tuple(tensors[5:]), ctx.rests[1])
        act, slope = ACTIVATIONS[ctx.name]
        gradient = upstream[0].reshape(-1, upstream[0].shape[-1])
        activated = act(gate)
        to_product, to_outer = outer.backward([gradient], activated * up, outer_low, for_x=True)
        assert to_product is not None
        to_up = activated.mul_(to_product)
        to_gate = slope(to_product.mul_(up), gate)
        flat = x.reshape(-1, x.shape[-1])
        to_x, to_inner = inner.backward([to_gate, to_up], flat, low, for_x=ctx.needs_input_grad[0])
        return None if to_x is None else to_x.reshape(x.shape), None, None, *to_inner, *to_outer


def _gated(gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
    return ACTIVATIONS[name][0](gate).mul_(up)  # type: ignore[no-any-return]


def fuse_mlps(model: Any) -> int:
    """Let every gated MLP of the model compute so that gives the same numbers this way; the number of those that do.

    It counts as one by the names of its three layers. Whether it is no more than that, and by which activation, is
    found by comparing results and gradients of its own lines on small random layers. Any that differs stays as it is.
    """
    kinds: dict[Any, str | None] = {}  # one of each class and activation is compared
    fused = 0
    for module in model.modules():
        if "forward" in vars(module) or not all(isinstance(getattr(module, p, None), torch.nn.Module) for p in PARTS):
            continue
        kind = (type(module), str(getattr(module, "act_fn", None)))
        if kind not in kinds:
            kinds[kind] = next((name for name in ACTIVATIONS if _agrees(module, name)), None)
        name = kinds[kind]
        if name is not None:
            module.forward = functools.partial(_forward, module, type(module).forward, name)
            fused += 1
    return fused


def _forward(module: Any, plain: Any, name: str, x: torch.Tensor, *more: Any, **named: Any) -> Any:
    if more or named or not torch.is_grad_enabled():
        return plain(module, x, *more, **named)
    parts = tuple(getattr(module, part) for part in PARTS)
    layers = tuple(one for part in parts if isinstance(one := vars(part).get("forward"), FusedLayer) and one.is_on())
    if len(layers) == len(PARTS) and len({one.scaling() for one in layers}) == 1:
        cast = as_autocast(x)
        operands = operands_of(layers, cast.dtype)
        if operands is not None:
            return _LoraMlp.apply(cast, name, layers[0].scaling(), *operands)
    gate_proj, up_proj, down_proj = parts
    gate, up = gate_proj(x), up_proj(x)
    return down_proj(_Product.apply(gate, up, name))


def _agrees(module: Any, name: str) -> bool:
    generator = torch.Generator().manual_seed(0)
    hidden = PROBE[-1]
    probe = copy.copy(module)
    layers = {"gate_proj": (hidden, PROBE_INNER), "up_proj": (hidden, PROBE_INNER), "down_proj": (PROBE_INNER, hidden)}
    probe.__dict__["_modules"] = dict(module._modules)
    for part, (inputs, outputs) in layers.items():
        layer = torch.nn.Linear(inputs, outputs, bias=False, device="meta")  # made without a draw of random numbers
        layer.weight = torch.nn.Parameter(torch.randn(outputs, inputs, generator=generator))
        probe._modules[part] = layer
    # From small to so large that a limit on what comes in or goes out would show.
    x = torch.randn(*PROBE, generator=generator) * torch.logspace(-2, 2, PROBE[1])[:, None]
    upstream = torch.randn(*PROBE, generator=generator)

    def numbers(forward: Any) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        result = forward(leaf)
        weights = [layer.weight for layer in probe._modules.values() if isinstance(layer, torch.nn.Linear)]
        to_x, *to_weights = torch.autograd.grad(result, [leaf, *weights], upstream)
        return [*result.flatten(0, 1), *to_x.flatten(0, 1), *to_weights]  # token by token

    own = functools.partial(type(module).forward, probe)
    ours = functools.partial(_forward, probe, type(module).forward, name)
    return gives_the_same(lambda: numbers(ours), lambda: numbers(own), torch.float32, type(module).__name__)
