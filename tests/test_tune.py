"""The search for the fastest way to train on the same batches, on a fake device whose truth is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import FakeProber, make_data, make_job
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import with_beginning
from tuning import DATA, LENGTHS, Device, Prober, device_of, tuned

from planner.chain import WORTH, Step, is_faster, twin_of
from planner.measurement import StepSignature
from planner.prober import DoesNotFit, LoadReply, MicroRows
from planner.tune import tune
from planner.twin import Change, Twin, Wanted
from presets.errors import MeasurementError
from presets.schema import preset_names
from trainer.job import Job
from trainer.planning import plan_job, stand_in

LEAN = Change(name="lean loss", loss="lean")


def test_where_every_micro_step_costs_a_lot_by_itself_fewer_of_them_are_chosen() -> None:
    (twin,) = tuned(device_of(base=0.2, per_token=1e-5, per_token_width=0.0))
    layout = twin.changes[0]
    assert layout.packed_length is not None or (layout.micro_batch_size or 0) >= 4
    assert twin.loop_gain > 2
    assert twin.loop_speedup == pytest.approx(twin.baseline_seconds / twin.seconds)


def test_where_only_real_tokens_cost_nothing_is_changed() -> None:
    # Padding costs as much as tokens and a micro-step next to nothing: one example a row is the best there is.
    (twin,) = tuned(device_of(base=0.0, per_token=4e-4, per_token_width=4e-6, optimizer=0.001))
    assert twin.changes == ()
    assert twin.text == "as written"
    assert twin.seconds == twin.written_seconds


def test_the_links_stand_in_their_order_and_multiply_to_the_speed_up() -> None:
    device = device_of(base=0.2, per_token=1e-4, per_token_width=0.0, lean_factor=0.8, memory=64 << 30)
    (twin,) = tuned(device, budget=300.0, precision="fp16", base_precision="fp16")
    kept = [link for link in twin.links if link.is_kept]
    assert [link.name for link in kept][:2] == ["accumulation", "fp16"]
    assert kept[0].factor == pytest.approx(1.0, abs=0.03)
    assert kept[1].factor == pytest.approx(2.0, rel=0.05)
    assert kept[-1].name == "lean loss"
    assert kept[-1].factor == pytest.approx(1.25, rel=0.05)
    assert math.prod(link.factor for link in kept) == pytest.approx(twin.loop_speedup)
    assert twin.explained.startswith("accumulation 1.0")


@pytest.mark.parametrize(
    ("factor", "noise", "verdict"), [(1.1, 0.0, "slower"), (0.99, 0.0, "too little"), (0.99, 0.05, "not told from")]
)
def test_what_was_tried_and_left_out_says_why_with_its_range(factor: float, noise: float, verdict: str) -> None:
    scatter = 1 + noise * np.array([1.0, -1.0, 0.5, -0.5])
    steps = [Step(name="baseline", job=make_job()), Step(name="lean loss", job=make_job(), changes=(LEAN,))]
    wanted = Wanted(name="baseline", job=make_job(), baseline=make_job())
    twin = twin_of(wanted, steps, [np.full(4, 10.0), 10 * factor * scatter])
    assert twin.changes == ()
    (link,) = twin.links
    assert link.low is not None
    assert link.high is not None
    assert link.low <= 1 / factor <= link.high
    assert verdict in link.verdict
    assert f"lean loss {link.factor:.2f}x ({link.verdict})" in twin.explained
    if noise:
        assert f"{link.low:.2f}-{link.high:.2f}: not told from chance" in twin.explained
    (untold,) = twin_of(wanted, steps, [np.full(2, 10.0), np.full(2, 5.0)]).links
    assert untold.verdict == "no range is known"


def test_where_the_time_is_too_short_to_tell_it_says_so_and_keeps_nothing_more() -> None:
    (twin,) = tuned(device_of(base=0.2, per_token=1e-4, lean_factor=0.5, memory=64 << 30), budget=40.0)
    assert all(change.loss is None for change in twin.changes)
    assert any("--budget" in reason for reason in twin.refused)


def test_a_precision_that_the_device_lacks_is_said_to_give_nothing() -> None:
    (twin,) = tuned(device_of())
    link = next(link for link in twin.links if "fp16" in link.name)
    assert link.name == "fp16 (not on this device)"
    assert link.factor == pytest.approx(1.0)


def test_packing_that_the_model_refuses_is_never_offered() -> None:
    device = device_of(base=0.2, per_token=1e-5, packing_refused="documents leak into each other")
    (twin,) = tuned(device)
    assert all(change.packed_length is None for change in twin.changes)
    assert "packing: documents leak into each other" in twin.refused


def test_where_rows_that_share_a_system_prompt_are_refused_rows_that_do_not_are_tried() -> None:
    class Particular(Prober):
        def packing_refused(self, packed_length: int) -> str | None:
            return "packed logits differ" if self.job.share_beginnings else None

    device = device_of(base=0.2, per_token=4e-4, memory=64 << 30)
    device.factory = lambda job: Particular(device, job)  # type: ignore[method-assign]
    (twin,) = tuned(device, data=with_beginning(DATA, 8))
    (packed,) = (change for change in twin.changes if change.packed_length is not None)
    job = packed.applied(make_job("recommended"))
    assert (job.packing, job.share_beginnings) == (True, False)
    assert not any("packing" in reason for reason in twin.refused)
    (twin,) = tuned(device)  # nothing to share: nothing else to try
    assert "packing: packed logits differ" in twin.refused


def test_a_lean_loss_that_the_worker_refuses_is_not_kept() -> None:
    (twin,) = tuned(device_of(lean_factor=0.5, lean_refused="the logits are scaled", memory=64 << 30), budget=300.0)
    assert "lean loss: the logits are scaled" in twin.refused
    assert all(change.loss is None for change in twin.changes)
    assert not any("lean" in link.name for link in twin.links)


def test_a_preset_with_another_base_than_the_baseline_s_is_timed_as_written_too() -> None:
    (twin,) = tuned(device_of(), base_precision="8bit")
    assert twin.written_seconds > 0
    assert [link.name for link in twin.links][:2] == ["accumulation", "base in 8bit"]


def test_memory_bounds_the_search_and_runs_out_at_most_once_a_step() -> None:
    longest = int(LENGTHS.max())
    failures: dict[StepSignature, list[int]] = {}

    class Small(Device):
        def factory(self, job: Job) -> FakeProber:
            return Counting(self, job)

    class Counting(Prober):
        def memory(self, windows: list[list[MicroRows]], more: list[list[MicroRows]], seconds: float) -> Any:
            try:
                return super().memory(windows, more, seconds)
            except DoesNotFit:
                largest = max(self.device.shape(rows)[0] for window in windows for rows in window)
                failures.setdefault(StepSignature.of(self.job), []).append(largest)
                raise

    device = Small(LENGTHS, base=0.2, per_token=1e-5, fits_padded_tokens=2 * longest)
    (twin,) = tuned(device)
    for change in twin.changes:
        assert (change.packed_length or 0) <= 2 * longest
        assert (change.micro_batch_size or 1) * longest <= 2 * longest
    assert StepSignature.of(make_job("recommended")) in failures
    for sizes in failures.values():
        assert len(set(sizes)) == 1
        assert len(sizes) <= 2  # the second time by itself, where it was not the first time


def test_where_nothing_fits_it_is_an_error_that_says_what_was_tried() -> None:
    with pytest.raises(MeasurementError, match=r"'recommended' cannot be timed here: it does not fit, .*checkpointing"):
        tuned(device_of(fits_padded_tokens=4))


class Tight(Device):
    """As written nothing fits; with checkpointing it does, and takes a third longer."""

    def factory(self, job: Job) -> FakeProber:
        return TightProber(self, job)


class TightProber(Prober):
    def _seconds(self, rows: MicroRows, longest_row: int = 0) -> float:
        saves = self.job.preset.gradient_checkpointing
        self.device.fits_padded_tokens = 4096 if saves else 4
        return super()._seconds(rows, longest_row) * (4 / 3 if saves else 1)


def test_where_only_checkpointing_fits_it_is_turned_on_and_the_fastest_split_found() -> None:
    (twin,) = tuned(Tight(LENGTHS, base=0.2, per_token=1e-5, per_token_width=0.0), budget=300.0)
    assert twin.changes[0].gradient_checkpointing is True
    assert any(change.is_layout for change in twin.changes)
    assert twin.written_seconds is twin.baseline_seconds is twin.loop_speedup is twin.loop_gain is None
    assert twin.job(make_job("recommended")).preset.gradient_checkpointing


def test_where_only_a_smaller_split_fits_it_is_taken() -> None:
    longest = int(LENGTHS.max())
    device = device_of(base=0.2, per_token=1e-5, per_token_width=0.0, fits_padded_tokens=2 * longest)
    (twin,) = tuned(device, budget=300.0, micro_batch_size=8)
    assert twin.written_seconds is None
    assert any(change.is_layout for change in twin.changes)
    assert twin.baseline_seconds is not None
    assert twin.loop_speedup is not None
    assert twin.loop_speedup > 1


def test_one_preset_that_does_not_fit_stops_no_other() -> None:
    baseline = make_job("baseline")
    large = replace(make_job("aggressive"), micro_batch_size=8)
    device = device_of(base=0.2, per_token=1e-5, per_token_width=0.0, fits_padded_tokens=int(LENGTHS.max()))
    wanted = [
        Wanted(name="aggressive", job=large, baseline=baseline),
        Wanted(name="recommended", job=make_job("recommended"), baseline=baseline),
    ]
    twins = {one.preset: one for one in tune(wanted, DATA, device.factory, budget_seconds=300, clock=device.clock)}
    assert isinstance(twins["aggressive"], Twin)
    assert isinstance(twins["recommended"], Twin)


def test_a_baseline_that_fails_costs_only_the_speed_up_over_it() -> None:
    device = device_of(base=0.2, per_token=1e-5, per_token_width=0.0, broken=("fp32",))
    (twin,) = tuned(device, device="cuda", precision="fp16", base_precision="fp16", budget=300.0)
    assert twin.loop_speedup is None
    assert twin.loop_gain is not None
    assert twin.loop_gain > 1
    assert any("baseline" in reason and "ended by itself" in reason for reason in twin.refused)


def test_a_candidate_whose_worker_fails_is_none() -> None:
    """It may have been timed for a while before, and be the fastest."""

    class Dies(Prober):
        runs = 0

        def run(self, micro_batches: Any, begins: list[int], longest_rows: list[int]) -> list[float]:
            if self.job.loss == "lean":
                self.runs += 1
                if self.runs > 6:
                    raise MeasurementError("the worker process ended by itself (exit code 1).")
            return super().run(micro_batches, begins, longest_rows)

    class Fragile(Device):
        def factory(self, job: Job) -> FakeProber:
            return Dies(self, job)

    device = Fragile(LENGTHS, base=0.0, per_token=4e-4, per_token_width=4e-6, optimizer=0.001, memory=64 << 30)
    device.lean_factor = 0.5
    (twin,) = tuned(device, budget=300.0)
    assert all(change.loss is None for change in twin.changes)
    assert any(reason.startswith("lean loss: ") and "ended by itself" in reason for reason in twin.refused)


def test_a_split_that_is_left_out_as_slower_has_not_failed() -> None:
    (twin,) = tuned(device_of(base=0.0, per_token=4e-4, per_token_width=4e-5, optimizer=0.001), budget=300.0)
    assert not any("left out" in reason for reason in twin.refused)


@pytest.mark.parametrize(("compiling", "is_kept"), [(1.0, True), (1e6, False)])
def test_compiling_is_a_link_and_its_seconds_count(compiling: float, is_kept: bool) -> None:
    class Compiles(Prober):
        def _seconds(self, rows: MicroRows, longest_row: int = 0) -> float:
            return super()._seconds(rows, longest_row) * (0.5 if self.job.compile else 1.0)

        def load(self) -> LoadReply:
            return replace(super().load(), compile_seconds=compiling if self.job.compile else 0.0)

    class Compiler(Device):
        def factory(self, job: Job) -> FakeProber:
            return Compiles(self, job)

    device = Compiler(LENGTHS, base=0.0, per_token=4e-4, per_token_width=4e-6, optimizer=0.001, memory=64 << 30)
    wanted = Wanted(
        name="recommended", job=replace(make_job("recommended"), compile=True), baseline=make_job("baseline")
    )
    (twin,) = tune([wanted], DATA, device.factory, budget_seconds=300.0, clock=device.clock)
    assert isinstance(twin, Twin)
    names = [link.name for link in twin.links]
    assert "compiled" in names
    assert twin.job(wanted.job).compile is is_kept
    assert (twin.links[names.index("compiled")].factor > 1.5) is is_kept


@pytest.mark.parametrize(("on", "at_most"), [("cuda", 4), ("cpu", 99)])
def test_a_search_on_a_gpu_starts_each_worker_once(on: str, at_most: int) -> None:
    """As written, in fp32 as the baseline has it, with the lean loss, with the other attention."""
    device = device_of(base=0.2, per_token=1e-5, per_token_width=0.0, lean_factor=0.9, memory=64 << 30)
    (twin,) = tuned(device, device=on, precision="fp16", base_precision="fp16", budget=300.0)
    assert twin.changes
    loads = sum(command == "load" for _, command in device.log)
    assert 3 <= loads <= at_most
    assert on == "cuda" or loads > 4
    assert device.alive == 0


def test_on_a_gpu_rows_that_hold_a_whole_window_are_tried() -> None:
    """Where a micro-step costs much by itself, one a window is the best; a row a power of two long leaves rests."""
    device = device_of(base=0.2, per_token=1e-6, per_token_width=0.0, optimizer=0.001, memory=64 << 30)
    (twin,) = tuned(device, device="cuda", precision="fp16", base_precision="fp16", budget=300.0)
    packed = twin.changes[0].packed_length
    assert packed is not None
    job = make_job("recommended", device="cuda", precision="fp16", base_precision="fp16")
    plan = plan_job(stand_in(twin.job(job)), DATA).plan
    assert plan.num_micro_batches == plan.num_steps
    longest = int(plan.per_window(LENGTHS).max())
    assert longest <= packed < longest + 256


@pytest.mark.parametrize(("num_devices", "tried"), [(1, {4}), (2, {2})])
def test_no_more_threads_are_tried_than_a_process_of_the_run_has_cores(
    monkeypatch: pytest.MonkeyPatch, num_devices: int, tried: set[int]
) -> None:
    """One worker is timed alone: on all cores it would look faster than two processes that share them can be."""
    from trainer import process

    monkeypatch.setattr(process, "cores", lambda: 8)
    monkeypatch.setattr("planner.step_changes.cores", lambda: 8)
    asked: set[int | None] = set()

    class Watched(Device):
        def factory(self, job: Job) -> FakeProber:
            asked.add(job.num_threads)
            return super().factory(job)

    tuned(Watched(LENGTHS), num_devices=num_devices)
    assert asked - {None} == tried


def test_workers_end_with_a_search_that_fails() -> None:
    device = device_of(base=0.2, broken=("fp32", "fp16"))
    with pytest.raises(MeasurementError, match="ended by itself"):
        tuned(device, device="cuda", precision="fp16", base_precision="fp16")
    assert device.alive == 0


def test_eager_attention_is_not_tried_with_packed_rows() -> None:
    device = device_of(base=0.2, per_token=1e-5, per_token_width=0.0, eager_factor=0.5)
    (twin,) = tuned(device)
    assert twin.changes[0].packed_length is not None
    assert all(change.attention is None for change in twin.changes)
    device = device_of(base=0.2, per_token=1e-5, per_token_width=0.0, eager_factor=0.5)
    device.packing_refused = "it leaks"
    (twin,) = tuned(device, budget=300.0)
    assert any(change.attention == "eager" for change in twin.changes)


def test_presets_with_the_same_step_share_a_search() -> None:
    device = device_of(base=0.2, per_token=1e-5)
    twins = tuned(device, "baseline", "recommended", "aggressive", "today")
    assert [twin.preset for twin in twins] == ["baseline", "recommended", "aggressive", "today"]
    assert device.log.count(("fp32", "load")) < 12
    assert all(twin.changes for twin in twins)


def test_noise_alone_is_seldom_taken_for_a_gain() -> None:
    kept = 0
    for seed in range(12):
        device = device_of(base=0.0, per_token=4e-4, per_token_width=4e-6, noise=0.1, seed=seed, optimizer=0.001)
        kept += bool(tuned(device)[0].changes)
    assert kept <= 1


def test_a_gain_of_a_sixth_is_found_in_noise() -> None:
    found = 0
    for seed in range(8):
        device = device_of(
            base=0.0, per_token=4e-4, per_token_width=4e-6, noise=0.05, seed=seed, lean_factor=0.85, optimizer=0.001
        )
        found += any(change.loss == "lean" for change in tuned(device)[0].changes)
    assert found >= 7


def test_faster_means_beyond_chance_and_worth_it() -> None:
    noise = np.random.default_rng(1).normal(0, 0.3, 20)
    assert is_faster(9 + noise, 10 + noise)  # what slows a round slows both
    assert not is_faster((1 - WORTH / 2) * (10 + noise), 10 + noise)
    assert not is_faster(10 + noise, 10 + noise[::-1])
    assert not is_faster(np.array([9.0, 10.6, 9.0, 10.2]), np.full(4, 10.0))  # 3 % less, well within chance
    assert not is_faster(np.array([5.0, 5.0]), np.array([10.0, 10.0]))  # too few rounds


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 200), min_size=70, max_size=150),
    preset=st.sampled_from([name for name in preset_names() if name not in ("two-stage", "prioritized")]),
    layout=st.sampled_from(
        [
            Change(name="micro-batch", micro_batch_size=4),
            Change(name="micro-batch", micro_batch_size=8),
            Change(name="packing", packed_length=256, micro_batch_size=1),
            Change(name="packing", packed_length=1024, micro_batch_size=2),
        ]
    ),
)
def test_a_tuned_plan_trains_on_the_same_examples_in_each_window(
    lengths: list[int], preset: str, layout: Change
) -> None:
    data = make_data(np.array(lengths))
    job = make_job(preset, max_length=200)
    written = plan_job(stand_in(job), data).plan
    changed = plan_job(stand_in(layout.applied(job)), data).plan
    assert changed.num_steps == written.num_steps
    for window in range(written.num_steps):
        assert sorted(changed.documents_of_window(window)) == sorted(written.documents_of_window(window))
