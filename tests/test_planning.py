"""A preset's words become batches: phases, stages, learning rates, and what is never reached."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from fakes import chat_lengths, make_data, make_job

from presets.errors import SettingsError
from presets.schema import load_preset, preset_names
from trainer import planning
from trainer.batching import BatchPlan, make_batch_plan
from trainer.data import prepare_data
from trainer.job import DataSpec, EvaluationSpec, Job
from trainer.planning import Plans, learning_rates, plan_job, with_evaluation_on_top


def planned(name: str, count: int = 63_000, **changes) -> tuple[Job, BatchPlan, tuple[str, ...]]:
    from presets.demo import demo_folder

    job = Job(
        **{
            "name": name,
            "preset": load_preset(name),
            "model": str(demo_folder()),
            "data": DataSpec(source="count", num_examples=count, tokens_per_example=20),
            "device": "cpu",
            "precision": "fp32",
            "base_precision": "fp32",
            "micro_batch_size": 1,
            **changes,
        }
    )
    data = prepare_data(with_evaluation_on_top(job.data, job.evaluation), model=job.model, max_length=1024)
    found = plan_job(job, data)
    return job, found.plan, found.notes


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("baseline", 3938),
        ("recommended", 1969),
        ("aggressive", 985),  # the formula rounds 984.375 down; a run flushes its last, partial window
        ("today", 493),
        ("iterate", 32),
        ("two-stage", 985 + 313),
        ("progressive", 500 + 969),
        ("prioritized", 2 * 985),
    ],
)
def test_the_published_presets_have_these_steps_on_63_000_examples(name: str, steps: int) -> None:
    _, plan, _ = planned(name)
    assert plan.num_steps == steps
    assert len(plan.evaluation) == 1000
    assert not set(plan.order.tolist()) & set(plan.evaluation.tolist())


def test_progressive_changes_its_window_at_step_501_and_says_that_phase_3_is_never_reached() -> None:
    _, plan, notes = planned("progressive")
    sizes = np.diff(plan.window_documents)
    assert (sizes[:500] == 64).all()
    assert (sizes[500:-1] == 32).all()
    assert any("phase 3 of 3" in note and "never reached" in note for note in notes)


def test_two_stage_goes_over_everything_and_then_over_the_best_ten_thousand() -> None:
    job, plan, _ = planned("two-stage")
    first = np.concatenate([plan.documents_of_window(w) for w in range(985)])
    second = np.concatenate([plan.documents_of_window(w) for w in range(985, plan.num_steps)])
    assert sorted(first.tolist()) == list(range(63_000))
    data = prepare_data(with_evaluation_on_top(job.data, job.evaluation), model=job.model, max_length=1024)
    best = np.argsort(-data.engagement[:63_000], kind="stable")[:10_000]
    assert set(second.tolist()) == set(best.tolist())


def test_stages_have_a_warm_up_and_decay_each_and_one_pass_has_one() -> None:
    job, plan, _ = planned("two-stage")
    rates = learning_rates(job.preset, plan)
    assert rates[:985].max() == pytest.approx(3.0e-4)
    assert rates[985:].max() == pytest.approx(2.5e-4)
    assert rates[985] == 0.0  # stage 2 warms up anew
    assert rates[984] < 1e-6
    job, plan, _ = planned("progressive")
    rates = learning_rates(job.preset, plan)
    assert (np.diff(rates[45:500]) < 0).all()
    assert rates[500] == pytest.approx(2.5 / 3.0 * rates[499], rel=2e-3)  # the peak changes, the decay goes on


def test_the_schedule_is_the_one_of_transformers() -> None:
    import torch
    from transformers import get_linear_schedule_with_warmup

    job, plan, _ = planned("recommended", 3_000)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=job.preset.learning_rate)
    warmup = int(np.ceil(plan.num_steps * job.preset.warmup_ratio))
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, plan.num_steps)
    theirs = []
    for _ in range(plan.num_steps):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert learning_rates(job.preset, plan) == pytest.approx(theirs)


def test_more_devices_shrink_accumulation_and_hold_the_global_batch() -> None:
    job, plan, _ = planned("recommended", 1000, num_devices=4, micro_batch_size=2)
    assert job.gradient_accumulation_steps == (4,)
    assert (np.diff(plan.window_documents)[:-1] == 32).all()
    assert (np.diff(plan.window_offsets) % 4 == 0).all()


def test_an_indivisible_global_batch_is_an_error_that_names_the_numbers() -> None:
    job, _, _ = planned("recommended", 100)
    with pytest.raises(SettingsError, match="a global batch of 32 cannot be split into micro-batches of 5"):
        dataclasses.replace(job, micro_batch_size=5)


def test_a_count_names_training_examples_and_evaluation_comes_on_top() -> None:
    _, plan, _ = planned("baseline", 500)
    assert plan.num_examples == 500
    assert len(plan.evaluation) == 10


def test_grouping_by_length_is_off_unless_asked_for_and_says_that_it_changes_the_batches() -> None:
    _, plain, notes = planned("recommended", 1000)
    assert not any("grouped" in note for note in notes)
    _, plan, notes = planned("recommended", 1000, group_by_length=True)
    assert any("changes which examples share a batch; not quality-neutral" in note for note in notes)
    assert sorted(plan.order.tolist()) == sorted(plain.order.tolist())
    assert plan.evaluation.tolist() == plain.evaluation.tolist()
    assert not set(plan.order.tolist()) & set(plan.evaluation.tolist())


def test_presets_with_the_same_batches_share_a_plan_and_each_has_the_plan_of_its_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = make_data(chat_lengths(700))
    data = dataclasses.replace(data, engagement=np.arange(700.0), created_at=np.arange(700.0) * 1e5)
    jobs = [make_job(name) for name in preset_names()]
    like_aggressive = make_job("aggressive", learning_rate=1e-5, precision="fp32")
    unlike = [
        make_job("aggressive", num_epochs=2),
        make_job("aggressive", seed=7),
        make_job("aggressive", micro_batch_size=2),
        make_job("aggressive", packing=True),
        make_job("aggressive", packing=True, packed_length=300),
        make_job("aggressive", group_by_length=True),
        make_job("aggressive", sort_window=False),
        make_job("aggressive", num_epochs=0.5),
        make_job("aggressive", evaluation=EvaluationSpec(minimum=0, maximum=4)),
        make_job("aggressive", sample_size=60),
    ]
    alone = [plan_job(job, data) for job in (*jobs, *unlike)]
    made: list[BatchPlan] = []

    def counted(*given, **named) -> BatchPlan:
        made.append(make_batch_plan(*given, **named))
        return made[-1]

    monkeypatch.setattr(planning, "make_batch_plan", counted)
    plans = Plans(data)
    together = [plans.of(job) for job in (*jobs, *unlike)]
    for one, other in zip(together, alone, strict=True):
        assert one.plan.digest() == other.plan.digest()
        assert one.notes == other.notes
    of = dict(zip(preset_names(), together, strict=False))
    assert of["iterate"].plan is of["aggressive"].plan  # 700 examples are fewer than it samples
    assert len(made) == len(together) - 1
    assert plans.of(like_aggressive).plan is of["aggressive"].plan
    assert len(made) == len(together) - 1
    others = [one.plan.digest() for one in together[len(jobs) :]]
    assert of["aggressive"].plan.digest() not in others
    assert len(set(others)) == len(others)
