"""What is timed, in which order, and what becomes of failures; on a fake device."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from fakes import FakeDevice, FakeProber, chat_lengths, make_data, make_job, make_row
from small_models import random_data

from planner.estimate import HEAP_GROWTH, estimate
from planner.measure import measure, with_references
from planner.measurement import Measurements, StepSignature
from planner.prober import DoesNotFit, MemoryReply, MicroRows
from presets import jsonio
from presets.errors import MeasurementError
from trainer.job import Job

LENGTHS = chat_lengths(3000)
DATA = make_data(LENGTHS)


def test_presets_that_differ_only_in_accumulation_share_one_signature() -> None:
    baseline, aggressive = make_job("baseline"), make_job("aggressive")
    assert StepSignature.of(baseline) == StepSignature.of(aggressive)
    assert StepSignature.of(baseline) != StepSignature.of(make_job("baseline", lora_rank=8))
    full = make_job("baseline", adapter="full")
    assert StepSignature.of(full) == StepSignature.of(make_job("baseline", adapter="full", lora_rank=8))


def test_the_notes_say_that_the_budget_ended_the_timing_and_whether_a_window_was_checked() -> None:
    row = make_row(make_job(), DATA)
    slow = FakeDevice(LENGTHS, base=1.0)
    found = measure([row], DATA, slow.factory, 40.0, clock=slow.clock)
    assert found.measurements[0].ended_by == "budget"
    assert any("until the budget was spent" in note and "within the ±2.0% asked for" in note for note in found.notes)
    assert found.measurements[0].windows == ()
    assert any("no whole window could be timed" in note for note in found.notes)
    quick = FakeDevice(LENGTHS)
    found = measure([row], DATA, quick.factory, clock=quick.clock)
    assert found.measurements[0].windows
    assert not any("whole window" in note or "was spent" in note for note in found.notes)


def test_one_worker_serves_all_presets_of_a_signature() -> None:
    device = FakeDevice(LENGTHS)
    rows = [make_row(make_job(name), DATA) for name in ("baseline", "recommended", "aggressive")]
    found = measure(rows, DATA, device.factory, clock=device.clock)
    assert [command for _, command in device.log].count("load") == 1
    assert len(found.measurements) == 1
    assert device.alive == 0


def test_timing_stops_when_the_range_is_narrow_enough_and_says_so() -> None:
    device = FakeDevice(LENGTHS)
    found = measure([make_row(make_job(), DATA)], DATA, device.factory, clock=device.clock)
    assert found.measurements[0].ended_by == "precision"
    assert len(found.measurements[0].rounds) >= 5
    assert found.measurements[0].warmup == ()  # a first round that is like the others counts
    assert found.warnings == ()


def test_timing_that_stops_before_the_budget_says_how_narrow_the_range_is() -> None:
    device = FakeDevice(LENGTHS, noise=0.01)
    found = measure([make_row(make_job(), DATA)], DATA, device.factory, clock=device.clock)
    assert found.measurements[0].ended_by == "precision"
    assert any("narrower than the ±2.0% asked for" in note for note in found.notes)


@pytest.mark.parametrize("device_name", ["cpu", "cuda"])
def test_timings_of_a_round_stand_in_the_order_of_time(device_name: str) -> None:
    """On a GPU the second pass, which counts, has an order of its own; a machine that changes shows only in time's."""
    device, count = FakeDevice(LENGTHS), itertools.count(1)

    class Slowing(FakeProber):
        def run(self, micro_batches: list[MicroRows], begins: list[int], longest_rows: list[int]) -> list[float]:
            super().run(micro_batches, begins, longest_rows)
            return [0.1 + next(count) * 1e-6 for _ in micro_batches]

    row = make_row(make_job(device=device_name), DATA)
    found = measure([row], DATA, lambda job: Slowing(device, job), clock=device.clock)
    (one,) = found.measurements
    assert len(one.rounds) > 3
    for done in one.rounds:
        seconds = [sample.seconds for sample in done.samples]
        assert seconds == sorted(seconds, key=lambda value: value or 0.0)


def test_timing_that_ends_with_the_last_round_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.measure.MOST_ROUNDS", 7)
    device = FakeDevice(LENGTHS, noise=0.05)
    found = measure([make_row(make_job(), DATA)], DATA, device.factory, 600.0, clock=device.clock)
    assert found.measurements[0].ended_by == "rounds"
    (note,) = (note for note in found.notes if "rounds" in note)
    assert "s of the 600 s, until 7 rounds were done" in note


def test_timing_stops_at_the_budget_and_warns_of_the_wide_range() -> None:
    device = FakeDevice(LENGTHS, noise=0.5, base=0.1)
    found = measure([make_row(make_job(), DATA)], DATA, device.factory, budget_seconds=20, clock=device.clock)
    assert found.measurements[0].ended_by == "budget"
    assert found.measurements[0].seconds_spent < 20 * 1.1
    assert "Give more time with --budget" in found.warnings[0]


def test_a_tiny_budget_takes_fewer_strata_and_says_so() -> None:
    device = FakeDevice(LENGTHS, base=1.0, per_token=0.01)
    found = measure([make_row(make_job(), DATA)], DATA, device.factory, budget_seconds=30, clock=device.clock)
    assert found.strata.count < 8
    assert len(found.measurements[0].rounds) >= 2
    assert any("micro-steps are slow" in warning for warning in found.warnings)
    one = estimate(make_row(make_job(), DATA), DATA, found)
    assert one.train_seconds == pytest.approx(device.true_seconds(make_row(make_job(), DATA).plan), rel=0.05)


def test_two_signatures_are_timed_in_turns_over_the_same_micro_batches() -> None:
    device = FakeDevice(LENGTHS)
    half = make_job("recommended", precision="fp16", base_precision="fp16")
    rows = [make_row(make_job("baseline"), DATA), make_row(half, DATA)]
    found = measure(rows, DATA, device.factory, clock=device.clock)
    assert found.in_turns
    runs = [precision for precision, command in device.log if command == "run"]
    assert runs[:8] == ["fp32", "fp16", "fp16", "fp32", "fp32", "fp16", "fp16", "fp32"]
    drawn = {p: [rows for q, rows in device.drawn if q == p] for p in ("fp32", "fp16")}
    assert drawn["fp32"] == drawn["fp16"]


def test_signatures_that_do_not_fit_together_are_timed_one_after_another_and_it_says_so() -> None:
    device = FakeDevice(LENGTHS, memory=1500 << 20)
    half = make_job("recommended", precision="fp16", base_precision="fp16")
    rows = [make_row(make_job("baseline"), DATA), make_row(half, DATA)]
    found = measure(rows, DATA, device.factory, clock=device.clock)
    assert not found.in_turns
    assert device.most_alive == 1
    assert any("one after another" in note for note in found.notes)
    assert all(one.rounds for one in found.measurements)


def test_a_packed_row_that_does_not_fit_says_nothing_of_larger_but_narrower_micro_batches() -> None:
    """Eager attention's memory grows with the square of the width, and a packed row is as wide as it is long."""
    lengths = chat_lengths(1500, longest=500)
    data = make_data(lengths)
    tried = []

    class Squares(FakeProber):
        def memory(self, windows: list[list[MicroRows]], more: list[list[MicroRows]], seconds: float) -> MemoryReply:
            padded, width = max(self.device.shape(rows) for window in windows for rows in window)
            tried.append(padded)
            if padded * width > 10_000_000:
                raise DoesNotFit(f"{padded} tokens of width {width}")
            return super().memory(windows, more, seconds)

    device = FakeDevice(lengths)
    job = make_job("recommended", device="cuda", attention="eager")
    rows = [make_row(replace(job, micro_batch_size=size), data, f"micro {size}") for size in (1, 8, 16, 32)]
    packed = [make_row(replace(job, packing=True, packed_length=size), data, f"packed {size}") for size in (4096, 8192)]
    found = measure(
        [*rows, *packed], data, lambda job: Squares(device, job), 30.0, clock=device.clock, with_fixed=False
    )
    fits = {row.name: row.fits for row in found.rows}
    assert fits == {row.name: row not in packed for row in rows + packed}
    assert len(tried) == len(rows) + 1  # what is larger in both is not tried


def test_oom_becomes_a_row_and_other_presets_still_run() -> None:
    longest = int(LENGTHS.max())
    device = FakeDevice(LENGTHS, fits_padded_tokens=2 * longest)
    rows = [
        make_row(make_job("baseline"), DATA),
        make_row(make_job("recommended", micro_batch_size=4), DATA, "wide"),
    ]
    found = measure(rows, DATA, device.factory, clock=device.clock)
    fits = {row.name: row.fits for row in found.rows}
    assert fits == {"baseline": True, "wide": False}
    wide = estimate(rows[1], DATA, found)
    assert wide.fits is False
    assert wide.seconds is None
    assert "does not fit" in (wide.error or "")
    baseline = estimate(rows[0], DATA, found)
    assert baseline.train_seconds == pytest.approx(device.true_seconds(rows[0].plan), rel=0.01)
    assert baseline.peak_memory_bytes == round(HEAP_GROWTH * (longest << 20))


def test_what_runs_out_of_memory_only_among_other_shapes_takes_no_smaller_row_with_it() -> None:
    # As a GPU's log suggests: the largest micro-batch fitted by itself, and no longer among many shapes.
    longest = int(LENGTHS.max())
    device = FakeDevice(LENGTHS, fits_in_turns=2 * longest)
    rows = [make_row(make_job(micro_batch_size=size), DATA, f"micro {size}") for size in (1, 2, 4, 8)]
    found = measure(rows, DATA, device.factory, budget_seconds=600, clock=device.clock)
    assert {row.name: row.fits for row in found.rows} == {
        "micro 1": True,
        "micro 2": True,
        "micro 4": False,
        "micro 8": False,
    }
    assert "no block is large enough" in (found.verdict("micro 8").error or "")  # type: ignore[union-attr]
    for row in rows[:2]:
        assert estimate(row, DATA, found).train_seconds == pytest.approx(device.true_seconds(row.plan), rel=0.01)
    assert device.alive == 0


def test_a_window_that_runs_out_of_memory_takes_no_smaller_row_with_it() -> None:
    class Crowded(FakeDevice):
        def factory(self, job: Job) -> FakeProber:
            return _WindowsOf(self, job)

    class _WindowsOf(FakeProber):
        def window(self, micro_batches: list[MicroRows], longest_row: int) -> float:
            if any(len(rows) > 1 for rows in micro_batches):
                raise DoesNotFit("no room beside the gradients")
            return super().window(micro_batches, longest_row)

    rows = [make_row(make_job(micro_batch_size=size), DATA, f"micro {size}") for size in (1, 4)]
    device = Crowded(LENGTHS)
    found = measure(rows, DATA, device.factory, budget_seconds=600, precision_target=1e-4, clock=device.clock)
    assert {row.name: row.fits for row in found.rows} == {"micro 1": True, "micro 4": False}
    assert estimate(rows[0], DATA, found).train_seconds == pytest.approx(device.true_seconds(rows[0].plan), rel=0.01)


def test_when_nothing_fits_every_row_says_so() -> None:
    device = FakeDevice(LENGTHS, fits_padded_tokens=10)
    found = measure([make_row(make_job(), DATA)], DATA, device.factory, clock=device.clock)
    assert [row.fits for row in found.rows] == [False]
    assert device.alive == 0


def test_a_worker_that_fails_takes_only_its_own_rows_with_it() -> None:
    device = FakeDevice(LENGTHS, broken=("fp16",))
    half = make_job("recommended", precision="fp16", base_precision="fp16")
    rows = [make_row(make_job("baseline"), DATA), make_row(half, DATA)]
    found = measure(rows, DATA, device.factory, clock=device.clock)
    assert estimate(rows[0], DATA, found).seconds is not None
    failed = estimate(rows[1], DATA, found)
    assert failed.fits is None
    assert "ended by itself" in (failed.error or "")


def test_it_is_an_error_when_nothing_at_all_could_be_measured() -> None:
    device = FakeDevice(LENGTHS, broken=("fp32",))
    with pytest.raises(MeasurementError, match="ended by itself"):
        measure([make_row(make_job(), DATA)], DATA, device.factory, clock=device.clock)
    assert device.alive == 0


def test_workers_are_stopped_when_the_user_interrupts() -> None:
    device = FakeDevice(LENGTHS)

    def interrupt(text: str, share: float) -> None:
        if text.startswith("timing, round 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure([make_row(make_job(), DATA)], DATA, device.factory, clock=device.clock, progress=interrupt)
    assert device.alive == 0


def test_slow_first_micro_steps_are_set_apart_as_warmup() -> None:
    device = FakeDevice(LENGTHS, slow_first=50, noise=0.02)
    row = make_row(make_job(), DATA)
    found = measure([row], DATA, device.factory, clock=device.clock, precision_target=0.01)
    assert len(found.measurements[0].warmup) >= 3
    one = estimate(row, DATA, found)
    assert one.train_seconds == pytest.approx(device.true_seconds(row.plan), rel=0.03)
    assert one.window_ratio is None or one.window_ratio < 1.1  # a slow window is set apart with the rounds around it


def test_every_round_holds_one_micro_batch_of_each_stratum_and_the_longest_are_one_of_them() -> None:
    device = FakeDevice(LENGTHS)
    found = measure([make_row(make_job(), DATA)], DATA, device.factory, clock=device.clock)
    for one in found.measurements[0].rounds:
        assert sorted(sample.stratum for sample in one.samples) == list(range(found.strata.count))
    tail = [s.width for one in found.measurements[0].rounds for s in one.samples if s.stratum == found.strata.count - 1]
    assert min(tail) > np.quantile(LENGTHS, 0.985)


def test_equal_lengths_need_a_single_stratum() -> None:
    data = make_data(np.full(300, 100))
    device = FakeDevice(np.full(300, 100))
    row = make_row(make_job(), data)
    found = measure([row], data, device.factory, clock=device.clock)
    assert found.strata.count == 1
    assert estimate(row, data, found).train_seconds == pytest.approx(device.true_seconds(row.plan), rel=1e-6)


def test_an_fp32_twin_is_added_for_the_speed_factor_only_where_none_is_there() -> None:
    half = make_row(make_job("recommended", precision="fp16", base_precision="fp16"), DATA)
    full = make_row(make_job("baseline"), DATA)
    assert with_references([half, full]) == [half, full]
    added = with_references([half])
    assert [row.is_reference for row in added] == [False, True]
    assert added[1].job.base_precision == "fp32"


@pytest.mark.parametrize("optional", [True, False])
def test_layouts_that_padding_makes_hopeless_are_left_out_and_what_is_as_written_never(optional: bool) -> None:
    device = FakeDevice(LENGTHS, base=0.0, per_token_width=0.0)
    rows = [make_row(make_job(micro_batch_size=size), DATA, name=f"micro {size}") for size in (1, 2, 4, 8, 16)]
    chosen = frozenset(row.name for row in rows[1:]) if optional else frozenset()
    found = measure(rows, DATA, device.factory, clock=device.clock, with_fixed=False, optional=chosen)
    fits = {row.name: row.fits for row in found.rows}
    left_out = [row.name for row in found.rows if row.error == "left out: a smaller one was slower already"]
    assert fits["micro 1"]
    assert bool(left_out) == optional
    assert all(fits[name] is None for name in left_out)
    assert [command for _, command in device.log].count("memory") == len(rows) - len(left_out)
    padded = {row.name: float(row.plan.micro_shapes(LENGTHS).padded_tokens.sum()) for row in rows}
    assert all(padded[name] > 1.25 * padded["micro 1"] for name in left_out)


def test_measurements_survive_json() -> None:
    device = FakeDevice(LENGTHS, noise=0.05)
    found = measure([make_row(make_job(), DATA)], DATA, device.factory, clock=device.clock)
    assert jsonio.from_json(Measurements, jsonio.to_json(found)) == found


def test_a_first_round_like_the_others_counts_and_a_slow_one_does_not() -> None:
    """Where a budget holds five rounds, throwing one away on suspicion would cost a fifth of what was timed."""
    row = make_row(make_job(), DATA)
    slow = FakeDevice(LENGTHS, base=1.0, noise=0.02)
    found = measure([row], DATA, slow.factory, 60.0, clock=slow.clock).measurements[0]
    assert len(found.rounds) <= 6
    assert found.warmup == ()
    starting = FakeDevice(LENGTHS, base=1.0, noise=0.02, slow_first=20)
    found = measure([row], DATA, starting.factory, 90.0, clock=starting.clock).measurements[0]
    assert len(found.warmup) == 1


@pytest.mark.parametrize("together", [True, False])
def test_a_reference_takes_a_small_part_of_the_time_and_tells_the_speed_factor_all_the_same(together: bool) -> None:
    # Optimizer steps are as long in either precision: left in, they would make the factor 2.88.
    memory = 64 << 30 if together else 700 << 20
    device = FakeDevice(LENGTHS, noise=0.05, half_speed_up=3.0, optimizer=1e-6, memory=memory)
    rows = with_references([make_row(make_job(device="cuda", precision="fp16"), DATA)])
    found = measure(rows, DATA, device.factory, budget_seconds=60, precision_target=0.001, clock=device.clock)
    assert found.in_turns is together
    row, reference = found.measurements
    assert reference.signature.precision == "fp32"
    assert reference.seconds_spent < 0.6 * row.seconds_spent  # each of its rounds takes three times as long
    assert estimate(rows[0], DATA, found).speed_factor == pytest.approx(3.0, rel=0.05)
    assert not any("at fp32" in text for text in (*found.notes, *found.warnings))


def test_what_a_round_will_take_is_guessed_from_each_signature_s_own_kinds() -> None:
    """Else two signatures with a kind each were taken for twice the work, and half as many classes were timed."""
    device = FakeDevice(LENGTHS, base=0.05, per_token=1e-4, per_token_width=0.0, memory=64 << 30)
    written = make_row(make_job("recommended"), DATA)
    tuned = make_row(make_job("recommended", packing=True, packed_length=4096, loss="lean"), DATA, "tuned")
    found = measure([written, tuned], DATA, device.factory, 12, clock=device.clock)
    assert found.strata.count >= 9
    assert not any("classes of micro-batches" in warning for warning in found.warnings)
    assert sum(one.seconds_spent for one in found.measurements) < 1.1 * 12


@pytest.mark.parametrize(
    ("loss", "thorough", "is_run"),
    [("plain", True, True), ("plain", False, True), ("lean", True, True), ("lean", False, False)],
)
def test_memory_is_probed_where_most_tokens_are_learnt_from_too(loss: str, thorough: bool, is_run: bool) -> None:
    """The longest are prompts with short answers; the logits of a shorter text, learnt from as a whole, are larger.

    With the lean loss too, since a model may refuse it; a search, which measures again in the end, does without.
    """
    lengths = np.array([400] * 60 + [300] + [400] * 59)
    data = make_data(lengths)
    supervised = data.supervised.copy()
    for example in np.flatnonzero(lengths == 400):
        supervised[data.offsets[example] : data.offsets[example + 1] - 5] = False
    data = replace(data, supervised=supervised)
    probed: list[int] = []

    class Recording(FakeProber):
        def memory(self, windows: list[list[MicroRows]], more: list[list[MicroRows]], seconds: float) -> MemoryReply:
            probed.extend(example for window in windows for rows in window for row in rows for example in row)
            return super().memory(windows, more, seconds)

    device = FakeDevice(lengths, half_speed_up=1.0)
    rows = [make_row(make_job(device="cuda", precision="fp16", loss=loss), data)]
    learnt = int(np.flatnonzero(lengths == 300)[0])
    assert learnt in rows[0].plan.order
    measure(rows, data, lambda job: Recording(device, job), 5, clock=device.clock, with_fixed=thorough)
    assert (learnt in probed) is is_run


def test_memory_is_probed_where_attention_holds_most_of_what_documents_share() -> None:
    """Rows of equal length: of one text, and of many short ones behind one system prompt."""
    lengths = [100 + 5] * 60 + [300] * 60
    data = random_data(lengths, beginning=100, without=range(60, 120))
    job = make_job(packing=True, packed_length=300)
    rows = [make_row(job, data), make_row(replace(job, share_beginnings=False), data, "whole")]
    assert [row.plan.shares_beginnings for row in rows] == [True, False]
    probed: list[int] = []

    class Recording(FakeProber):
        def memory(self, windows: list[list[MicroRows]], more: list[list[MicroRows]], seconds: float) -> MemoryReply:
            if self.job.share_beginnings:
                probed.extend(max(len(row) for row in rows) for window in windows for rows in window)
            return super().memory(windows, more, seconds)

    device = FakeDevice(np.array(lengths))
    measure(rows, data, lambda job: Recording(device, job), 5, clock=device.clock)
    most = int(np.diff(rows[0].plan.row_offsets).max())
    assert most > 10
    assert max(probed) == most


@pytest.mark.parametrize(("plans", "windows"), [(1, 10), (3, 10), (12, 10)])
def test_as_many_long_micro_batches_are_tried_for_a_table_as_for_one_row(plans: int, windows: int) -> None:
    """What a CPU's heap grows beyond them is known for so many."""
    device = FakeDevice(LENGTHS)
    tried: list[int] = []

    class Watched(FakeProber):
        def memory(self, windows: list[list[MicroRows]], more: list[list[MicroRows]], seconds: float) -> MemoryReply:
            tried.append(len(more))
            return super().memory(windows, more, seconds)

    rows = [make_row(make_job(gradient_accumulation_steps=16 + number), DATA, f"{number}") for number in range(plans)]
    measure(rows, DATA, lambda job: Watched(device, job), budget_seconds=5, clock=device.clock)
    assert tried == [windows]
