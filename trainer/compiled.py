"""torch.compile, where it is asked for: layer by layer, compiled before the first step, checked on the model itself.

The decoder layers are compiled and nothing else. They are where the time goes, they are alike, so that one
compilation serves many, and what lies around them (the lean loss, masks, adapters on the output layer) stays as it is.
Shapes are dynamic: micro-batches differ in width, and a compilation for each would never end. Evaluation and answers
run as before: they are a small part and would compile everything once more.

It is no default, for it can lose: on two CPU cores micro-batches of four of the bundled model took 0.31 s compiled and
0.16 s as they are, after 29 s (torch's cache warm) to 143 s (cold, cores shared) of compiling (torch 2.13, 2026-11-25).
"""

from __future__ import annotations

import functools
import os
import shutil
from typing import Any

import numpy as np

from presets.errors import ModelError
from trainer import step as steps
from trainer.collate import batch_on
from trainer.job import Job
from trainer.tokens import IntArray, TokenizedDataset

COMPILERS = ("g++", "clang++", "c++", "cl")


def require_compiler(job: Job) -> None:
    """Raises: ModelError where the job is to be compiled and nothing here can do it."""
    named = os.environ.get("CXX")
    if job.device == "cuda" or any(shutil.which(name) for name in ((named,) if named else COMPILERS)):
        return
    raise ModelError(
        f"--compile needs a C++ compiler, and {f'CXX={named}' if named else 'g++'} was not found. "
        "Install one (apt install g++), or leave out --compile."
    )


def compile_layers(stepper: steps.Stepper, job: Job, data: TokenizedDataset) -> str | None:
    """Compile the model's layers and run them over a few shapes of the job; None, or why they stay as they were.

    Loss and gradients are compared with the uncompiled ones. Weights, gradients and random state are left as they are.
    How long this takes depends on what torch's own cache on this machine already holds.

    Raises:
        ModelError: there is no compiler.
    """
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    from trainer.lean import TOLERANCES

    require_compiler(job)
    stepper.halves = None  # compiled layers cast as they go
    layers = [module for module in stepper.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        return "its layers are not known as such"
    # A layer's adapters are objects of their own, and each may need its own trace; at the limit torch would go on
    # uncompiled without a word.
    limit = torch._dynamo.config
    limit.recompile_limit = max(limit.recompile_limit, 8 * len(layers))
    limit.accumulated_recompile_limit = max(limit.accumulated_recompile_limit, 8 * len(layers))
    # Dropout then draws what it draws uncompiled, so that both can be compared.
    torch._inductor.config.fallback_random = True
    batches = [batch_on(stepper.device, rows, data) for rows in probe_rows(job, data)]
    was_training = stepper.model.training
    refused: str | None = None
    gpus = [torch.cuda.current_device()] if stepper.device.startswith("cuda") else []
    with torch.random.fork_rng(devices=gpus):
        try:
            stepper.model.train()
            plain = _pass(stepper, batches[0])
            for layer in layers:
                _compile(layer)
            for batch in batches:
                found = _pass(stepper, batch)
                if batch is batches[0]:
                    refused = _differs(plain, found, TOLERANCES[job.precision])
                    if refused:
                        break
        except Exception as reason:  # a compiler fails in as many ways as there are models
            from trainer.model import is_out_of_memory

            if is_out_of_memory(reason):
                raise
            line = (str(reason).strip() or "-").splitlines()[0][:200]
            refused = f"it fails on this model ({type(reason).__name__}: {line})"
        finally:
            steps.clear_gradients(stepper.parameters)
            stepper.model.train(was_training)
    if refused:
        for layer in layers:
            layer.__dict__.pop("forward", None)
    return refused


def probe_rows(job: Job, data: TokenizedDataset) -> list[list[IntArray]]:
    """Micro-batches of the job's longest, middle and shortest examples: what is dynamic is known after three shapes."""
    usable = np.flatnonzero(data.num_supervised > 0)
    by_length = usable[np.argsort(-data.lengths[usable], kind="stable")]
    size = min(job.micro_batch_size, len(by_length))
    starts = (0, (len(by_length) - size) // 2, len(by_length) - size)
    if not job.packing:
        return [[by_length[at + index : at + index + 1] for index in range(size)] for at in starts]
    return [[by_length[at : at + 2]] * size for at in (0, max(0, len(by_length) // 2 - 2), max(0, len(by_length) - 2))]


def _compile(layer: Any) -> None:
    import torch

    plain = layer.forward
    layer.forward = functools.partial(_forward, plain, torch.compile(plain, dynamic=True))


def _forward(plain: Any, compiled: Any, *positional: Any, **named: Any) -> Any:
    import torch

    return (compiled if torch.is_grad_enabled() else plain)(*positional, **named)


def _pass(stepper: steps.Stepper, batch: Any) -> tuple[float, list[Any]]:
    """Loss and gradients of one micro-batch; dropout draws the same each time."""
    import torch

    torch.manual_seed(0)
    steps.clear_gradients(stepper.parameters)
    loss = steps.micro_step(stepper, batch, scale=1.0 / max(1, len(batch.targets)))
    return float(loss), [None if one.grad is None else one.grad for one in stepper.parameters]


def _differs(plain: tuple[float, list[Any]], found: tuple[float, list[Any]], limit: float) -> str | None:
    loss = abs(found[0] - plain[0]) / max(abs(plain[0]), 1e-12)
    whole = sum(float(one.double().norm()) ** 2 for one in plain[1] if one is not None) ** 0.5
    apart = [
        float((other.double() - one.double()).norm()) if one is not None and other is not None else float("inf")
        for one, other in zip(plain[1], found[1], strict=True)
        if one is not None or other is not None
    ]
    gradient = max(apart, default=0.0) / max(whole, 1e-12)
    for name, difference in (("loss", loss), ("gradient", gradient)):
        if not difference <= limit:
            return f"its {name} differs from the uncompiled one's by {difference:.1e}, more than {limit:.0e}"
    return None
