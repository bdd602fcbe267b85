"""Adapter layers with one input, computed together: the same numbers, in fewer products, and only for that input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_models import random_data, small_model, with_lora

from trainer.collate import MicroBatch, collate
from trainer.fused import FusedLayer, fuse_adapters
from trainer.siblings import Siblings, join_siblings, siblings_of
from trainer.step import Stepper, make_stepper, micro_step

DATA = random_data([12, 30, 7])


def batch() -> MicroBatch:
    return collate([np.array([number]) for number in range(len(DATA))], DATA)


def joined(family: str = "llama", *, precision: str = "fp32", join: bool = True) -> Stepper:
    model = with_lora(small_model(family))
    if precision != "double":
        model = model.float()
    fuse_adapters(model)
    if join:
        join_siblings(model)
    return make_stepper(model, "cpu", "fp32" if precision == "double" else precision)


def gradients(stepper: Stepper) -> Any:
    import torch

    micro_step(stepper, batch(), scale=0.1)
    found = torch.cat([parameter.grad.flatten() for parameter in stepper.parameters if parameter.grad is not None])
    stepper.model.zero_grad()
    return found


def layers_named(stepper: Stepper) -> dict[str, FusedLayer]:
    """Of the first block, by the name that the model gives them."""
    return {
        name.rsplit(".", 1)[-1]: module.forward
        for name, module in stepper.model.named_modules()
        if "layers.0." in name and isinstance(vars(module).get("forward"), FusedLayer)
    }


def products(stepper: Stepper) -> int:
    """Matrix products of one micro-step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            self.number += function.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
            return function(*arguments, **(named or {}))

    with Count() as count:
        micro_step(stepper, batch(), scale=0.1)
    stepper.model.zero_grad()
    return count.number


@pytest.mark.parametrize(("precision", "tolerance"), [("double", 1e-12), ("fp32", 1e-5)])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "cohere", "opt"])
def test_gradients_are_those_of_each_layer_for_itself(family: str, precision: str, tolerance: float) -> None:
    alone = gradients(joined(family, precision=precision, join=False))
    together = gradients(joined(family, precision=precision))
    assert float((together - alone).norm() / alone.norm()) < tolerance


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision_they_round_as_each_for_itself(precision: str) -> None:
    exact = gradients(joined(precision="double"))
    errors = []
    for join in (False, True):
        stepper = joined(precision=precision, join=join)
        stepper.scaler = None
        errors.append(float((gradients(stepper).double() - exact).norm() / exact.norm()))
    assert 0 < errors[1] < 1.5 * errors[0]


def test_who_is_a_sibling_is_seen_in_the_model() -> None:
    stepper = joined()
    layers = layers_named(stepper)
    groups = siblings_of(stepper.model)
    assert len(groups) == len(stepper.siblings) == 4  # two in each of two blocks
    assert groups[0].layers == (layers["q_proj"], layers["k_proj"], layers["v_proj"])
    assert groups[1].layers == (layers["gate_proj"], layers["up_proj"])
    assert layers["o_proj"].siblings is layers["down_proj"].siblings is None


def test_looking_for_them_leaves_the_model_as_it_was() -> None:
    model = with_lora(small_model("llama"))
    fuse_adapters(model)
    assert join_siblings(model) == 4
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_fewer_products_are_computed() -> None:
    """Of q, k and v two products with A less, two gradients of A and two of x; of gate and up one of each."""
    blocks, saved = 2, 9
    first_layers_input_needs_no_gradient = 2
    before, after = products(joined(join=False)), products(joined())
    assert before - after == blocks * saved - first_layers_input_needs_no_gradient


def test_a_result_is_for_the_very_tensor_that_it_was_made_of() -> None:
    import torch

    layers = layers_named(joined(precision="double"))
    q, k, v = (layers[name] for name in ("q_proj", "k_proj", "v_proj"))
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    q(x)
    other = torch.randn_like(x)
    assert torch.allclose(k(other), k.plain(k.layer, other))  # another tensor
    assert torch.allclose(k(x), k.plain(k.layer, x))
    x.mul_(2)  # the same tensor with other values
    assert torch.allclose(v(x), v.plain(v.layer, x))


def test_a_layer_asked_twice_computes_twice() -> None:
    import torch

    layers = layers_named(joined(precision="double"))
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    layers["q_proj"](x)
    one, other = layers["k_proj"](x), layers["k_proj"](x)
    assert one is not other
    assert torch.allclose(one, other)


def test_with_another_scaling_or_switched_off_each_computes_for_itself() -> None:
    import torch

    stepper = joined(precision="double")
    layers = layers_named(stepper)
    k = layers["k_proj"]
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    k.layer.scaling["default"] *= 3
    layers["q_proj"](x)
    assert torch.allclose(k(x), k.plain(k.layer, x))
    with stepper.model.disable_adapter():
        layers["q_proj"](x)
        assert torch.equal(k(x), k.layer.base_layer(x))


def test_a_micro_step_that_fails_keeps_no_result() -> None:
    """One kept would keep the whole forward pass in memory, where memory has just run out."""
    import torch

    stepper = joined()
    group = siblings_of(stepper.model)[-2]
    assert gradients(stepper).norm() > 0
    assert holds_nothing(group)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    handle = group.layers[1].layer.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        micro_step(stepper, batch(), scale=0.1)
    handle.remove()
    assert holds_nothing(group)


def holds_nothing(group: Siblings) -> bool:
    return not group._ahead and group._x is None


def test_checkpointing_gives_the_same_gradients() -> None:
    alone = gradients(joined(join=False))
    stepper = joined()
    stepper.model.activation_checkpointing_enable({"use_reentrant": False})
    assert float((gradients(stepper) - alone).norm() / alone.norm()) < 1e-5
    assert all(holds_nothing(group) for group in stepper.siblings)


def test_a_model_that_takes_no_two_tokens_trains_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(small_model("llama")).float()
    fuse_adapters(model)
    plain = type(model.base_model.model).forward

    def picky(self: Any, input_ids: Any, **named: Any) -> Any:
        if input_ids.shape[1] < 3:
            raise ValueError("too short")
        return plain(self, input_ids=input_ids, **named)

    monkeypatch.setattr(type(model.base_model.model), "forward", picky)
    assert join_siblings(model) == 0
    assert gradients(make_stepper(model, "cpu", "fp32")).norm() > 0
