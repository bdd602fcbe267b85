"""Held-out examples: how they are batched on which device, and what their evaluation takes and holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fake_host import HostedDevice
from fakes import FakeDevice, chat_lengths, make_data, make_job, make_row

import trainer.evaluate
from planner.estimate import (
    Estimate,
    batch_cost,
    estimate,
    evaluations_and_checkpoints,
)
from planner.fixed import EVALUATION_BATCHES
from planner.measure import measure
from planner.measurement import PlannedRow
from trainer.evaluate import evaluation_batches, tokens_at_once
from trainer.job import EvaluationSpec
from trainer.planning import plan_job, stand_in

LENGTHS = chat_lengths(3000)
DATA = make_data(LENGTHS)


def estimates(device: FakeDevice, rows: list[PlannedRow]) -> list[Estimate]:
    found = measure(rows, DATA, device.factory, clock=device.clock)
    return [estimate(row, DATA, found) for row in rows]


def test_what_a_gpu_s_first_evaluation_takes_longer_is_counted_once() -> None:
    """Kernels are loaded for each shape, once; the run evaluates five times."""
    row = make_row(make_job(device="cuda"), DATA)
    plain, slow = (
        estimates(FakeDevice(LENGTHS, loading_evaluation=seconds), [row])[0].fixed.evaluation for seconds in (0.0, 0.7)
    )
    assert plain is not None
    assert slow is not None
    at_once = tokens_at_once(row.job, row.plan.micro_shapes(LENGTHS).largest)
    batches = len(evaluation_batches(DATA, row.plan.evaluation, "cuda", at_once))
    loaded = min(EVALUATION_BATCHES, batches) - 1  # the largest was met by the memory probe
    assert loaded > 0
    assert slow == pytest.approx(plain + loaded * 0.7)


def test_several_devices_share_the_held_out_examples_and_what_is_scored() -> None:
    """The trainer gives each its batches in turns; the slowest share counts."""
    evaluation = EvaluationSpec(minimum=0, maximum=300)
    device = FakeDevice(LENGTHS)
    preset = {"sampling_strategy": "prioritized", "sample_score": "loss", "sample_ratio": 0.5}
    jobs = [make_job(num_devices=number, evaluation=evaluation, **preset) for number in (1, 2)]
    rows = [PlannedRow(name="x", job=job, plan=plan_job(stand_in(job), DATA).plan) for job in jobs]
    alone, shared = (
        estimate(row, DATA, measure([row], DATA, device.factory, clock=device.clock), data_seconds=0.0).fixed
        for row in rows
    )
    assert alone.evaluation
    assert alone.data
    for examples, one, two in (
        (rows[0].plan.evaluation, alone.evaluation, shared.evaluation),
        (np.setdiff1d(np.arange(len(DATA)), rows[0].plan.evaluation), alone.data, shared.data),
    ):
        padded = [len(batch) * int(LENGTHS[batch].max()) for batch in evaluation_batches(DATA, examples, "cpu")]
        assert two == pytest.approx(one * max(sum(padded[0::2]), sum(padded[1::2])) / sum(padded), rel=0.01)


@pytest.mark.parametrize("sizes", [(1, 8), (8, 8)])
def test_a_gpu_evaluates_each_row_in_batches_of_its_own_size(sizes: tuple[int, int]) -> None:
    """Rows of one signature share what was measured; a batch takes a launch, or its tokens."""
    device = HostedDevice(LENGTHS, launch=0.07, per_token=25e-6)
    evaluation = EvaluationSpec(minimum=0, maximum=300)
    rows = [
        make_row(make_job(device="cuda", micro_batch_size=size, evaluation=evaluation), DATA, f"{name}{size}")
        for name, size in zip("ab", sizes, strict=True)
    ]
    numbers = []
    for row, found in zip(rows, estimates(device, rows), strict=True):
        at_once = tokens_at_once(row.job, row.plan.micro_shapes(LENGTHS).largest)
        batches = evaluation_batches(DATA, row.plan.evaluation, "cuda", at_once)
        once = sum(device.factory(row.job).evaluate([batch.tolist() for batch in batches]))
        evaluations, _ = evaluations_and_checkpoints(row)
        assert found.fixed.evaluation == pytest.approx(evaluations * once, rel=0.03)
        numbers.append(len(batches))
    assert (numbers[0] > 2 * numbers[1]) == (sizes[0] < sizes[1])


def test_an_evaluation_that_holds_more_than_a_step_is_counted_once_and_of_its_own_row() -> None:
    """Micro-batches of one short row, of which few tokens are learnt from, and a large vocabulary."""
    each = 5 << 20
    rows = [make_row(make_job(device="cuda", micro_batch_size=size), DATA, f"{size}") for size in (1, 8)]
    (alone,) = estimates(FakeDevice(LENGTHS, memory=1 << 38, evaluation_bytes=each), rows[:1])

    def most(row: PlannedRow) -> int:
        at_once = tokens_at_once(row.job, row.plan.micro_shapes(LENGTHS).largest)
        batches = evaluation_batches(DATA, row.plan.evaluation, "cuda", at_once)
        return max(len(batch) * int(LENGTHS[batch].max()) for batch in batches)

    assert alone.peak_memory_bytes == each * most(rows[0])
    both = estimates(FakeDevice(LENGTHS, memory=1 << 38, evaluation_bytes=each), rows)
    assert both[1].peak_memory_bytes == each * most(rows[1])
    assert both[0].peak_memory_bytes is not None
    assert both[0].peak_memory_bytes < both[1].peak_memory_bytes


def test_a_gpu_s_evaluation_batch_takes_the_longer_of_launching_and_computing() -> None:
    sizes = np.array([2000, 1900, 16000, 8000, 300], dtype=np.float64)
    seconds = np.maximum(0.025, 4e-6 * sizes)
    launch, per_token = batch_cost(sizes, seconds)
    assert launch == pytest.approx(0.025)
    assert per_token == pytest.approx(4e-6)
    launch, per_token = batch_cost(sizes, 4e-6 * sizes)
    assert per_token == pytest.approx(4e-6)
    assert launch <= 1.001 * 4e-6 * sizes.min()
    alike = np.array([15000, 16000, 14000], dtype=np.float64)
    assert batch_cost(alike, 4e-6 * alike) == pytest.approx((0.0, 4e-6))  # no more is known of small ones
    launch, per_token = batch_cost(np.array([300.0, 2000.0]), np.array([0.025, 0.025]))
    assert launch == 0.025
    assert per_token == pytest.approx(0.025 / 2000)  # nor of larger ones
    noise = np.exp(np.random.default_rng(1).normal(0, 0.05, len(sizes)))
    noisy = batch_cost(sizes, noise * seconds)
    assert max(noisy[0], 6000 * noisy[1]) == pytest.approx(0.025, rel=0.1)


def test_memory_that_runs_out_in_an_evaluation_halves_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that has fitted for hours must not end there."""
    tried: list[int] = []

    def in_memory(_model: object, _data: object, batches: list[Any], each: Any, **_options: object) -> None:
        padded = [len(batch) * int(LENGTHS[batch].max()) for batch in batches]
        tried.append(max(padded))
        for batch, tokens in zip(batches, padded, strict=True):
            if tokens > most and len(batch) > 1:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            each(torch.tensor(2.0), len(batch))

    monkeypatch.setattr(trainer.evaluate, "evaluate_batches", in_memory)
    examples = np.flatnonzero(LENGTHS < 1000)[:400]

    def loss(**options: Any) -> Any:
        return trainer.evaluate.evaluate(None, DATA, examples, device="cuda", precision="bf16", at_once=9000, **options)

    most = 3000
    found = loss()
    assert found.at_once == 2250
    assert found.num_tokens == len(examples)  # what was added before it ran out is not counted twice
    assert [size > most for size in tried] == [True, True, False]
    with pytest.raises(torch.cuda.OutOfMemoryError):  # the others would wait for this one for ever
        loss(reduce=lambda total: total)
    most = 1000
    with pytest.raises(torch.cuda.OutOfMemoryError):
        loss()


def test_evaluation_batches_are_as_large_as_micro_batches_on_a_gpu_only() -> None:
    def at_once(largest: int, **changes: object) -> int:
        return tokens_at_once(make_job(**changes), largest)  # type: ignore[arg-type]

    assert at_once(9000) == 0
    assert at_once(9000, device="cuda") == 9000
    assert at_once(9000, device="cuda", num_devices=2) == 0  # one could run out of memory alone
    by_loss = {"sampling_strategy": "prioritized", "sample_score": "loss", "sample_ratio": 0.5}
    assert at_once(9000, device="cuda", **by_loss) == 0  # what is scored before there is a plan comes in small ones
    assert make_row(make_job(), DATA).plan.micro_shapes(LENGTHS).largest == LENGTHS.max()


@pytest.mark.parametrize(
    ("device", "at_once", "most"),
    [("cpu", 0, 512), ("cpu", 9000, 512), ("cuda", 0, 2048), ("cuda", 9000, 9000), ("cuda", 1 << 20, 16384)],
)
def test_evaluation_batches_hold_each_example_once_and_no_more_than_the_device_wants(
    device: str, at_once: int, most: int
) -> None:
    """On a CPU large ones make the peak of a run that trains one example at a time, and save no time."""
    examples = np.arange(0, len(DATA), 2)
    batches = evaluation_batches(DATA, examples, device, at_once)
    assert sorted(np.concatenate(batches).tolist()) == examples.tolist()
    padded = [len(batch) * int(LENGTHS[batch].max()) for batch in batches]
    assert max(size for size, batch in zip(padded, batches, strict=True) if len(batch) > 1) <= most
    assert max(padded) > most / 2
