"""How a run stops and goes on: the same bytes, whenever it was stopped."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import StopAfter, adapter_bytes, metrics

from trainer import loop, outputs
from trainer.checkpoint import Progress
from trainer.job import EvaluationSpec
from trainer.loop import Stopped, train
from trainer.record import RunRecord
from trainer.run import Run


def stop(run: Path, count: int) -> None:
    """Train up to the signal at the micro-step of this number."""
    with pytest.MonkeyPatch.context() as patch:
        StopAfter(patch, count)
        with pytest.raises(Stopped):
            train(run)


@pytest.mark.parametrize("stop_at", [1, 3, 17, 40, 71])  # in the first window, mid-window, at and after boundaries
def test_a_stopped_and_resumed_run_ends_with_the_same_bytes(make_run: Any, monkeypatch: Any, stop_at: int) -> None:
    whole, stopped = make_run("whole", lora_dropout=0.1), make_run("stopped", lora_dropout=0.1)
    train(whole)
    with pytest.MonkeyPatch.context() as patch:
        StopAfter(patch, stop_at)
        with pytest.raises(Stopped) as caught:
            train(stopped)
    assert caught.value.signal_number == signal.SIGTERM
    assert RunRecord.read(stopped / "record.json").status == "stopped"
    record = train(stopped, resume=True)
    assert adapter_bytes(stopped) == adapter_bytes(whole)
    assert record.actual.num_examples == 72
    assert [line["step"] for line in metrics(stopped)] == list(range(1, 10))
    losses = [[line["loss"] for line in metrics(run)] for run in (whole, stopped)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("base", "changes", "stop_at"),
    [
        ("prioritized", {"gradient_accumulation_steps": 8}, 50),  # in epoch 2
        ("two-stage", {}, 75),  # between the stages and in stage 2
        ("progressive", {}, 20),
    ],
)
def test_resume_is_exact_across_epochs_stages_and_changes_of_accumulation(
    make_run: Any, base: str, changes: dict[str, Any], stop_at: int
) -> None:
    import dataclasses

    from presets.schema import load_preset

    preset = load_preset(base)
    if base == "two-stage":
        phases = (
            dataclasses.replace(preset.phases[0], gradient_accumulation_steps=8),
            dataclasses.replace(preset.phases[1], gradient_accumulation_steps=4, sample_size=20),
        )
        changes = {"phases": phases}
    elif base == "progressive":
        sizes = ((8, 2), (4, 4), (2, None))
        phases = tuple(
            dataclasses.replace(phase, gradient_accumulation_steps=size, num_steps=steps)
            for phase, (size, steps) in zip(preset.phases, sizes, strict=True)
        )
        changes = {"phases": phases}
    whole, stopped = make_run("whole", base=base, **changes), make_run("stopped", base=base, **changes)
    train(whole)
    with pytest.MonkeyPatch.context() as patch:
        StopAfter(patch, stop_at, signal.SIGINT)
        with pytest.raises(Stopped):
            train(stopped)
    train(stopped, resume=True)
    assert adapter_bytes(stopped) == adapter_bytes(whole)


def test_resume_repeats_the_open_window_from_its_own_start(make_run: Any) -> None:
    run = make_run()
    stop(run, 20)  # in the third window of eight micro-steps
    state = json.loads((run / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["progress"]["windows_done"] == 2


def test_what_was_found_before_training_is_not_found_anew_by_a_resume(make_run: Any) -> None:
    run = make_run()
    stop(run, 50)
    loss_before = RunRecord.read(run / "record.json").actual.eval_loss_before
    path = run / "samples-before.json"
    answers = json.loads(path.read_text())
    answers[0]["answer"] = "of the untrained model"
    path.write_text(json.dumps(answers))
    record = train(run, resume=True)
    assert record.actual.eval_loss_before == loss_before
    assert "of the untrained model" in (run / "samples.md").read_text()


def test_each_resume_is_counted(make_run: Any) -> None:
    run = make_run("often")
    stop(run, 5)
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            StopAfter(patch, 10)
            with pytest.raises(Stopped):
                train(run, resume=True)
    assert train(run, resume=True).actual.num_resumes == 3


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ((math.nan, 3.0, 2.0), (3, 2.0)),
        ((3.0, math.nan, 4.0), (1, 3.0)),
        ((math.nan, math.inf, math.nan), (None, None)),
    ],
)
def test_a_held_out_loss_that_is_no_number_is_never_the_best(
    losses: tuple[float, ...], best: tuple[int | None, float | None], monkeypatch: Any
) -> None:
    from types import SimpleNamespace

    run: Any = SimpleNamespace(progress=Progress(), accelerator=SimpleNamespace(process_index=0))
    for step, loss in enumerate(losses, start=1):
        run.progress = replace(run.progress, windows_done=step)
        monkeypatch.setattr(loop, "held_out_loss", lambda _, loss=loss: SimpleNamespace(loss=loss))
        loop._evaluate(run)
    assert (run.progress.best_step, run.progress.best_eval_loss) == best


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(make_run: Any) -> None:
    whole, run = make_run("whole"), make_run("run")
    train(whole)
    stop(run, 50)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    record = train(run, resume=True)
    assert any("damaged" in note and "set aside" in note for note in record.notes)
    assert (newest.parent / f"damaged-{newest.name}").is_dir()
    assert adapter_bytes(run) == adapter_bytes(whole)


def test_a_checkpoint_is_set_aside_where_one_of_its_number_was_before(make_run: Any) -> None:
    whole, run = make_run("whole"), make_run("run")
    train(whole)
    stop(run, 50)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    earlier = newest.with_name(f"damaged-{newest.name}")
    earlier.mkdir()
    (earlier / "state.json").write_text("of an earlier time")
    (newest / "state.json").write_text("{")
    train(run, resume=True)
    assert (earlier / "state.json").read_text() == "{"
    assert (earlier / "model.safetensors").is_file()
    assert adapter_bytes(run) == adapter_bytes(whole)


def test_the_best_checkpoint_outlives_the_rotation_and_a_resume(make_run: Any, monkeypatch: Any) -> None:
    from trainer.evaluate import EvaluationResult

    run = make_run(evaluation=EvaluationSpec(times_during_training=9), keep_checkpoints=1)
    scripted = iter([5.0, 4.0, 3.0, 3.5, 3.4, 3.6, 3.3, 3.2, 3.1, 3.05, 3.05, 3.05])
    monkeypatch.setattr(
        outputs, "evaluate", lambda *_, **__: EvaluationResult(loss=next(scripted), num_examples=8, num_tokens=80)
    )
    stop(run, 37)  # in the fifth window: the best one is of the second
    assert kept(run) == ["step-000002", "step-000003", "step-000004"]
    record = train(run, resume=True)
    assert (record.actual.best_step, record.actual.best_eval_loss) == (2, 3.0)
    assert kept(run) == ["step-000002", "step-000008", "step-000009"]


def kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize(
    ("number", "twice", "code"), [(signal.SIGTERM, False, 143), (signal.SIGINT, False, 130), (signal.SIGINT, True, 130)]
)
def test_the_first_signal_saves_and_exits_with_its_code_and_the_second_leaves_at_once(
    make_run: Any, number: int, twice: bool, code: int
) -> None:
    run = make_run(num_epochs=200)
    slow = (
        "import sys, time, trainer.loop as loop, trainer.__main__ as entry\n"
        "real = loop._checkpoint\n"
        "def checkpoint(*arguments):\n"
        "    if arguments[0].stop_signal: (arguments[0].folder / 'saving').touch(); time.sleep(float(sys.argv.pop()))\n"
        "    return real(*arguments)\n"
        "loop._checkpoint = checkpoint\n"
        "sys.exit(entry.main())\n"
    )
    pause = "60" if twice else "0"
    # The pause stands for a slow disk: the second signal must not wait for the checkpoint.
    argv = [sys.executable, "-P", "-c", slow.replace("sys.argv.pop()", f"'{pause}'"), str(run / "job.json")]
    child = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics_so_far(run)) > 2, child)
        child.send_signal(number)
        if twice:
            wait_for(lambda: (run / "saving").exists(), child)
            for _ in range(60):  # what comes within a second of the first is taken for a copy of it
                child.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=0.5)
        assert child.wait(timeout=50) == code
    finally:
        child.kill()
    if twice:
        assert not (run / "record.json").exists()
    else:
        assert RunRecord.read(run / "record.json").status == "stopped"
        assert list((run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("copies", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_the_copy_of_a_signal_that_was_sent_to_the_whole_group_is_no_second_signal(
    make_run: Any, monkeypatch: pytest.MonkeyPatch, copies: tuple[int, int]
) -> None:
    def leave(code: int) -> None:
        raise AssertionError(f"left at once with {code}")

    monkeypatch.setattr(os, "_exit", leave)
    run = make_run()
    real = loop.steps.micro_step
    seen = []

    def step(*args: Any, **kwargs: Any) -> Any:
        seen.append(True)
        if len(seen) == 20:
            for number in copies:
                os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.steps, "micro_step", step)
        with pytest.raises(Stopped):
            train(run)
    assert RunRecord.read(run / "record.json").status == "stopped"
    assert kept(run)[-1] == "step-000002"


def test_a_copy_that_comes_late_does_not_keep_the_record_of_the_stop_from_being_written(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.write_record

    def write(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "write_record", write)
    monkeypatch.setattr(loop, "SAME_SIGNAL_SECONDS", 1e6)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("nobody listened to the signal"))
    run = make_run()
    try:
        stop(run, 20)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert RunRecord.read(run / "record.json").status == "stopped"


@pytest.mark.parametrize(("seconds_later", "leaves"), [(0.0, False), (0.5, False), (1.1, True), (60.0, True)])
def test_a_second_signal_is_one_that_comes_a_second_after_the_first(
    monkeypatch: pytest.MonkeyPatch, seconds_later: float, leaves: bool
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    run = Run.__new__(Run)  # only what the handlers look at
    run.stop_signal = 0
    with loop._signals(run):
        os.kill(os.getpid(), signal.SIGINT)
        assert (run.stop_signal, codes) == (signal.SIGINT, [])
        run.stop_asked_at = time.monotonic() - seconds_later
        os.kill(os.getpid(), signal.SIGTERM)
    assert codes == ([143] if leaves else [])


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the system has no SIGHUP")
@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_hang_up_stops_a_run_unless_it_is_ignored_as_under_nohup(
    monkeypatch: pytest.MonkeyPatch, is_ignored: bool
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    run = Run.__new__(Run)  # only what the handlers look at
    run.stop_signal = 0
    outside: list[int] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else lambda number, _: outside.append(number))
    try:
        with loop._signals(run):
            os.kill(os.getpid(), signal.SIGHUP)
            assert run.stop_signal == (0 if is_ignored else signal.SIGHUP)
            run.stop_asked_at = time.monotonic() - 60
            os.kill(os.getpid(), signal.SIGHUP)  # the shell's, and later the system's: no second wish
            assert codes == []
            if not is_ignored:
                os.kill(os.getpid(), signal.SIGTERM)
                assert codes == [143]
        assert outside == []
        os.kill(os.getpid(), signal.SIGHUP)
        assert outside == ([] if is_ignored else [signal.SIGHUP])
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such terminals")
def test_a_terminal_that_is_closed_stops_a_run_with_a_checkpoint(make_run: Any) -> None:
    import pty

    run = make_run(num_epochs=200)
    code = (
        "import fcntl, signal, sys, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"  # its own terminal
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # tests may run where it is ignored
        "import trainer.__main__ as entry\n"
        "sys.exit(entry.main())\n"
    )
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(run / "job.json")],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    try:
        while not (run / "metrics.jsonl").exists() or len(metrics_so_far(run)) < 3:
            assert child.poll() is None, seen.decode(errors="replace")
            if select.select([ours], [], [], 0.05)[0]:
                seen += os.read(ours, 65536)
        os.close(ours)
        assert child.wait(timeout=50) == 128 + signal.SIGHUP
    finally:
        child.kill()
        child.wait()
    record = RunRecord.read(run / "record.json")
    assert (record.status, record.error) == ("stopped", None)
    assert kept(run)[-1] == f"step-{record.actual.num_steps:06d}"


def metrics_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def wait_for(condition: Any, child: Any) -> None:
    while not condition():
        assert child.poll() is None, "the run ended by itself"
        time.sleep(0.05)
