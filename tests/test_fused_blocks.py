"""Norms and rotary positions in few passes give the model's own numbers; what is of another kind is left alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from small_models import small_model, with_lora
from test_fused import difference, gradients

from trainer import norms, rotary
from trainer.norms import fuse_norms
from trainer.rotary import NAME, Turned, fuse_rotary

# Norms of two blocks and the last one; queries and keys have their own in qwen3 and gemma3.
NORMS = {
    "llama": 5,
    "mistral": 5,
    "qwen3": 9,
    "gemma2": 9,
    "gemma3": 13,
    "cohere": 0,
    "granite": 5,
    "gpt2": 0,
    "opt": 0,
}
TURNING = {"llama", "mistral", "qwen3", "gemma2", "gemma3", "granite"}  # cohere turns neighbours, not halves


@pytest.fixture(autouse=True)
def _own_functions_again() -> Iterator[None]:
    """Families share nothing, but tests do: each begins with the models' own functions."""

    def put_back() -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith("transformers.models.") and isinstance(vars(module).get(NAME), Turned):
                setattr(module, NAME, vars(module)[NAME].plain)

    put_back()
    yield
    put_back()


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("family", NORMS)
def test_loss_and_gradients_are_the_model_s_own(family: str, adapter: str) -> None:
    model = small_model(family)
    model = (with_lora(model) if adapter == "lora" else model).float()
    plain_loss, plain = gradients(model)
    assert fuse_norms(model) == NORMS[family]
    norm_loss, normed = gradients(model)
    assert fuse_rotary(model) == (family in TURNING)
    loss, turned = gradients(model)
    assert norm_loss == pytest.approx(plain_loss, rel=1e-5)
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert difference(plain, normed) < 2e-5
    assert difference(plain, turned) < 2e-5
    if NORMS[family]:
        assert difference(plain, normed) > 0  # another way of computing rounds differently somewhere
    if family in TURNING:
        assert difference(normed, turned) > 0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("base", ["fp32", "half"])
def test_half_precisions_stay_near_the_model_s_own(precision: str, base: str) -> None:
    import torch

    model = with_lora(small_model("llama")).float()
    _, exact = gradients(model)
    if base == "half":
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, {"fp16": "float16", "bf16": "bfloat16"}[precision]))
    _, plain = gradients(model, precision)
    fuse_norms(model)
    assert fuse_rotary(model) == 1
    _, fused = gradients(model, precision)
    whole = [torch.cat([one[name].flatten() for name in exact]) for one in (exact, plain, fused)]
    errors = [float((one - whole[0]).norm() / whole[0].norm()) for one in whole[1:]]
    assert 1e-4 < errors[0] < 0.3
    assert errors[1] < 1.5 * errors[0]


def test_gradients_of_a_norm_are_those_of_finite_differences() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    scale = torch.rand(6, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, scale: norms._Lines.apply(x, scale, 1e-3), (x, scale))
    assert torch.autograd.gradcheck(lambda x: norms._Lines.apply(x, scale.detach(), 1e-3), (x,))


def test_gradients_of_turning_are_those_of_finite_differences() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    cos, sin = torch.randn(2, 2, 1, 5, 8, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: rotary._Turn.apply(x, cos, sin), (x,))


def test_norms_of_another_kind_are_left_alone() -> None:
    import torch

    class CentredRMSNorm(torch.nn.Module):  # one by name only: it takes the mean away first
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))
            self.eps = 1e-6

        def forward(self, x: Any) -> Any:
            x = x - x.mean(-1, keepdim=True)
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    class LooseRMSNorm(CentredRMSNorm):  # another eps than it says
        def forward(self, x: Any) -> Any:
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)

    class BiasedRMSNorm(CentredRMSNorm):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.ones(8))

    class SolidRMSNorm(CentredRMSNorm):  # its gradient stops half-way
        def forward(self, x: Any) -> Any:
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps).detach()

    class GatedRMSNorm(CentredRMSNorm):  # cannot be called without a gate
        def forward(self, x: Any, gate: Any) -> Any:  # type: ignore[override]
            return super().forward(x) * gate

    class TrueRMSNorm(CentredRMSNorm):
        def forward(self, x: Any) -> Any:
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    kinds = [CentredRMSNorm, LooseRMSNorm, BiasedRMSNorm, SolidRMSNorm, GatedRMSNorm, torch.nn.LayerNorm, TrueRMSNorm]
    made = [kind(8) if kind is torch.nn.LayerNorm else kind() for kind in kinds]
    assert [fuse_norms(one) for one in made] == [0, 0, 0, 0, 0, 0, 1]


def test_partial_rotation_and_other_arguments_go_to_the_model_s_own_function() -> None:
    import torch

    calls = []

    def plain(*given: Any, **named: Any) -> tuple[str, str]:
        calls.append((given, named))
        return "q", "k"

    turned = Turned(plain)
    q, angles = torch.ones(1, 2, 3, 8), torch.ones(1, 3, 8)
    assert turned(q, q, angles[..., :4], angles[..., :4]) == ("q", "k")  # only part of a head turns
    assert turned(q, q, angles, angles, 1) == ("q", "k")
    assert turned(q, q, angles, angles, position_ids=None) == ("q", "k")
    assert len(calls) == 3
    assert turned(q, q, angles, angles)[0].shape == q.shape
    apart = turned(q.transpose(1, 2), q.transpose(1, 2), angles, angles, unsqueeze_dim=2)[0]
    assert torch.equal(apart.transpose(1, 2), turned(q, q, angles, angles)[0])
    assert len(calls) == 3


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_checkpointing_gives_the_same_gradients(adapter: str) -> None:
    model = small_model("llama")
    model = (with_lora(model) if adapter == "lora" else model).float()
    _, plain = gradients(model)
    fuse_norms(model)
    fuse_rotary(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert difference(plain, gradients(model)[1]) < 2e-5


def test_running_out_of_memory_while_comparing_is_no_difference() -> None:
    import torch

    from trainer.alike import gives_the_same

    def full() -> list[Any]:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        gives_the_same(full, full, torch.float32, "a norm")
