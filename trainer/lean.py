"""The loss without the big logits: only supervised positions go through the output layer, a chunk at a time.

The output layer is not called by us. What a model does to its last hidden states is its own affair: it may scale them,
cap the logits softly or carry an adapter on the output layer. So the model's own forward does it: once whole, but with
the backbone's result emptied on its way to the output layer, which then costs nothing and passes every wrapper
(adapters, several processes) as usual; and once a chunk, with the backbone replaced by the chunk's hidden states.
Passing an index as `logits_to_keep` would not do: it picks the same positions in every row, and still holds all that it
picked at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trainer.entropy import cross_entropy

# Bytes of one chunk's logits in fp32; its gradient and the softmax are as large again. Few enough to stay small beside
# the weights of a large vocabulary, many enough rows for a matrix product to be worth its name.
CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29}
WIDTHS = (13, 9)  # tokens in the rows of the batch that plain and lean loss are compared on

# Largest difference between both paths, relative to the gradient's norm. The backbone is called with the same shapes,
# so only the output layer's products are summed in another order: fp32 leaves some 1e-6. The half precisions and TF32
# round each product once more, by 2^-8 (bf16) or 2^-11; the limits are about eight such roundings.
TOLERANCES = {"fp32": 1e-4, "tf32": 4e-3, "fp16": 4e-3, "bf16": 3e-2}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LeanHead:
    """Where a model is cut in two, and what of it trains behind the cut."""

    causal: Any  # the causal language model itself, without wrappers
    backbone: torch.nn.Module  # whose result the model turns into logits
    result: type[Any]  # what the backbone returns
    vocabulary: int
    trained: tuple[torch.nn.Parameter, ...] = ()  # trainable parameters that the output layer reads, also tied ones
    chunk_rows: int = 1  # positions in one chunk

    def hidden_states(self, model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        """Last hidden states, (rows, width, hidden), from a forward of `model`: the causal model or what wraps it."""
        found: list[torch.Tensor] = []

        def empty(_module: Any, _arguments: Any, output: Any) -> Any:
            found.append(output[0])
            return _with_states(type(output), output[0][:, :0])

        handle = self.backbone.register_forward_hook(empty)
        try:
            model(**arguments)
        finally:
            handle.remove()
        return found[-1]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """What the model makes of hidden states: (positions, hidden) -> (positions, vocabulary)."""
        ids = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
        with _replaced(self.backbone, lambda *_args, **_kwargs: _with_states(self.result, states[None])):
            return self.causal(input_ids=ids, use_cache=False).logits[0]

    def losses(self, states: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        """Cross-entropy of one chunk, in fp32 (fp64 for a double model)."""
        return cross_entropy(self.logits(states), targets, reduction=reduction)

    def chunks(self, count: int) -> list[slice]:
        return [slice(at, at + self.chunk_rows) for at in range(0, count, self.chunk_rows)]


def lean_losses(
    head: LeanHead,
    model: Any,
    arguments: dict[str, Any],
    predicts: torch.Tensor,
    targets: torch.Tensor,
    *,
    reduction: str = "sum",
    gradient_scale: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Cross-entropy of the targets as `trainer.step.token_losses` defines it, never holding more than a chunk's logits.

    Args:
        arguments: of the model's forward.
        gradient_scale: what the sum will be multiplied by before its backward pass, or near it. The gradient of a
            chunk is taken in the forward pass, and in fp16 it would vanish if it were not scaled there already.
    """
    states = head.hidden_states(model, arguments)
    # Selected, not indexed: see trainer.step.token_losses.
    chosen = states.reshape(-1, states.shape[-1]).index_select(0, predicts)
    differentiated = torch.is_grad_enabled() and (chosen.requires_grad or bool(head.trained))
    if reduction == "sum" and differentiated:
        scale = (
            gradient_scale.to(chosen.device, torch.float32)
            if isinstance(gradient_scale, torch.Tensor)
            else torch.full((), gradient_scale, dtype=torch.float32, device=chosen.device)  # a copied one waits
        )
        return _ChunkedSum.apply(chosen, targets, scale, head, *head.trained)
    parts = []
    for chunk in head.chunks(len(targets)):
        if differentiated:
            from torch.utils.checkpoint import checkpoint

            part = checkpoint(head.losses, chosen[chunk], targets[chunk], reduction, use_reentrant=False)
        else:
            part = head.losses(chosen[chunk], targets[chunk], reduction)
        parts.append(part.reshape(-1))
    if not parts:
        empty = chosen.new_zeros(0, dtype=_loss_dtype(chosen))
        return empty.sum() if reduction == "sum" else empty
    joined = torch.cat(parts)
    return joined.sum() if reduction == "sum" else joined


class _ChunkedSum(torch.autograd.Function):
    """Sum of the chunks' losses. A chunk's gradient is taken as soon as its loss is known, so that its logits can go.

    Making the logits again in the backward pass would cost a third product with the output layer. That each parameter
    is an input of one function, and gets one gradient from it, is what data parallelism counts on.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        targets: torch.Tensor,
        scale: torch.Tensor,
        head: LeanHead,
        *trained: torch.nn.Parameter,
    ) -> torch.Tensor:
        needed = [bool(flag) for flag in (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])]
        to_states = torch.zeros_like(states) if needed[0] else None
        to_trained: list[torch.Tensor | None] = [None] * len(trained)
        total = torch.zeros((), dtype=_loss_dtype(states), device=states.device)
        wanted = [index for index, flag in enumerate(needed[1:]) if flag]
        for chunk in head.chunks(len(targets)):
            with torch.enable_grad():
                part = states[chunk].detach().requires_grad_(needed[0])
                loss = head.losses(part, targets[chunk], "sum")
                inputs = [part] * needed[0] + [trained[index] for index in wanted]
                found = list(torch.autograd.grad(loss * scale, inputs, allow_unused=True))
            total += loss.detach()
            if to_states is not None:
                to_states[chunk] = found.pop(0)
            for index, gradient in zip(wanted, found, strict=True):
                before = to_trained[index]
                to_trained[index] = gradient if before is None or gradient is None else before.add_(gradient)
        for index in wanted:  # without a target: zeros and not nothing, since data parallelism waits for each of them
            if to_trained[index] is None:
                to_trained[index] = torch.zeros_like(trained[index])
        ctx.gradients = (to_states, *to_trained)
        ctx.scale = scale
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ratio = upstream[0] / ctx.scale
        gradients = [None if one is None else one.mul_(ratio.to(one.dtype)) for one in ctx.gradients]
        del ctx.gradients  # scaled in place, and so good for one backward pass only
        return gradients[0], None, None, None, *gradients[1:]


def lean_head(model: Any, *, precision: str) -> LeanHead | str:
    """Where to cut `model` for the lean loss, checked on the model itself, or the reason why it keeps the plain one."""
    head = find_lean_head(model, precision=precision)
    return head if isinstance(head, str) else lean_loss_agrees(model, head, precision=precision) or head


def find_lean_head(model: Any, *, precision: str, chunk_bytes: int | None = None) -> LeanHead | str:
    """Where `model` can be cut before its output layer, or the reason why it cannot. Weights and modes are left alone.

    Args:
        chunk_bytes: of one chunk's logits in fp32.
    """
    from trainer.step import autocast

    causal = causal_model(model)
    if not callable(getattr(causal, "get_output_embeddings", None)) or causal.get_output_embeddings() is None:
        return "the model names no output layer"
    device = next(causal.parameters()).device
    candidates = {id(part): part for part in (causal.base_model, causal.get_decoder()) if part is not causal}
    ended: list[tuple[torch.nn.Module, Any]] = []
    with contextlib.ExitStack() as stack:
        for part in candidates.values():
            handle = part.register_forward_hook(lambda module, _arguments, output: ended.append((module, output)))
            stack.callback(handle.remove)
        with _evaluating(model), torch.no_grad(), autocast(device.type, precision):
            ids = torch.zeros((1, 2), dtype=torch.long, device=device)
            vocabulary = int(causal(input_ids=ids, use_cache=False).logits.shape[-1])
    if not ended:
        return "its backbone is not called as a module of its own"
    backbone, output = ended[-1]  # an outer one ends after what it holds
    head = LeanHead(causal=causal, backbone=backbone, result=type(output), vocabulary=vocabulary)
    with _evaluating(model), torch.enable_grad(), autocast(device.type, precision):
        trained = _leaves(head.logits(output[0][0, :1].detach()))
    rows = (chunk_bytes or CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])) // (4 * vocabulary)
    if chunk_bytes is None:  # each chunk writes the whole gradient of what trains: logits as large as it cost no more
        rows = max(rows, max((parameter.numel() for parameter in trained), default=0) // vocabulary)
    return dataclasses.replace(head, trained=trained, chunk_rows=max(1, rows))


def causal_model(model: Any) -> Any:
    """The causal language model inside what distributes it and what adds adapters to it."""
    while isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
        model = model.module
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def lean_loss_agrees(
    model: Any, head: LeanHead, *, precision: str, batch: Any = None, tolerance: float | None = None
) -> str | None:
    """None where plain and lean loss and their gradients agree on this model, else the reason why they do not.

    Compared are the sum of the losses, the loss of each token, and the gradient of every trainable parameter, dropout
    switched off. Gradients are taken aside: nothing piles up in the parameters, and no process waits for another.

    Args:
        batch: what to compare on (a `trainer.collate.MicroBatch` on the model's device); by default two rows of random
            tokens, every third position unsupervised.
        tolerance: largest relative difference; by default that of the precision, `TOLERANCES`.
    """
    from trainer.step import autocast, token_losses

    causal = causal_model(model)
    inner = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    device = str(next(causal.parameters()).device)
    batch = batch or _probe(head.vocabulary, device)
    limit = TOLERANCES[precision] if tolerance is None else tolerance
    # In many small chunks, so that their seams are compared too.
    small = dataclasses.replace(head, chunk_rows=min(head.chunk_rows, max(1, len(batch.targets) // 4)))
    trained = [parameter for parameter in causal.parameters() if parameter.requires_grad]
    scale = (2.0**8 if precision == "fp16" else 1.0) / len(batch.targets)  # or small gradients would vanish in both
    found = []
    try:
        with _evaluating(model):
            for cut in (None, small):
                with torch.enable_grad(), autocast(device, precision):
                    total = token_losses(inner, batch, head=cut, gradient_scale=scale)
                gradients = torch.autograd.grad(total * scale, trained, allow_unused=True)
                with torch.no_grad(), autocast(device, precision):
                    each = token_losses(inner, batch, reduction="none", head=cut)
                found.append((total.detach(), each, gradients))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as reason:
        from trainer.model import is_out_of_memory

        if is_out_of_memory(reason):
            raise
        return f"it fails on this model ({type(reason).__name__}: {str(reason).strip().splitlines()[0][:200]})"
    (plain, plain_each, plain_gradients), (lean, lean_each, lean_gradients) = found
    if not bool(torch.isfinite(plain)):
        return "the loss is not a number, so that nothing can be compared"
    differences = {
        "loss": float((lean - plain).abs() / plain.abs().clamp_min(1e-12)),
        "loss of the tokens": _relative([plain_each], [lean_each]),
        "gradient": _relative(list(plain_gradients), list(lean_gradients)),
    }
    for name, difference in differences.items():
        if not difference <= limit:
            return f"its {name} differs from the plain one's by {difference:.1e}, more than {limit:.0e}"
    return None


def _relative(plain: list[Any], lean: list[Any]) -> float:
    """Norm of the difference over the norm, the worst of all tensors; of a tiny one, over a thousandth of the whole."""
    whole = sum(float(one.double().norm()) ** 2 for one in plain if one is not None) ** 0.5
    worst = 0.0
    for one, other in zip(plain, lean, strict=True):
        if one is None and other is None:
            continue
        norm = 0.0 if one is None else float(one.double().norm())
        if one is not None and other is not None and one.shape != other.shape:
            return float("inf")
        if one is None or other is None:
            difference = norm if other is None else float(other.double().norm())
        else:
            difference = float((other.double() - one.double()).norm())
        if difference != difference:
            return difference
        worst = max(worst, difference / max(norm, 1e-3 * whole, 1e-12))
    return worst


def _probe(vocabulary: int, device: str) -> Any:
    """Two rows of random tokens, the shorter one padded; a third of the positions counts for nothing."""
    from trainer.collate import MicroBatch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (len(WIDTHS), max(WIDTHS)), generator=generator)
    inside = torch.arange(max(WIDTHS))[None] < torch.tensor(WIDTHS)[:, None]
    counted = inside & (torch.arange(max(WIDTHS)) % 3 > 0)[None]
    at = counted.reshape(-1).nonzero()[:, 0]
    return MicroBatch(
        input_ids=ids,
        position_ids=None,
        predicts=at - 1,
        targets=ids.reshape(-1)[at],
        num_tokens=sum(WIDTHS),
    ).to(device)


def _loss_dtype(states: torch.Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def _with_states(result: type[Any], states: torch.Tensor) -> Any:
    """A backbone's result that holds nothing but these hidden states."""
    if issubclass(result, tuple):
        return (states,)
    fields = {field.name: None for field in dataclasses.fields(result)}
    return result(**{**fields, "last_hidden_state": states})


@contextlib.contextmanager
def _replaced(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` with another forward, for a moment."""
    own = vars(module).get("forward")  # libraries that move weights about put theirs here
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _leaves(tensor: torch.Tensor) -> tuple[torch.nn.Parameter, ...]:
    """The parameters that a tensor was made of and that want a gradient."""
    found: dict[int, Any] = {}
    seen: set[Any] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        waiting += [parent for parent, _ in node.next_functions]
    return tuple(found.values())
