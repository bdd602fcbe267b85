"""Losses and gradients that are not numbers, overflow in fp16, and memory that runs out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_runs import adapter_bytes, metrics

from presets.errors import NonFiniteLossError, OutOfMemoryError
from trainer import loop, window
from trainer.batching import BatchPlan
from trainer.collate import collate
from trainer.feed import one_ahead
from trainer.loop import train
from trainer.record import RunRecord


def test_a_nan_loss_stops_the_run_with_the_step_and_the_examples_and_touches_no_weight(make_run: Any) -> None:
    import torch

    run = make_run(micro=2)
    real, count = loop.steps.micro_step, [0]

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        loss = real(*args, **kwargs)
        return loss * float("nan") if count[0] == 10 else loss  # window 3, its second micro-batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.steps, "micro_step", poisoned)
        with pytest.raises(NonFiniteLossError, match="step 3: the loss is not a number") as caught:
            train(run)
    plan = BatchPlan.load(run / "batch_plan.npz")
    guilty = [int(example) for row in plan.rows_of_micro_batch(9) for example in row]
    assert all(str(example) in str(caught.value) for example in guilty)
    record = RunRecord.read(run / "record.json")
    assert record.status == "failed"
    assert record.actual.num_steps == 2
    assert (run / "checkpoints" / "step-000002").is_dir()
    from safetensors.torch import load_file

    kept = load_file(run / "checkpoints" / "step-000002" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    train(run, resume=True)


def all_checkpoints_are_finite(run: Path) -> bool:
    from safetensors.numpy import load_file

    files = [path for path in (run / "checkpoints").rglob("*.safetensors") if path.name != "random.safetensors"]
    return all(np.isfinite(values).all() for path in files for values in load_file(path).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(make_run: Any, value: float) -> None:
    whole, run = make_run("whole", checkpoint_every=1), make_run("run", checkpoint_every=1)
    train(whole)
    real, count = loop.steps.micro_step, [0]

    def spoiling(stepper: Any, batch: Any, *, scale: float) -> Any:
        loss = real(stepper, batch, scale=scale)
        count[0] += 1
        if count[0] == 20:  # in the third window; the loss stays as it was
            stepper.parameters[-1].grad.view(-1)[0] = value
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.steps, "micro_step", spoiling)
        with pytest.raises(
            NonFiniteLossError, match=r"^step 3: the norm of the gradient is (nan|inf), although"
        ) as seen:
            train(run)
    assert "\n" not in str(seen.value)
    record = RunRecord.read(run / "record.json")
    assert (record.status, record.actual.num_steps, record.error) == ("failed", 2, str(seen.value))
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == "step-000002"
    assert all_checkpoints_are_finite(run)
    train(run, resume=True)
    assert adapter_bytes(run) == adapter_bytes(whole)


def test_weights_that_are_not_finite_are_never_written_as_a_checkpoint(make_run: Any) -> None:
    import torch

    run = make_run(checkpoint_every=1)
    real, count = loop.steps.optimizer_step, [0]

    def spoiling(stepper: Any, learning_rate: float) -> Any:
        result = real(stepper, learning_rate)
        count[0] += 1
        if count[0] == 3:  # as by a learning rate that is beyond fp32
            with torch.no_grad():
                stepper.parameters[-1].view(-1)[0] = float("inf")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.steps, "optimizer_step", spoiling)
        with pytest.raises(NonFiniteLossError, match=r"^step 3: weights have become NaN or infinite\. No checkpoint"):
            train(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == "step-000002"
    assert all_checkpoints_are_finite(run)
    assert not (run / "adapter").exists()


@pytest.mark.parametrize("is_ahead", [False, True], ids=["in turn", "made ahead"])
def test_running_out_of_memory_halves_the_micro_batch_keeps_the_global_batch_and_says_so(
    make_run: Any, is_ahead: bool
) -> None:
    """What a thread has made ahead, as on a GPU, is of the size that did not fit: it must not be trained on."""
    whole, run = (
        make_run("whole", micro=4, gradient_accumulation_steps=8),
        make_run("run", micro=4, gradient_accumulation_steps=8),
    )
    train(whole)
    real = loop.steps.micro_step
    seen: list[int] = []
    large = [0]

    def small_card(stepper: Any, batch: Any, *, scale: float) -> Any:
        large[0] += len(batch.input_ids) > 2
        if len(batch.input_ids) > 2 and large[0] == 1:
            return real(stepper, batch, scale=scale)  # its gradient must be dropped when the window is done again
        if len(batch.input_ids) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        seen.append(len(batch.input_ids))
        return real(stepper, batch, scale=scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.steps, "micro_step", small_card)
        if is_ahead:
            patch.setattr(
                window,
                "feed",
                lambda parts, data, device, row_length: one_ahead(lambda rows: collate(rows, data), parts),
            )
        record = train(run)
    assert record.actual.micro_batch_split == 2
    assert record.actual.num_examples == 72
    assert any("executed as 2" in note for note in record.notes)
    assert max(seen) == 2
    ours, theirs = [[line["loss"] for line in metrics(folder)] for folder in (run, whole)]
    assert ours == pytest.approx(theirs, rel=1e-4)
    state = json.loads(next(iter(sorted((run / "checkpoints").glob("step-*"))[-1:])).joinpath("state.json").read_text())
    assert state["progress"]["split"] == 2


def test_out_of_memory_at_micro_batch_one_stops_with_what_would_help(make_run: Any) -> None:
    run = make_run(micro=2)

    def no_room(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.steps, "micro_step", no_room)
        with pytest.raises(OutOfMemoryError, match=r"out of memory at micro-batch 1\. What helps: a shorter"):
            train(run)
    assert RunRecord.read(run / "record.json").status == "failed"


def test_a_skipped_fp16_step_does_not_advance_the_learning_rate_and_is_counted(make_run: Any) -> None:
    run = make_run()
    real, count = loop.steps.optimizer_step, [0]

    def overflowing(stepper: Any, learning_rate: float) -> Any:
        count[0] += 1
        if count[0] == 3:
            loop.steps.clear_gradients(stepper.parameters)
            return loop.steps.StepResult(grad_norm=stepper.parameters[0].detach().sum() * 0, applied=False)
        return real(stepper, learning_rate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.steps, "optimizer_step", overflowing)
        record = train(run)
    rates = [line["learning_rate"] for line in metrics(run)]
    assert rates[3] == rates[2]
    assert (record.actual.applied_steps, record.actual.skipped_steps) == (8, 1)


def test_a_real_overflow_skips_the_step_and_leaves_the_weights(make_job: Any) -> None:
    """torch's own scaler on the CPU: an infinite gradient must change nothing and shrink the scale."""
    import torch

    from trainer.step import make_stepper, optimizer_step

    layer = torch.nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    stepper = make_stepper(layer, "cpu", "fp16")
    stepper.scaler.scale(layer(torch.ones(1, 4)).sum()).backward()
    layer.weight.grad[0, 0] = float("inf")
    assert not optimizer_step(stepper, 0.1).applied
    assert torch.equal(layer.weight, before)
    stepper.scaler.scale(layer(torch.ones(1, 4)).sum()).backward()
    assert optimizer_step(stepper, 0.1).applied
    assert not torch.equal(layer.weight, before)


def test_fp16_gives_up_once_there_is_no_scale_left_to_take_away() -> None:
    """A gradient that is NaN at any scale: skipping for ever would look like training."""
    import torch

    from trainer.checkpoint import Progress
    from trainer.step import make_stepper, optimizer_step

    layer = torch.nn.Linear(4, 1)
    stepper = make_stepper(layer, "cpu", "fp16")
    assert stepper.scaler is not None
    run: Any = SimpleNamespace(stepper=stepper, progress=Progress(windows_done=6))
    steps = 0
    while stepper.scaler.get_scale() >= 1.0:
        stepper.scaler.scale(layer(torch.ones(1, 4)).sum()).backward()
        assert layer.weight.grad is not None
        layer.weight.grad[0, 0] = float("nan")
        result = optimizer_step(stepper, 1.0)
        assert not result.applied
        steps += 1
        if stepper.scaler.get_scale() >= 1.0:
            window._require_finite_gradient(run, float(result.grad_norm))
    assert steps == 17, "from 65,536 to below 1, halved each time"
    with pytest.raises(NonFiniteLossError, match=r"^step 7: the norm of the gradient is nan"):
        window._require_finite_gradient(run, float("nan"))


def test_without_a_scaler_too_an_infinite_gradient_leaves_the_weights() -> None:
    import torch

    from trainer.step import make_stepper, optimizer_step

    layer = torch.nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    stepper = make_stepper(layer, "cpu", "fp32")
    layer(torch.ones(1, 4)).sum().backward()
    layer.weight.grad[0, 0] = float("inf")
    assert not optimizer_step(stepper, 0.1).applied
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad is None
    layer(torch.ones(1, 4)).sum().backward()
    assert optimizer_step(stepper, 0.1).applied
    assert not torch.equal(layer.weight, before)
