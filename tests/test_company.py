"""Who else takes the device's time, then and now: what that does to a stored measurement."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
from planned import FACTS, Bench

from planner.candidates import MeasureSettings
from planner.correction import corrected, correction
from planner.estimate import Estimate, FixedSeconds
from planner.measurement import Conditions, GpuConditions
from trainer.company import Company, MachineSeconds


@pytest.mark.parametrize(
    ("then", "now", "beside", "is_reused", "is_busier"),
    [
        pytest.param(0.43, 0.02, 0.03, False, False, id="gone"),
        pytest.param(0.43, 0.40, 0.44, True, False, id="still there"),
        pytest.param(0.43, None, 0.0, True, False, id="not known"),
        # What one, two and four programs took beside two threads of ours on two cores, and what they want alone.
        pytest.param(0.47, 0.5, 0.51, True, False, id="the one"),
        pytest.param(0.65, 1.0, 0.63, True, False, id="the two"),
        pytest.param(0.61, 0.9, 0.61, True, False, id="the two, which pause"),
        pytest.param(0.76, 2.0, 0.75, True, False, id="the four"),
        pytest.param(0.20, 1.0, 0.63, True, True, id="more of them"),
        pytest.param(0.52, 2.0, 0.75, True, True, id="more on full cores"),
        pytest.param(0.80, 1.0, 0.63, False, False, id="fewer on full cores"),
        pytest.param(0.05, 0.0, 0.0, True, False, id="hardly any"),
        pytest.param(0.05, 0.2, 0.27, True, False, id="a few"),
        pytest.param(0.05, 0.6, 0.54, True, True, id="come since"),
    ],
)
def test_who_else_is_there_counts_as_much_as_who_was(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    then: float,
    now: float | None,
    beside: float,
    is_reused: bool,
    is_busier: bool,
) -> None:
    class Meter:
        def __init__(self, *, is_gpu: bool) -> None:
            pass

        def __call__(self) -> Conditions:
            return Conditions(seconds=1.0, others=then, steal=0.0)

    asked: list[float | None] = []
    monkeypatch.setattr("planner.meter.ConditionsMeter", Meter)
    monkeypatch.setattr("planner.compare.watch_others", lambda device: lambda seconds: asked.append(seconds) or now)
    measured = bench.plan().report.rows
    assert not asked  # nothing was stored
    shown = bench.plan(minutes=10).report.rows
    # What a glance finds is looked at again; a refused one was asked of this data's and of the latest.
    assert asked == ([0.1, 0.7] * (1 if is_reused else 2) if is_busier or not is_reused else [0.1])
    assert (bench.starts == 0) is is_reused
    told = [line for line in bench.said if line.startswith("measuring again")]
    assert told == (
        []
        if is_reused
        else [
            f"measuring again: other programs took {then:.0%} of the CPU's time while it was timed, and would take "
            f"{beside:.0%} now"
        ]
    )
    for before, row in zip(measured, shown, strict=True):
        said = f"other programs take {min(1, now or 0):.0%} of this machine's CPU time just now"
        assert (said in (row.note or "")) is is_busier
        if is_busier:  # twice as long and more, with less than half of the CPU
            assert not row.calibrated
            assert now
            assert row.seconds
            assert row.breakdown
            assert before.breakdown
            lows = [
                one.seconds_low - (one.breakdown.data or 0.0)
                for one in (row, before)
                if one.breakdown and one.seconds_low
            ]
            assert lows[0] == pytest.approx(lows[1], rel=2e-3)  # reading the data takes what it takes
            assert row.seconds_high
            steps = row.breakdown.forward_backward + row.breakdown.optimizer
            slower = (1 - then) / (1 - beside)
            told = re.search(r"takes ([\d.]+) to ([\d.]+) x as long", " ".join((row.note or "").split()))
            assert told is not None
            assert float(told[1]) == pytest.approx(slower, rel=0.04)
            assert float(told[2]) == pytest.approx(1.5 * slower, rel=0.04)
            assert row.seconds_high >= row.seconds + (steps + row.breakdown.start) * (1.5 * slower - 1) * 0.95


def test_a_burst_beside_a_table_is_no_company(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there for a tenth of a second, and what pauses for one, decide nothing."""
    seen: list[float] = []
    monkeypatch.setattr("planner.compare.watch_others", lambda device: lambda seconds: seen.pop(0))
    for then, looks in ((0.02, [0.9, 0.1]), (0.43, [0.0, 0.5])):

        class Meter:
            def __init__(self, *, is_gpu: bool) -> None:
                pass

            def __call__(self, then: float = then) -> Conditions:
                return Conditions(seconds=1.0, others=then, steal=0.0)

        monkeypatch.setattr("planner.meter.ConditionsMeter", Meter)
        bench.plan(fresh=True)
        seen[:] = looks
        rows = bench.plan(minutes=10).report.rows
        assert bench.starts == 0
        assert not seen
        assert not any("just now" in (row.note or "") for row in rows)


def test_what_the_host_takes_is_no_company_that_has_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steal shows only while somebody computes: an idle look finds none, and each plan measured again."""

    class Meter:
        def __init__(self, *, is_gpu: bool) -> None:
            pass

        def __call__(self) -> Conditions:
            return Conditions(seconds=1.0, others=0.01, steal=0.3)

    monkeypatch.setattr("planner.meter.ConditionsMeter", Meter)
    monkeypatch.setattr("planner.compare.watch_others", lambda device: lambda seconds: 0.01)
    bench.plan()
    bench.plan(minutes=10)
    assert bench.starts == 0


def test_what_was_timed_beside_others_on_a_gpu_is_measured_again_once_they_are_gone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = GpuConditions(other_processes=2, other_share=0.5)

    class Meter:
        def __init__(self, *, is_gpu: bool) -> None:
            assert is_gpu

        def __call__(self) -> Conditions:
            return Conditions(seconds=1.0, gpu=gpu)

    now: list[float | None] = [None]
    monkeypatch.setattr("planner.meter.ConditionsMeter", Meter)
    monkeypatch.setattr("planner.compare.watch_others", lambda device: lambda seconds: now[0])
    on_gpu = replace(FACTS, kind="cuda", name="a GPU")
    assert not bench.plan(facts=on_gpu).report.rows[0].calibrated
    bench.plan(facts=on_gpu, minutes=10)
    assert bench.starts == 0  # they are there still, or nobody tells
    now[0] = 0.0
    bench.plan(facts=on_gpu, minutes=10)
    assert bench.starts > 0
    told = "measuring again: other programs took 50% of the GPU's time while it was timed, and would take 0% now"
    assert told in bench.said


def test_what_others_take_leaves_out_ourselves(monkeypatch: pytest.MonkeyPatch) -> None:
    now, running = [0.0], [1]
    monkeypatch.setattr("trainer.company.runnable_threads", lambda: running[0])
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr("trainer.company.time", SimpleNamespace(monotonic=lambda: now[0], sleep=pass_time(now)))

    def share(*, ours: float, others: float, seconds: float = 0.1) -> float | None:
        """Two cores, of which we take `ours` and others `others`."""
        begun = now[0]

        def counted() -> MachineSeconds:
            at = now[0] - begun
            return MachineSeconds(busy=(ours + others) * at, steal=0.0, total=2 * at)

        monkeypatch.setattr("trainer.company.machine_seconds", counted)
        monkeypatch.setattr("trainer.company.own_cpu_seconds", lambda: ours * (now[0] - begun))
        return Company().demand(seconds)

    assert share(ours=1.5, others=0.0) == 0.0
    assert now[0] == pytest.approx(0.1)
    assert share(ours=1.0, others=1.0, seconds=0.7) == pytest.approx(0.5)
    assert now[0] == pytest.approx(0.8)
    assert share(ours=0.0, others=0.0, seconds=0.0) is None  # no time has passed
    # Two programs and six fill two cores alike; the kernel tells how many threads want them.
    for threads in (2, 6):
        running[0] = threads + 1  # and the one that looks
        assert share(ours=0.0, others=2.0, seconds=0.7) == pytest.approx(threads / 2)
    running[0] = 9  # of which most have nothing to do: there is time left
    assert share(ours=0.0, others=1.0, seconds=0.7) == pytest.approx(0.5)


def test_a_look_is_at_now_and_not_at_what_was_since_the_command_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes of tokenising or of a search lie between: others that were there then may have left."""
    now = [0.0]
    monkeypatch.setattr("trainer.company.runnable_threads", lambda: None)
    monkeypatch.setattr("trainer.company.time", SimpleNamespace(monotonic=lambda: now[0], sleep=pass_time(now)))
    monkeypatch.setattr("trainer.company.own_cpu_seconds", lambda: 0.0)
    monkeypatch.setattr(
        "trainer.company.machine_seconds",
        lambda: MachineSeconds(busy=2 * min(now[0], 200.0), steal=0.0, total=2 * now[0]),  # busy for 200 s, then idle
    )
    company = Company()
    now[0] = 201.0
    assert company.demand(0.1) == 0.0
    assert now[0] == pytest.approx(201.1, abs=0.01)
    assert company.demand(0.7) == 0.0
    assert now[0] == pytest.approx(201.7, abs=0.01)  # the longer look goes on from the glance
    assert company.share() == pytest.approx(200 / 201.7, abs=1e-4)


def pass_time(now: list[float]) -> Callable[[float], None]:
    def sleep(seconds: float) -> None:
        now[0] += seconds

    return sleep


def test_nobody_is_looked_for_beside_a_measurement_that_does_not_do_anyway(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look takes a tenth of a second."""
    asked: list[float] = []
    monkeypatch.setattr("planner.compare.watch_others", lambda device: lambda seconds: asked.append(seconds))
    bench.plan()
    bench.plan(minutes=10, measuring=MeasureSettings(budget_seconds=600.0, precision_target=0.0001))
    assert bench.starts > 0
    assert asked == []


def test_a_corrected_range_reaches_as_far_for_what_stands_beside_the_loop() -> None:
    fixed = FixedSeconds(start=10.0)
    raw = Estimate(
        name="x", fits=True, train_seconds=100.0, train_seconds_low=95.0, train_seconds_high=400.0, fixed=fixed,
        seconds=110.0, seconds_low=104.0, seconds_high=440.0, slower=4.0,
    )  # fmt: skip
    by = correction([1.0, 1.0, 1.0])
    assert by is not None
    high = corrected(raw, by).seconds_high
    assert high is not None
    assert high == pytest.approx(440.0)
