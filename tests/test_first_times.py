"""What a GPU takes longer the first time: kernels, which it loads once, and each new shape that a run meets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fakes import FakeDevice, FakeProber, chat_lengths, make_data, make_job, make_row

from planner.estimate import estimate
from planner.first_times import First, FirstTimes
from planner.measure import measure
from planner.measurement import Measurements
from planner.prober import DoesNotFit, MicroRows
from trainer.job import Job

LENGTHS = chat_lengths(3000)
DATA = make_data(LENGTHS)


def gpu_that_loads_kernels(*, budget: float, seed: int = 0) -> tuple[float, Measurements, float]:
    """Estimate, measurements and truth of a run on a device whose first micro-steps load kernels, as an H100's do."""
    device = FakeDevice(
        LENGTHS,
        base=0.2,
        per_token=0.0,
        per_token_width=0.0,
        noise=0.02,
        seed=seed,
        variants=20,
        variant_seconds=0.25,
        half_speed_up=1.0,
    )
    row = make_row(make_job(device="cuda", precision="bf16", micro_batch_size=4), DATA)
    found = measure([row], DATA, device.factory, budget_seconds=budget, clock=device.clock, seed=seed)
    seconds = estimate(row, DATA, found).train_seconds
    assert seconds is not None
    return seconds, found, device.run_seconds(row.plan, seed, packed=row.job.packing)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [20, 60])
def test_kernels_that_a_gpu_loads_at_first_are_not_taken_for_its_pace(budget: float, seed: int) -> None:
    seconds, found, truth = gpu_that_loads_kernels(budget=budget, seed=seed)
    assert abs(seconds / truth - 1) < 0.03
    assert found.measurements[0].seconds_spent < 1.1 * budget
    assert 2 < found.measurements[0].one_off_seconds <= 5.2  # 20 x 0.25 s, most of them met, and noise


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [8, 12])
def test_two_rounds_cannot_tell_what_shapes_take_from_what_is_still_loaded(budget: float, seed: int) -> None:
    """Taken for what each shape takes, it made a run 12 to 30 % too long."""
    seconds, found, truth = gpu_that_loads_kernels(budget=budget, seed=seed)
    assert len(found.measurements[0].rounds) <= 2
    assert abs(seconds / truth - 1) < 0.03


@pytest.mark.parametrize("seed", range(4))
def test_what_shapes_take_is_in_the_range_where_too_few_rounds_could_tell_it(seed: int) -> None:
    lengths = chat_lengths(160, longest=512)
    cost = {"base": 0.5, "per_token": 2e-6, "per_token_width": 0.0, "noise": 0.03, "half_speed_up": 1.0}
    device = FakeDevice(lengths, seed=seed, new_shape_seconds=0.12, **cost)
    row = make_row(make_job(device="cuda", precision="bf16", micro_batch_size=4), make_data(lengths))
    found = measure([row], make_data(lengths), device.factory, budget_seconds=12, clock=device.clock, seed=seed)
    (one,) = found.measurements
    assert len(one.rounds) + len(one.warmup) <= 2
    assert one.new_shape_seconds == 0
    told = estimate(row, make_data(lengths), found)
    truth = device.run_seconds(row.plan, seed)
    assert told.train_seconds < truth < told.train_seconds_high


def test_new_micro_batches_timed_once_would_be_taken_for_the_pace_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeProber.run
    first: dict[str, float] = {}

    def first_times(
        self: FakeProber, micro_batches: list[MicroRows], begins: list[int], longest_rows: list[int]
    ) -> list[float]:
        taken = run(self, micro_batches, begins, longest_rows)
        return [first.setdefault(str(rows), seconds) for rows, seconds in zip(micro_batches, taken, strict=True)]

    monkeypatch.setattr(FakeProber, "run", first_times)
    seconds, _, truth = gpu_that_loads_kernels(budget=20)
    assert seconds / truth - 1 > 0.1


def test_what_a_worker_that_was_started_again_loads_counts_once() -> None:
    """It runs out of memory among other shapes, gives its larger row up and goes on with the other."""
    device = FakeDevice(LENGTHS, noise=0.02, variants=20, variant_seconds=0.25, half_speed_up=1.0)
    row = make_row(make_job(device="cuda", micro_batch_size=4), DATA)
    starts = []
    run = FakeProber.run

    class Failing(FakeProber):
        def run(self, micro_batches: list[MicroRows], begins: list[int], longest_rows: list[int]) -> list[float]:
            if len(starts) == 1 and len(device.drawn) > 120:
                raise DoesNotFit("no block is large enough any more")
            return run(self, micro_batches, begins, longest_rows)

    def factory(job: Job) -> FakeProber:
        starts.append(job)
        return Failing(device, job)

    small = make_row(make_job(device="cuda", micro_batch_size=1), DATA, "small")
    found = measure([row, small], DATA, factory, budget_seconds=120, clock=device.clock)
    assert len(starts) == 2  # the larger row is given up, the other goes on in a new process
    assert found.measurements[0].one_off_seconds <= 5.2  # 20 x 0.25 s and noise, however many processes


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_what_the_memory_probe_loads_counts_too_since_its_micro_steps_are_the_first(noise: float) -> None:
    cost = {"base": 0.05, "per_token": 2e-5, "per_token_width": 0.0}
    device = FakeDevice(LENGTHS, noise=noise, variants=1, variant_seconds=2.0, half_speed_up=1.0, **cost)
    row = make_row(make_job(device="cuda", micro_batch_size=4), DATA)
    found = measure([row], DATA, device.factory, budget_seconds=20, clock=device.clock)
    assert found.measurements[0].one_off_seconds == pytest.approx(2.0, rel=0.001 + 3 * noise)
    on_cpu = make_row(make_job(micro_batch_size=4), DATA)
    again = FakeDevice(LENGTHS, noise=noise, variants=1, variant_seconds=2.0)
    (other,) = measure([on_cpu], DATA, again.factory, budget_seconds=20, clock=again.clock).measurements
    assert other.one_off_seconds == 0.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [160, 1500])
def test_what_each_new_shape_takes_counts_as_often_as_the_run_meets_one(count: int, seed: int) -> None:
    """Of 40 micro-batches nearly all are of a new shape, of 375 a part. The pace is that of shapes met before."""
    lengths = chat_lengths(count, longest=512)
    data = make_data(lengths)
    device = FakeDevice(
        lengths,
        base=0.05,
        per_token=2e-6,
        per_token_width=0.0,
        noise=0.05,
        seed=seed,
        new_shape_seconds=0.012,
        half_speed_up=1.0,
    )
    row = make_row(make_job(device="cuda", precision="bf16", micro_batch_size=4), data)
    found = measure([row], data, device.factory, budget_seconds=15, clock=device.clock, seed=seed)
    with_them = estimate(row, data, found)
    assert found.measurements[0].new_shape_seconds == pytest.approx(0.012, rel=0.3)
    assert with_them.train_seconds == pytest.approx(
        device.run_seconds(row.plan, seed, packed=row.job.packing), rel=0.03
    )
    assert any("new shapes of micro-batches take" in note for note in with_them.notes)
    without = replace(found, measurements=(replace(found.measurements[0], new_shape_seconds=0.0),))
    off = estimate(row, data, without)
    assert off.train_seconds is not None
    assert off.train_seconds < (0.9 if count == 160 else 0.97) * device.run_seconds(
        row.plan, seed, packed=row.job.packing
    )


@pytest.mark.parametrize("packed_length", [None, 1024])
def test_what_probing_memory_ran_is_no_new_shape_in_a_round(
    monkeypatch: pytest.MonkeyPatch, packed_length: int | None
) -> None:
    """Without noise each new shape takes as much more the first time as the device says, and no other does."""
    excess: list[tuple[float, bool]] = []
    original = FirstTimes.add

    def watched(self: FirstTimes, timed: list[First]) -> None:
        excess.extend((one.excess, one.is_new) for one in timed)
        original(self, timed)

    monkeypatch.setattr(FirstTimes, "add", watched)
    lengths = chat_lengths(600, longest=512)
    device = FakeDevice(lengths, per_token=2e-6, per_token_width=0.0, new_shape_seconds=0.012, half_speed_up=1.0)
    packing: dict[str, object] = {"packing": True, "packed_length": packed_length} if packed_length else {}
    job = make_job(device="cuda", precision="bf16", micro_batch_size=2, **packing)
    measure([make_row(job, make_data(lengths))], make_data(lengths), device.factory, 10, clock=device.clock)
    assert any(is_new for _, is_new in excess)
    assert [seconds for seconds, _ in excess] == pytest.approx([0.012 * is_new for _, is_new in excess], abs=1e-9)


def test_windows_of_new_shapes_are_no_sign_that_the_parts_do_not_add_up() -> None:
    lengths = chat_lengths(3000, longest=1024)
    data = make_data(lengths)
    device = FakeDevice(
        lengths, base=0.04, per_token=0.0, per_token_width=0.0, new_shape_seconds=0.02, half_speed_up=1.0
    )
    row = make_row(make_job(device="cuda", precision="bf16", micro_batch_size=2), data)
    found = measure([row], data, device.factory, budget_seconds=20, clock=device.clock)
    one = estimate(row, data, found)
    assert any(window.new_shapes for window in found.measurements[0].windows)
    assert one.window_ratio == pytest.approx(1.0, abs=0.02)


def test_a_gpu_for_which_new_shapes_are_like_others_is_not_said_to_choose_for_them() -> None:
    said = loaded = 0
    for seed in range(20):
        device = FakeDevice(
            LENGTHS, base=0.05, per_token=2e-6, per_token_width=0.0, noise=0.1, seed=seed, half_speed_up=1.0
        )
        row = make_row(make_job(device="cuda", precision="bf16", micro_batch_size=4), DATA)
        found = measure([row], DATA, device.factory, budget_seconds=10, clock=device.clock, seed=seed)
        said += found.measurements[0].new_shape_seconds > 0
        loaded += found.measurements[0].one_off_seconds > 0
    assert said <= 1
    assert loaded <= 2  # nor to load anything


def test_too_short_a_time_to_warm_a_gpu_up_is_said() -> None:
    seconds, found, truth = gpu_that_loads_kernels(budget=10)
    assert any("longer the first time to the end" in note for note in found.notes)
    assert abs(seconds / truth - 1) < 0.05


def test_what_is_loaded_at_first_is_a_note_of_the_estimate_and_counts_once() -> None:
    _, found, _ = gpu_that_loads_kernels(budget=60)
    row = make_row(make_job(device="cuda", precision="bf16", micro_batch_size=4), DATA)
    with_it = estimate(row, DATA, found)
    plain = estimate(row, DATA, replace(found, measurements=(replace(found.measurements[0], one_off_seconds=0.0),)))
    assert with_it.train_seconds is not None
    assert plain.train_seconds is not None
    assert with_it.train_seconds - plain.train_seconds == pytest.approx(found.measurements[0].one_off_seconds)
    assert with_it.seconds_per_step == plain.seconds_per_step
    assert any("while kernels are loaded" in note for note in with_it.notes)


def test_noise_alone_is_nothing_that_was_loaded_though_no_shape_is_new() -> None:
    loaded = 0
    lengths = np.full(3000, 300)
    for seed in range(20):
        device = FakeDevice(lengths, base=0.05, per_token=2e-5, noise=0.05, seed=seed, half_speed_up=1.0)
        row = make_row(make_job(device="cuda", precision="bf16", micro_batch_size=4), make_data(lengths))
        found = measure([row], make_data(lengths), device.factory, budget_seconds=20, clock=device.clock, seed=seed)
        loaded += found.measurements[0].one_off_seconds > 0
    assert loaded <= 2


@pytest.mark.parametrize(("with_fixed", "more"), [(True, 1), (False, 0)])
def test_only_the_first_memory_probe_of_a_process_is_run_twice_and_none_of_a_search(
    with_fixed: bool, more: int
) -> None:
    device = FakeDevice(LENGTHS, base=0.05, per_token=2e-5, per_token_width=0.0, half_speed_up=1.0)
    rows = [make_row(make_job(device="cuda", micro_batch_size=size), DATA, f"{size}") for size in (1, 2, 4, 8)]
    measure(rows, DATA, device.factory, budget_seconds=20, clock=device.clock, with_fixed=with_fixed)
    assert [command for _, command in device.log].count("memory") == len(rows) + more
