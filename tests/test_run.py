"""The loop: what a run writes, how it stops, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from presets.errors import ModelError, NonFiniteLossError, OutOfMemoryError, RunError
from trainer import loop, outputs, window
from trainer.batching import BatchPlan
from trainer.collate import collate
from trainer.feed import one_ahead
from trainer.job import EvaluationSpec
from trainer.loop import Stopped, train
from trainer.record import RunRecord


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class StopAfter:
    """Sends this process a signal at the n-th micro-step, as a user or a scheduler would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, number: int = signal.SIGTERM) -> None:
        self.left = count
        real = loop.steps.micro_step

        def step(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), number)
            return real(*args, **kwargs)

        monkeypatch.setattr(loop.steps, "micro_step", step)


def test_a_run_writes_its_folder_and_a_complete_record(make_run: Any) -> None:
    run = make_run(micro=2)
    record = train(run)
    assert record is not None
    assert record == RunRecord.read(run / "record.json")
    assert record.status == "finished"
    actual = record.actual
    assert actual.num_steps == 9
    assert actual.num_examples == 72  # 80 less the 8 held out
    assert actual.seconds > actual.train_seconds > 0
    assert actual.peak_memory_bytes > 10_000_000
    assert actual.eval_loss_after < actual.eval_loss_before
    names = {path.name for path in run.iterdir()}
    assert {
        "job.json",
        "batch_plan.npz",
        "metrics.jsonl",
        "train.log",
        "checkpoints",
        "adapter",
        "record.json",
    } <= names
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes", "seconds"} <= set(lines[0])
    assert not list(run.rglob("*.tmp"))


def test_the_adapter_loads_in_plain_peft_and_gives_the_same_logits(make_run: Any, tiny_model: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = make_run()
    seen: dict[str, Any] = {}
    real = loop.save_result

    def save(state: Any) -> None:
        real(state)
        ids = torch.arange(20)[None]
        seen["logits"] = state.stepper.model.eval()(input_ids=ids).logits.detach()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_result", save)
        train(run)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = base(input_ids=torch.arange(20)[None]).logits.detach()
    reloaded = PeftModel.from_pretrained(base, run / "adapter").eval()(input_ids=torch.arange(20)[None]).logits.detach()
    assert torch.allclose(reloaded, seen["logits"], atol=1e-6)
    assert not torch.allclose(reloaded, plain, atol=1e-3)


@pytest.mark.parametrize("stop_at", [1, 3, 17, 40, 71])  # in the first window, mid-window, at and after boundaries
def test_a_stopped_and_resumed_run_ends_with_the_same_bytes(make_run: Any, monkeypatch: Any, stop_at: int) -> None:
    whole, stopped = make_run("whole", lora_dropout=0.1), make_run("stopped", lora_dropout=0.1)
    train(whole)
    with pytest.MonkeyPatch.context() as patch:
        StopAfter(patch, stop_at)
        with pytest.raises(Stopped) as caught:
            train(stopped)
    assert caught.value.signal_number == signal.SIGTERM
    assert RunRecord.read(stopped / "record.json").status == "stopped"
    record = train(stopped, resume=True)
    assert adapter_bytes(stopped) == adapter_bytes(whole)
    assert record.actual.num_examples == 72
    assert [line["step"] for line in metrics(stopped)] == list(range(1, 10))
    losses = [[line["loss"] for line in metrics(run)] for run in (whole, stopped)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("base", "changes", "stop_at"),
    [
        ("prioritized", {"gradient_accumulation_steps": 8}, 50),  # in epoch 2
        ("two-stage", {}, 75),  # between the stages and in stage 2
        ("progressive", {}, 20),
    ],
)
def test_resume_is_exact_across_epochs_stages_and_changes_of_accumulation(
    make_run: Any, base: str, changes: dict[str, Any], stop_at: int
) -> None:
    import dataclasses

    from presets.schema import load_preset

    preset = load_preset(base)
    if base == "two-stage":
        phases = (
            dataclasses.replace(preset.phases[0], gradient_accumulation_steps=8),
            dataclasses.replace(preset.phases[1], gradient_accumulation_steps=4, sample_size=20),
        )
        changes = {"phases": phases}
    elif base == "progressive":
        sizes = ((8, 2), (4, 4), (2, None))
        phases = tuple(
            dataclasses.replace(phase, gradient_accumulation_steps=size, num_steps=steps)
            for phase, (size, steps) in zip(preset.phases, sizes, strict=True)
        )
        changes = {"phases": phases}
    whole, stopped = make_run("whole", base=base, **changes), make_run("stopped", base=base, **changes)
    train(whole)
    with pytest.MonkeyPatch.context() as patch:
        StopAfter(patch, stop_at, signal.SIGINT)
        with pytest.raises(Stopped):
            train(stopped)
    train(stopped, resume=True)
    assert adapter_bytes(stopped) == adapter_bytes(whole)


def test_resume_repeats_the_open_window_from_its_own_start(make_run: Any) -> None:
    run = make_run()
    with pytest.MonkeyPatch.context() as patch:
        StopAfter(patch, 20)  # in the third window of eight micro-steps
        with pytest.raises(Stopped):
            train(run)
    state = json.loads((run / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["progress"]["windows_done"] == 2


def test_what_was_found_before_training_is_not_found_anew_by_a_resume(make_run: Any) -> None:
    run = make_run()
    with pytest.MonkeyPatch.context() as patch:
        StopAfter(patch, 50)
        with pytest.raises(Stopped):
            train(run)
    loss_before = RunRecord.read(run / "record.json").actual.eval_loss_before
    path = run / "samples-before.json"
    answers = json.loads(path.read_text())
    answers[0]["answer"] = "of the untrained model"
    path.write_text(json.dumps(answers))
    record = train(run, resume=True)
    assert record.actual.eval_loss_before == loss_before
    assert "of the untrained model" in (run / "samples.md").read_text()


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(make_run: Any) -> None:
    whole, run = make_run("whole"), make_run("run")
    train(whole)
    with pytest.MonkeyPatch.context() as patch:
        StopAfter(patch, 50)
        with pytest.raises(Stopped):
            train(run)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    record = train(run, resume=True)
    assert any("damaged" in note and "set aside" in note for note in record.notes)
    assert (newest.parent / f"damaged-{newest.name}").is_dir()
    assert adapter_bytes(run) == adapter_bytes(whole)


def test_a_checkpoint_is_set_aside_where_one_of_its_number_was_before(make_run: Any) -> None:
    whole, run = make_run("whole"), make_run("run")
    train(whole)
    with pytest.MonkeyPatch.context() as patch:
        StopAfter(patch, 50)
        with pytest.raises(Stopped):
            train(run)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    earlier = newest.with_name(f"damaged-{newest.name}")
    earlier.mkdir()
    (earlier / "state.json").write_text("of an earlier time")
    (newest / "state.json").write_text("{")
    train(run, resume=True)
    assert (earlier / "state.json").read_text() == "{"
    assert (earlier / "model.safetensors").is_file()
    assert adapter_bytes(run) == adapter_bytes(whole)


def test_the_best_checkpoint_outlives_the_rotation_and_a_resume(make_run: Any, monkeypatch: Any) -> None:
    from trainer.evaluate import EvaluationResult

    run = make_run(evaluation=EvaluationSpec(times_during_training=9), keep_checkpoints=1)
    scripted = iter([5.0, 4.0, 3.0, 3.5, 3.4, 3.6, 3.3, 3.2, 3.1, 3.05, 3.05, 3.05])
    monkeypatch.setattr(
        outputs, "evaluate", lambda *_, **__: EvaluationResult(loss=next(scripted), num_examples=8, num_tokens=80)
    )
    with pytest.MonkeyPatch.context() as patch:
        StopAfter(patch, 37)  # in the fifth window: the best one is of the second
        with pytest.raises(Stopped):
            train(run)
    assert kept(run) == ["step-000002", "step-000003", "step-000004"]
    record = train(run, resume=True)
    assert (record.actual.best_step, record.actual.best_eval_loss) == (2, 3.0)
    assert kept(run) == ["step-000002", "step-000008", "step-000009"]


def kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


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
                window, "feed", lambda parts, data, device: one_ahead(lambda rows: collate(rows, data), parts)
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


def test_full_fine_tuning_writes_a_model_that_loads_by_itself(make_run: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = make_run(adapter="full")
    record = train(run)
    assert record.actual.eval_loss_after < record.actual.eval_loss_before
    AutoModelForCausalLM.from_pretrained(run / "model")
    AutoTokenizer.from_pretrained(run / "model")


@pytest.mark.parametrize("base_precision", ["4bit", "8bit"])
def test_a_quantized_base_trains_saves_and_reloads(make_run: Any, tiny_model: Path, base_precision: str) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra 'quant' is not installed")
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = make_run(base_precision=base_precision, lora_rslora=True)
    record = train(run)
    assert record.actual.eval_loss_after < record.actual.eval_loss_before
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run / "adapter")
    assert torch.isfinite(model(input_ids=torch.arange(9)[None]).logits).all()


def test_a_tracker_gets_every_step(make_run: Any) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_run(tracker="tensorboard")
    train(run)
    (events,) = run.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events.parent))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == list(range(1, 10))
    assert [event.value for event in found.Scalars("loss")] == pytest.approx([line["loss"] for line in metrics(run)])


def test_packed_and_padded_runs_learn_the_same(make_run: Any) -> None:
    runs = [make_run("one"), make_run("rows", micro=4), make_run("packed", packing=True, packed_length=128)]
    losses = []
    for run in runs:
        train(run)
        losses.append([line["loss"] for line in metrics(run)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_a_model_without_weights_can_be_planned_but_not_trained(
    make_run: Any, tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    from presets.errors import ModelError

    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_model / name).exists():
            shutil.copy(tiny_model / name, bare)
    with pytest.raises(ModelError, match=r"no weights \(\*\.safetensors\)"):
        train(make_run(model=str(bare)))


def test_every_window_is_normalised_by_the_targets_that_it_holds(make_run: Any, monkeypatch: Any) -> None:
    run = make_run(micro=2, gradient_accumulation_steps=16)
    real, windows = loop.steps.micro_step, [0.0]
    update = loop.steps.optimizer_step

    def step(stepper: Any, batch: Any, *, scale: float) -> Any:
        windows[-1] += len(batch.targets) * scale
        return real(stepper, batch, scale=scale)

    def finish(*args: Any) -> Any:
        windows.append(0.0)
        return update(*args)

    monkeypatch.setattr(loop.steps, "micro_step", step)
    monkeypatch.setattr(loop.steps, "optimizer_step", finish)
    train(run)
    assert windows[:-1] == pytest.approx([1.0] * 5)  # four of 16 examples and a partial one of 8


def test_no_held_out_example_is_trained_on(make_run: Any) -> None:
    run = make_run(base="prioritized", gradient_accumulation_steps=4)
    train(run)
    plan = BatchPlan.load(run / "batch_plan.npz")
    assert len(plan.evaluation) == 8
    assert not np.isin(plan.order, plan.evaluation).any()


def test_the_wrong_number_of_processes_is_refused(make_run: Any) -> None:
    with pytest.raises(RunError, match=r"planned for 2 process\(es\), 1 were started"):
        train(make_run(num_devices=2))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize(
    ("number", "twice", "code"), [(signal.SIGTERM, False, 143), (signal.SIGINT, False, 130), (signal.SIGINT, True, 130)]
)
def test_the_first_signal_saves_and_exits_with_its_code_and_the_second_leaves_at_once(
    make_run: Any, number: int, twice: bool, code: int
) -> None:
    run = make_run(num_epochs=200)
    slow = (
        "import sys, time, trainer.loop as loop, trainer.__main__ as entry\n"
        "real = loop._checkpoint\n"
        "def checkpoint(*arguments):\n"
        "    if arguments[0].stop_signal: (arguments[0].folder / 'saving').touch(); time.sleep(float(sys.argv.pop()))\n"
        "    return real(*arguments)\n"
        "loop._checkpoint = checkpoint\n"
        "sys.exit(entry.main())\n"
    )
    pause = "60" if twice else "0"
    # The pause stands for a slow disk: the second signal must not wait for the checkpoint.
    argv = [sys.executable, "-P", "-c", slow.replace("sys.argv.pop()", f"'{pause}'"), str(run / "job.json")]
    child = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics_so_far(run)) > 2, child)
        child.send_signal(number)
        if twice:
            wait_for(lambda: (run / "saving").exists(), child)
            child.send_signal(number)
        assert child.wait(timeout=50) == code
    finally:
        child.kill()
    if twice:
        assert not (run / "record.json").exists()
    else:
        assert RunRecord.read(run / "record.json").status == "stopped"
        assert list((run / "checkpoints").glob("step-*"))


def metrics_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def wait_for(condition: Any, child: Any) -> None:
    while not condition():
        assert child.poll() is None, "the run ended by itself"
        time.sleep(0.05)


def test_packing_that_the_model_gets_wrong_stops_the_run_before_the_first_step(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import loop

    folder = make_run(packing=True)
    monkeypatch.setattr(loop, "settle_packing", lambda *_: "packed logits differ from separate ones")
    with pytest.raises(ModelError, match=r"packed logits differ.*--packing"):
        loop.train(folder)
    assert not (folder / "metrics.jsonl").exists()
