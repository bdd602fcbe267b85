"""What earlier measurements and runs may be used for, and what happens to the file they are kept in."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fakes
import pytest
from test_cli import PYTHON, plan, refused

from planner import reuse
from planner.candidates import MeasureSettings
from planner.compare import Comparison, compare, predicted_of
from planner.correction import Correction, corrected, correction, past_correction
from planner.estimate import HEAP_GROWTH, Estimate
from planner.figures import ago
from planner.hardware import DeviceFacts
from planner.history import (
    _SCHEMA,
    APPLICATION_ID,
    BUSY_SECONDS,
    FILE_NAME,
    SCHEMA_VERSION,
    History,
    PastRun,
    _identity,
)
from planner.past import accuracy, accuracy_text, runs_json, runs_text, wilson
from planner.resolve import Options
from planner.table import measured_text
from presets import jsonio
from presets.demo import demo_folder
from presets.env import read_settings
from trainer.record import Actual, Predicted, RunRecord
from trainer.tokens import TokenizedDataset

NOW = datetime(2026, 11, 23, 10, 0, tzinfo=UTC)
FACTS = DeviceFacts(
    name="a processor", kind="cpu", memory_bytes=16 << 30, free_bytes=8 << 30, driver="1.0", torch_version="2.13.0"
)


@dataclass
class Bench:
    """A machine with a fake device, on which plans are made one after another."""

    home: Path
    model: Path
    device: dict[str, Any] = field(default_factory=dict)
    starts: int = 0  # workers started: 0 where a plan was answered from the history
    said: list[str] = field(default_factory=list)

    @property
    def history(self) -> History:
        return History(home=self.home)

    def plan(
        self,
        dataset: str = "400",
        *,
        facts: DeviceFacts = FACTS,
        names: tuple[str, ...] = ("baseline", "aggressive"),
        measuring: MeasureSettings | None = None,
        fresh: bool = False,
        minutes: float = 0.0,
        **options: Any,
    ) -> Comparison:
        self.starts = 0
        self.said.clear()

        devices: list[fakes.FakeDevice] = []

        def factory(folder: Path) -> Callable[..., Any]:
            device = fakes.FakeDevice(TokenizedDataset.load(folder).lengths, **self.device)
            devices.append(device)

            def start(job: Any) -> Any:
                self.starts += 1
                return device.factory(job)

            return start

        return compare(
            Options(dataset=dataset, **{"model": str(self.model), **options}),
            read_settings(self.home, {}),
            measuring or MeasureSettings(fresh=fresh),
            names=names,
            say=self.said.append,
            factory=factory,
            facts=facts,
            now=NOW + timedelta(minutes=minutes),
            history=self.history,
            clock=lambda: devices[-1].clock(),
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(demo_folder() / "config.json", model)
    (tmp_path / "home").mkdir()
    return Bench(home=tmp_path / "home", model=model)


def past_run(number: int = 0, **changes: Any) -> PastRun:
    """A run that was predicted to take 100 s (90 to 110) and took 130."""
    plain: dict[str, Any] = {
        "folder": f"/runs/{number}",
        "ended_at": (NOW + timedelta(hours=number)).isoformat(timespec="seconds"),
        "status": "finished",
        "name": "recommended",
        "model": "/models/small",
        "num_examples": 1000,
        "raw_seconds": 100.0,
        "raw_train_seconds": 80.0,
        "seconds": 100.0,
        "seconds_low": 90.0,
        "seconds_high": 110.0,
        "train_seconds": 80.0,
        "actual_seconds": 130.0,
        "actual_train_seconds": 104.0,
        "signature_key": "k",
    }
    return PastRun(**{**plain, **changes})


# --- measurements -----------------------------------------------------------------------------------------------------


def test_a_plan_is_answered_from_an_earlier_measurement_and_says_how_old_it_is(bench: Bench) -> None:
    first = bench.plan()
    assert bench.starts > 0
    assert {row.basis for row in first.report.rows} == {"measured"}
    second = bench.plan(minutes=3)
    assert bench.starts == 0
    assert any("measured 3 min ago" in line for line in bench.said)
    text = measured_text(second.report, now=NOW + timedelta(minutes=3))
    assert "Measured 3 min ago on this device, not now: all rows. --fresh measures again." in text
    for row, before in zip(json.loads(second.report.to_json())["rows"], first.report.rows, strict=True):
        assert row["basis"] == "cached"
        assert datetime.fromisoformat(row["measured_at"]) == NOW
        assert row["seconds_per_step"] == before.seconds_per_step
        assert row["peak_memory_bytes"] == before.peak_memory_bytes
        assert "measured_at" not in before.to_plain()


def test_another_dataset_and_other_settings_of_the_same_step_reuse_a_measurement(bench: Bench, tmp_path: Path) -> None:
    bench.plan("1000")
    fewer = bench.plan("300")
    assert bench.starts == 0
    assert fewer.estimates["baseline"].num_steps == 19
    truth = fakes.FakeDevice(fewer.candidates[0].data.lengths).true_seconds(fewer.candidates[0].planned.plan)
    assert fewer.estimates["baseline"].train_seconds == pytest.approx(truth, rel=0.02)
    for options in ({"learning_rate": 1e-4}, {"seed": 7}, {"epochs": 2}, {"gradient_accumulation_steps": 8}):
        bench.plan("300", **options)
        assert bench.starts == 0, options
    bench.plan(names=("aggressive",))
    assert bench.starts == 0
    shutil.copytree(bench.model, tmp_path / "the same under another name")
    bench.plan(model=str(tmp_path / "the same under another name"))
    assert bench.starts == 0


def test_fresh_measures_again_and_replaces(bench: Bench) -> None:
    before = bench.plan().estimates["baseline"].train_seconds
    bench.device = {"base": 0.02, "per_token": 0.0008, "per_token_width": 4e-7, "optimizer": 0.04}
    assert bench.plan().estimates["baseline"].train_seconds == pytest.approx(before)
    assert bench.plan(fresh=True, minutes=5).estimates["baseline"].train_seconds == pytest.approx(2 * before, rel=0.01)
    assert bench.starts > 0
    after = bench.plan(minutes=6)
    assert bench.starts == 0
    assert after.estimates["baseline"].train_seconds == pytest.approx(2 * before, rel=0.01)
    assert datetime.fromisoformat(after.report.rows[0].measured_at or "") == NOW + timedelta(minutes=5)


@pytest.mark.parametrize(
    "facts",
    [{"name": "another"}, {"memory_bytes": 8 << 30}, {"driver": "1.1"}, {"num_devices": 2}, {"capability": (9, 0)}],
    ids=lambda change: next(iter(change)),
)
def test_another_device_or_driver_is_measured_itself(bench: Bench, facts: dict[str, Any]) -> None:
    bench.plan()
    bench.plan(facts=replace(FACTS, **facts))
    assert bench.starts > 0


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 512}, {"attention": "eager"}, {"gradient_checkpointing": True}, {"num_threads": 1},
        {"micro_batch_size": 2}, {"packing": True},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_step_is_measured_itself(bench: Bench, options: dict[str, Any]) -> None:
    bench.plan()
    bench.plan(**options)
    assert bench.starts > 0


def test_other_versions_other_code_and_another_model_are_measured(bench: Bench, monkeypatch: Any) -> None:
    bench.plan()
    version, digest = reuse._version, reuse._source_digest
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "training-planner"):
        with monkeypatch.context() as patched:
            patched.setattr(reuse, "_version", lambda of, name=name: "0.0.0" if of == name else version(of))
            assert reuse.Keys(FACTS).of_measurement(fakes.make_job(model=str(bench.model))) not in _keys(bench)
    with monkeypatch.context() as patched:
        patched.setattr(reuse, "_source_digest", lambda sources: digest(sources) + "x")
        bench.plan()
        assert bench.starts > 0
    with monkeypatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "13")
        bench.plan()
        assert bench.starts > 0
    config = json.loads((bench.model / "config.json").read_text())
    (bench.model / "config.json").write_text(json.dumps({**config, "transformers_version": "0", "_name_or_path": "x"}))
    bench.plan()
    assert bench.starts == 0
    (bench.model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 17}))
    bench.plan()
    assert bench.starts > 0
    (bench.model / "model.safetensors").write_bytes(b"")
    bench.plan()
    assert bench.starts > 0


def _keys(bench: Bench) -> set[str]:
    with sqlite3.connect(bench.history.path) as db:
        return {key.partition(".")[0] for (key,) in db.execute("SELECT key FROM measurements")}


def test_every_module_that_a_step_is_made_of_counts_as_timed_code() -> None:
    """A part of the step left out of the list would let old measurements stand for new code."""
    import ast
    from importlib import resources

    from planner.reuse import TIMED_SOURCES

    found: set[str] = set()
    waiting = ["step.py", "model.py"]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for node in ast.walk(ast.parse(resources.files("trainer").joinpath(name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "trainer":
                waiting += [f"{alias.name}.py" for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainer."):
                waiting.append(f"{str(node.module).removeprefix('trainer.')}.py")
    untimed = {"job.py", "tokens.py"}  # what a run is and what it learns from: in the key by their values
    assert {"norms.py", "rotary.py", "halves.py", "lean.py"} <= found
    assert found - untimed == {name for package, name in TIMED_SOURCES if package == "trainer"} & found


def test_micro_batches_outside_of_what_was_measured_are_measured(bench: Bench) -> None:
    bench.plan(tokens_per_example=200)
    for tokens, starts in ((200, False), (150, False), (201, True)):
        bench.plan(tokens_per_example=tokens)
        assert bool(bench.starts) == starts, tokens
        assert any("lies outside" in line for line in bench.said) == starts
    # Far shorter ones than any that was timed: the fit would have to reach too far.
    bench.plan(tokens_per_example=20)
    assert bench.starts > 0
    assert any("too far from those that were timed" in line for line in bench.said)


def test_memory_measured_without_accumulation_does_not_stand_for_a_plan_that_accumulates(bench: Bench) -> None:
    bench.plan(names=("baseline",), gradient_accumulation_steps=1)
    bench.plan(names=("baseline",), gradient_accumulation_steps=4)
    assert bench.starts > 0
    bench.plan(names=("baseline",), gradient_accumulation_steps=1)  # the other way it does
    assert bench.starts == 0


def peak_of(tokens: int) -> int:
    """Bytes that are shown where the device took a MiB a token and the heap of a run grows on."""
    return round(HEAP_GROWTH * (tokens << 20))


def test_memory_of_a_longer_micro_batch_is_said_to_be_that(bench: Bench) -> None:
    bench.plan(tokens_per_example=200)
    found = bench.plan(tokens_per_example=150)
    assert any("memory is that of a longer micro-batch (200 tokens)" in note.lower() for note in found.report.notes)
    assert found.report.rows[0].peak_memory_bytes == peak_of(200)


def test_a_measurement_of_other_data_does_not_push_out_that_of_this(bench: Bench) -> None:
    first = bench.plan(tokens_per_example=200)
    bench.plan(tokens_per_example=400)
    assert bench.starts > 0
    again = bench.plan(tokens_per_example=200)
    assert bench.starts == 0
    assert again.report.rows[0].seconds_per_step == first.report.rows[0].seconds_per_step
    assert again.report.rows[0].peak_memory_bytes == peak_of(200)  # its own, where the other's is 400
    other = bench.plan(tokens_per_example=300)  # never measured: the latest stands for it
    assert bench.starts == 0
    assert other.report.rows[0].peak_memory_bytes == peak_of(400)


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
    bench.plan(tokens_per_example=200)  # 200 MiB on this device
    bench.plan(tokens_per_example=200, facts=replace(FACTS, free_bytes=201 << 20))
    assert bench.starts == 0
    bench.plan(tokens_per_example=200, facts=replace(FACTS, free_bytes=199 << 20))
    assert bench.starts > 0


def test_a_sharper_measurement_than_the_stored_one_is_made(bench: Bench) -> None:
    bench.plan(measuring=MeasureSettings(precision_target=0.05))  # ended by precision: no noise
    bench.plan(measuring=MeasureSettings(precision_target=0.05, budget_seconds=600))
    assert bench.starts == 0
    bench.plan(measuring=MeasureSettings(precision_target=0.02))
    assert bench.starts > 0
    assert any("sharper" in line for line in bench.said)
    bench.plan(measuring=MeasureSettings(precision_target=0.05))
    assert bench.starts == 0


def test_a_measurement_that_failed_is_not_kept(bench: Bench) -> None:
    bench.device = {"broken": ("bf16",)}
    with_bf16 = replace(FACTS, supports_bf16=True)
    bench.plan(precision="bf16", facts=with_bf16)  # its fp32 reference works
    assert len(_keys(bench)) == 1
    bench.device = {}
    found = bench.plan(precision="bf16", facts=with_bf16)
    assert bench.starts > 0
    assert found.report.rows[0].seconds is not None
    assert found.report.rows[0].speed_factor == pytest.approx(2.0, rel=0.05)
    again = bench.plan(precision="bf16", facts=with_bf16)
    assert bench.starts == 0
    assert again.report.rows[0].speed_factor == found.report.rows[0].speed_factor


def test_a_stored_measurement_of_another_form_is_measured_again(bench: Bench) -> None:
    bench.plan()
    for content in ("{}", "no JSON", '{"measured_at": 3}'):
        with sqlite3.connect(bench.history.path) as db:
            db.execute("UPDATE measurements SET content = ?", (content,))
        bench.plan()
        assert bench.starts > 0


def test_the_key_of_a_hub_model_comes_from_what_was_fetched(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert reuse.model_shape("some/model") is None
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text('{"hidden_size": 8}')
    found = reuse.model_shape("some/model")
    assert found is not None
    assert found["config"] == {"hidden_size": 8}


def test_a_phase_that_the_data_never_reaches_is_said_with_the_plan(bench: Bench) -> None:
    from planner.table import measured_text

    said = "of 3 (GA 32, from step 501) is never reached: the data ends at step 7"
    report = bench.plan(names=("progressive",)).report
    assert said in (report.rows[0].note or "")
    assert said in " ".join(measured_text(report, now=NOW, width=110, ascii_only=True).split())


def test_ages_are_told_in_their_largest_unit() -> None:
    for seconds, text in (
        (-5, "0 s"),
        (59, "59 s"),
        (185, "3 min"),
        (7200, "2 h"),
        (47.5 * 3600, "47 h"),
        (9e5, "10 d"),
    ):
        assert ago(NOW, NOW + timedelta(seconds=seconds)) == f"{text} ago"


# --- corrections ------------------------------------------------------------------------------------------------------


def generations(history: History, ratio: float, count: int) -> list[float]:
    """Corrected training seconds of `count` runs, each predicted as 80 s raw and really taking 80 x ratio."""
    shown = []
    for number in range(count):
        by = past_correction(history, "k")
        shown.append(80.0 * (by.factor if by else 1.0))
        history.add_run(past_run(number, train_seconds=shown[-1], actual_train_seconds=80.0 * ratio))
    return shown


@pytest.mark.parametrize("ratio", [1.3, 0.8])
def test_corrections_converge_on_the_true_ratio_and_stay_there(tmp_path: Path, ratio: float) -> None:
    shown = generations(History(home=tmp_path), ratio, 30)
    assert shown[:3] == [80.0, 80.0, 80.0]  # from three runs on
    assert shown[3] == pytest.approx(80.0 * ratio, rel=0.02)
    assert shown[10:] == pytest.approx([80.0 * ratio] * 20, rel=0.002)


def test_right_predictions_are_left_as_they_are(tmp_path: Path) -> None:
    assert generations(History(home=tmp_path), 1.0, 30) == [80.0] * 30


def test_only_the_latest_ten_runs_of_the_same_signature_count(tmp_path: Path) -> None:
    history = History(home=tmp_path)
    for number in range(10):
        history.add_run(past_run(number, actual_train_seconds=800.0))
    for number in range(10, 20):
        history.add_run(past_run(number, actual_train_seconds=88.0))
    by = past_correction(history, "k")
    assert by is not None
    assert (by.num_runs, by.factor) == (10, pytest.approx(1.1, rel=0.005))
    assert past_correction(history, "another") is None


def test_interrupted_runs_are_listed_and_do_not_correct(tmp_path: Path) -> None:
    history = History(home=tmp_path)
    job = fakes.make_job()
    by_loss = fakes.make_job("prioritized", sampling_strategy="top", sample_score="loss", sample_ratio=0.5)
    predicted = Predicted(seconds=100.0, train_seconds=80.0, raw_train_seconds=80.0, signature_key="k")
    usual = Actual(seconds=900.0, train_seconds=800.0, num_resumes=0, micro_batch_split=1)
    cases = [
        ("finished", job, replace(usual, num_resumes=1)),
        ("finished", job, replace(usual, paused_seconds=7200.0)),
        ("stopped", job, usual),
        ("failed", job, usual),
        ("finished", job, replace(usual, micro_batch_split=2)),
        ("finished", by_loss, usual),
    ]
    for number, (status, of, actual) in enumerate(cases):
        record = RunRecord(status=status, job=of, predicted=predicted, actual=actual, versions={"torch": "2.13.0"})
        history.add_run(PastRun.of(record, Path(f"/runs/{number}"), NOW))
    assert len(history.runs()) == 6
    assert all(run.not_counted for run in history.runs())
    assert past_correction(history, "k") is None
    assert [run.error is None for run in history.runs()] == [False, False, True, True, True, True]
    for number in range(3):
        record = RunRecord(status="finished", job=job, predicted=predicted, actual=usual, versions={})
        history.add_run(PastRun.of(record, Path(f"/runs/whole-{number}"), NOW))
    by = past_correction(history, "k")
    assert by is not None
    assert by.num_runs == 3


def test_a_run_folder_has_one_entry_and_the_later_one_counts(tmp_path: Path) -> None:
    history = History(home=tmp_path)
    history.add_run(past_run(1, status="stopped"))
    history.add_run(past_run(2))
    history.add_run(past_run(1, num_resumes=1, ended_at=(NOW + timedelta(hours=9)).isoformat()))
    assert [(run.folder, run.status, run.num_resumes) for run in history.runs()] == [
        ("/runs/1", "finished", 1),
        ("/runs/2", "finished", 0),
    ]


def test_runs_that_scatter_hardly_correct_and_widen_the_range() -> None:
    alike, scattered = correction([1.3, 1.3, 1.3]), correction([1.0, 1.0, 2.2])
    assert alike is not None
    assert scattered is not None
    assert math.log(scattered.factor) < 0.5 * scattered.mean
    assert alike.half_width < 0.08
    ten = correction([1.3] * 10)
    assert ten is not None
    assert ten.half_width < 0.035
    assert scattered.half_width > math.log(2.2)
    assert correction([1.3, 1.3]) is None


def test_the_corrected_range_holds_the_next_run_as_often_as_it_says() -> None:
    """Ratios of a machine scatter by 8 % around 1.2, the measured range is far too narrow: past runs mend it."""
    draw = random.Random(3)
    raw = Estimate(
        name="x", fits=True, train_seconds=100.0, train_seconds_low=99.0, train_seconds_high=101.0,
        seconds=100.0, seconds_low=99.0, seconds_high=101.0,
    )  # fmt: skip
    for runs in (3, 10):
        held = 0
        for _ in range(1000):
            by = correction([1.2 * math.exp(draw.gauss(0, 0.08)) for _ in range(runs)])
            assert by is not None
            found = corrected(raw, by)
            assert found.train_seconds_low is not None
            assert found.train_seconds_high is not None
            held += found.train_seconds_low <= 120.0 * math.exp(draw.gauss(0, 0.08)) <= found.train_seconds_high
        assert 0.80 < held / 1000 < 0.97, runs


def test_a_correction_keeps_a_wider_measured_range_and_the_fixed_parts() -> None:
    raw = fakes_estimate()
    by = Correction(num_runs=4, mean=math.log(1.5), weight=0.5, half_width=0.01)
    found = corrected(raw, by)
    factor = math.sqrt(1.5)
    assert found.train_seconds == pytest.approx(100 * factor)
    assert found.seconds == pytest.approx(100 * factor + 7)
    assert found.train_seconds_low == pytest.approx(50 * factor)
    # Upwards it reaches as far as the unshrunk ratio would.
    assert found.train_seconds_high == pytest.approx(200 * 1.5)
    assert found.seconds_per_step == pytest.approx(10 * factor)
    assert "corrected by x1.22 from 4 runs on this machine" in found.notes


def fakes_estimate() -> Estimate:
    from planner.estimate import FixedSeconds

    return Estimate(
        name="x", fits=True, num_steps=10, seconds_per_step=10.0, train_seconds=100.0, train_seconds_low=50.0,
        train_seconds_high=200.0, fixed=FixedSeconds(load=7.0), seconds=107.0, seconds_low=57.0, seconds_high=207.0,
    )  # fmt: skip


def test_a_plan_is_corrected_by_past_runs_and_the_run_keeps_the_raw_figures(bench: Bench) -> None:
    first = bench.plan()
    key = first.past.signature_keys["baseline"]
    assert first.past.corrections == {}
    raw = first.estimates["baseline"]
    for number in range(4):
        bench.history.add_run(past_run(number, signature_key=key, actual_train_seconds=80.0 * 1.25))
    second = bench.plan()
    row = json.loads(second.report.to_json())["rows"][0]
    assert row["correction"]["num_runs"] == 4
    assert row["correction"]["factor"] == pytest.approx(1.25, rel=0.01)
    assert row["correction"]["raw_seconds"] == second.past.raw["baseline"].seconds
    assert "corrected by x1.25 from 4 runs on this machine" in measured_text(second.report, now=NOW)
    kept = predicted_of(second, second.candidates[0])
    assert kept.raw_train_seconds == raw.train_seconds
    raw = second.past.raw["baseline"]
    assert (kept.raw_seconds, kept.raw_seconds_low) == (raw.seconds, raw.seconds_low)
    assert kept.raw_seconds_high == raw.seconds_high
    assert kept.train_seconds == pytest.approx(1.25 * raw.train_seconds, rel=0.01)
    assert kept.signature_key == key
    assert kept.cost is not None
    assert raw.cost is not None
    assert kept.cost.per_token == pytest.approx(raw.cost.per_token * second.past.corrections["baseline"].factor)
    # What enters the history is the raw figure, however the run was corrected.
    record = RunRecord(
        status="finished", job=fakes.make_job(), predicted=kept, actual=Actual(train_seconds=50.0), versions={}
    )
    assert PastRun.of(record, Path("run"), NOW).raw_train_seconds == raw.train_seconds
    assert PastRun.of(record, Path("run"), NOW).train_seconds == kept.train_seconds


def test_estimates_of_older_run_folders_can_be_read() -> None:
    old = '{"seconds": 5.0, "seconds_low": 4.0, "seconds_high": 6.0, "train_seconds": 3.0, "peak_memory_bytes": 9}'
    found = jsonio.from_json(Predicted, old)
    assert (found.seconds, found.raw_seconds, found.signature_key) == (5.0, None, None)


# --- the file ---------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from planner.history import History, PastRun
home, who = Path(sys.argv[1]), sys.argv[2]
history = History(home=home)
sys.stdin.readline()  # all at once
for number in range(40):
    history.add_run(PastRun(folder=f"/{who}/{number}", ended_at="2026-01-01T00:00:00+00:00", status="finished",
                            name="baseline", model=who))
    history.keep_measurements({f"{who}-{number}": "x" * 20_000, "shared": who})
    assert history.measurements(["shared"])
assert not history.notes, history.notes
"""


def test_several_processes_write_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    home = tmp_path / "not there yet"
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(home), who],
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for who in ("one", "two", "three")
    ]  # fmt: skip
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        _, said = child.communicate(timeout=120)
        assert child.returncode == 0, said
    history = History(home=home)
    assert len(history.runs()) == 120
    assert len(history.measurements(f"{who}-{n}" for who in ("one", "two", "three") for n in range(40))) == 120
    assert history.measurements(["shared"])["shared"] in ("one", "two", "three")
    assert [path.name for path in home.iterdir()] == [FILE_NAME]


def test_a_process_that_comes_while_another_makes_the_tables_uses_those(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for statement in filter(str.strip, _SCHEMA.split(";")):
        other.execute(statement)
    other.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    other.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    history = History(home=tmp_path)
    late = threading.Thread(target=history.add_run, args=(past_run(),))
    late.start()
    time.sleep(0.2)  # it has seen that there are no tables, and waits to make them
    other.execute("COMMIT")
    other.close()
    late.join(timeout=60)
    assert not history.notes
    assert len(history.runs()) == 1


def _text(path: Path) -> None:
    path.write_text("this is no database, " * 100)


def _overwritten(path: Path) -> None:
    History(home=path.parent).add_run(past_run())
    content = bytearray(path.read_bytes())
    content[100:] = os.urandom(len(content) - 100)
    path.write_bytes(content)


def _cut(path: Path) -> None:
    history = History(home=path.parent)
    history.keep_measurements({f"key{number}": "x" * 5000 for number in range(20)})
    path.write_bytes(path.read_bytes()[:6000])


def _other_program(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE bookmarks (address TEXT)")


def _without_tables(path: Path) -> None:
    History(home=path.parent).add_run(past_run())
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE runs")
        db.execute("DROP TABLE measurements")


@pytest.mark.parametrize("spoil", [_text, _overwritten, _cut, _other_program, _without_tables])
def test_a_damaged_or_foreign_file_is_set_aside_with_a_note_that_names_it(tmp_path: Path, spoil: Any) -> None:
    path = tmp_path / FILE_NAME
    spoil(path)
    before = path.read_bytes()
    said: list[str] = []
    history = History(home=tmp_path, say=said.append)
    history.runs()
    history.measurements(["key19"])
    history.add_run(past_run(5))
    history.keep_measurements({"key": "content"})
    assert [run.folder for run in history.runs()] == ["/runs/5"]
    assert history.measurements(["key"]) == {"key": "content"}
    [aside] = [other for other in tmp_path.iterdir() if other.name != FILE_NAME]
    assert aside.read_bytes() == before
    [note] = said
    assert str(path) in note
    assert aside.name in note


def test_a_new_file_is_not_set_aside_for_the_damage_of_the_one_before_it(tmp_path: Path) -> None:
    """Two processes find the same damage: the second must not take away what the first has begun."""
    _text(tmp_path / FILE_NAME)
    found_by_both = _identity(tmp_path / FILE_NAME)
    first, second = History(home=tmp_path), History(home=tmp_path)
    first.add_run(past_run())
    second._set_aside(found_by_both, "it is damaged")
    assert len(second.runs()) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    history = History(home=tmp_path)
    history.add_run(past_run())
    with sqlite3.connect(history.path) as db:
        db.execute("PRAGMA user_version = 99")
    before = history.path.read_bytes()
    history.add_run(past_run(2))
    assert history.runs() == []
    assert history.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    [note] = history.notes
    assert "later version" in note


def test_a_home_that_cannot_be_used_is_a_note_and_no_error(tmp_path: Path, bench: Bench) -> None:
    (tmp_path / "file").write_text("")
    history = History(home=tmp_path / "file" / "home")
    history.add_run(past_run())
    history.keep_measurements({"key": "content"})
    assert history.runs() == []
    assert len(history.notes) == 1
    bench.home = tmp_path / "file" / "home"
    assert bench.plan().report.rows[0].seconds is not None


def test_a_file_that_another_process_holds_is_waited_for_and_not_set_aside(tmp_path: Path, monkeypatch: Any) -> None:
    assert BUSY_SECONDS >= 5
    monkeypatch.setattr("planner.history.BUSY_SECONDS", 0.05)
    history = History(home=tmp_path)
    history.add_run(past_run(1))
    with sqlite3.connect(history.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        assert len(history.runs()) == 1
        history.add_run(past_run(2))
        assert "locked" in history.notes[0]
        other.execute("COMMIT")
    history.add_run(past_run(2))
    assert len(history.runs()) == 2
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_old_measurements_go_when_there_are_too_many(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("planner.history.MOST_MEASUREMENTS", 3)
    history = History(home=tmp_path)
    for number in range(5):
        history.keep_measurements({f"key{number}": "x"})
    assert sorted(history.measurements(f"key{number}" for number in range(5))) == ["key2", "key3", "key4"]


# --- plan history -----------------------------------------------------------------------------------------------------


def test_the_accuracy_is_that_of_all_runs_that_finished_without_interruption() -> None:
    runs = [past_run(number, actual_seconds=100.0 + change) for number, change in enumerate([0, 2, -4, 8, 50])]
    runs += [past_run(7, actual_seconds=9e9, num_resumes=1), past_run(8, actual_seconds=1.0, status="stopped")]
    found = accuracy(runs)
    assert found is not None
    assert (found.num_runs, found.num_inside, found.num_with_range) == (5, 4, 5)
    assert found.median_absolute == pytest.approx(0.04)
    assert found.percentile_90_absolute == pytest.approx(0.08 + 0.6 * 0.42)
    assert found.worst == pytest.approx(0.5)
    assert found.median == pytest.approx(0.02)
    # Wilson (1927) for 4 of 5.
    assert (found.inside_low, found.inside_high) == (pytest.approx(0.3755, abs=1e-3), pytest.approx(0.9638, abs=1e-3))
    assert "4 of 5" in accuracy_text(found)
    assert accuracy(runs[5:]) is None
    assert accuracy_text(None) == "no finished runs yet"


def test_wilsons_interval_at_its_ends() -> None:
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-3))
    assert wilson(10, 10) == (pytest.approx(0.7225, abs=1e-3), pytest.approx(1.0))


def test_names_from_outside_cannot_write_to_the_terminal() -> None:
    text = runs_text([past_run(model="/models/\x1b[2Jevil\n", name="a\x07b", status="finished")], NOW)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert len(text.splitlines()) == 3
    assert r"\x1b[2Jevil\n" in text


def test_runs_that_cannot_be_compared_are_marked() -> None:
    lines = runs_text([past_run(1), past_run(2, num_resumes=1), past_run(3, status="stopped")], NOW).splitlines()
    assert "+30.0%" in lines[2]
    assert "NO" in lines[2]
    assert "resumed" in lines[3]
    assert "%" not in lines[3]
    assert "stopped" in lines[4]
    [first, second, _] = json.loads(runs_json([past_run(1), past_run(2, num_resumes=1), past_run(3)]))["runs"]
    assert (first["error"], first["inside"]) == (pytest.approx(0.3), False)
    assert (second["error"], second["inside"]) == (None, None)


def test_a_run_that_stood_still_in_between_is_not_compared_with_its_prediction() -> None:
    from planner.history import PAUSED

    assert past_run(1).error == pytest.approx(0.3)
    assert past_run(1, actual_seconds=9000.0, not_counted=PAUSED).error is None


def test_plan_history_lists_a_thousand_runs_newest_first(tmp_path: Path) -> None:
    assert plan("history", cwd=tmp_path).stdout == "no finished runs yet\n"
    assert plan("history", "--accuracy", cwd=tmp_path).stdout == "no finished runs yet\n"
    history = History()
    history.add_run(past_run())
    with sqlite3.connect(history.path) as db:  # one transaction: a disk that syncs a thousand times is not the point
        names = [name for name in PastRun.__dataclass_fields__ if name != "folder"]
        columns = ", ".join(names)
        stamp = columns.replace("ended_at", "strftime('%Y-%m-%dT%H:%M:%S+00:00', '2027-01-01', '+' || n || ' hours')")
        db.execute(
            f"WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 999) "
            f"INSERT INTO runs (folder, {columns}) SELECT '/more/' || n, {stamp} FROM runs, c"
        )
    everything = plan("history", "--limit", "2000", "--json", cwd=tmp_path, timeout=60)
    runs = json.loads(everything.stdout)["runs"]
    assert len(runs) == 1000
    assert [run["folder"] for run in runs[:2]] == ["/more/999", "/more/998"]
    assert runs[-1]["folder"] == "/runs/0"
    assert len(plan("history", cwd=tmp_path).stdout.splitlines()) == 22
    assert len(plan("history", "--limit", "3", cwd=tmp_path).stdout.splitlines()) == 5
    found = json.loads(plan("history", "--accuracy", "--json", cwd=tmp_path).stdout)["accuracy"]
    assert (found["num_runs"], found["num_inside"]) == (1000, 0)
    assert found["median"] == pytest.approx(0.3)
    assert "0 of 1,000" in plan("history", "--accuracy", cwd=tmp_path).stdout
    refused(plan("history", "--limit", "0", cwd=tmp_path), "0", code=2)


WITHOUT_TORCH = """
import sys
sys.argv = ['plan', *sys.argv[1:]]
from planner.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {'torch', 'transformers', 'tokenizers', 'peft', 'accelerate', 'datasets', 'pyarrow', 'pandas', 'scipy'}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_measure_once_then_plan_without_torch_and_run_from_the_measurement(
    tmp_path: Path, tiny_model: Path, chat_file: Path, preloaded: None
) -> None:
    """The chain on a real model: measured, answered from the cache by a light process, run from it, and in the list."""
    options = ["--model", str(tiny_model), "--dataset", str(chat_file), "--gradient-accumulation-steps", "8"]
    timing = ["--budget", "1", "--preset", "baseline", "--preset", "recommended", "--json"]
    first = plan(*options, *timing, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    rows = {row["name"]: row for row in json.loads(first.stdout)["rows"]}
    assert {row["basis"] for row in rows.values()} == {"measured"}
    result = subprocess.run(
        [PYTHON, "-P", "-c", WITHOUT_TORCH, *options, *timing],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": PLAN_ROOT},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert re_measured(result.stderr)
    for row in json.loads(result.stdout)["rows"]:
        assert row["basis"] == "cached"
        assert row["seconds_per_step"] == rows[row["name"]]["seconds_per_step"]
    assert (tmp_path / "run").exists() is False

    ran = plan("--run", "recommended", *options, "--budget", "1", "--output", "run", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert re_measured(ran.stderr)
    assert "on this device, not now: recommended" in ran.stdout
    [entry] = json.loads(plan("history", "--json", cwd=tmp_path).stdout)["runs"]
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert entry["folder"] == str(tmp_path / "run")
    assert (
        entry["raw_train_seconds"] == record["predicted"]["raw_train_seconds"] == record["predicted"]["train_seconds"]
    )
    assert entry["actual_seconds"] == record["actual"]["seconds"]
    assert (entry["status"], entry["not_counted"], entry["num_examples"]) == ("finished", None, 72)
    assert entry["signature_key"]
    assert "1 run(s)" in plan("history", "--accuracy", cwd=tmp_path).stdout
    assert "recommended" in plan("history", cwd=tmp_path).stdout
    (Path(os.environ["PLAN_HOME"]) / FILE_NAME).unlink()
    assert plan("--resume", "run", cwd=tmp_path).returncode == 0
    assert json.loads(plan("history", "--json", cwd=tmp_path).stdout)["runs"] == [entry]


PLAN_ROOT = str(Path(__file__).resolve().parent.parent)


def re_measured(stderr: str) -> bool:
    return " ago on this machine; --fresh measures again" in stderr
