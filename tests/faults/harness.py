"""Runs with faults in real processes, and what has to hold afterwards: for tests/faults and for bench/faults.py."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.batching import BatchPlan
from trainer.job import DataSpec, EvaluationSpec

HERE = Path(__file__).parent
A_DEFECT = 70
# Six steps over 20 examples and two epochs, a checkpoint after each; dropout, so that a random state that is not put
# back shows in the bytes.
SHORT: dict[str, Any] = {
    "micro": 4,
    "gradient_accumulation_steps": 8,
    "num_epochs": 2,
    "lora_dropout": 0.1,
    "checkpoint_every": 1,
    "keep_checkpoints": 2,
    "evaluation": EvaluationSpec(num_samples=1, max_new_tokens=2, times_during_training=1),
}


def short_data(chats: Path) -> DataSpec:
    """28 examples, of which 8 are held out."""
    return DataSpec(source=str(chats), limit=28)


def why_no_shim() -> str | None:
    """Why faults cannot be put between a process and its system here; None where they can."""
    if sys.platform != "linux":
        return "the shim stands in front of Linux's C library"
    return None if shutil.which("cc") else "there is no C compiler (cc)"


def build_shim(folder: Path) -> Path:
    """Compile shim.c; returns the library."""
    path = folder / "shim.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(path), str(HERE / "shim.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return path


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended and what it said."""

    code: int  # below 0: by that signal
    said: str

    @property
    def errors(self) -> list[str]:
        """Lines that tell a user of an error, and what looks like a traceback."""
        lines = self.said.splitlines()
        return [line for line in lines if line.startswith(("Error:", "Traceback", "--- Logging error"))]


class Server:
    """Starts processes that are forked from one that has imported everything."""

    def __init__(self, folder: Path, shim: Path | None) -> None:
        self.log = folder / "said.txt"
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
        if shim is not None:
            environment["LD_PRELOAD"] = str(shim)
        with open(folder / "server.txt", "wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "server.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
            )
        assert self._line() == "ready", (folder / "server.txt").read_text()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, meanwhile: Callable[[int], None] | None = None, **asked: Any) -> Ended:
        """One process; `meanwhile` gets its id while it runs."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"log": str(self.log), **asked}) + "\n")
        self.process.stdin.flush()
        child = int(self._line())
        if meanwhile is not None:
            meanwhile(child)
        status = int(self._line())
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return Ended(code, self.log.read_text(errors="replace"))

    def train(self, run: Path, *, resume: bool = False, **more: Any) -> Ended:
        return self.ask(action="train", run=str(run), resume=resume, **more)

    def is_answering(self, within: float = 0.0) -> bool:
        """Whether the last process has ended, or does so within these seconds."""
        return bool(select.select([self.process.stdout], [], [], within)[0])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def calls_of(server: Server, run: Path, log: Path) -> list[tuple[str, bool, str]]:
    """(call, whether it takes room on the disk, path) of every change that a whole run makes to its folder."""
    ended = server.train(run, below=str(run), at=0, mode="count", calls=str(log))
    assert ended.code == 0, ended.said
    lines = [line.split(" ", 2) for line in log.read_text().splitlines()]
    return [(call, takes_room == "1", path) for call, takes_room, path in lines]


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def consumed(run: Path) -> Counter[int]:
    """How often each example was trained on: the windows that metrics.jsonl names, through the batch plan."""
    plan = BatchPlan.load(run / "batch_plan.npz")
    counts: Counter[int] = Counter()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        counts.update(plan.documents_of_window(json.loads(line)["step"] - 1).tolist())
    return counts


def why_lost(run: Path, whole: Path) -> str | None:
    """What of a run is not as in the uninterrupted one; None where nothing is."""
    if json.loads((run / "record.json").read_text())["status"] != "finished":
        return "the record does not say that it is finished"
    if adapter_bytes(run) != adapter_bytes(whole):
        return "the adapter has other bytes"
    if losses(run) != losses(whole):
        return "the losses of the steps are others"
    if consumed(run) != consumed(whole):
        return "the examples were not consumed as often"
    leftovers = [str(path.relative_to(run)) for path in run.rglob("*.tmp")]
    return f"left behind: {leftovers}" if leftovers else None


def survives(server: Server, run: Path, whole: Path, at: int, mode: str) -> str | None:
    """Fail at the `at`-th change of the run folder, resume, compare; what was lost, or None."""
    first = server.train(run, below=str(run), at=at, mode=mode)
    if mode in ("kill", "torn"):
        if first.code not in (-signal.SIGKILL, 0):
            return f"ended with {first.code}: {first.said[-500:]}"
    elif first.code not in (0, 1) or len(first.errors) != first.code:
        return f"ended with {first.code}, not in one line: {first.said[-1500:]}"
    if first.code != 0:
        second = server.train(run, resume=True)
        if second.code != 0:
            return f"the resume ended with {second.code}: {second.said[-1500:]}"
    return why_lost(run, whole)
