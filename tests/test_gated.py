"""Gated MLPs that keep less for the backward pass: the model's own numbers, and fewer tensors of the inner size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_models import random_data, small_model, with_lora

from trainer.collate import collate
from trainer.fused import fuse_adapters
from trainer.gated import fuse_mlps
from trainer.step import Stepper, make_stepper, micro_step

DATA = random_data([12, 30, 7])
INNER = 48  # the intermediate size of `small_model`
GATED = ("llama", "qwen3", "mistral", "gemma3", "cohere", "granite")  # silu, gelu by tanh
ADAPTED = {"all": "all-linear", "attention": ["q_proj", "v_proj"], "some": ["q_proj", "up_proj"], "none": None}


def stepper(
    family: str = "llama", *, fused: bool = True, adapted: str = "all", precision: str = "double", own: bool = True
) -> Stepper:
    """`own`: whether adapters are computed our way."""
    model = small_model(family)
    targets = ADAPTED[adapted]
    model = with_lora(model, targets) if targets else model
    if precision != "double":
        model = model.float()
    if own:
        fuse_adapters(model)
    if fused:
        assert fuse_mlps(model) == 2  # one a block
    return make_stepper(model, "cpu", "fp32" if precision == "double" else precision)


def loss_and_gradients(made: Stepper) -> tuple[float, Any]:
    import torch

    rows = [np.array([number]) for number in range(len(DATA))]
    loss = micro_step(made, collate(rows, DATA), scale=0.1)
    found = torch.cat([parameter.grad.flatten() for parameter in made.parameters if parameter.grad is not None])
    made.model.zero_grad()
    return float(loss), found


def kept(made: Stepper) -> int:
    """Different tensors of the inner size that the forward pass keeps for the backward pass."""
    import torch

    weights = {parameter.data_ptr() for parameter in made.model.parameters()}
    found = {}

    def keep(tensor: Any) -> Any:
        if INNER in tensor.shape[-1:] and tensor.data_ptr() not in weights:
            found[tensor.data_ptr()] = tensor  # held, so that no other can lie where it lay
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_and_gradients(made)
    return len(found)


@pytest.mark.parametrize("adapted", list(ADAPTED))
@pytest.mark.parametrize("family", GATED)
def test_loss_and_gradients_are_the_model_s_own(family: str, adapted: str) -> None:
    own_loss, own = loss_and_gradients(stepper(family, fused=False, adapted=adapted))
    loss, found = loss_and_gradients(stepper(family, adapted=adapted))
    assert loss == pytest.approx(own_loss, rel=1e-12)
    assert float((found - own).norm() / own.norm()) < 1e-12


@pytest.mark.parametrize("adapted", ["all", "attention"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_less_exact_numbers_are_rounded_as_the_model_s_own(precision: str, adapted: str) -> None:
    _, exact = loss_and_gradients(stepper(fused=False, adapted=adapted))
    errors = []
    for fused in (False, True):
        made = stepper(fused=fused, adapted=adapted, precision=precision)
        made.scaler = None
        errors.append(float((loss_and_gradients(made)[1].double() - exact).norm() / exact.norm()))
    assert 0 < errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize(("adapted", "before", "after"), [("all", 4, 2), ("attention", 3, 2), ("none", 4, 3)])
def test_fewer_tensors_are_kept(adapted: str, before: int, after: int) -> None:
    blocks = 2
    assert kept(stepper(fused=False, adapted=adapted)) == blocks * before
    assert kept(stepper(adapted=adapted)) == blocks * after


def test_adapters_that_are_left_to_peft_are_used() -> None:
    _, own = loss_and_gradients(stepper(fused=False, own=False))
    _, found = loss_and_gradients(stepper(own=False))
    assert float((found - own).norm() / own.norm()) < 1e-12


def test_checkpointing_gives_the_same_gradients() -> None:
    _, plain = loss_and_gradients(stepper())
    made = stepper()
    made.model.activation_checkpointing_enable({"use_reentrant": False})
    assert float((loss_and_gradients(made)[1] - plain).norm() / plain.norm()) < 1e-12


@pytest.mark.parametrize("what", ["limited", "another activation", "not gated"])
def test_what_is_no_plain_gated_mlp_stays_as_it_is(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model = small_model("llama")
    kind = type(model.model.layers[0].mlp)
    forwards = {
        "limited": lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7.0)) * self.up_proj(x)),
        "another activation": lambda self, x: self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x)),
        "not gated": lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x)),
    }
    monkeypatch.setattr(kind, "forward", forwards[what])
    assert fuse_mlps(model) == 0


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_other_mlps_are_left_alone(family: str) -> None:
    assert fuse_mlps(small_model(family)) == 0


def test_looking_at_them_draws_no_random_number() -> None:
    import torch

    model = small_model("llama")
    before = torch.get_rng_state()
    assert fuse_mlps(model) == 2
    assert torch.equal(before, torch.get_rng_state())


def test_a_switched_off_adapter_is_switched_off() -> None:
    import torch

    made = stepper()
    x = torch.arange(1, 9)[None]
    with made.model.disable_adapter():
        found = made.model(input_ids=x, use_cache=False).logits
    assert torch.allclose(found, small_model("llama")(input_ids=x, use_cache=False).logits)
