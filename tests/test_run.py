"""The loop: what a run writes, what it learns, and what it refuses."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import metrics

from presets.errors import ModelError, RunError
from trainer import loop
from trainer.batching import BatchPlan
from trainer.loop import train
from trainer.record import RunRecord


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


def test_what_a_run_does_between_its_start_and_its_first_step_is_a_part_of_loading(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a second of each run on an H200 stood in no part of its breakdown, and in no estimate."""
    import accelerate

    from trainer import loop
    from trainer.run import Clock

    part, during = Clock.part, []
    open_parts: list[str] = []

    @contextlib.contextmanager
    def watched(self: Clock, name: str) -> Any:
        with part(self, name):
            open_parts.append(name)
            yield
            open_parts.pop()

    def noting(name: str, action: Any) -> Any:
        def noted(*given: Any, **named: Any) -> Any:
            during.append((name, *open_parts))
            return action(*given, **named)

        return noted

    monkeypatch.setattr(Clock, "part", watched)
    monkeypatch.setattr(accelerate, "Accelerator", noting("device", accelerate.Accelerator))
    monkeypatch.setattr(loop, "settle_garbage", noting("garbage", lambda: None))
    loop.train(make_run(), owns_process=True)
    assert during == [("device", "load"), ("garbage", "load")]


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


def test_packing_that_the_model_gets_wrong_stops_the_run_before_the_first_step(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import loop

    folder = make_run(packing=True)
    monkeypatch.setattr(loop, "settle_packing", lambda *_: "packed logits differ from separate ones")
    with pytest.raises(ModelError, match=r"packed logits differ.*--packing"):
        loop.train(folder)
    assert not (folder / "metrics.jsonl").exists()
