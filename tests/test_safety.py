"""What blocks a run, and what is only remarked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import make_data, make_job

from planner.safety import blocking, verdicts
from presets.schema import PRESET_ORDER, Phase, load_preset
from trainer.planning import plan_job

DATA = make_data(np.full(20_000, 30))
NUM_TRAINING = 20_000 - 8  # eight are held out


def said(data: Any = DATA, **changes: Any) -> tuple[Any, ...]:
    job = make_job(changes.pop("name", "baseline"), **changes)
    return verdicts(job, plan_job(job, data).plan)


@pytest.mark.parametrize(("accumulation", "blocks"), [(128, False), (129, True), (1024, True)])
def test_a_global_batch_over_128_blocks(accumulation: int, blocks: bool) -> None:
    found = blocking(said(gradient_accumulation_steps=accumulation))
    assert bool(found) is blocks
    if blocks:
        assert str(accumulation) in found[0]
        assert "--force" in found[0]


@pytest.mark.parametrize(("rate", "blocks"), [(5e-4, False), (5.1e-4, True), (0.5, True)])
def test_a_learning_rate_over_5e_4_blocks(rate: float, blocks: bool) -> None:
    assert bool(blocking(said(learning_rate=rate))) is blocks


def test_under_one_epoch_blocks_and_a_sample_does_not() -> None:
    assert "0.5 epochs are under one" in blocking(said(num_epochs=0.5))[0]
    assert not blocking(said(sample_ratio=0.5))
    assert not blocking(said(sample_size=100))
    assert not blocking(said(num_epochs=1))


def test_phases_with_steps_of_their_own_still_see_every_example() -> None:
    short = (Phase(gradient_accumulation_steps=16, learning_rate=2e-4, num_steps=10),)
    plan = plan_job(make_job(phases=short), DATA).plan
    assert plan.num_examples == NUM_TRAINING  # the last phase goes on to the end: it cannot fall under one epoch
    assert not blocking(said(phases=short))


@pytest.mark.parametrize("name", PRESET_ORDER)
def test_no_bundled_preset_is_blocked(name: str) -> None:
    preset = load_preset(name)
    highest = max([preset.learning_rate, *(phase.learning_rate for phase in preset.phases)])
    assert highest <= 5e-4
    if preset.sampling_strategy == "prioritized" or any(phase.sample_size for phase in preset.phases):
        return  # these need scores that the made-up data lack; their batches and rates are checked above
    assert not blocking(said(name=name))


def test_an_epoch_under_one_sees_that_share_of_the_examples_once() -> None:
    job = make_job(num_epochs=0.25)
    plan = plan_job(job, DATA).plan
    assert plan.num_examples == round(0.25 * NUM_TRAINING)
    assert len(np.unique(plan.order)) == plan.num_examples
    assert not set(plan.order.tolist()) & set(plan.evaluation.tolist())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gradient_accumulation_steps": 64}, "global batch of 64 with LoRA"),
        ({"learning_rate": 2e-5}, "ten times that of full"),
        ({"adapter": "full", "learning_rate": 2e-4}, "a tenth of LoRA's"),
    ],
)
def test_what_the_field_knows_is_remarked_and_does_not_block(changes: dict[str, Any], words: str) -> None:
    found = said(**changes)
    assert any(words in one.text for one in found)
    assert not blocking(found)


def test_coarse_and_few_steps_are_remarked() -> None:
    few = make_data(np.full(400, 30))
    found = [one.text for one in said(few, gradient_accumulation_steps=16)]
    assert any("more than 1/50" in text for text in found)
    assert any("only 25 optimizer steps" in text for text in found)
    assert said(gradient_accumulation_steps=16) == ()
