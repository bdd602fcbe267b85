"""Sampling by the model's own loss: scored before the batch plan, counted, and never an example that is held out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.launch import make_run_folder
from presets.errors import NonFiniteLossError
from trainer.batching import BatchPlan
from trainer.data import prepare_data
from trainer.loop import train
from trainer.model import load_model
from trainer.planning import needs_loss, plan_job, split, stand_in
from trainer.record import Predicted
from trainer.scoring import example_losses

BY_LOSS = {"sampling_strategy": "top", "sample_score": "loss", "sample_size": 24}


def tokenised(job: Any) -> Any:
    return prepare_data(job.data, model=job.model, max_length=job.preset.max_length, seed=job.seed)


def losses_one_by_one(model: Any, data: Any) -> list[float]:
    """Straight from the logits, one example at a time, without the project's batching and loss."""
    import torch

    found = []
    model.eval()
    with torch.no_grad():
        for example in range(len(data)):
            span = slice(int(data.offsets[example]), int(data.offsets[example + 1]))
            ids = torch.from_numpy(np.array(data.token_ids[span], dtype=np.int64))
            logged = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            targets = np.flatnonzero(data.supervised[span])
            found.append(float(np.mean([-float(logged[at - 1, ids[at]]) for at in targets])))
    return found


def test_example_losses_are_those_of_each_example_alone_and_change_nothing(make_job: Any) -> None:
    import torch

    job = make_job(lora_dropout=0.5)
    data = tokenised(job)
    model = load_model(job, need_weights=True).model
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    found = example_losses(model, data, device="cpu", precision="fp32")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert found.tolist() == pytest.approx(losses_one_by_one(model, data), rel=1e-5)
    assert len(set(found.tolist())) > 70


def test_the_shares_of_several_processes_add_up_to_the_whole(make_job: Any) -> None:
    job = make_job()
    data = tokenised(job)
    model = load_model(job, need_weights=True).model
    whole = example_losses(model, data, device="cpu", precision="fp32")
    parts: list[Any] = []
    for rank in range(3):
        example_losses(
            model,
            data,
            device="cpu",
            precision="fp32",
            share=slice(rank, None, 3),
            reduce=lambda tensor: parts.append(tensor.clone()) or tensor,
        )
    assert sum(parts).tolist() == whole.tolist()


def test_a_run_by_loss_trains_on_the_examples_of_highest_loss_and_on_no_held_out_one(make_run: Any) -> None:
    from trainer.job import Job

    run = make_run(micro=2, **BY_LOSS)
    record = train(run)
    job = Job.read(run / "job.json")
    data = tokenised(job)
    losses = np.array(losses_one_by_one(load_model(job, need_weights=True).model, data))
    training, evaluation = split(job.data, job.evaluation, len(data), job.seed)
    plan = BatchPlan.load(run / "batch_plan.npz")
    expected = training[np.argsort(-losses[training], kind="stable")[:24]]
    assert sorted(plan.order.tolist()) == sorted(expected.tolist())
    assert plan.evaluation.tolist() == evaluation.tolist()
    assert not np.isin(plan.order, evaluation).any()
    assert record is not None
    assert (record.actual.num_examples, record.actual.num_steps) == (24, 3)
    assert any("model's own loss: 72 examples were scored" in note for note in record.notes)


def test_a_resumed_run_keeps_the_plan_that_was_made_from_the_untrained_model(make_run: Any, monkeypatch: Any) -> None:
    from trainer import loop

    run = make_run(micro=2, **BY_LOSS)
    train(run)
    before = (run / "batch_plan.npz").read_bytes()
    monkeypatch.setattr(loop, "example_losses", lambda *_, **__: pytest.fail("scored again"))
    train(run, resume=True)
    assert (run / "batch_plan.npz").read_bytes() == before


@pytest.mark.parametrize("moment", ["example_losses", "_plan"])
def test_a_run_killed_before_its_plan_is_written_scores_again_and_ends_the_same(make_run: Any, moment: str) -> None:
    from trainer import loop

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> Any:
        raise Killed

    whole, run = (make_run(name, micro=2, lora_dropout=0.1, **BY_LOSS) for name in ("whole", "run"))
    train(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, moment, killed)
        with pytest.raises(Killed):
            train(run)
    assert not (run / "batch_plan.npz").exists()
    train(run, resume=True)
    ours, theirs = [BatchPlan.load(folder / "batch_plan.npz").order.tolist() for folder in (run, whole)]
    assert ours == theirs
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (run, whole)]
    assert adapters[0] == adapters[1]


def test_an_example_without_a_usable_loss_is_named_and_not_left_out_silently(make_job: Any, monkeypatch: Any) -> None:
    import torch

    from trainer import step

    job = make_job()
    data = tokenised(job)
    model = load_model(job, need_weights=True).model
    real = step.token_losses

    def poisoned(model: Any, batch: Any, **kwargs: Any) -> Any:
        found = real(model, batch, **kwargs)
        return torch.full_like(found, float("nan"))

    monkeypatch.setattr(step, "token_losses", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"not a number for example\(s\) 3, 7 of the data"):
        example_losses(model, data, device="cpu", precision="fp32", examples=np.array([3, 7]))


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        (BY_LOSS, True),
        ({"sampling_strategy": "prioritized", "sample_score": "loss"}, True),
        ({"sampling_strategy": "top", "sample_score": "loss"}, False),  # takes all
        ({"sampling_strategy": "random", "sample_score": "loss", "sample_size": 9}, False),
        ({"sampling_strategy": "top", "sample_score": "recency", "sample_size": 9}, False),
    ],
)
def test_the_stand_in_needs_no_loss_and_has_the_same_number_of_steps(
    make_job: Any, changes: dict[str, Any], needed: bool
) -> None:
    job = make_job(**changes)
    data = tokenised(job)
    assert needs_loss(job.preset) is needed
    instead = stand_in(job)
    assert not needs_loss(instead.preset)
    scores = np.random.default_rng(0).random(len(data))
    ours, theirs = plan_job(instead, data).plan, plan_job(job, data, scores).plan
    assert (ours.num_examples, ours.num_steps) == (theirs.num_examples, theirs.num_steps)
    assert (instead == job) is (not needed)


def test_the_stand_in_replaces_stages_too(make_job: Any) -> None:
    job = make_job("two-stage")
    first, second = job.preset.phases
    by_loss = dataclasses.replace(second, sampling_strategy="top", sample_score="loss", sample_size=16)
    job = dataclasses.replace(job, preset=dataclasses.replace(job.preset, phases=(first, by_loss)))
    assert needs_loss(job.preset)
    assert not needs_loss(stand_in(job).preset)
    assert stand_in(job).preset.phases[0] == first


def test_a_run_folder_by_loss_gets_no_batch_plan_of_the_stand_in(make_job: Any, tmp_path: Path) -> None:
    from datetime import datetime

    for changes, there in ((BY_LOSS, False), ({}, True)):
        job = make_job(**changes)
        plan = plan_job(stand_in(job), tokenised(job)).plan
        folder = make_run_folder(tmp_path / str(there), job, plan, Predicted(), datetime.now())
        assert (folder / "batch_plan.npz").exists() is there
        assert (folder / "job.json").exists()
