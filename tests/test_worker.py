"""One real worker process over a tiny random model on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from fakes import make_data, make_job, make_row

from planner.estimate import estimate
from planner.measure import measure
from planner.prober import DoesNotFit, ProcessProber
from planner.worker import guarded
from planner.workload import Worker
from presets.errors import MeasurementError
from trainer.job import Job

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LENGTHS = np.random.default_rng(3).integers(4, 60, 80)
DATA = make_data(LENGTHS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("worker")
    (made / "model").mkdir()
    (made / "model" / "config.json").write_text(json.dumps(CONFIG))
    (made / "data").mkdir()
    DATA.save(made / "data")
    return made


@pytest.fixture(scope="module")
def prober(folder: Path) -> Iterator[ProcessProber]:
    started = ProcessProber(make_job(model=str(folder / "model"), num_threads=1), folder / "data", folder)
    yield started
    pid = started.pid
    started.stop()
    started.stop()  # twice is safe
    assert not psutil.pid_exists(pid)


def test_a_packed_job_s_check_is_a_part_of_loading_as_in_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its passes are the first of the process: left out, a run took half a second longer than planned (an H200)."""
    import trainer.agreement

    asked: list[int | None] = []

    def refuse(model: object, data: object, job: Job, **options: object) -> str:
        asked.append(job.packed_length)
        return "documents leak"

    monkeypatch.setattr(trainer.agreement, "settle_packing", refuse)
    model = str(folder / "model")
    plain = Worker(make_job(model=model), DATA, None)
    plain.load()
    assert asked == []
    with pytest.raises(MeasurementError, match="packing: documents leak"):
        plain.run([[[0, 1]]], [], [0])
    assert asked == [int(LENGTHS[:2].sum())]
    packed = Worker(make_job(model=model, packing=True, packed_length=128), DATA, None)
    packed.load()
    assert asked[1:] == [128]
    packed.run([[[0], [1]]], [], [0])  # rows of one document are no matter of packing
    for _ in range(2):  # refused once is refused for good
        with pytest.raises(MeasurementError, match="packing: documents leak"):
            packed.run([[[0, 1]]], [], [0])
    assert asked[1:] == [128]


def test_loading_counts_the_garbage_that_a_run_collects_once_it_has_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from planner import worker as served

    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(served, "time", clock)
    monkeypatch.setattr(served, "settle_garbage", lambda: now.__setitem__(0, now[0] + 5000.0))
    worker = Worker(make_job(model=str(folder / "model")), DATA, None)
    assert served.loaded(worker, {"command": "load"})["load_seconds"] > 5000.0
    assert "error" in served.loaded(worker, {"command": "unknown"})


def test_gradients_pile_up_within_a_window_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a run, where the first micro-step of a window finds none to add to."""
    worker = Worker(make_job(model=str(folder / "model")), DATA, None)
    worker.load()
    step = worker._micro_step
    found: list[bool] = []

    def noted(*given: Any) -> Any:
        found.append(any(parameter.grad is not None for parameter in worker.stepper.parameters))
        return step(*given)

    monkeypatch.setattr(worker, "_micro_step", noted)
    assert len(worker.run([[[0]], [[1]], [[2]], [[3]]], [2], [0, 0, 0, 0])) == 4
    assert found == [False, True, False, True]


@pytest.mark.slow
def test_a_worker_loads_times_and_reports_memory(prober: ProcessProber) -> None:
    with pytest.raises(MeasurementError, match="before 'load'"):
        prober.run([[[0]]], [], [0])
    loaded = prober.load()
    assert loaded.weights == "random"
    assert 0 < loaded.num_trainable_parameters < loaded.num_parameters
    assert loaded.start_seconds > 0
    assert loaded.num_threads == 1
    memory = prober.memory([[[[int(LENGTHS.argmax())]], [[0]]]], [], 0.0)
    assert memory.reserved_bytes == memory.allocated_bytes > 50 << 20
    seconds = prober.run([[[0]], [[1, 2]], [[3], [4]]], [], [0, 0, 0])  # one row, a packed one, two rows
    assert len(seconds) == 3
    assert all(0 < value < 5 for value in seconds)
    assert len(prober.optimizer(2)) == 2
    window = prober.window([[[5]], [[6]]], 0)
    assert 0 < window < 5
    assert prober.free() > 0
    assert len(prober.evaluate([[0, 1], [2]])) == 2
    saved = prober.save()
    assert saved.checkpoint_seconds > 0
    assert saved.adapter_seconds > 0
    assert 0 < saved.removal_seconds < saved.checkpoint_seconds + 1


@pytest.mark.slow
def test_a_failed_command_is_a_reply_and_the_worker_lives_on(prober: ProcessProber) -> None:
    with pytest.raises(MeasurementError, match="out of bounds"):
        prober.run([[[10_000_000]]], [], [0])
    assert len(prober.run([[[0]]], [], [0])) == 1


@pytest.mark.slow
def test_a_worker_s_end_is_an_error_that_names_its_exit_code_and_a_killed_one_ran_out_of_memory(folder: Path) -> None:
    job = make_job(model=str(folder / "model"))
    missing = ProcessProber(job, folder / "nothing")
    with pytest.raises(MeasurementError, match="cannot be read"):
        missing.load()
    missing.stop()
    killed = ProcessProber(job, folder / "data")
    psutil.Process(killed.pid).kill()
    with pytest.raises(DoesNotFit, match="killed"):
        killed.load()
    killed.stop()


@pytest.mark.slow
def test_a_worker_ends_when_its_parent_is_gone(folder: Path) -> None:
    orphan = ProcessProber(make_job(model=str(folder / "model")), folder / "data")
    assert orphan._process.stdin is not None
    orphan._process.stdin.close()  # what the end of the parent looks like from inside
    assert orphan._process.wait(timeout=20) == 0
    orphan.stop()


@pytest.mark.slow
def test_a_real_measurement_gives_a_whole_estimate(
    folder: Path, prober: ProcessProber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prober, "stop", lambda: None)  # starting another would take seconds
    job = make_job(model=str(folder / "model"), num_threads=1)
    row = make_row(job, DATA)
    found = measure([row], DATA, lambda job: prober, budget_seconds=2)
    one = estimate(row, DATA, found)
    assert one.fits
    assert one.seconds is not None
    assert one.train_seconds is not None
    assert 0 < one.train_seconds < one.seconds
    assert one.fixed.evaluation is not None
    assert one.speed_factor == 1.0
    assert found.measurements[0].seconds_spent < 3


def test_out_of_memory_is_told_from_other_failures() -> None:
    class Failing:
        def __init__(self, reason: Exception) -> None:
            self.reason = reason

        def free(self) -> int:
            raise self.reason

        def recover(self) -> None:
            pass

    oom = guarded(Failing(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore")), {"command": "free"})  # type: ignore[arg-type]
    assert oom == {"oom": True, "message": "CUDA out of memory. Tried to allocate 2 GiB"}
    other = guarded(Failing(ValueError("no")), {"command": "free"})  # type: ignore[arg-type]
    assert other["error"] == "no"
    assert "ValueError" in other["traceback"]
