"""RMS norms in few passes: the model's own numbers, without the five tensors that its own lines leave behind.

Models write the norm out (to fp32, square, mean, root, two products, and back): in bf16 some 30 kernels forward and
backward on a GPU, where launching them sets the pace of small micro-batches, and on a CPU as many passes over the
activations. With CUDA, PyTorch's fused kernels take one and two; on a CPU the few lines below take a third of the time
(1.9 ms instead of 5.8 for 1,024 tokens x 576, forward and backward; two cores of an AMD EPYC, torch 2.13, 2026-11-26).
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from trainer.alike import gives_the_same

PROBE_ROWS = 4


class _Lines(torch.autograd.Function):
    """x * rsqrt(mean(x^2) + eps) * scale on a CPU, in the input's own precision (fp32 or fp64)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, inverse)
        return torch.mul(x, inverse).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, inverse = ctx.saved_tensors
        scaled = upstream[0] * scale
        # Of the norm itself x sees the part along x: minus x * inverse^2 / n * <scaled, x>.
        along = torch.linalg.vecdot(scaled, x).unsqueeze(-1).mul_(inverse).mul_(inverse).mul_(-1.0 / x.shape[-1])
        to_scale = None
        if ctx.needs_input_grad[1]:
            width = x.shape[-1]
            to_scale = (upstream[0] * x).reshape(-1, width).t().mv(inverse.reshape(-1))
        to_x = scaled.addcmul_(x, along).mul_(inverse) if ctx.needs_input_grad[0] else None
        return to_x, to_scale, None


class _Kernels(torch.autograd.Function):
    """The same by PyTorch's fused CUDA kernels: statistics in fp32, rounded once.

    Called as they are: through `F.rms_norm`, autocast would make fp32 of a half-precision input and of the result.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
        result, inverse = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], scale, eps)
        ctx.save_for_backward(x, scale, inverse)
        return result  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, inverse = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
        to_x, to_scale = torch.ops.aten._fused_rms_norm_backward(
            upstream[0].contiguous(), x, [x.shape[-1]], inverse, scale, wanted
        )
        return to_x if wanted[0] else None, to_scale if wanted[1] else None, None


def fuse_norms(model: Any) -> int:
    """Let every RMS norm of the model compute so that gives the same numbers this way; the number of those that do.

    A norm counts as one by its name, its single weight and its eps; whether it scales by that weight or by one plus it
    (Gemma) is found by comparing results and gradients with its own on random input. Any that differs stays as it is.
    """
    kinds: dict[Any, float | None] = {}  # norms of one class, width and precision are compared once
    fused = 0
    for module in model.modules():
        eps = _eps(module)
        if eps is None:
            continue
        weight = module.weight
        kind = (type(module), weight.shape, weight.dtype, weight.device, eps)
        if kind not in kinds:
            kinds[kind] = _offset(module, eps)
        offset = kinds[kind]
        if offset is not None:
            module.forward = functools.partial(_forward, module, type(module).forward, eps, offset)
            fused += 1
    return fused


def _eps(module: Any) -> float | None:
    """A norm's eps; None for any other module."""
    if "RMSNorm" not in type(module).__name__ or "forward" in vars(module):
        return None
    parameters = dict(module.named_parameters())
    if list(parameters) != ["weight"] or parameters["weight"].ndim != 1 or list(module.children()):
        return None
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(found) if isinstance(found, (int, float)) else None


def _forward(module: Any, plain: Any, eps: float, offset: float, x: torch.Tensor, *more: Any, **named: Any) -> Any:
    weight = module.weight
    if more or named or x.dtype != weight.dtype or x.device != weight.device:
        return plain(module, x, *more, **named)
    scale = weight + offset if offset else weight
    if x.device.type == "cuda":
        return _Kernels.apply(x, scale, eps)
    if x.dtype in (torch.float32, torch.float64):
        return _Lines.apply(x, scale, eps)
    return plain(module, x)


def _offset(module: Any, eps: float) -> float | None:
    """What is added to the weight of norms like this one; None where fused results or gradients are not its own."""
    weight = module.weight
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(weight.device, weight.dtype)

    width = len(weight)
    probe = copy.deepcopy(module).train(module.training)
    # Away from zero on average, and rows so small that eps counts: a norm that does more than ours would show it.
    x = (random(PROBE_ROWS, width) + 0.5) * torch.logspace(-3, 0, PROBE_ROWS, device=weight.device)[:, None]
    x = x.to(weight.dtype)
    upstream = random(PROBE_ROWS, width)
    probe.weight = torch.nn.Parameter(random(width).abs() + 0.5)
    own = functools.partial(_result, probe.forward, probe.weight, x, upstream)
    for offset in (0.0, 1.0):
        norm = functools.partial(_forward, probe, type(probe).forward, eps, offset)
        ours = functools.partial(_result, norm, probe.weight, x, upstream)
        if gives_the_same(ours, own, weight.dtype, type(module).__name__):
            return offset
    return None


def _result(norm: Any, weight: Any, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """Result, gradient of the input and gradient of the weight, row by row where there are rows."""
    leaf = x.clone().requires_grad_()
    result = norm(leaf)
    to_x, to_weight = torch.autograd.grad(result, [leaf, weight], upstream.to(result.dtype))
    return [*result, *to_x, to_weight]
