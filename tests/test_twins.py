"""Tuned twins in the history: kept, found again, gone on with, and shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fakes import make_data, make_job
from tuning import DATA, LENGTHS, Device, device_of, saving

from planner.history import History
from planner.keys import Keys
from planner.twin import Change, Twin, Wanted
from planner.twins import find_twins, known_twin
from presets.errors import MeasurementError
from trainer.planning import plan_job, stand_in
from trainer.tokens import TokenizedDataset


def test_one_preset_of_which_nothing_can_be_timed_is_named_and_the_others_found(tmp_path: Path) -> None:
    """Of another precision, and so of another search; where all fail, so does the command."""
    from planner.hardware import DeviceFacts
    from planner.twin import Untimed

    facts = DeviceFacts(name="Fake", kind="cpu", memory_bytes=8 << 30, free_bytes=4 << 30, driver="1")
    half = make_job("aggressive", precision="fp16", base_precision="fp16")
    jobs = {"recommended": make_job("recommended"), "aggressive": half}

    def search(*names: str) -> dict[str, Twin | Untimed]:
        device = device_of(base=0.2, per_token=1e-5, per_token_width=0.0, broken=("fp16",))
        wanted = [Wanted(name=name, job=jobs[name], baseline=make_job("baseline")) for name in names]
        return find_twins(
            wanted, DATA, lambda _: device.factory, budget_seconds=300, history=History(home=tmp_path),
            keys=Keys(facts), now=datetime(2026, 1, 1, tzinfo=UTC), clock=device.clock,
        )  # fmt: skip

    found = search("aggressive", "recommended")
    failed = found["aggressive"]
    assert isinstance(failed, Untimed)
    assert "ended by itself" in failed.reason
    assert isinstance(found["recommended"], Twin)
    with pytest.raises(MeasurementError, match="ended by itself"):
        search("aggressive")


def test_a_twin_is_kept_for_this_data_and_machine_only(tmp_path: Path) -> None:
    from planner.hardware import DeviceFacts
    from presets.demo import demo_folder

    facts = DeviceFacts(name="Fake", kind="cpu", memory_bytes=8 << 30, free_bytes=4 << 30, driver="1")
    history = History(home=tmp_path)
    job = make_job("recommended", model=str(demo_folder()))
    device = device_of(base=0.2, per_token=1e-5)
    found = find_twins(
        [Wanted(name="recommended", job=job, baseline=make_job("baseline", model=str(demo_folder())))],
        DATA,
        lambda folder: device.factory,
        history=history,
        keys=Keys(facts),
        budget_seconds=60,
        now=datetime(2026, 1, 1, tzinfo=UTC),
        clock=device.clock,
    )
    assert known_twin(history, Keys(facts), job, DATA) == found["recommended"]
    assert known_twin(history, Keys(facts), job, DATA, quantized=True) is None
    assert known_twin(history, Keys(facts), job, make_data(LENGTHS[:-1])) is None
    assert known_twin(history, Keys(replace(facts, driver="2")), job, DATA) is None
    assert known_twin(history, Keys(facts), replace(job, micro_batch_size=2), DATA) is None
    assert known_twin(history, Keys(facts), make_job("aggressive", model=job.model), DATA) is None


class Searches:
    """The same command given several times, on a fake device and with a history of its own."""

    def __init__(self, home: Path, make: Callable[[], Device] | None = None) -> None:
        from planner.hardware import DeviceFacts
        from presets.demo import demo_folder

        self.model = str(demo_folder())
        self.facts = DeviceFacts(name="Fake", kind="cpu", memory_bytes=8 << 30, free_bytes=4 << 30, driver="1")
        self.history = History(home=home)
        self.make = make or (
            lambda: device_of(base=0.2, per_token=1e-4, per_token_width=0.0, lean_factor=0.8, memory=64 << 30)
        )
        self.device = self.make()

    def search(
        self,
        *names: str,
        stop_at: str | None = None,
        budget: float = 300.0,
        fresh: bool = False,
        later: timedelta = timedelta(0),
    ) -> tuple[dict[str, Twin], list[str]]:
        """The twins and what was told; told `stop_at`, the user presses Ctrl-C."""
        told: list[str] = []

        def progress(text: str, _share: float) -> None:
            told.append(text)
            if stop_at is not None and text.startswith(stop_at):
                raise KeyboardInterrupt

        self.device = self.make()
        baseline = make_job("baseline", model=self.model)
        twins: dict[str, Twin] = {}
        try:
            twins = find_twins(
                [Wanted(name=name, job=make_job(name, model=self.model), baseline=baseline) for name in names],
                DATA,
                lambda folder: self.device.factory,
                history=self.history,
                keys=Keys(self.facts),
                budget_seconds=budget,
                fresh=fresh,
                now=datetime(2026, 1, 1, tzinfo=UTC) + later,
                progress=progress,
                clock=self.device.clock,
            )
        except KeyboardInterrupt:
            assert stop_at is not None
        return twins, told

    def stages(self, told: list[str]) -> list[str]:
        """The stages that were timed."""
        every = ("layouts", "larger splits", "steps", "the chain")
        return [one for one in every if any(text.startswith(f"{one}: timing") for text in told)]


@pytest.mark.parametrize(
    ("stop_at", "left"),
    [
        ("layouts: timing", ["layouts", "steps", "the chain"]),
        ("steps: timing", ["steps", "the chain"]),
        ("the chain: timing", ["the chain"]),
    ],
)
def test_an_interrupted_search_goes_on_after_the_last_stage_that_it_ended(
    tmp_path: Path, stop_at: str, left: list[str]
) -> None:
    whole, _ = Searches(tmp_path / "other").search("recommended", "aggressive")
    searches = Searches(tmp_path)
    assert searches.search("recommended", "aggressive", stop_at=stop_at)[0] == {}
    assert searches.device.alive == 0
    found, told = searches.search("recommended", "aggressive")
    assert searches.stages(told) == left
    for name, twin in whole.items():
        assert found[name].changes == twin.changes
        assert found[name].loop_speedup == pytest.approx(twin.loop_speedup, rel=0.02)
        assert found[name].refused == twin.refused


@pytest.mark.parametrize(
    ("stop_at", "left"),
    [
        ("larger splits: timing", ["larger splits", "steps", "the chain"]),
        ("steps: timing", ["steps", "the chain"]),
        ("the chain: timing", ["the chain"]),
    ],
)
def test_an_interrupted_search_keeps_which_larger_splits_are_to_be_tried_and_which_were(
    tmp_path: Path, stop_at: str, left: list[str]
) -> None:
    searches = Searches(tmp_path, lambda: saving(base=0.2))
    assert searches.search("recommended", stop_at=stop_at)[0] == {}
    found, told = searches.search("recommended")
    assert searches.stages(told) == left
    assert [change.text for change in found["recommended"].changes] == ["checkpointing", "micro-batch 8"]


def test_one_of_the_presets_of_an_interrupted_search_goes_on_alone(tmp_path: Path) -> None:
    searches = Searches(tmp_path)
    searches.search("recommended", "aggressive", stop_at="the chain: timing")
    _, told = searches.search("aggressive")
    assert searches.stages(told) == ["the chain"]


@pytest.mark.parametrize(
    "changes",
    [{"fresh": True}, {"budget": 301.0}, {"later": timedelta(days=2)}, {"names": ("recommended", "aggressive")}],
    ids=["fresh", "more time", "days later", "another preset"],
)
def test_a_search_begins_anew_where_it_should(tmp_path: Path, changes: dict[str, Any]) -> None:
    searches = Searches(tmp_path)
    searches.search("recommended", stop_at="the chain: timing")
    _, told = searches.search(*changes.pop("names", ("recommended",)), **changes)
    assert searches.stages(told) == ["layouts", "steps", "the chain"]


def test_what_the_time_did_not_suffice_for_is_searched_again(tmp_path: Path) -> None:
    searches = Searches(tmp_path)
    searches.search("recommended", stop_at="the chain: timing", budget=40.0)
    _, told = searches.search("recommended", budget=40.0)
    assert searches.stages(told) == ["steps", "the chain"]


def test_a_changed_job_is_split_as_the_twin_says() -> None:
    change = Change(name="packing", packed_length=512, micro_batch_size=1)
    twin = Twin(
        preset="aggressive",
        changes=(
            change,
            Change(name="lean loss", loss="lean"),
            Change(name="checkpointing", gradient_checkpointing=True),
        ),
        links=(),
        written_seconds=2.0,
        seconds=1.0,
        baseline_seconds=4.0,
    )
    job = twin.job(make_job("aggressive"))
    assert job.packing
    assert job.packed_length == 512
    assert job.loss == "lean"
    assert job.preset.gradient_checkpointing
    assert job.global_batch_sizes == (64,)
    assert twin.loop_speedup == 4.0
    assert twin.loop_gain == 2.0
    assert twin.text == "packed to 512 tokens, lean loss, checkpointing"


def test_compare_shows_a_known_twin_after_its_preset_and_runs_it_alone(tmp_path: Path) -> None:
    from planner.candidates import MeasureSettings
    from planner.compare import compare, predicted_of
    from planner.explain import PARTS, explain_text
    from planner.hardware import DeviceFacts
    from planner.resolve import Options
    from presets.demo import demo_folder
    from presets.env import read_settings

    devices: list[Device] = []

    def factory(folder: Path, scratch: Path | None = None) -> Any:
        made = Device(TokenizedDataset.load(folder).lengths, base=0.2, per_token=1e-5)
        made.lean_factor, made.eager_factor = 1.0, 1.1
        devices.append(made)
        return made.factory

    def plan(**more: Any) -> Any:
        return compare(
            Options(model=str(demo_folder()), limit=300),
            read_settings(tmp_path, {}),
            MeasureSettings(),
            factory=factory,
            facts=DeviceFacts(name="Fake", kind="cpu", memory_bytes=64 << 30, free_bytes=32 << 30),
            history=History(home=tmp_path),
            clock=lambda: devices[-1].clock(),
            **more,
        )

    first = plan(names=("baseline", "recommended"))
    assert [row.name for row in first.report.rows] == ["baseline", "recommended"]
    assert any("plan tune" in note for note in first.report.notes)
    aside = plan(names=("baseline", "aggressive"), tuned=True, unsearched=frozenset({"baseline"}))
    assert [row.name for row in aside.report.rows] == ["baseline", "aggressive", "aggressive, tuned"]
    searched = plan(names=("baseline", "recommended"), tuned=True)
    names = ["baseline", "baseline, tuned", "recommended", "recommended, tuned"]
    assert [row.name for row in searched.report.rows] == names
    twin = searched.report.rows[3].to_plain()
    assert twin["tuned_from"] == "recommended"
    assert twin["speedup"] > 2
    assert searched.report.rows[0].speedup == 1.0
    known = plan(names=("baseline", "recommended"))
    assert [row.name for row in known.report.rows] == names
    assert not any("plan tune" in note for note in known.report.notes)
    (untuned,) = (n for n in plan(names=("baseline", "recommended", "iterate")).report.notes if "plan tune" in n)
    assert "not yet for iterate." in untuned
    alone = plan(names=("recommended",), running=True, tuned=True)
    assert [candidate.name for candidate in alone.candidates] == ["recommended, tuned"]
    assert predicted_of(alone, alone.candidates[0]).is_tuned  # and so the run's entry in the history
    written = plan(names=("recommended",), running=True)
    assert [candidate.name for candidate in written.candidates] == ["recommended"]
    assert not predicted_of(written, written.candidates[0]).is_tuned
    text = explain_text(searched)
    assert "forward+backward" in text
    assert f"recommended, tuned: {twin['speedup']:.2f}x over the baseline as written; loop: accumulation 1.0" in text
    # Where the baseline is not in the table the figure still is that of whole runs, from what the search timed.
    without = plan(names=("recommended",))
    parts = without.report.rows[1].breakdown
    loop = parts.forward_backward + parts.optimizer
    rest = sum(getattr(parts, name) or 0.0 for name, _ in PARTS) - loop
    ratio = without.candidates[1].twin.loop_speedup
    shown = [row.speedup for row in without.report.rows]
    assert shown[1] == pytest.approx((ratio * loop + rest) / (loop + rest))
    assert shown[1] < 0.95 * ratio
    assert shown[0] == pytest.approx(1.0, abs=0.05)
    assert f"recommended, tuned: {shown[1]:.2f}x over the baseline as written" in explain_text(without)


def test_a_search_that_was_too_short_is_made_again_with_more_time_and_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import planner.candidates as candidates
    from planner.candidates import MeasureSettings, Search, with_twins
    from planner.hardware import DeviceFacts
    from planner.twin import TOO_SHORT, Untimed
    from presets.demo import demo_folder

    model = str(demo_folder())
    budgets: list[float] = []

    def search_for(wanted: list[Wanted], *_: Any, budget_seconds: float, history: History, **more: Any) -> Any:
        budgets.append(budget_seconds)
        device = device_of(base=0.2, per_token=1e-4, per_token_width=0.0, lean_factor=0.5, memory=64 << 30)
        found = find_twins(
            wanted, DATA, lambda _: device.factory, budget_seconds=budget_seconds, history=history,
            keys=more["keys"], now=more["now"], clock=device.clock,
        )  # fmt: skip
        assert not any(isinstance(one, Untimed) for one in found.values())
        return found

    monkeypatch.setattr(candidates, "find_twins", search_for)
    job = make_job("recommended", model=model)
    resolved: Any = type("Resolved", (), {"preset": job.preset, "job": job})
    planned = candidates.PlannedRow(name="recommended", job=job, plan=plan_job(stand_in(job), DATA).plan)
    asked = candidates.Candidate(resolved=resolved, planned=planned, data=DATA)
    monkeypatch.setattr(candidates, "twin_candidate", lambda candidate, twin: replace(candidate, twin=twin))
    facts = DeviceFacts(name="Fake", kind="cpu", memory_bytes=8 << 30, free_bytes=4 << 30, driver="1")
    history = History(home=tmp_path)

    def said(budget: float) -> str:
        search = Search(
            measuring=MeasureSettings(budget_seconds=budget), say=lambda _: None, shown=candidates.as_lines,
            factory=lambda _: None, history=history, keys=Keys(facts), now=datetime(2026, 1, 1, tzinfo=UTC),
            clock=lambda: 0.0,
        )  # type: ignore[arg-type, return-value]  # fmt: skip
        baseline = make_job("baseline", model=model)
        (found,) = with_twins((asked,), lambda _: baseline, search, tuned=True, instead=True)
        return "; ".join(found.notes if found.twin is None else found.twin.refused)

    assert TOO_SHORT in said(13)
    assert TOO_SHORT in said(13)
    assert budgets == [39]
    assert TOO_SHORT not in said(100)
    assert TOO_SHORT not in said(200)
    assert budgets == [39, 300]
