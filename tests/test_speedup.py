"""One meaning of "speed-up": whole runs, predicted over predicted, of both the same parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakeProber
from planned import Bench

from planner.estimate import Estimate, FixedSeconds
from planner.explain import explain_text
from planner.speedup import speedup, speedup_by_loops
from planner.twin import Change, Twin


def estimate_of(seconds: float | None, **fixed: float) -> Estimate:
    return Estimate(name="x", fits=seconds is not None, train_seconds=seconds, fixed=FixedSeconds(**fixed))


def test_a_speed_up_is_that_of_whole_runs() -> None:
    assert speedup(estimate_of(100.0, load=10.0), estimate_of(45.0, load=10.0)) == 2.0
    assert speedup(estimate_of(None), estimate_of(45.0)) is None
    assert speedup(None, estimate_of(45.0)) is None
    assert speedup(estimate_of(100.0), estimate_of(None)) is None


def test_with_compile_every_table_counts_from_the_baseline_as_it_is_not_compiled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.device = {"base": 0.2, "per_token": 1e-5, "memory": 64 << 30}  # each preset has a twin
    plain = FakeProber._seconds
    monkeypatch.setattr(
        FakeProber, "_seconds", lambda self, *given: plain(self, *given) * (0.5 if self.job.compile else 1)
    )

    def speedups(*names: str, tuned: bool = False) -> dict[str, float | None]:
        return {row.name: row.speedup for row in bench.plan(names=names, compile=True, tuned=tuned).report.rows}

    both = speedups("baseline", "recommended", tuned=True)
    assert both["recommended"] == pytest.approx(speedups("recommended")["recommended"], rel=0.03)
    assert (both["baseline"] or 0.0) > 1.2  # what compiling gives is a part of it
    assert (both["recommended, tuned"] or 0.0) > 2.0
    assert speedups("aggressive", "baseline")["aggressive"] is None  # no search has timed the baseline beside it


def test_a_part_that_is_known_of_one_run_alone_is_counted_of_neither() -> None:
    known, unknown = estimate_of(100.0, load=10.0, evaluation=55.0), estimate_of(45.0, load=10.0)
    assert speedup(known, unknown) == 2.0
    assert speedup(unknown, known) == 0.5


def test_from_the_loops_ratio_the_other_parts_are_counted_too() -> None:
    assert speedup_by_loops(2.0, estimate_of(45.0, load=10.0)) == pytest.approx(100 / 55)
    assert speedup_by_loops(2.0, estimate_of(40.0, compile=5.0, load=10.0)) == pytest.approx(100 / 55)
    assert speedup_by_loops(None, estimate_of(45.0)) is None
    assert speedup_by_loops(2.0, estimate_of(None)) is None


@pytest.mark.parametrize(
    ("written", "tuned", "over", "said"),
    [
        (None, 45.0, None, "no speed-up can be told: as written it could not be timed"),
        (90.0, 45.0, None, "1.82x over itself as written (the baseline could not be timed)"),
        (90.0, 45.0, 1.5, "1.50x over the baseline as written"),
        (90.0, None, None, "no speed-up can be told: it does not fit now"),
    ],
)
def test_what_a_twin_gains_is_told_of_whole_runs(
    written: float | None, tuned: float | None, over: float | None, said: str
) -> None:
    twin = Twin(
        preset="a", changes=(Change(name="micro-batch", micro_batch_size=2),), links=(), written_seconds=written,
        seconds=45.0, baseline_seconds=None,
    )  # fmt: skip
    row = SimpleNamespace(name="a, tuned", speedup=over, breakdown=None)
    comparison: Any = SimpleNamespace(
        candidates=[SimpleNamespace(twin=twin)],
        report=SimpleNamespace(rows=[row]),
        estimates={"a, tuned": estimate_of(tuned, load=10.0), "a": estimate_of(written, load=10.0)},
    )
    assert f"a, tuned: {said}; loop: micro-batch 2" in explain_text(comparison, width=110)
