"""Measured samples x batch plan -> seconds and an interval; on a fake device whose truth is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from fakes import FakeDevice, chat_lengths, make_data, make_job, make_row
from planned import FACTS

from planner.correction import corrected, correction
from planner.estimate import (
    CHECKPOINTED_HEAP_GROWTH,
    EAGER_HEAP_GROWTH,
    EXCHANGE,
    HEAP_GROWTH,
    PACKED_HEAP_GROWTH,
    Estimate,
    accumulation_saving,
    estimate,
    evaluations_and_checkpoints,
    mean_micro_seconds,
)
from planner.estimator import Estimator, fit_cost
from planner.measure import measure, with_references
from planner.measurement import FixedSamples, MicroSample, PlannedRow, Round
from planner.resolve import Options, resolve_job
from planner.steadiness import HAS_TO_SHOW
from presets.env import Settings
from presets.schema import load_preset
from trainer.job import DataSpec, EvaluationSpec
from trainer.planning import CHECKPOINT_SECONDS, CHECKPOINT_SHARE, with_checkpoint_interval
from trainer.record import CostModel
from trainer.tokens import TokenizedDataset

LENGTHS = chat_lengths(3000)
DATA = make_data(LENGTHS)


def estimates(
    device: FakeDevice, rows: list[PlannedRow], data: TokenizedDataset = DATA, **options: float
) -> list[Estimate]:
    found = measure(rows, data, device.factory, clock=device.clock, seed=device.seed, **options)  # type: ignore[arg-type]
    return [estimate(row, data, found) for row in rows]


def test_a_cpu_s_heap_grows_on_in_a_run_and_a_gpu_s_blocks_do_not() -> None:
    device = FakeDevice(LENGTHS)
    rows = [
        make_row(make_job(), DATA, "cpu"),
        make_row(make_job(device="cuda"), DATA, "cuda"),
        make_row(make_job(attention="eager"), DATA, "eager"),
        make_row(make_job(packing=True, packed_length=4096), DATA, "packed"),
        make_row(make_job(gradient_checkpointing=True), DATA, "checkpointed"),
    ]
    on_cpu, on_gpu, eager, packed, checkpointed = estimates(device, rows)
    longest = int(LENGTHS.max()) * device.bytes_per_token
    assert on_gpu.peak_memory_bytes == longest
    assert on_cpu.peak_memory_bytes == round(HEAP_GROWTH * longest)
    assert eager.peak_memory_bytes == round(EAGER_HEAP_GROWTH * longest)
    assert checkpointed.peak_memory_bytes == round(CHECKPOINTED_HEAP_GROWTH * longest)
    fullest = int(rows[3].plan.micro_shapes(LENGTHS).padded_tokens.max()) * device.bytes_per_token
    assert packed.peak_memory_bytes == round(PACKED_HEAP_GROWTH * fullest)


def test_a_run_in_tight_memory_is_promised_a_smaller_micro_batch_only_where_there_is_one() -> None:
    def said(**changes: object) -> str:
        row = make_row(make_job(**changes), DATA)  # type: ignore[arg-type]
        worst = int(row.plan.micro_shapes(LENGTHS).padded_tokens.max())
        device = FakeDevice(LENGTHS, memory=int(1.03 * worst) << 20)
        (one,) = estimates(device, [row])
        (warning,) = one.warnings
        assert "memory is tight" in warning
        return warning

    assert "halves its micro-batch" in said(device="cuda", micro_batch_size=4)
    for changes in ({}, {"packing": True, "packed_length": 2048}):
        single = said(device="cuda", **changes)
        assert "halve its" not in single
        assert "ends, since a single row cannot be halved" in single
        assert "--micro-batch-size" not in single
    assert "--resume" in said(micro_batch_size=4)  # a CPU's memory is overcommitted: the system kills what is too large


def test_whether_a_run_fits_is_judged_by_the_peak_that_is_shown() -> None:
    row = make_row(make_job(packing=True, packed_length=4096), DATA)
    worst = int(row.plan.micro_shapes(LENGTHS).padded_tokens.max()) << 20

    def judged(room: float, row: PlannedRow = row) -> Estimate:
        return estimates(FakeDevice(LENGTHS, memory=int(room * worst)), [row])[0]

    roomy, tight, short = judged(1.2), judged(1.07), judged(1.04)
    assert roomy.fits
    assert roomy.warnings == ()
    assert tight.fits
    assert any("memory is tight" in warning for warning in tight.warnings)  # 7 % by the worker's peak
    assert short.fits is False
    assert short.peak_memory_bytes == roomy.peak_memory_bytes == round(PACKED_HEAP_GROWTH * worst)
    assert "does not fit: its heap grows" in str(short.error)
    assert judged(1.04, replace(row, job=replace(row.job, device="cuda"))).fits


def test_accumulation_earns_no_credit_that_it_has_not() -> None:
    device = FakeDevice(LENGTHS)
    rows = [
        make_row(make_job("baseline", gradient_accumulation_steps=size), DATA, f"ga{size}") for size in (16, 32, 64)
    ]
    at16, at32, at64 = estimates(device, rows)
    assert at16.seconds_per_step
    assert at32.seconds_per_step
    assert at16.seconds_per_sample
    assert at32.seconds_per_sample
    assert at32.seconds_per_step / at16.seconds_per_step == pytest.approx(2.0, rel=0.03)
    assert at32.seconds_per_sample / at16.seconds_per_sample == pytest.approx(1.0, rel=0.02)
    assert at16.cost is not None
    saving = accumulation_saving(at16.cost, mean_micro_seconds(at16, rows[0].plan.num_micro_batches))
    assert at64.seconds_per_sample is not None
    assert 1 - at64.seconds_per_sample / at16.seconds_per_sample == pytest.approx(saving, abs=0.003)
    assert 0 < saving < 0.03


def test_what_new_shapes_take_is_no_part_of_what_accumulation_saves() -> None:
    lengths = LENGTHS[:300]
    data = make_data(lengths)
    row = make_row(make_job(device="cuda", precision="bf16"), data)
    costs = {"per_token": 2e-6, "per_token_width": 0.0, "half_speed_up": 1.0}
    device = FakeDevice(lengths, base=0.05, new_shape_seconds=0.05, **costs)
    (one,) = estimates(device, [row], data)
    assert one.train_seconds is not None
    assert one.train_seconds > 1.2 * device.true_seconds(row.plan)
    true = float(device.true_micro_seconds(row.plan).mean())
    assert mean_micro_seconds(one, row.plan.num_micro_batches) == pytest.approx(true, rel=0.01)


def test_the_sum_over_a_long_tailed_plan_is_right_where_the_first_steps_mislead() -> None:
    lengths = np.sort(chat_lengths(4000, sigma=1.2, longest=4096))  # a few very long ones carry much of the work
    data = make_data(lengths)
    device = FakeDevice(lengths, per_token_width=2e-6)
    row = make_row(make_job(), data)
    (one,) = estimates(device, [row], data)
    true = device.true_seconds(row.plan)
    assert one.train_seconds == pytest.approx(true, rel=0.01)
    first = device.true_micro_seconds(row.plan)[:48].sum() / 3 * row.plan.num_steps
    assert abs(first / true - 1) > 0.05


@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("packing", [False, True])
def test_the_sum_is_right_for_micro_batches_and_packed_rows(micro_batch_size: int, packing: bool) -> None:
    device = FakeDevice(LENGTHS)
    row = make_row(make_job(micro_batch_size=micro_batch_size, packing=packing), DATA)
    (one,) = estimates(device, [row])
    assert one.train_seconds == pytest.approx(device.true_seconds(row.plan), rel=0.01)


def test_a_cost_that_the_fit_cannot_follow_is_corrected_by_stratum() -> None:
    class Stepped(FakeDevice):
        def cost(self, rows: list[list[int]]) -> float:
            return 0.05 * float(np.ceil(self.shape(rows)[0] / 128))  # as of kernels with tiles of 128

    device = Stepped(LENGTHS)
    row = make_row(make_job(), DATA)
    (one,) = estimates(device, [row], precision_target=0.005)
    true = float((0.05 * np.ceil(LENGTHS[row.plan.order] / 128)).sum()) + row.plan.num_steps * device.optimizer
    assert one.train_seconds == pytest.approx(true, rel=0.02)


def test_steps_times_seconds_per_step_is_the_time() -> None:
    device = FakeDevice(LENGTHS, noise=0.1)
    row = make_row(make_job(), DATA)
    (one,) = estimates(device, [row])
    assert one.seconds_per_step
    assert one.train_seconds
    assert one.tokens_per_second
    assert one.seconds
    assert one.num_steps * one.seconds_per_step == pytest.approx(one.train_seconds)
    assert one.tokens_per_second == pytest.approx(LENGTHS[row.plan.order].sum() / one.train_seconds)
    assert one.seconds == pytest.approx(one.train_seconds + one.fixed.total)


def test_fixed_parts_are_counted_as_often_as_the_run_does_them() -> None:
    device = FakeDevice(LENGTHS)
    row = make_row(make_job(), DATA)
    (one,) = estimates(device, [row])
    evaluations, checkpoints = evaluations_and_checkpoints(row)
    assert evaluations == 5
    assert one.fixed.start == 4.5
    assert row.job.keep_checkpoints == 2
    assert one.fixed.checkpoints == pytest.approx(0.2 * checkpoints + 0.03 * (checkpoints - 2))
    assert one.fixed.evaluation is not None
    assert one.fixed.data is None
    assert one.fixed.samples == 0.0  # there is no prompt to answer


def test_a_long_run_s_checkpoints_are_counted_every_ten_minutes_as_it_writes_them() -> None:
    device = FakeDevice(LENGTHS, base=10.0)
    row = make_row(make_job(), DATA)
    (one,) = estimates(device, [row], budget_seconds=3000.0)
    assert one.seconds_per_step is not None
    assert one.checkpoint_every == round(CHECKPOINT_SECONDS / one.seconds_per_step) < row.plan.num_steps / 10
    run = replace(row, job=replace(row.job, checkpoint_every=one.checkpoint_every))  # what `plan --run` starts
    written = evaluations_and_checkpoints(run)[1]
    assert written > 20
    assert one.fixed.checkpoints == pytest.approx(0.2 * written + 0.03 * (written - 2))
    # A job that says how often keeps its own.
    own = make_row(make_job(checkpoint_every=10**6), DATA)
    (rare,) = estimates(device, [own], budget_seconds=3000.0)
    assert rare.checkpoint_every == 10**6
    assert rare.fixed.checkpoints is not None
    assert rare.fixed.checkpoints < one.fixed.checkpoints / 3


def test_a_short_run_writes_checkpoints_seldomer_where_they_would_take_a_part_of_it_that_is_felt() -> None:
    device = FakeDevice(LENGTHS, base=0.01, per_token=2e-5, per_token_width=0.0)
    row = make_row(make_job(), DATA)
    (one,) = estimates(device, [row])
    assert one.seconds_per_step is not None
    assert one.checkpoint_every is not None
    steps, bearable = row.plan.num_steps, math.ceil(0.23 / (CHECKPOINT_SHARE * one.seconds_per_step))
    assert steps / 10 < bearable <= one.checkpoint_every < steps  # writing one takes the fake 0.2 s, removing one 0.03
    assert not 0 < steps % one.checkpoint_every < bearable  # none shortly before the last

    def every(num_steps: int, seconds_per_step: float, checkpoint: float) -> int | None:
        return with_checkpoint_interval(row.job, num_steps, seconds_per_step, checkpoint).checkpoint_every

    assert every(100, 1.0, 0.1) == 10
    assert every(100, 1.0, 0.5) == 25
    assert every(50, 1.0, 0.12) == 10  # after 6 each, 48 and 50 would be near each other
    assert every(100, 1.0, 1.02) == 100  # one after 51 would leave 49 to the last: two take more than 2 %
    assert every(100, 1.0, 60.0) == 100
    assert every(10_000, 1.0, 120.0) == CHECKPOINT_SECONDS  # however long it takes: every ten minutes


def test_the_speed_factor_compares_the_same_batches_at_fp32() -> None:
    device = FakeDevice(LENGTHS, optimizer=0.0)
    half = make_row(make_job("recommended", precision="fp16", base_precision="fp16"), DATA)
    rows = with_references([half])
    found = measure(rows, DATA, device.factory, clock=device.clock)
    assert estimate(half, DATA, found).speed_factor == pytest.approx(2.0, rel=0.01)
    assert estimate(rows[1], DATA, found).speed_factor == 1.0
    alone = measure([half], DATA, device.factory, clock=device.clock)
    assert estimate(half, DATA, alone).speed_factor is None


def test_several_devices_wait_for_the_slowest() -> None:
    device = FakeDevice(LENGTHS)
    row = make_row(make_job(num_devices=2), DATA)
    (one,) = estimates(device, [row])
    slowest = device.true_micro_seconds(row.plan).reshape(-1, 2).max(axis=1).sum()
    assert one.train_seconds == pytest.approx(slowest + row.plan.num_steps * device.optimizer, rel=0.01)
    assert not one.calibrated
    assert EXCHANGE in one.warnings
    by = correction([1.1, 1.1, 1.1])
    assert by is not None
    mended = corrected(one, by)
    assert mended.calibrated
    assert EXCHANGE not in mended.warnings
    assert not corrected(replace(one, is_but_for_exchange=False), by).calibrated  # something else was the matter too


@pytest.mark.parametrize(("asked", "held_out", "readable", "written"), [(4, 10, 10, 4), (100, 1, 1, 1), (4, 3, 0, 0)])
def test_as_many_answers_count_as_there_are_to_write(asked: int, held_out: int, readable: int, written: int) -> None:
    """A hundred were asked for of one example, and counted: 128 s of a run of 14."""
    data = make_data(np.full(200, 600))
    places = np.arange(len(data.token_ids)) % 600
    data = replace(data, supervised=places >= (300 if readable else 550))  # a prompt of over 512 tokens is not read
    evaluation = EvaluationSpec(minimum=held_out, maximum=held_out, num_samples=asked, max_new_tokens=11)
    row = make_row(make_job(evaluation=evaluation), data)
    assert len(row.plan.evaluation) == held_out
    device = FakeDevice(data.lengths)
    found = measure([row], data, device.factory, clock=device.clock)
    fixed = FixedSamples(answer_seconds=1.1, answer_tokens=11, first_token_seconds=0.1)
    assert estimate(row, data, found).fixed.samples == (None if written else 0.0)  # no tokenizer: not known
    (one,) = found.measurements
    found = replace(found, measurements=(replace(one, fixed=replace(fixed, save=one.fixed.save)),))
    assert estimate(row, data, found).fixed.samples == pytest.approx(2 * written * 1.1)


def test_windows_that_take_longer_than_their_parts_widen_the_range_and_warn() -> None:
    device = FakeDevice(LENGTHS, window_factor=1.3)
    (one,) = estimates(device, [make_row(make_job(), DATA)])
    assert one.window_ratio == pytest.approx(1.3, rel=0.02)
    assert one.train_seconds
    assert one.train_seconds_high
    assert one.train_seconds_low
    assert one.train_seconds_high >= 1.28 * one.train_seconds
    assert one.train_seconds_low > 0.97 * one.train_seconds
    assert "1.3" in one.warnings[0]


def test_a_fit_without_noise_finds_the_cost_function() -> None:
    true = CostModel(base=0.01, per_token=4e-4, per_token_width=2e-7, optimizer=0.02)
    samples = tuple(
        MicroSample(
            stratum=0,
            rows=rows,
            width=width,
            tokens=1,
            seconds=true.base + (true.per_token + true.per_token_width * width) * rows * width,
        )
        for rows, width in ((1, 20), (1, 100), (4, 300), (2, 900), (1, 1024))
    )
    found = fit_cost((Round(started=0.0, samples=samples, optimizer_seconds=(0.02,)),))
    for name in ("base", "per_token", "per_token_width", "optimizer"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6)


def test_no_cost_is_below_zero() -> None:
    widths = (100, 200, 400, 800)
    samples = tuple(MicroSample(stratum=0, rows=1, width=width, tokens=1, seconds=0.1 * width**0.5) for width in widths)
    found = fit_cost((Round(started=0.0, samples=samples, optimizer_seconds=()),))
    assert min(found.base, found.per_token, found.per_token_width) >= 0


def test_an_unsteady_machine_is_warned_of_and_a_steady_one_is_not() -> None:
    row = make_row(make_job(), DATA)
    (unsteady,) = estimates(FakeDevice(LENGTHS, noise=0.02, drift=1.0), [row], precision_target=0.001)
    assert any("not steady" in warning for warning in unsteady.warnings)
    (steady,) = estimates(FakeDevice(LENGTHS, noise=0.05), [row])
    assert steady.warnings == ()


def test_too_few_noisy_timings_to_tell_a_drift_widen_the_range_and_are_said() -> None:
    row = make_row(make_job(), DATA)
    (few,) = estimates(FakeDevice(LENGTHS, noise=0.10, base=2.0), [row])
    (sure,) = estimates(FakeDevice(LENGTHS, noise=0.01, base=2.0), [row])
    assert any("too few timings to tell whether this machine is steady" in one for one in few.warnings)
    assert not few.calibrated
    assert sure.warnings == ()
    assert sure.calibrated
    assert few.train_seconds is not None
    assert few.train_seconds_low is not None
    assert few.train_seconds_high is not None
    assert few.train_seconds_high / few.train_seconds - 1 > HAS_TO_SHOW / 4
    assert few.train_seconds / few.train_seconds_low - 1 > HAS_TO_SHOW / 4


def test_the_budget_that_would_do_counts_how_many_measurements_share_it() -> None:
    """Rows with two maximum lengths have data of their own, and half of the budget each."""
    row = make_row(make_job(), DATA)
    device = FakeDevice(LENGTHS, noise=0.10, base=2.0)
    found = measure([row], DATA, device.factory, clock=device.clock)

    def advised(shares: int) -> int:
        warnings = estimate(row, DATA, found, budget_shares=shares).warnings
        (text,) = (one for one in warnings if "too few timings" in one)
        return int(text.partition("--fresh --budget ")[2].partition(",")[0])

    assert advised(2) == pytest.approx(2 * advised(1), abs=10)


def test_a_drift_is_read_from_the_moments_of_single_micro_steps() -> None:
    row = make_row(make_job(), DATA)
    device = FakeDevice(LENGTHS, noise=0.01, base=1.0, drift=0.24)
    found = measure([row], DATA, device.factory, clock=device.clock)
    rounds = found.measurements[0].rounds
    along = Estimator(rounds, found.strata, row.kind).movement
    last = rounds[-1].started + sum(one.seconds or 0.0 for one in rounds[-1].samples)
    passed = np.log((1 + 0.24 * last / 60) / (1 + 0.24 * rounds[0].started / 60))
    assert along.stands_out
    assert along.by == pytest.approx(passed, rel=0.15)


def test_a_row_that_was_not_measured_is_named() -> None:
    device = FakeDevice(LENGTHS)
    row = make_row(make_job(), DATA)
    found = measure([row], DATA, device.factory, clock=device.clock)
    with pytest.raises(Exception, match="'other' was not measured"):
        estimate(replace(row, name="other"), DATA, found)


def test_what_differs_from_one_run_to_the_next_widens_the_range_and_moves_nothing() -> None:
    device = FakeDevice(LENGTHS, noise=0.02)
    row = make_row(make_job(), DATA)
    found = measure([row], DATA, device.factory, clock=device.clock)
    plain, wide = estimate(row, DATA, found), estimate(row, DATA, found, between=0.06)
    assert wide.train_seconds == plain.train_seconds
    assert wide.train_seconds
    assert plain.train_seconds_high
    assert wide.train_seconds_high
    own = plain.train_seconds_high / wide.train_seconds - 1
    assert wide.train_seconds_high / wide.train_seconds - 1 == pytest.approx(np.hypot(own, 0.06), rel=0.02)


def test_compile_time_is_a_part_of_the_total_and_a_refusal_is_told() -> None:
    device = FakeDevice(LENGTHS)
    row = make_row(replace(make_job(), compile=True), DATA)
    found = measure([row], DATA, device.factory, clock=device.clock)
    plain = estimate(row, DATA, found)
    assert plain.seconds is not None
    assert plain.fixed.compile == 0.0
    (measured,) = found.measurements
    assert measured.load is not None
    assert measured.signature.compile
    load = replace(measured.load, compile_seconds=40.0, compile_refused="it fails on this model")
    one = estimate(row, DATA, replace(found, measurements=(replace(measured, load=load),)))
    assert one.fixed.compile == 40.0
    assert one.seconds == pytest.approx(plain.seconds + 40.0)
    assert any("not compiled: it fails" in note for note in one.notes)


def test_a_lean_loss_that_is_asked_for_is_in_the_job_and_its_refusal_is_said() -> None:
    for wanted in (False, True):
        found = resolve_job(load_preset("baseline"), Options(lean_loss=wanted), Settings(), FACTS, DataSpec(source="x"))
        assert found.job is not None
        assert found.job.loss == ("lean" if wanted else "plain")
    device = FakeDevice(LENGTHS)
    row = make_row(make_job(loss="lean"), DATA)
    measured = measure([row], DATA, device.factory, clock=device.clock)
    (one,) = measured.measurements
    assert one.load is not None
    refused = replace(measured, measurements=(replace(one, load=replace(one.load, lean_refused="its logits differ")),))
    said = "the plain loss is used instead of the lean one: its logits differ"
    assert said in estimate(row, DATA, refused).notes
    assert said not in estimate(row, DATA, measured).notes
