"""Two processes through Accelerate's launcher, against one process with the same global batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
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

PYTHON = sys.executable  # itself, where a test is about how processes start and end

launched = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="torch's launcher needs libuv on Windows"),
]

# 24 held-out chats: more than one batch, so that both processes have a share of the evaluation.
EVALUATION = EvaluationSpec(minimum=24, num_samples=1, max_new_tokens=4)
# Global batch 8 as 2 x 2 x 2. Of the 56 chats that are not held out 49 = 6 x 8 + 1 are used: the last window has one
# micro-batch with a row and an empty one, on the second process.
SAME = {"gradient_accumulation_steps": 8, "micro": 2, "sample_size": 49, "evaluation": EVALUATION}


# What a process runs in place of `python -m trainer` where one of them is to have an accident. Each appends the rows of
# its micro-steps to a file of its own.
WITH_ACCIDENT = """
import os, signal, sys
from pathlib import Path
from trainer import __main__ as entry, loop, window

rank, run = int(os.environ["RANK"]), Path(sys.argv[1]).parent
real, count = loop.steps.micro_step, 0

def micro_step(stepper, batch, *, scale):
    global count
    count += 1
    with open(run / f"micro-steps-{{rank}}", "a") as file:
        file.write(f"{{len(batch.input_ids)}}\\n")
    if rank == 1:
{accident}
    return real(stepper, batch, scale=scale)

loop.steps.micro_step = micro_step
window.ASK_SECONDS = {ask_seconds}
sys.exit(entry.main())
"""


def start(
    run: Path, *, resume: bool = False, accident: str | None = None, ask_seconds: float = 5.0
) -> subprocess.Popen[bytes]:
    argv = command(run, Job.read(run / "job.json"), resume=resume)
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    if accident is not None:
        folder = run.with_suffix(".code")
        folder.mkdir()
        code = WITH_ACCIDENT.format(accident=textwrap.indent(accident, " " * 8), ask_seconds=ask_seconds)
        (folder / "accident.py").write_text(code)
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")])
        argv[argv.index("--module") + 1] = "accident"
    with open(run.with_suffix(".log"), "ab") as output:
        return subprocess.Popen(argv, env=environment, stdout=output, stderr=subprocess.STDOUT)


def ended(launcher: subprocess.Popen[bytes]) -> int:
    """The launcher's exit code; one that hangs is ended with its processes."""
    try:
        return launcher.wait(timeout=120)
    except subprocess.TimeoutExpired:
        launcher.terminate()
        launcher.wait(timeout=60)  # it kills those that do not leave within 30 s
        raise


def train(run: Path, *, resume: bool = False, accident: str | None = None) -> RunRecord:
    code = ended(start(run, resume=resume, accident=accident))
    assert code == 0, run.with_suffix(".log").read_text()
    return RunRecord.read(run / "record.json")


def micro_steps(run: Path, rank: int) -> list[int]:
    """Rows of each micro-step that a process began."""
    return [int(line) for line in (run / f"micro-steps-{rank}").read_text().split()]


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
@pytest.mark.usefixtures("preloaded")
class TestTwoProcesses:
    pytestmark = launched

    def test_they_give_the_losses_the_adapter_and_the_record_of_one(
        self, make_run: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from trainer.loop import train as train_here

        monkeypatch.setattr(sys, "executable", PYTHON)  # once from nothing, as a user's launcher starts them

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
        # Nothing random was drawn, so these are the seeds: the same on both would leave out the same in dropout.
        from safetensors.numpy import load_file

        states = load_file(two / "checkpoints" / "step-000007" / "random.safetensors")
        assert not np.array_equal(states["cpu.0"], states["cpu.1"])

    def test_full_fine_tuning_gives_the_model_of_one(self, make_run: Any) -> None:
        from safetensors.numpy import load_file

        from trainer.loop import train as train_here

        changes = {**SAME, "adapter": "full", "sample_size": 24, "learning_rate": 1e-4}
        one, two = make_run("one", **changes), make_run("two", num_devices=2, **changes)
        train_here(one)
        train(two)
        assert [line["grad_norm"] for line in metrics(two)] == pytest.approx(
            [line["grad_norm"] for line in metrics(one)], rel=1e-4
        )
        expected, found = (load_file(run / "model" / "model.safetensors") for run in (one, two))
        assert expected.keys() == found.keys()
        for name, values in expected.items():
            assert np.linalg.norm(found[name] - values) < 1e-5 * np.linalg.norm(values), name

    def test_sigterm_to_the_launcher_stops_both_with_a_checkpoint_and_a_resume_ends_the_same(
        self, make_run: Any
    ) -> None:
        changes = {**SAME, "num_devices": 2, "num_epochs": 5, "lora_dropout": 0.1}
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
        assert ended(launcher) != 0
        record = RunRecord.read(stopped / "record.json")
        assert record.status == "stopped", stopped.with_suffix(".log").read_text()
        done = record.actual.num_steps
        assert 3 <= done < 35
        newest = sorted((stopped / "checkpoints").glob("step-*"))[-1]
        assert newest.name == f"step-{done:06d}"
        resumed = train(stopped, resume=True)
        assert resumed.actual.num_steps == 35
        assert [line["step"] for line in metrics(stopped)] == list(range(1, 36))
        # A sum of two gradients has no order that could differ: the same bytes, as on one process.
        ours, theirs = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (stopped, whole)]
        assert ours == theirs

    def test_when_one_runs_out_of_memory_all_halve_and_the_weights_are_those_of_an_undisturbed_run(
        self, make_run: Any
    ) -> None:
        from trainer.loop import train as train_here

        # Windows of 16 as 4 x 2 x 2. The second process fails in its second micro-step of the second window, when
        # gradients are already there on both.
        changes = {"micro": 4, "gradient_accumulation_steps": 16, "evaluation": EVALUATION}
        whole, run = make_run("whole", **changes), make_run("run", num_devices=2, **changes)
        train_here(whole)
        record = train(run, accident="if count == 4:\n    raise RuntimeError('CUDA out of memory. Tried to allocate')")
        assert_same_adapter(whole, run, 1e-5)
        ours, theirs = [[line["loss"] for line in metrics(folder)] for folder in (run, whole)]
        assert ours == pytest.approx(theirs, rel=1e-4)
        # 56 examples: windows of 16, 16, 16 and 8. Two of four rows, then one of four and the one that fails (or is
        # thrown away); from the second window's start again, everything in halves.
        for rank in (0, 1):
            assert micro_steps(run, rank) == [4] * 4 + [2] * 10
        assert record.actual.micro_batch_split == 2
        assert any("step 2: out of memory; micro-batches of 4 are now executed as 2" in note for note in record.notes)
        newest = sorted((run / "checkpoints").glob("step-*"))[-1]
        assert json.loads((newest / "state.json").read_text())["progress"]["split"] == 2

    def test_when_one_has_no_memory_at_micro_batch_one_all_stop_and_the_record_says_why(self, make_run: Any) -> None:
        run = make_run("run", num_devices=2, micro=1, gradient_accumulation_steps=8, evaluation=EVALUATION)
        launcher = start(run, accident="if count == 6:\n    raise MemoryError")
        assert ended(launcher) == 1
        record = RunRecord.read(run / "record.json")
        assert record.status == "failed"
        assert record.error is not None
        assert record.error.startswith("step 2: out of memory at micro-batch 1. What helps: a shorter")

    def test_an_error_of_one_ends_the_run_instead_of_leaving_the_other_waiting(self, make_run: Any) -> None:
        run = make_run("run", num_devices=2, micro=1, gradient_accumulation_steps=8, evaluation=EVALUATION)
        launcher = start(run, accident="if count == 6:\n    raise ValueError('a defect')")
        assert ended(launcher) == 1
        assert "a defect" in run.with_suffix(".log").read_text()
        assert [line["step"] for line in metrics(run)] == [1]

    def test_a_signal_to_one_stops_all_within_the_window_and_a_resume_ends_the_same(self, make_run: Any) -> None:
        # Windows of 28 micro-steps a process: the end of one would be far too late. Two of them: the first has rate 0.
        changes = {
            "num_devices": 2,
            "micro": 1,
            "gradient_accumulation_steps": 56,
            "num_epochs": 2,
            "lora_dropout": 0.1,
            "evaluation": EVALUATION,
        }
        whole, stopped = make_run("whole", **changes), make_run("stopped", **changes)
        train(whole)
        accident = "if count == 5:\n    os.kill(os.getpid(), signal.SIGTERM)"
        launcher = start(stopped, accident=accident, ask_seconds=0.0)  # after every micro-step
        assert ended(launcher) != 0
        record = RunRecord.read(stopped / "record.json")
        assert record.status == "stopped", stopped.with_suffix(".log").read_text()
        assert record.actual.num_steps == 0
        assert [len(micro_steps(stopped, rank)) for rank in (0, 1)] == [5, 5]
        assert (stopped / "checkpoints" / "step-000000").is_dir()
        train(stopped, resume=True)
        norms = [[line["grad_norm"] for line in metrics(run)] for run in (stopped, whole)]
        assert norms[0] == norms[1]
        ours, theirs = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (stopped, whole)]
        assert ours == theirs


def test_news_are_exchanged_about_every_five_seconds_and_more_seldom_only_by_degrees() -> None:
    from trainer.window import next_interval

    assert next_interval(1, 0.001) == 2
    assert next_interval(64, 0.1) == 50  # 5 s of them
    assert next_interval(50, 2.0) == 2
    assert next_interval(8, 40.0) == 1
    assert next_interval(8, 0.0) == 16


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
    [
        (None, "No such file"),
        (b"a: [1", "cannot be read"),
        (b"a: \xff", "cannot be read"),
        (b"- 1\n", "is not an Accelerate conf"),
        (b"", "is not an Accelerate conf"),
        (b"compute_environment: AMAZON_SAGEMAKER\n", "compute_environment AMAZON_SAGEMAKER; only LOCAL_MACHINE"),
    ],
)
def test_an_accelerate_configuration_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "accelerate.yaml"
    if content is not None:
        path.write_bytes(content)
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
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)])
@pytest.mark.parametrize(
    ("is_launcher", "ending", "expected"),
    [
        (True, "sys.exit(1)", None),  # torch's launcher ends with 1 when its processes were stopped
        (True, "os.kill(os.getpid(), signal.SIGKILL)", None),
        (True, "os._exit(0)", 0),  # the run came to its end all the same
        (False, "sys.exit(1)", 1),
        (False, "os._exit(128 + number)", None),
        (False, "os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
)
def test_a_run_that_was_told_to_stop_ends_with_its_signals_code(
    is_launcher: bool, ending: str, expected: int | None, number: int
) -> None:
    code = (
        "import os, signal, sys, time\n"
        f"def end(number, _):\n    {ending}\n"
        f"signal.signal({int(number)}, end)\n"
        f"os.kill(os.getppid(), {int(number)})\n"
        "time.sleep(20)\n"
    )
    before = signal.signal(number, lambda *_: None)  # tests may run where a hang-up is ignored
    try:
        found = launch.start([PYTHON, "-c", code, *([launch.LAUNCHER] if is_launcher else [])])
    finally:
        signal.signal(number, before)
    assert found == (128 + number if expected is None else expected)


@pytest.mark.parametrize(("num_devices", "asked", "threads"), [(2, None, 3), (2, 5, 5), (8, None, 1)])
def test_a_worker_times_a_step_on_as_many_threads_as_each_process_of_the_run_gets(
    make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_devices: int, asked: int | None, threads: int
) -> None:
    import torch

    from planner.workload import Worker
    from trainer import process
    from trainer.data import prepare_data

    monkeypatch.setattr(process, "cores", lambda: 6)
    job = make_job(num_devices=num_devices, num_threads=asked, gradient_accumulation_steps=16)
    argv = command(tmp_path, job, dry=True)
    assert argv[argv.index("--num_cpu_threads_per_process") + 1] == str(threads)
    data = prepare_data(job.data, model=job.model, max_length=job.preset.max_length, seed=job.seed)
    before = torch.get_num_threads()
    try:
        assert Worker(job, data, None).load().num_threads == threads
    finally:
        torch.set_num_threads(before)


def test_a_process_that_has_the_machine_to_itself_leaves_the_threads_to_torch() -> None:
    from trainer.process import threads_of_a_process

    assert threads_of_a_process(None, 1) is None
    assert threads_of_a_process(3, 1) == 3
