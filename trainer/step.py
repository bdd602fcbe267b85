"""micro_step() and optimizer_step(): the only code that trains, and the code that the planner times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.collate import MicroBatch

if TYPE_CHECKING:
    import torch


@dataclass(slots=True, eq=False)
class Stepper:
    """What both steps need: the model as called, its trainable parameters, optimizer, precision and loss scaler."""

    model: Any  # a causal language model, or what wraps it
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    device: str
    precision: str
    max_grad_norm: float
    scaler: torch.amp.GradScaler | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What one optimizer step did."""

    grad_norm: torch.Tensor  # before clipping, on the device
    applied: bool  # False: fp16 gradients overflowed and the step was skipped


def make_stepper(
    model: Any, device: str, precision: str, *, weight_decay: float = 0.0, max_grad_norm: float = 1.0
) -> Stepper:
    """A stepper over the trainable parameters of `model`, with AdamW (betas 0.9 and 0.999, eps 1e-8).

    Weight decay applies to matrices only, not to norms and biases, as in transformers' Trainer.
    """
    import torch

    set_matmul_precision(precision)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, fused=True if device.startswith("cuda") else None
    )
    scaler = torch.amp.GradScaler(device.split(":")[0]) if precision == "fp16" else None
    return Stepper(model, parameters, optimizer, device, precision, max_grad_norm, scaler)


def set_matmul_precision(precision: str) -> None:
    """TF32 on where asked for, and off for fp32: torch's default differs between matrix products and convolutions."""
    import torch

    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def autocast(device: str, precision: str) -> Any:
    """The autocast context of a precision: half precisions inside, fp32 and TF32 untouched."""
    import torch

    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = kinds.get(precision)
    return torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype is not None)


def token_losses(model: Any, batch: MicroBatch, *, reduction: str = "sum") -> torch.Tensor:
    """Cross-entropy of the batch's targets: their sum, or with reduction "none" one number a target, (num_targets,).

    Only the positions that predict a target are compared; the loss is taken in fp32 (fp64 for a double model).
    """
    import torch
    import torch.nn.functional as F

    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is not None:
        arguments["position_ids"] = batch.position_ids
    logits = model(**arguments).logits
    chosen = logits.reshape(-1, logits.shape[-1])[batch.predicts]
    if chosen.dtype in (torch.float16, torch.bfloat16):
        chosen = chosen.float()
    return F.cross_entropy(chosen, batch.targets, reduction=reduction)


def micro_step(stepper: Stepper, batch: MicroBatch, *, scale: float) -> torch.Tensor:
    """Forward and backward of one micro-batch; gradients add up in the parameters.

    Args:
        batch: on the stepper's device.
        scale: number of processes / supervised tokens of the whole window. Summed over the window's micro-batches this
            makes the gradient of the window's mean token loss, however the window is split. (Processes' gradients are
            averaged, hence their number.)

    Returns:
        The sum of the token losses, detached, on the device: reading it is left to the caller, since it waits for it.
    """
    with autocast(stepper.device, stepper.precision):
        loss = token_losses(stepper.model, batch)
    scaled = loss * scale
    if stepper.scaler is not None:
        scaled = stepper.scaler.scale(scaled)
    scaled.backward()
    return loss.detach()


def optimizer_step(stepper: Stepper, learning_rate: float) -> StepResult:
    """Unscale, clip, update, clear. A step whose fp16 gradients overflowed changes no weight and says so."""
    import torch

    for group in stepper.optimizer.param_groups:
        group["lr"] = learning_rate
    scaler = stepper.scaler
    if scaler is not None:
        scaler.unscale_(stepper.optimizer)
    limit = stepper.max_grad_norm if stepper.max_grad_norm > 0 else float("inf")
    grad_norm = torch.nn.utils.clip_grad_norm_(stepper.parameters, limit)
    applied = True
    if scaler is None:
        stepper.optimizer.step()
    else:
        before = scaler.get_scale()
        scaler.step(stepper.optimizer)
        scaler.update()
        applied = scaler.get_scale() >= before  # the scale shrinks exactly when a step was skipped
    clear_gradients(stepper.parameters)
    return StepResult(grad_norm.detach(), applied)


def clear_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Drop all gradients, as at the start of a window."""
    for parameter in parameters:
        parameter.grad = None


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given, so that a clock read next is true."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device.startswith("mps"):
        torch.mps.synchronize()
