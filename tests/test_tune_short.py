"""The search on a GPU where launching kernels sets the pace and the budget is short, on a fake whose truth is known.

A 1 B model on an H200 took about 0.067 s a micro-step up to some 8,000 tokens, and 4e-6 s a token beyond; a shape met
for the first time 0.015 s more, and the first micro-steps of a process about 1 s more in sum (2026-11-26).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from fakes import make_data, make_job, make_row
from tuning import Device, Prober, tuned

from planner.chain import Timed, make_chain
from planner.group import Group
from planner.measure import measure
from planner.measurement import StepSignature
from planner.trials import Trials
from planner.tune import MOST_PACKED_TOKENS, STAGE_SHARES, WINDOW_MULTIPLE
from planner.twin import Change, Twin, Wanted
from trainer.planning import plan_job, stand_in

HALF: dict[str, Any] = {"device": "cuda", "precision": "fp16", "base_precision": "fp16"}
BOTH = ("recommended", "aggressive")


def lengths_of(count: int) -> np.ndarray:
    """Like those of GSM8K: about 490 tokens, 200 to 1,000."""
    drawn = np.random.default_rng(3).lognormal(np.log(450), 0.4, count)
    return np.clip(drawn.round(), 200, 1000).astype(np.int64)


class Launching(Device):
    wave: float = 0.0  # by which the speed moves up and down, in about 40 s

    def factory(self, job: Any) -> Prober:
        return Prober(self, job)

    def pass_time(self, seconds: float) -> float:
        return super().pass_time(seconds * (1 + self.wave * float(np.sin(self.now / 6.4 + self.seed))))


def launching(lengths: np.ndarray, *, lean_factor: float = 1.0, wave: float = 0.0, **changes: Any) -> Launching:
    cost: dict[str, Any] = {"base": 0.06, "per_token": 4e-6, "per_token_width": 0.0, "optimizer": 0.006}
    loading: dict[str, Any] = {"variants": 1 << 20, "variant_seconds": 0.015, "slow_first": 8}
    device = Launching(
        lengths, **{**cost, **loading, "noise": 0.1, "half_speed_up": 1.0, "memory": 139 << 30, **changes}
    )
    device.lean_factor, device.wave = lean_factor, wave
    return device


def true_gain(twin: Twin, device: Launching, data: Any) -> float:
    written = make_job(twin.preset, **HALF)
    job = twin.job(written)
    seconds = [device.true_seconds(plan_job(stand_in(one), data).plan) for one in (written, job)]
    return seconds[0] / seconds[1] / (device.lean_factor if job.loss == "lean" else 1.0)


@dataclass
class Spent:
    seconds: float = 0.0


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> Spent:
    """Seconds of timing of all searches."""
    sum_of = Spent()
    close = Trials.close

    def closed(self: Trials) -> None:
        sum_of.seconds += self.spent
        close(self)

    monkeypatch.setattr(Trials, "close", closed)
    return sum_of


@pytest.mark.parametrize(
    ("count", "budget", "changes"),
    [
        (200, 24.0, {}),
        (200, 24.0, {"wave": 0.15}),
        (200, 24.0, {"lean_factor": 0.85}),
        (200, 36.0, {"lean_factor": 0.85, "wave": 0.15}),
        (2000, 24.0, {}),
        (2000, 36.0, {"lean_factor": 0.85}),
    ],
)
def test_packing_is_found_in_a_short_time_and_its_gain_told(
    spent: Spent, count: int, budget: float, changes: dict[str, Any]
) -> None:
    lengths = lengths_of(count)
    data = make_data(lengths)
    packed, seeds = 0, 10
    for seed in range(seeds):
        device = launching(lengths, seed=seed, **changes)
        for twin in tuned(device, *BOTH, data=data, budget=budget, **HALF):
            assert twin.loop_gain is not None
            assert any(change.is_layout for change in twin.changes)
            is_near = twin.loop_gain == pytest.approx(true_gain(twin, device, data), rel=0.15)
            packed += is_near and any(change.packed_length is not None for change in twin.changes)
    assert packed >= 0.9 * 2 * seeds
    assert spent.seconds <= 1.05 * seeds * budget


@pytest.mark.parametrize("changes", [{}, {"wave": 0.15}, {"slow_first": 0, "variants": 0}])
def test_where_as_written_is_the_fastest_on_a_gpu_noise_is_taken_for_a_gain_no_more_often(
    changes: dict[str, Any],
) -> None:
    """Padding costs as much as tokens, a micro-step next to nothing, and long rows more than short ones."""
    lengths = lengths_of(200)
    kept = 0
    for budget in (24.0, 36.0, 90.0):
        for seed in range(6):
            cost = {"base": 0.0, "per_token": 1e-4, "per_token_width": 1e-6, "optimizer": 0.001}
            device = launching(lengths, seed=seed, **cost, **changes)
            twins = tuned(device, *BOTH, data=make_data(lengths), budget=budget, **HALF)
            kept += any(twin.changes for twin in twins)
    assert kept <= 2  # of 18, at a chance of one in twenty


@dataclass(frozen=True)
class Call:
    """Of `Trials.measure`."""

    what: str
    names: set[str]
    seconds: float  # that it may take
    num_rounds: int


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    made: list[Call] = []
    original = Trials.measure

    def watched(self: Trials, rows: Any, seconds: float, what: str, **more: Any) -> Any:
        found = original(self, rows, seconds, what, **more)
        num_rounds = max(len(one.rounds) for one in found.measurements)
        made.append(Call(what, {row.name for row in rows}, seconds, num_rounds))
        return found

    monkeypatch.setattr(Trials, "measure", watched)
    return made


def test_what_is_plainly_slower_is_timed_in_the_first_heat_alone(calls: list[Call]) -> None:
    lengths = lengths_of(200)
    (twin,) = tuned(launching(lengths), data=make_data(lengths), budget=300.0, **HALF)
    (all_of_them, brief), (near, long) = [(one.names, one.num_rounds) for one in calls if one.what == "layouts"]
    assert "recommended" in all_of_them - near
    assert "recommended + micro-batch 2" in all_of_them - near
    assert f"recommended + {twin.text}" in near
    assert brief <= 2 < long


def test_a_layout_that_runs_out_of_memory_while_it_is_timed_is_none_and_the_others_go_on() -> None:
    lengths = lengths_of(200)
    device = launching(lengths, fits_in_turns=20_000)
    for twin in tuned(device, *BOTH, data=make_data(lengths), budget=90.0, **HALF):
        assert twin.loop_gain is not None
        assert twin.loop_gain > 5
        assert (twin.job(make_job(twin.preset, **HALF)).packed_length or 0) <= 20_000
    assert device.alive == 0


def test_of_windows_that_are_too_long_for_a_row_even_parts_are_tried() -> None:
    """Else the longest packed row would be the one of eight examples, and rows of 64 that stand together be faster."""
    lengths = lengths_of(2000)
    (twin,) = tuned(launching(lengths, noise=0.0), "aggressive", data=make_data(lengths), budget=90.0, **HALF)
    job = twin.job(make_job("aggressive", **HALF))
    longest = int(plan_job(stand_in(job), make_data(lengths)).plan.per_window(lengths).max())
    assert longest > MOST_PACKED_TOKENS["cuda"]
    assert job.packed_length is not None
    assert longest / 2 <= job.packed_length < longest / 2 + WINDOW_MULTIPLE


def test_the_chain_has_the_time_of_the_steps_where_there_is_none_to_try(calls: list[Call]) -> None:
    """The lean loss is there as written, and packed rows take no eager attention."""
    lengths = lengths_of(200)
    tuned(launching(lengths), data=make_data(lengths), budget=24.0, loss="lean", **HALF)
    assert [one.what for one in calls] == ["layouts", "layouts", "the chain"]
    least = (STAGE_SHARES[1] + STAGE_SHARES[2]) * 24.0
    assert calls[-1].seconds > least or calls[-1].seconds == pytest.approx(least)


def test_a_heat_that_took_the_layouts_time_is_all_that_there_is(calls: list[Call]) -> None:
    lengths = lengths_of(2000)
    slow = launching(lengths, base=0.6, per_token=1e-4)
    tuned(slow, *BOTH, data=make_data(lengths), budget=24.0, **HALF)
    assert [one.what for one in calls].count("layouts") == 1
    assert all(one.seconds > 0 for one in calls)


def test_steps_that_could_not_be_told_from_chance_leave_their_time_to_the_chain(calls: list[Call]) -> None:
    lengths = lengths_of(2000)
    slow = launching(lengths, base=0.2, per_token=4e-5)
    for twin in tuned(slow, *BOTH, data=make_data(lengths), budget=36.0, **HALF):
        assert any(change.packed_length for change in twin.changes)
        assert twin.was_too_short
    assert "steps" not in [one.what for one in calls]
    calls.clear()
    tuned(launching(lengths), *BOTH, data=make_data(lengths), budget=36.0, **HALF)
    assert "steps" in [one.what for one in calls]


def test_a_heat_of_one_round_does_not_take_a_split_for_its_small_remainder(calls: list[Call]) -> None:
    lengths = lengths_of(200)
    slow = launching(lengths, base=0.6, per_token=1e-4)
    twins = tuned(slow, *BOTH, data=make_data(lengths), budget=180.0, **HALF)
    layouts = [one for one in calls if one.what == "layouts"]
    assert layouts[0].num_rounds == 1
    assert len(layouts) == 2  # else the split was taken to be twice as fast as any packed row, and that for decided
    assert all(any(change.packed_length for change in twin.changes) for twin in twins)


def test_a_first_look_ends_after_so_many_rounds() -> None:
    lengths = lengths_of(200)
    device = launching(lengths)
    row = make_row(make_job("recommended", **HALF), make_data(lengths))
    found = measure(
        [row], make_data(lengths), device.factory, 60.0, clock=device.clock, with_fixed=False, most_rounds=2
    )
    (measured,) = found.measurements
    assert len(measured.rounds) == 2


def test_a_micro_batch_is_taken_to_need_what_probed_ones_of_like_size_did() -> None:
    group = Group(StepSignature.of(make_job()), [])
    assert group.probed_seconds(100) == 0
    group.probed |= {1000.0: 0.06, 16_000.0: 0.12}
    assert [group.probed_seconds(tokens) for tokens in (10, 1000, 8500, 1e6)] == pytest.approx([0.06, 0.06, 0.09, 0.12])


def test_for_want_of_time_packed_rows_are_reached_in_one_link() -> None:
    job = make_job("recommended", **HALF)
    split, packing = (
        Change(name="micro-batch", micro_batch_size=32),
        Change(name="packing", packed_length=16_384, micro_batch_size=1),
    )
    timed = [
        Timed(job=change.applied(job), changes=(change,), seconds=seconds)
        for change, seconds in ((packing, 1.0), (split, 2.0))
    ]
    timed.append(Timed(job=job, changes=(), seconds=20.0))
    wanted = Wanted(name="recommended", job=job, baseline=make_job("baseline", device="cuda"))
    names = [step.name for step in make_chain(wanted, timed, ())]
    assert names[-2:] == ["micro-batch 32", "packed to 16,384 tokens"]
    direct = [step.name for step in make_chain(wanted, timed, (), is_direct=True)]
    assert direct == [name for name in names if name != "micro-batch 32"]
