"""Kill -9 at random moments: whatever is on the disk then, a resume ends with the bytes of the uninterrupted run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Server, adapter_bytes, consumed, losses

from presets import jsonio
from trainer import checkpoint
from trainer.batching import BatchPlan
from trainer.job import EvaluationSpec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither fork nor SIGKILL"),
]

MOMENTS = 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path, shim=None)
    yield made
    made.close()


def came_to_its_end(server: Server, run: Path, *, resume: bool, kill_after: float | None = None) -> bool:
    """One start of a run; whether it was not killed. `kill_after` is in seconds."""

    def kill(child: int) -> None:
        if kill_after is not None and not server.is_answering(within=kill_after):
            with contextlib.suppress(ProcessLookupError):  # it has just ended, and its answer is on the way
                os.kill(child, signal.SIGKILL)

    ended = server.train(run, resume=resume, meanwhile=kill)
    assert ended.code == 0 or (ended.code == -signal.SIGKILL and kill_after is not None), ended.said
    return ended.code == 0


def test_runs_killed_at_twenty_random_moments_resume_to_the_same_bytes(make_run: Any, server: Server) -> None:
    # Two epochs of 72 examples, ten steps; dropout, so that a random state that is not put back shows in the bytes.
    changes = {
        "micro": 4,
        "gradient_accumulation_steps": 16,
        "num_epochs": 2,
        "lora_dropout": 0.1,
        "checkpoint_every": 1,
        "keep_checkpoints": 2,
        "evaluation": EvaluationSpec(num_samples=1, max_new_tokens=2, times_during_training=1),
    }
    whole = make_run("whole", **changes)
    begun = time.monotonic()
    assert came_to_its_end(server, whole, resume=False)
    duration = time.monotonic() - begun
    expected = adapter_bytes(whole)
    once_per_epoch = consumed(whole)
    plan = BatchPlan.load(whole / "batch_plan.npz")
    assert len(losses(whole)) == plan.num_steps
    assert set(once_per_epoch) == set(range(80)) - set(plan.evaluation.tolist())
    assert set(once_per_epoch.values()) == {2}

    moments = random.Random(20)
    kills = 0
    number = 0
    while kills < MOMENTS:
        run = make_run(f"killed-{number}", **changes)
        number += 1
        resume, killed = False, 0
        # Up to three kills of one run; a resumed run is shorter, so a moment may come too late for it.
        for _ in range(moments.choice([1, 1, 2, 3])):
            if came_to_its_end(server, run, resume=resume, kill_after=moments.uniform(0.0, duration)):
                break
            resume, killed = True, killed + 1
        else:
            assert came_to_its_end(server, run, resume=True)
        kills += killed
        assert adapter_bytes(run) == expected, f"run {number}, killed {killed} times"
        assert consumed(run) == once_per_epoch
        assert losses(run) == losses(whole)
        assert json.loads((run / "record.json").read_text())["status"] == "finished"
        leftovers = [str(path.relative_to(run)) for path in run.rglob("*.tmp")]
        assert leftovers == [], f"run {number}, killed {killed} times"


def stopped_after(run: Path, window: int) -> None:
    """Train until the end of a window, and die there as a killed process does: nothing is closed or written."""
    from trainer import loop

    class Killed(BaseException):
        pass

    real = loop.run_window

    def window_or_end(state: Any, random_state: Any) -> None:
        if state.progress.windows_done == window:
            raise Killed
        real(state, random_state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run_window", window_or_end)
        with pytest.raises(Killed):
            loop.train(run)


def test_what_a_killed_process_of_the_same_number_left_half_written_is_in_nobodys_way(make_run: Any) -> None:
    from trainer.loop import train

    whole, run = make_run("whole", checkpoint_every=1), make_run("run", checkpoint_every=1)
    train(whole)
    stopped_after(run, 4)
    checkpoints = run / "checkpoints"
    # In a container a resumed run has the process id of the one before.
    half = checkpoints / f".step-000005.{os.getpid()}.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (checkpoints / ".step-000002.old.tmp").mkdir()
    (run / ".adapter.tmp").mkdir()
    (run / f".samples-after.json.{os.getpid()}.tmp").write_text("[")
    (run / "batch_plan.tmp").write_bytes(b"PK")
    (run / "metrics.tmp").write_text("{")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 5.1}\n{"step": 6, "lo')
    train(run, resume=True)
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert losses(run) == losses(whole)
    assert list(run.rglob("*.tmp")) == []


def test_half_a_checkpoint_under_a_whole_ones_name_is_written_anew(make_run: Any) -> None:
    from trainer.loop import train

    run = make_run("run", checkpoint_every=1)
    stopped_after(run, 4)
    newest = run / "checkpoints" / "step-000004"
    (newest / "state.json").unlink()  # as a removal that was cut off leaves it
    seen = []
    real = checkpoint.rotate

    def rotate(folder: Path, keep: int, best: int | None) -> None:
        seen.append((newest / "state.json").is_file())
        real(folder, keep, best)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "rotate", rotate)
        train(run, resume=True)
    assert seen[0]


def make_checkpoint(folder: Path, number: int) -> Path:
    """What looks like a whole checkpoint from outside."""
    path = folder / f"step-{number:06d}"
    path.mkdir(parents=True)
    sizes = dict.fromkeys(checkpoint.TENSORS, 3)
    for name in sizes:
        (path / name).write_bytes(b"abc")
    state = checkpoint._State(
        format=checkpoint.FORMAT,
        progress=checkpoint.Progress(windows_done=number),
        scaler={},
        optimizer_steps={},
        python_random=(),
        sizes=sizes,
    )
    (path / "state.json").write_text(jsonio.to_json(state))
    return path


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.find_checkpoints(folder)]


def test_an_old_checkpoint_is_renamed_before_it_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for number in range(1, 6):
        make_checkpoint(folder, number)
    removed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: removed.append(path.name))
        checkpoint.rotate(folder, 2, best=2)
    assert names(folder) == ["step-000002", "step-000004", "step-000005"]
    assert removed
    assert all(name.startswith(".") for name in removed)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_two_checkpoints_stay_even_where_fewer_are_to_be_kept(tmp_path: Path, keep: int) -> None:
    for number in (3, 4, 5):
        make_checkpoint(tmp_path, number)
    checkpoint.rotate(tmp_path, keep, best=None)
    assert names(tmp_path) == ["step-000004", "step-000005"]


def test_a_checkpoint_that_was_cut_off_does_not_count_among_those_that_are_kept(tmp_path: Path) -> None:
    for number in (1, 2, 3, 4):
        make_checkpoint(tmp_path, number)
    (tmp_path / "step-000003" / "optimizer.safetensors").write_bytes(b"ab")
    (tmp_path / "step-000004" / "state.json").write_text("{")
    checkpoint.rotate(tmp_path, 2, best=None)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003", "step-000004"]
    make_checkpoint(tmp_path, 5)
    checkpoint.rotate(tmp_path, 2, best=None)
    assert names(tmp_path) == ["step-000002", "step-000003", "step-000004", "step-000005"]


def test_checkpoints_are_told_by_number_and_other_names_are_none(tmp_path: Path) -> None:
    for number in (999_999, 1_000_000, 2):
        make_checkpoint(tmp_path, number)
    for other in ("step-1", "step-00000x", "step-000003.old", "damaged-step-000004"):
        (tmp_path / other).mkdir()
    assert names(tmp_path) == ["step-000002", "step-999999", "step-1000000"]
