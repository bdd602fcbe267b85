"""Rounded copies of the adapters, made all at once, change no bit of the gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_models import random_data, small_model, with_lora

from trainer.collate import collate
from trainer.fused import FusedLayer, fuse_adapters
from trainer.step import Stepper, make_stepper, micro_step, optimizer_step

DATA = random_data([12, 30, 7, 18])


def stepper(precision: str, *, with_halves: bool, family: str = "llama", checkpointing: bool = False) -> Stepper:
    import torch

    model = with_lora(small_model(family)).float()
    fuse_adapters(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    made = make_stepper(model, "cpu", precision)
    assert made.halves is not None
    if precision == "fp16":  # these steep models would overflow with torch's first scale
        made.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    if not with_halves:
        made.halves = None
    return made


def micro(made: Stepper, row: int) -> float:
    return float(micro_step(made, collate([np.array([row])], DATA), scale=0.1))


def gradients(made: Stepper) -> list[Any]:
    return [None if one.grad is None else one.grad.clone() for one in made.parameters]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_losses_gradients_and_weights_are_the_same_to_the_last_bit(precision: str, checkpointing: bool) -> None:
    import torch

    one, other = (stepper(precision, with_halves=flag, checkpointing=checkpointing) for flag in (False, True))
    for _step in range(2):  # the second shows that the copies follow the weights
        for row in range(len(DATA)):
            assert micro(one, row) == micro(other, row)
            for plain, found in zip(gradients(one), gradients(other), strict=True):
                assert plain is not None
                assert found.dtype == torch.float32
                assert torch.equal(plain, found)
        before = one.parameters[0].detach().clone()
        assert optimizer_step(one, 0.01).applied
        assert optimizer_step(other, 0.01).applied
        assert not torch.equal(before, one.parameters[0])
        for plain, found in zip(one.parameters, other.parameters, strict=True):
            assert torch.equal(plain, found)
            assert found.grad is None


def test_outside_a_micro_step_nothing_of_them_is_left() -> None:
    import torch

    made = stepper("bf16", with_halves=True)
    layers = [m.forward for m in made.model.modules() if isinstance(vars(m).get("forward"), FusedLayer)]
    during = []
    handle = layers[3].layer.register_forward_hook(lambda *_: during.append(layers[3].halves))
    micro(made, 0)
    handle.remove()
    assert len(layers) == 14
    assert during[0] is not None
    assert during[0][0].dtype == torch.bfloat16
    assert all(layer.halves is None for layer in layers)
    assert made.halves is not None
    assert all(copy.grad is None for copy in made.halves.copies)


def test_a_micro_step_that_fails_leaves_nothing_behind_and_the_next_is_right() -> None:
    import torch

    made, other = stepper("bf16", with_halves=True), stepper("bf16", with_halves=False)
    assert made.halves is not None
    layer = made.halves.layers[5].layer

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    handle = layer.register_full_backward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        micro(made, 0)
    handle.remove()
    assert all(copy.grad is None for copy in made.halves.copies)
    assert all(one.halves is None for one in made.halves.layers)
    made.model.zero_grad()
    assert micro(made, 1) == micro(other, 1)
    assert all(torch.equal(a, b) for a, b in zip(gradients(made), gradients(other), strict=True))


def test_a_layer_that_took_no_part_has_no_gradient() -> None:
    made = stepper("bf16", with_halves=True)
    assert made.halves is not None
    idle = made.halves.layers[0]
    base = idle.layer.base_layer
    idle.layer.forward = lambda x: base(x)  # as an expert that no token chose
    micro(made, 0)
    assert all(matrix.grad is None for matrix in idle.matrices())
    assert all(matrix.grad is not None for layer in made.halves.layers[1:] for matrix in layer.matrices())


def test_full_precision_and_full_fine_tuning_need_none() -> None:
    model = with_lora(small_model("llama")).float()
    fuse_adapters(model)
    assert make_stepper(model, "cpu", "fp32").halves is None
    assert make_stepper(small_model("llama").float(), "cpu", "bf16").halves is None


def test_an_adapter_on_the_output_layer_trains_beside_the_lean_loss() -> None:
    """The lean loss takes the gradients behind its cut in the parameters themselves."""
    import torch

    found = []
    for with_halves in (False, True):
        targets = ["q_proj", "down_proj", "lm_head"]
        model = with_lora(small_model("llama"), targets).float()
        fuse_adapters(model)
        made = make_stepper(model, "cpu", "bf16", loss="lean")
        assert made.head is not None
        assert len(made.head.trained) == 2
        assert made.halves is not None
        assert len(made.halves.layers) == 4
        if not with_halves:
            made.halves = None
        micro(made, 1)
        found.append(gradients(made))
    assert len(found[0]) == 10
    for plain, other in zip(*found, strict=True):
        assert float(plain.norm()) > 0
        assert torch.equal(plain, other)
