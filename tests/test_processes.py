"""Two processes through Accelerate's launcher, against one process with the same global batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner import launch
from planner.launch import check_accelerate_config, command
from presets.errors import SettingsError
from trainer.batching import BatchPlan
from trainer.job import EvaluationSpec, Job
from trainer.record import RunRecord

launched = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="torch's launcher needs libuv on Windows"),
]

# 24 held-out chats: more than one batch, so that both processes have a share of the evaluation.
EVALUATION = EvaluationSpec(minimum=24, num_samples=1, max_new_tokens=4)
# Global batch 8 as 2 x 2 x 2. Of the 56 chats that are not held out 49 = 6 x 8 + 1 are used: the last window has one
# micro-batch with a row and an empty one, on the second process.
SAME = {"gradient_accumulation_steps": 8, "micro": 2, "sample_size": 49, "evaluation": EVALUATION}


def start(run: Path, *, resume: bool = False, log: Path | None = None) -> subprocess.Popen[bytes]:
    job = Job.read(run / "job.json")
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with open(log or run.with_suffix(".log"), "ab") as output:
        return subprocess.Popen(
            command(run, job, resume=resume), env=environment, stdout=output, stderr=subprocess.STDOUT
        )


def train(run: Path, *, resume: bool = False) -> RunRecord:
    code = start(run, resume=resume).wait(timeout=120)
    assert code == 0, run.with_suffix(".log").read_text()
    return RunRecord.read(run / "record.json")


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(run: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return dict(load_file(run / "adapter" / "adapter_model.safetensors"))


def assert_same_adapter(one: Path, other: Path, tolerance: float) -> None:
    expected, found = adapter(one), adapter(other)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        difference = np.linalg.norm(found[name] - values) / np.linalg.norm(values)
        assert difference < tolerance, f"{name}: {difference}"


@pytest.fixture
def hostile_default_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own default configuration of Accelerate, which must not reach a run that did not ask for it."""
    home = tmp_path / "hf-home"
    (home / "accelerate").mkdir(parents=True)
    (home / "accelerate" / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nno_such_key: 1\nnum_processes: 7\n"
    )
    monkeypatch.setenv("HF_HOME", str(home))


@pytest.mark.usefixtures("hostile_default_config")
class TestTwoProcesses:
    pytestmark = launched

    def test_they_give_the_losses_the_adapter_and_the_record_of_one(self, make_run: Any) -> None:
        from trainer.loop import train as train_here

        one, two = make_run("one", **SAME), make_run("two", num_devices=2, **SAME)
        alone, together = train_here(one), train(two)
        plan = BatchPlan.load(two / "batch_plan.npz")
        assert plan.num_devices == 2
        last = range(int(plan.window_offsets[-2]), int(plan.window_offsets[-1]))
        assert [len(plan.rows_of_micro_batch(micro)) for micro in last] == [1, 0]
        ours, theirs = metrics(two), metrics(one)
        assert [line["step"] for line in ours] == list(range(1, 8))
        for name in ("loss", "grad_norm"):
            assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-4)
        assert [line["learning_rate"] for line in ours] == [line["learning_rate"] for line in theirs]
        assert_same_adapter(one, two, 1e-5)
        assert alone is not None
        counts = ("num_steps", "num_examples", "num_tokens", "applied_steps", "skipped_steps", "best_step")
        assert {name: getattr(together.actual, name) for name in counts} == {
            name: getattr(alone.actual, name) for name in counts
        }
        assert together.actual.num_examples == 49
        for name in ("train_loss", "eval_loss_before", "eval_loss_after", "best_eval_loss"):
            assert getattr(together.actual, name) == pytest.approx(getattr(alone.actual, name), rel=1e-4)

    def test_sigterm_to_the_launcher_stops_both_with_a_checkpoint_and_a_resume_ends_the_same(
        self, make_run: Any
    ) -> None:
        changes = {**SAME, "num_devices": 2, "num_epochs": 12, "lora_dropout": 0.1}
        whole, stopped = make_run("whole", **changes), make_run("stopped", **changes)
        train(whole)
        launcher = start(stopped)
        log = stopped / "metrics.jsonl"
        deadline = time.monotonic() + 90
        while not log.is_file() or log.read_text().count("\n") < 3:
            assert launcher.poll() is None, stopped.with_suffix(".log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=60) != 0
        record = RunRecord.read(stopped / "record.json")
        assert record.status == "stopped", stopped.with_suffix(".log").read_text()
        done = record.actual.num_steps
        assert 3 <= done < 84
        newest = sorted((stopped / "checkpoints").glob("step-*"))[-1]
        assert newest.name == f"step-{done:06d}"
        resumed = train(stopped, resume=True)
        assert resumed.actual.num_steps == 84
        assert [line["step"] for line in metrics(stopped)] == list(range(1, 85))
        # A sum of two gradients has no order that could differ: the same bytes, as on one process.
        ours, theirs = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (stopped, whole)]
        assert ours == theirs


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_an_accelerate_configuration_that_asks_for_what_is_not_tested_is_refused(
    make_job: Any, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(f"compute_environment: LOCAL_MACHINE\ndistributed_type: {kind}\nnum_processes: 2\n")
    for job in (make_job(), make_job(num_devices=2)):
        with pytest.raises(SettingsError, match=f"asks for distributed_type {kind}, which is not supported") as caught:
            command(tmp_path, job, accelerate_config=path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), ("a: [1", "cannot be read"), ("- 1\n", "is not an Accelerate conf"), ("", "is not an")],
)
def test_an_accelerate_configuration_that_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, content: str | None, reason: str
) -> None:
    path = tmp_path / "accelerate.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match=reason) as caught:
        check_accelerate_config(path)
    assert "\n" not in str(caught.value)


def test_an_ordinary_accelerate_configuration_is_passed_on(make_job: Any, tmp_path: Path) -> None:
    path = tmp_path / "accelerate.yaml"
    for kind in ("NO", "'NO'", "MULTI_GPU", "MULTI_CPU"):
        path.write_text(f"distributed_type: {kind}\ngpu_ids: 0,1\n")
        argv = command(tmp_path, make_job(num_devices=2), accelerate_config=path)
        assert argv[argv.index("--config_file") + 1] == str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not pass signals on")
@pytest.mark.parametrize(("is_launcher", "expected"), [(True, 143), (False, 1)])
def test_a_launcher_that_was_told_to_stop_counts_as_stopped_and_not_as_failed(is_launcher: bool, expected: int) -> None:
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        "time.sleep(1)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(20)\n"
    )
    assert launch.start([sys.executable, "-c", code, *([launch.LAUNCHER] if is_launcher else [])]) == expected
