"""micro_step() and optimizer_step(): the only code that trains, and the code that the planner times."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainer import documents, packed
from trainer.collate import MicroBatch
from trainer.job import Loss

if TYPE_CHECKING:
    import torch

    from trainer.halves import HalfCopies
    from trainer.lean import LeanHead
    from trainer.siblings import Siblings

BUCKET_ELEMENTS = 8 * 1024 * 1024  # 32 MiB of fp32 exchanged between processes at once


@dataclass(slots=True, eq=False)
class Stepper:
    """What both steps need: the model as called, its trainable parameters, optimizer, precision and loss scaler."""

    model: Any  # a causal language model
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    device: str
    precision: str
    max_grad_norm: float
    scaler: torch.amp.GradScaler | None = None
    head: LeanHead | None = None  # where the model is cut for the lean loss; None: the plain loss
    halves: HalfCopies | None = None  # of the adapters, in half precision
    siblings: list[Siblings] = field(default_factory=list)  # adapter layers with the same input
    lean_refused: str | None = None  # why the lean loss is not used although it was asked for


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What one optimizer step did."""

    grad_norm: torch.Tensor  # before clipping, on the device
    applied: bool  # False: a gradient was NaN or infinite (in fp16: overflowed), and no weight was changed


def make_stepper(
    model: Any,
    device: str,
    precision: str,
    *,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    loss: Loss = "plain",
) -> Stepper:
    """A stepper over the trainable parameters of `model`, with AdamW (betas 0.9 and 0.999, eps 1e-8).

    Weight decay applies to matrices only, not to norms and biases, as in transformers' Trainer. The lean loss is used
    where it agrees with the plain one on this very model; else the stepper says why not and takes the plain one.
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
    stepper = Stepper(model, parameters, optimizer, device, precision, max_grad_norm, scaler)
    if loss == "lean":
        from trainer.lean import lean_head

        found = lean_head(model, precision=precision)
        if isinstance(found, str):
            stepper.lean_refused = found
        else:
            stepper.head = found
    from trainer.halves import half_copies
    from trainer.siblings import siblings_of

    # The lean loss takes the gradients of what trains behind its cut itself, in the parameters and not in copies.
    stepper.halves = half_copies(model, precision, without=stepper.head.trained if stepper.head else ())
    stepper.siblings = siblings_of(model)
    return stepper


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


def model_arguments(model: Any, batch: MicroBatch) -> dict[str, Any]:
    """What the model's forward is called with: of packed rows also where their documents lie."""
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is not None:
        arguments["position_ids"] = batch.position_ids
        if documents.are_used(model):
            arguments["documents"] = batch.arrangement or batch.documents
        elif batch.documents is not None and any(before for *_, before in batch.documents):
            # No position tells that a document goes on from what its row begins with.
            arguments["attention_mask"] = documents.mask(model, batch.documents, batch.input_ids)
    return arguments


def token_losses(
    model: Any,
    batch: MicroBatch,
    *,
    reduction: str = "sum",
    head: LeanHead | None = None,
    gradient_scale: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Cross-entropy of the batch's targets: their sum, or with reduction "none" one number a target, (num_targets,).

    Only the positions that predict a target are compared; the loss is taken in fp32 (fp64 for a double model).

    Args:
        head: where the model is cut for the lean loss; None makes all logits at once.
        gradient_scale: of the lean loss, see `trainer.lean.lean_losses`.
    """
    from trainer.entropy import cross_entropy

    arguments = model_arguments(model, batch)
    with packed.known(packed=batch.position_ids is not None):
        if head is not None:
            from trainer.lean import lean_losses

            return lean_losses(
                head,
                model,
                arguments,
                batch.predicts,
                batch.targets,
                reduction=reduction,
                gradient_scale=gradient_scale,
            )
        logits = model(**arguments).logits
    # Selected, not indexed: each position is taken once, and adding rows back needs no sorting of them on a GPU.
    chosen = logits.reshape(-1, logits.shape[-1]).index_select(0, batch.predicts)
    return cross_entropy(chosen, batch.targets, reduction=reduction)


def micro_step(stepper: Stepper, batch: MicroBatch, *, scale: float) -> torch.Tensor:
    """Forward and backward of one micro-batch; gradients add up in the parameters.

    Args:
        batch: on the stepper's device.
        scale: 1 / supervised tokens of the whole window. Summed over the window's micro-batches, of all processes, this
            makes the gradient of the window's mean token loss, however the window is split.

    Returns:
        The sum of the token losses, detached, on the device: reading it is left to the caller, since it waits for it.
    """
    gradient_scale: torch.Tensor | float = 1.0
    if stepper.head is not None and stepper.scaler is not None:
        import torch

        # Filled on the device: a number copied there waits for it.
        gradient_scale = stepper.scaler.scale(torch.full((), scale or 1.0, device=stepper.device))
    try:
        with contextlib.nullcontext() if stepper.halves is None else stepper.halves.in_place():
            with autocast(stepper.device, stepper.precision):
                loss = token_losses(stepper.model, batch, head=stepper.head, gradient_scale=gradient_scale)
            scaled = loss * scale
            if stepper.scaler is not None:
                scaled = stepper.scaler.scale(scaled)
            scaled.backward()
    finally:  # also where memory ran out between one sibling and the next
        for siblings in stepper.siblings:
            siblings.forget()
    return loss.detach()


def optimizer_step(stepper: Stepper, learning_rate: float) -> StepResult:
    """Unscale, clip, update, clear. A step whose gradients are not finite changes no weight and says so."""
    import torch

    for group in stepper.optimizer.param_groups:
        group["lr"] = learning_rate
    scaler = stepper.scaler
    if scaler is not None:
        scaler.unscale_(stepper.optimizer)
    limit = stepper.max_grad_norm if stepper.max_grad_norm > 0 else float("inf")
    grad_norm = torch.nn.utils.clip_grad_norm_(stepper.parameters, limit)
    if scaler is None:
        # Waits for the device; the loop has just waited for the window's losses, so little is left to wait for.
        applied = bool(torch.isfinite(grad_norm))
        if applied:
            stepper.optimizer.step()
    else:
        # The scaler skips exactly the steps with a gradient that is not finite. Not told by a scale that shrank: after
        # very many skips it is 0 and shrinks no more.
        scaler.step(stepper.optimizer)
        scaler.update()
        applied = bool(torch.isfinite(grad_norm))
    clear_gradients(stepper.parameters)
    return StepResult(grad_norm.detach(), applied)


def add_up_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace each process's gradients by their sum over the processes; every process calls this once a window.

    Not DistributedDataParallel: it exchanges gradients inside the last backward pass, so that a process that runs out
    of memory there leaves the others waiting for ever. Here the processes first agree that all of them got through.
    The price: the exchange does not overlap with the backward pass. It is paid once a window, and adapters are small.
    """
    import torch
    import torch.distributed as dist

    # A parameter that no process has used keeps no gradient, as on one process: weight decay must not move it.
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    gradients = []
    for parameter, is_used in zip(parameters, used.tolist(), strict=True):
        if is_used and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    _exchange(gradients, dist.all_reduce)


def share_parameters(parameters: list[torch.nn.Parameter]) -> None:
    """Give every process the first one's values: nothing but the exchanged gradients may move them from then on."""
    import torch.distributed as dist

    _exchange([parameter.detach() for parameter in parameters], lambda flat: dist.broadcast(flat, src=0))


def _exchange(tensors: list[torch.Tensor], exchange: Callable[[torch.Tensor], Any]) -> None:
    """Run a collective operation over the tensors in place, small ones many at a time: each call has its own cost."""
    import torch

    bucket: list[torch.Tensor] = []
    for number, tensor in enumerate(tensors):
        bucket.append(tensor)
        following = tensors[number + 1] if number + 1 < len(tensors) else None
        if (
            following is not None
            and following.dtype == tensor.dtype
            and sum(one.numel() for one in bucket) + following.numel() <= BUCKET_ELEMENTS
        ):
            continue
        if len(bucket) == 1 and tensor.is_contiguous():
            exchange(tensor)  # a large one needs no copy
        else:
            flat = torch.cat([one.reshape(-1) for one in bucket])
            exchange(flat)
            for one, part in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
                one.copy_(part.view_as(one))
        bucket = []


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
