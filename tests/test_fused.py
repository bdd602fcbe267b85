"""LoRA layers computed in fewer passes give peft's numbers, and leave to peft what is not plain."""

from __future__ import annotations

from typing import Any

import pytest
from small_models import random_data, small_model, with_lora

from trainer.collate import collate
from trainer.fused import fuse_adapters
from trainer.step import make_stepper, micro_step

DATA = random_data([12, 30, 7])


def gradients(model: Any, precision: str = "fp32") -> tuple[float, dict[str, Any]]:
    import numpy as np

    stepper = make_stepper(model, "cpu", precision)
    stepper.scaler = None
    rows = [np.array([number]) for number in range(len(DATA))]
    loss = micro_step(stepper, collate(rows, DATA), scale=0.1)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss), found


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float((other[name] - one[name]).norm() / one[name].norm().clamp_min(1e-9)) for name in one)


@pytest.mark.parametrize(("precision", "tolerance"), [("double", 1e-12), ("fp32", 1e-5)])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_loss_and_gradients_are_peft_s(family: str, precision: str, tolerance: float) -> None:
    model = with_lora(small_model(family))
    if precision != "double":
        model = model.float()
    plain_loss, plain = gradients(model)
    assert fuse_adapters(model) == 14  # seven linear layers in each of two blocks
    loss, fused = gradients(model)
    assert loss == pytest.approx(plain_loss, rel=tolerance)
    assert difference(plain, fused) < tolerance


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision_the_error_is_no_larger_than_peft_s(precision: str) -> None:
    """On two layers, mean of ten draws: through a whole model, whose roundings come out smaller is a matter of luck."""
    import torch
    from peft import LoraConfig, get_peft_model

    from trainer.step import autocast

    errors: dict[str, list[float]] = {"peft": [], "fused": []}
    for seed in range(10):
        torch.manual_seed(seed)
        base = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.SiLU(), torch.nn.Linear(96, 64))
        model: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2"]))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            torch.nn.init.normal_(parameter, std=0.1)
        x, weights = torch.randn(50, 64), torch.randn(50, 64)

        def whole_gradient(kind: str, model: Any = model, trained: Any = trained, x: Any = x, w: Any = weights) -> Any:
            leaf = x.clone().requires_grad_()
            with autocast("cpu", kind):
                result = model(leaf)
            found = torch.autograd.grad((result.float() * w).sum(), [leaf, *trained])
            assert all(gradient.dtype == torch.float32 for gradient in found)
            return torch.cat([gradient.flatten() for gradient in found])

        exact = whole_gradient("fp32")
        for name in errors:
            if name == "fused":
                assert fuse_adapters(model) == 2
            errors[name].append(float((whole_gradient(precision) - exact).norm() / exact.norm()))
    assert 1e-4 < sum(errors["peft"]) / 10 < 2e-2
    assert sum(errors["fused"]) < 1.05 * sum(errors["peft"])


def test_a_bias_of_the_base_is_kept() -> None:
    import torch

    model = with_lora(small_model("llama")).float()
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.out_features == 48:
            module.bias = torch.nn.Parameter(torch.full((48,), 0.5), requires_grad=False)
    _, plain = gradients(model)
    fuse_adapters(model)
    assert difference(plain, gradients(model)[1]) < 1e-5


def test_a_switched_off_adapter_is_switched_off() -> None:
    import torch

    model = with_lora(small_model("llama")).float()
    ids = torch.arange(1, 9)[None]
    fuse_adapters(model)
    adapted = model(input_ids=ids, use_cache=False).logits
    with model.disable_adapter():
        base = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(base, small_model("llama").float()(input_ids=ids, use_cache=False).logits)
    assert not torch.allclose(base, adapted)


@pytest.mark.parametrize("more", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_not_plain_is_left_to_peft(more: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **more)
    assert fuse_adapters(get_peft_model(small_model("llama").float(), config)) == 0


def test_checkpointing_and_the_fused_layers_give_the_same_gradients() -> None:
    model = with_lora(small_model("llama")).float()
    _, plain = gradients(model)
    fuse_adapters(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert difference(plain, gradients(model)[1]) < 1e-5
