"""What a stored measurement says of memory, and of which rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fakes
import numpy as np
import pytest
from planned import DISK, FACTS, NOW, Bench, learnt_from, peak_of

from planner import reuse
from planner.estimate import HEAP_GROWTH, estimate
from planner.keys import Keys
from planner.measure import measure
from planner.stored import Sharpness, keep


@pytest.mark.parametrize(
    ("loss", "refused", "is_reused"), [("plain", None, False), ("lean", None, True), ("lean", "it differs", False)]
)
def test_memory_is_not_told_of_micro_batches_with_more_logits(
    bench: Bench, loss: Any, refused: str | None, is_reused: bool
) -> None:
    """Logits of what is learnt from can be the largest tensors: 306 and 1,016 of them are not the same peak."""
    made, asked = Keys(FACTS), Sharpness(budget_seconds=60.0, precision_target=0.02)
    job = fakes.make_job(model=str(bench.model), loss=loss)
    few, many = learnt_from(0.4), learnt_from(0.4)
    few.supervised[:100] = few.supervised[100:200]
    assert few.num_supervised.max() == 40
    assert many.num_supervised.max() == 100
    rows = [fakes.make_row(job, few)]
    device = fakes.FakeDevice(few.lengths)
    found = measure(rows, few, device.factory, clock=device.clock)
    (one,) = found.measurements
    assert one.load is not None
    found = replace(found, measurements=(replace(one, load=replace(one.load, lean_refused=refused)),))
    keep(bench.history, made, rows, few, found, asked, NOW, DISK)
    assert isinstance(reuse.reuse(bench.history, made, rows, few, asked, DISK), reuse.Reused)
    other = reuse.reuse(bench.history, made, [fakes.make_row(job, many)], many, asked, DISK)
    assert isinstance(other, reuse.Reused) is is_reused
    if not is_reused:
        assert "holds more logits" in str(other)


def test_what_stays_free_is_what_stays_free_now(bench: Bench) -> None:
    asked = Sharpness(budget_seconds=60.0, precision_target=0.02)
    job, data = fakes.make_job(model=str(bench.model)), fakes.make_data(np.full(400, 100))
    rows, device = [fakes.make_row(job, data)], fakes.FakeDevice(data.lengths)
    found = measure(rows, data, device.factory, clock=device.clock)
    then, peak, context = 80 << 30, 10 << 30, 1 << 29  # the context is in no allocator's figures
    verdict = replace(
        found.rows[0], peak_reserved_bytes=peak, peak_allocated_bytes=peak, headroom_bytes=then - peak - context
    )
    found = replace(found, rows=(verdict,))

    def made(free: int) -> Keys:
        return Keys(replace(FACTS, free_bytes=free))

    keep(bench.history, made(then), rows, data, found, asked, NOW, DISK)
    grown = round(HEAP_GROWTH * peak) - peak
    for left, fits in ((1 << 30, True), (grown, True), (grown - (1 << 20), False), (-(1 << 20), False)):
        got = reuse.reuse(bench.history, made(peak + context + left), rows, data, asked, DISK)
        if fits:
            assert isinstance(got, reuse.Reused)
            (row,) = got.measurements.rows
            assert row.headroom_bytes == left
            warned = any("memory is tight" in one for one in estimate(rows[0], data, got.measurements).warnings)
            assert warned is (left < 1 << 29)  # a margin below 5 %
        else:
            assert got == "less memory is free than was needed then"


def test_memory_measured_without_accumulation_does_not_stand_for_a_plan_that_accumulates(bench: Bench) -> None:
    bench.plan(names=("baseline",), gradient_accumulation_steps=1)
    bench.plan(names=("baseline",), gradient_accumulation_steps=4)
    assert bench.starts > 0
    bench.plan(names=("baseline",), gradient_accumulation_steps=1)  # the other way it does
    assert bench.starts == 0


def test_memory_of_a_longer_micro_batch_is_said_to_be_that(bench: Bench) -> None:
    bench.plan(tokens_per_example=200)
    found = bench.plan(tokens_per_example=150)
    assert any("memory is that of a longer micro-batch (200 tokens)" in note.lower() for note in found.report.notes)
    assert found.report.rows[0].peak_memory_bytes == pytest.approx(peak_of(200), rel=1e-3)


def test_what_did_not_fit_is_remembered_until_more_memory_is_free(bench: Bench) -> None:
    bench.device = {"fits_padded_tokens": 300}
    found = bench.plan(tokens_per_example=400)
    assert found.report.rows[0].fits is False
    found = bench.plan(tokens_per_example=500)
    assert bench.starts == 0
    assert found.report.rows[0].fits is False
    assert found.report.rows[0].seconds is None
    bench.plan(tokens_per_example=500, facts=replace(FACTS, free_bytes=9 << 30))
    assert bench.starts > 0
    bench.plan(tokens_per_example=250)
    assert bench.starts > 0


def test_what_fitted_is_measured_again_where_less_memory_is_free_now(bench: Bench) -> None:
    bench.plan(tokens_per_example=200)  # 200 MiB on this device, 203 in a run
    bench.plan(tokens_per_example=200, facts=replace(FACTS, free_bytes=204 << 20))
    assert bench.starts == 0
    bench.plan(tokens_per_example=200, facts=replace(FACTS, free_bytes=202 << 20))
    assert bench.starts > 0


def test_memory_on_a_cpu_goes_by_the_data_that_the_run_has(bench: Bench) -> None:
    """63,000 messages hold 33 MB more than 3,000, and a run of the 3,000 was shown 7 % too much."""
    (many,) = bench.plan("2000", names=("baseline",), tokens_per_example=200).estimates.values()
    (few,) = bench.plan("1000", names=("baseline",), tokens_per_example=200).estimates.values()
    assert bench.starts == 0
    assert many.peak_memory_bytes is not None
    assert few.peak_memory_bytes is not None
    less = 1000 * (204 * (4 + 1) + 8)  # tokens, mask and offsets
    assert many.peak_memory_bytes - few.peak_memory_bytes == pytest.approx(HEAP_GROWTH * less, rel=1e-3)
    bench.plan("80000", names=("baseline",), tokens_per_example=200)
    assert bench.starts > 0  # 82 MB of data beside a peak of 213: measured with them
    assert any("the data are of another size" in line for line in bench.said)
