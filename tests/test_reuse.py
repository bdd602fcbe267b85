"""What an earlier measurement may answer for, and what it may not."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from planned import DISK, FACTS, NOW, Bench, learnt_from, peak_of
from small_models import random_data

from planner import keys, reuse
from planner.candidates import MeasureSettings
from planner.figures import ago
from planner.keys import Keys
from planner.measure import measure
from planner.scratch import place_for
from planner.stored import Sharpness, keep
from planner.table import measured_text
from presets.schema import parse_preset
from trainer.batching import BatchPlan
from trainer.tokens import TokenizedDataset


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


def test_a_table_from_the_history_goes_over_each_plan_and_the_data_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("baseline", "recommended", "aggressive", "progressive", "prioritized")
    first = bench.plan(names=names)
    went_over: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        plain = getattr(owner, name)

        def counted(self: Any, *given: Any) -> Any:
            went_over[name] += 1
            return plain(self, *given)

        monkeypatch.setattr(owner, name, counted)

    count(BatchPlan, "micro_shapes")
    count(TokenizedDataset, "_count_supervised")
    parse_preset.cache_clear()
    found = bench.plan(names=names)
    assert bench.starts == 0
    plans = {id(one.planned.plan) for one in found.candidates if one.planned is not None}
    assert len(plans) == len(names)
    assert went_over == {"micro_shapes": len(plans), "_count_supervised": 1}
    assert parse_preset.cache_info().misses == len(names)
    seconds = [(one.train_seconds, one.train_seconds_high) for one in first.estimates.values()]
    assert [(one.train_seconds, one.train_seconds_high) for one in found.estimates.values()] == seconds


def test_a_table_from_the_history_imports_nothing_that_measures() -> None:
    heavy = ("torch", "transformers", "planner.measure", "planner.memory", "planner.decks", "planner.tune")
    code = f"import sys, planner.compare, planner.table\nprint([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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


def test_a_checkpoint_that_was_timed_on_another_disk_is_timed_again(bench: Bench, monkeypatch: Any) -> None:
    """Also where each disk comes again: one measurement does not push out the other."""
    for disk, is_new in (("ssd", True), ("usb", True), ("ssd", False), ("usb", False)):
        monkeypatch.setattr("planner.scratch.disk_of", lambda folder, disk=disk: disk)
        bench.plan()
        assert bool(bench.starts) == is_new, disk


def test_other_versions_other_code_and_another_model_are_measured(bench: Bench, monkeypatch: Any) -> None:
    def key() -> str | None:
        job = fakes.make_job(model=str(bench.model))
        return Keys(FACTS).of_measurement(job, place_for(None).disk)

    bench.plan()
    assert key() in _keys(bench)
    version, digest = keys._version, keys._source_digest
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "training-planner"):
        with monkeypatch.context() as patched:
            patched.setattr(keys, "_version", lambda of, name=name: "0.0.0" if of == name else version(of))
            assert key() not in _keys(bench)
    with monkeypatch.context() as patched:
        patched.setattr(keys, "_source_digest", lambda sources: digest(sources) + "x")
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


def test_what_is_said_of_a_row_is_said_of_the_row_that_stands_there_now(bench: Bench) -> None:
    asked = Sharpness(budget_seconds=60.0, precision_target=0.02)
    data = fakes.make_data(np.full(400, 100))
    device = fakes.FakeDevice(data.lengths)
    plain = fakes.make_job(model=str(bench.model))
    checkpointed = fakes.make_job(model=str(bench.model), preset=replace(plain.preset, gradient_checkpointing=True))
    rows = [fakes.make_row(plain, data, name="one"), fakes.make_row(checkpointed, data, name="two, tuned")]
    found = measure(rows, data, device.factory, clock=device.clock)
    found = replace(
        found,
        notes=("one: a note: of it", "two, tuned: another", "one, two, tuned: of both", "the configurations: of all"),
        warnings=("two, tuned: the budget was spent",),
    )
    made = Keys(FACTS)
    keep(bench.history, made, rows, data, found, asked, NOW, DISK)
    alone = reuse.reuse(bench.history, made, [fakes.make_row(plain, data, name="three")], data, asked, DISK)
    assert isinstance(alone, reuse.Reused)
    told = ("three: a note: of it", "one, two, tuned: of both", "the configurations: of all")
    assert alone.measurements.notes == told
    assert alone.measurements.warnings == ()
    both = reuse.reuse(bench.history, made, rows, data, asked, DISK)
    assert isinstance(both, reuse.Reused)
    assert set(both.measurements.notes) == set(found.notes)
    assert both.measurements.warnings == found.warnings


def test_packed_rows_that_share_another_beginning_are_measured(bench: Bench) -> None:
    made, asked = Keys(FACTS), Sharpness(budget_seconds=60.0, precision_target=0.02)
    plain = fakes.make_job(model=str(bench.model))
    packed = replace(plain, packing=True, packed_length=128)
    data = {size: random_data([50] * 60, beginning=size) for size in (30, 31)}

    def rows(size: int, *jobs: Any) -> list[Any]:
        return [fakes.make_row(job, data[size], name=f"{number}") for number, job in enumerate(jobs)]

    device = fakes.FakeDevice(data[30].lengths)
    both = rows(30, plain, packed)
    found = measure(both, data[30], device.factory, clock=device.clock)
    keep(bench.history, made, both, data[30], found, asked, NOW, DISK)

    def is_reused(size: int, *jobs: Any) -> bool:
        got = reuse.reuse(bench.history, made, rows(size, *jobs), data[size], asked, DISK)
        return isinstance(got, reuse.Reused)

    assert is_reused(30, plain, packed)
    assert is_reused(30, plain)  # alone too, as a run asks for it
    assert is_reused(30, packed)
    assert is_reused(31, plain)  # rows of one example hold it in any case
    assert not is_reused(31, packed)
    assert not is_reused(30, replace(packed, packed_length=120))


def test_every_module_that_a_step_is_made_of_counts_as_timed_code() -> None:
    """A part of the step left out of the list would let old measurements stand for new code."""
    import ast
    from importlib import resources

    from planner.keys import TIMED_SOURCES

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


def test_a_measurement_of_other_data_does_not_push_out_that_of_this(bench: Bench) -> None:
    first = bench.plan(tokens_per_example=200)
    bench.plan(tokens_per_example=400)
    assert bench.starts > 0
    again = bench.plan(tokens_per_example=200)
    assert bench.starts == 0
    assert again.report.rows[0].seconds_per_step == first.report.rows[0].seconds_per_step
    assert again.report.rows[0].peak_memory_bytes == pytest.approx(
        peak_of(200), rel=1e-3
    )  # its own, where the other's is 400
    other = bench.plan(tokens_per_example=300)  # never measured: the latest stands for it
    assert bench.starts == 0
    assert other.report.rows[0].peak_memory_bytes == pytest.approx(peak_of(400), rel=1e-3)


@pytest.mark.parametrize(
    ("loss", "refused", "share", "is_reused"),
    [
        ("plain", None, 0.60, True),
        ("plain", None, 0.70, False),
        ("lean", None, 0.44, True),
        ("lean", None, 0.50, False),
        ("lean", None, 0.30, False),
        ("lean", "it differs", 0.60, True),  # the plain one was timed
    ],
)
def test_timings_stand_for_data_of_which_about_as_much_is_learnt_from(
    bench: Bench, loss: str, refused: str | None, share: float, is_reused: bool
) -> None:
    """From the loss's time on completions alone does not follow that on whole texts."""
    made, asked = Keys(FACTS), Sharpness(budget_seconds=60.0, precision_target=0.02)
    job = fakes.make_job(model=str(bench.model), loss=loss)
    measured, data = learnt_from(0.4), learnt_from(share)
    device = fakes.FakeDevice(measured.lengths)
    rows = [fakes.make_row(job, measured)]
    found = measure(rows, measured, device.factory, clock=device.clock)
    (one,) = found.measurements
    assert one.load is not None
    found = replace(found, measurements=(replace(one, load=replace(one.load, lean_refused=refused)),))
    keep(bench.history, made, rows, measured, found, asked, NOW, DISK)
    again = reuse.reuse(bench.history, made, rows, measured, asked, DISK)
    assert isinstance(again, reuse.Reused)  # its own
    other = reuse.reuse(bench.history, made, [fakes.make_row(job, data)], data, asked, DISK)
    assert isinstance(other, reuse.Reused) == is_reused
    if not is_reused:
        assert f"{share:.0%} of the tokens are learnt from, and of those that were timed 40%" in str(other)


def test_each_of_the_plans_that_were_timed_together_is_answered_whatever_the_others_learn_from(bench: Bench) -> None:
    """The mean over all of them lies far from the share of one that trains on the best messages alone."""
    made, asked = Keys(FACTS), Sharpness(budget_seconds=60.0, precision_target=0.02)
    data = fakes.make_data(np.full(400, 100))
    example, place = np.divmod(np.arange(len(data.token_ids)), 100)
    learnt = place >= np.where(example < 300, 80, 10)  # 20 % of most, 90 % of the best
    data = replace(data, supervised=learnt, engagement=np.arange(400.0))
    plain = fakes.make_job(model=str(bench.model), loss="lean")
    best = fakes.make_job(model=str(bench.model), loss="lean", sampling_strategy="top", sample_size=90)
    rows = [fakes.make_row(plain, data, "all"), fakes.make_row(best, data, "best")]
    device = fakes.FakeDevice(data.lengths)
    found = measure(rows, data, device.factory, clock=device.clock)
    keep(bench.history, made, rows, data, found, asked, NOW, DISK)
    for some in (rows, rows[:1], rows[1:]):
        assert isinstance(reuse.reuse(bench.history, made, some, data, asked, DISK), reuse.Reused)
    for share, is_reused in ((0.93, True), (0.34, True), (0.60, True), (0.99, False), (0.30, False)):
        other = learnt_from(share)
        answer = reuse.reuse(bench.history, made, [fakes.make_row(plain, other)], other, asked, DISK)
        assert isinstance(answer, reuse.Reused) is is_reused, share
        assert is_reused or "of those that were timed 38% to 90%" in str(answer)


def test_a_sharper_measurement_than_the_stored_one_is_made(bench: Bench) -> None:
    bench.plan(measuring=MeasureSettings(precision_target=0.05))  # ended by precision: no noise
    bench.plan(measuring=MeasureSettings(precision_target=0.05, budget_seconds=600))
    assert bench.starts == 0
    bench.plan(measuring=MeasureSettings(precision_target=0.02))
    assert bench.starts > 0
    assert any("sharper" in line for line in bench.said)
    bench.plan(measuring=MeasureSettings(precision_target=0.05))
    assert bench.starts == 0


def test_the_budget_that_is_advised_is_that_of_all_rows_that_share_it(bench: Bench, tmp_path: Path) -> None:
    """Rows of another maximum length have data of their own, and get half of it."""
    bench.device = {"noise": 0.06, "base": 1.0}
    other = tmp_path / "short.toml"
    written = resources.files("presets").joinpath("baseline.toml").read_text(encoding="utf-8")
    other.write_text(re.sub(r"max_length = [0-9]+", "max_length = 64", written))

    def advised(budget: float, *names: str) -> int:
        asked = MeasureSettings(budget_seconds=budget, fresh=True)
        note = bench.plan(names=names, measuring=asked).report.rows[0].note or ""
        return int(note.partition("--fresh --budget ")[2].partition(",")[0])

    assert advised(60, "baseline", str(other)) == pytest.approx(2 * advised(30, "baseline"), abs=10)


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
    assert keys.model_shape("some/model") is None
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text('{"hidden_size": 8}')
    found = keys.model_shape("some/model")
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
