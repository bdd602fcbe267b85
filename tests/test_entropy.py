"""The sum of cross-entropies and its gradient are PyTorch's, with fewer tensors of the logits' size."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.entropy import cross_entropy


def given(dtype: str, rows: int = 7, vocabulary: int = 301, steepness: float = 3.0) -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    logits = steepness * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return logits.to(getattr(torch, dtype)).requires_grad_(), targets


def both(logits: Any, targets: Any, scale: float = 0.3) -> list[tuple[Any, Any]]:
    """(loss, gradient), ours and PyTorch's."""
    import torch
    import torch.nn.functional as F

    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    losses = (cross_entropy(logits, targets), F.cross_entropy(wide, targets, reduction="sum"))
    return [(loss.detach(), torch.autograd.grad(loss * scale, logits)[0]) for loss in losses]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6), ("bfloat16", 4e-3), ("float16", 5e-4)]
)
@pytest.mark.parametrize("rows", [7, 1, 0])
def test_loss_and_gradient_are_pytorch_s(dtype: str, tolerance: float, rows: int) -> None:
    logits, targets = given(dtype, rows)
    (loss, gradient), (known_loss, known) = both(logits, targets)
    assert loss.dtype == known_loss.dtype
    assert gradient.dtype == logits.dtype
    assert float(loss) == pytest.approx(float(known_loss), rel=1e-6)
    assert float((gradient - known).double().norm()) <= tolerance * float(known.double().norm())


def test_a_target_that_is_as_good_as_impossible_has_a_finite_loss() -> None:
    import torch

    logits = torch.zeros(1, 5, requires_grad=True)
    with torch.no_grad():
        logits[0, 3] = 500.0  # exp(-500) is 0 in fp32
    (loss, gradient), (known_loss, known) = both(logits, torch.tensor([0]))
    assert float(loss) == float(known_loss) == 500.0
    assert torch.equal(gradient, known)


def test_each_position_s_own_loss_adds_up_to_the_sum() -> None:
    logits, targets = given("bfloat16")
    each = cross_entropy(logits, targets, reduction="none")
    assert each.shape == (7,)
    assert each.sum().item() == pytest.approx(cross_entropy(logits, targets).item(), rel=1e-6)


def test_a_second_backward_pass_is_refused_and_not_wrong() -> None:
    logits, targets = given("float32")
    loss = cross_entropy(logits, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1), ("bfloat16", 3)])
def test_few_tensors_of_the_logits_size_are_made(dtype: str, most: int) -> None:
    """Of half-precision logits: their fp32 form for a moment, the log-probabilities, and the gradient."""
    import torch
    import torch.nn.functional as F
    from torch.utils._python_dispatch import TorchDispatchMode

    class Made(TorchDispatchMode):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size
            self.storages: dict[int, Any] = {}

        def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
            result = function(*given, **(named or {}))
            for one in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(one, torch.Tensor) and one.numel() == self.size:
                    self.storages[one.untyped_storage().data_ptr()] = one  # kept, so that no address comes twice
            return result

    logits, targets = given(dtype)
    counts = []
    for ours in (True, False):
        with Made(logits.numel()) as made:
            loss = cross_entropy(logits, targets) if ours else F.cross_entropy(logits.float(), targets, reduction="sum")
            torch.autograd.grad(loss, logits)
        made.storages.pop(logits.untyped_storage().data_ptr(), None)
        counts.append(len(made.storages))
    assert counts[0] <= most < counts[1]
