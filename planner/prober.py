"""Prober: what can be asked of a device about one step signature. The real one talks to a worker process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from planner.nursery import Child, Nursery
from presets import jsonio
from presets.errors import MeasurementError
from trainer.job import Job

MicroRows = list[list[int]]  # rows of example indices


class DoesNotFit(Exception):
    """The device ran out of memory. Not an error of the tool: it becomes a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReply:
    """What starting and loading took, in seconds, and what was loaded."""

    start_seconds: float  # process start to the first import of torch
    import_seconds: float
    load_seconds: float
    num_parameters: int
    num_trainable_parameters: int
    weights: str  # "loaded" or "random"
    has_tokenizer: bool = False
    num_threads: int | None = None  # CPU threads that torch really uses
    lean_refused: str | None = None  # why the lean loss is not used although the job asks for it
    compile_seconds: float = 0.0
    compile_refused: str | None = None  # why the layers are not compiled although the job asks for it


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryReply:
    """Peak bytes over some windows (or parts of them) and their updates; seconds of the slowest micro-step."""

    allocated_bytes: int
    reserved_bytes: int
    micro_step_seconds: float
    token_seconds: float | None = None  # of the micro-step that took the least a padded token
    first_seconds: float = 0.0  # by which the process's first micro-step took longer than the same one again
    taken: tuple[float, ...] = ()  # seconds of each micro-step in turn, each waited for


@dataclass(frozen=True, kw_only=True, slots=True)
class PeakReply:
    """Peak bytes since the last `memory` command (on a CPU since the process started), and what was still free then."""

    allocated_bytes: int
    reserved_bytes: int
    headroom_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveReply:
    """Seconds of one checkpoint, of saving the adapter (or the whole model) and of taking an old checkpoint away."""

    checkpoint_seconds: float
    adapter_seconds: float
    removal_seconds: float = 0.0


class Prober(Protocol):
    """One model on one device, to be timed. Every method but `stop` may raise DoesNotFit or MeasurementError."""

    def load(self) -> LoadReply: ...
    def run(self, micro_batches: list[MicroRows], begins: list[int], longest_rows: list[int]) -> list[float]: ...
    def optimizer(self, repeat: int) -> list[float]: ...
    def window(self, micro_batches: list[MicroRows], longest_row: int) -> float: ...
    def memory(self, windows: list[list[MicroRows]], more: list[list[MicroRows]], seconds: float) -> MemoryReply: ...
    def peak(self) -> PeakReply: ...
    def packing_refused(self, packed_length: int) -> str | None: ...
    def free(self) -> int: ...
    def evaluate(self, batches: list[list[int]]) -> list[float]: ...
    def save(self) -> SaveReply: ...
    def answer(self, examples: list[int], max_new_tokens: int) -> float: ...
    def stop(self) -> None: ...


ProberFactory = Callable[[Job], Prober]


class ProberMaker(Protocol):
    """Makes what starts workers over a folder of tokenised data; they try out the disk of `scratch`."""

    def __call__(self, data_dir: Path, scratch: Path | None = None, /) -> ProberFactory: ...


class ProcessProber:
    """A worker process, spoken to in JSON lines. `stop` ends it; so does the end of this process, however it comes."""

    def __init__(self, job: Job, data_dir: Path, scratch: Path | None = None, nursery: Nursery | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # the worker's stderr: shown only if it dies, closed by stop
        forked = None if nursery is None else nursery.start(self._log)
        self._process: Child = forked or subprocess.Popen(
            [sys.executable, "-P", "-m", "planner.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=worker_environment(),
            encoding="utf-8",
        )
        self._send(
            {
                "job": jsonio.to_plain(job),
                "data_dir": str(data_dir),
                "scratch": str(scratch) if scratch else None,
            }
        )

    @classmethod
    def factory(cls, data_dir: Path, scratch: Path | None = None, nursery: Nursery | None = None) -> ProberFactory:
        """What `measure` calls to start a worker for a job; `data_dir` holds the saved TokenizedDataset."""
        return lambda job: cls(job, data_dir, scratch, nursery)

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(self) -> LoadReply:
        return jsonio.from_plain(LoadReply, self._ask(command="load"), what="worker", error=MeasurementError)

    def run(self, micro_batches: list[MicroRows], begins: list[int], longest_rows: list[int]) -> list[float]:
        asked = {"micro_batches": micro_batches, "begins": begins, "longest_rows": longest_rows}
        return list(self._ask(command="run", **asked)["seconds"])

    def optimizer(self, repeat: int) -> list[float]:
        return list(self._ask(command="optimizer", repeat=repeat)["seconds"])

    def window(self, micro_batches: list[MicroRows], longest_row: int) -> float:
        return float(self._ask(command="window", micro_batches=micro_batches, longest_row=longest_row)["seconds"])

    def memory(self, windows: list[list[MicroRows]], more: list[list[MicroRows]], seconds: float) -> MemoryReply:
        answer = self._ask(command="memory", windows=windows, more=more, seconds=seconds)
        return jsonio.from_plain(MemoryReply, answer, what="worker", error=MeasurementError)

    def packing_refused(self, packed_length: int) -> str | None:
        reason = self._ask(command="packing", packed_length=packed_length)["refused"]
        return None if reason is None else str(reason)

    def peak(self) -> PeakReply:
        return jsonio.from_plain(PeakReply, self._ask(command="peak"), what="worker", error=MeasurementError)

    def free(self) -> int:
        return int(self._ask(command="free")["bytes"])

    def evaluate(self, batches: list[list[int]]) -> list[float]:
        return list(self._ask(command="evaluate", batches=batches)["seconds"])

    def save(self) -> SaveReply:
        return jsonio.from_plain(SaveReply, self._ask(command="save"), what="worker", error=MeasurementError)

    def answer(self, examples: list[int], max_new_tokens: int) -> float:
        return float(self._ask(command="answer", examples=examples, max_new_tokens=max_new_tokens)["seconds"])

    def stop(self) -> None:
        """End the worker and wait for it, so that its memory is free when this returns. Safe to call twice."""
        process = self._process
        if process.poll() is None:
            process.kill()  # it holds nothing worth a goodbye, and a tidy exit of torch costs up to a second
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was still to be written has nobody to read it
                    stream.close()
        self._log.close()

    def __del__(self) -> None:
        if hasattr(self, "_process") and self._process.returncode is None:
            self.stop()

    def _ask(self, **request: Any) -> dict[str, Any]:
        self._send(request)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            raise MeasurementError(f"the worker answered something that is not JSON: {line[:200]!r}.") from None
        if answer.get("oom"):
            raise DoesNotFit(answer["message"])
        if "error" in answer:
            raise MeasurementError(f"the worker failed: {answer['error'].rstrip('.')}.") from RuntimeError(
                answer.get("traceback", "")
            )
        return dict(answer)

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, OSError):
            raise self._death() from None

    def _death(self) -> Exception:
        try:
            code: int | None = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        if code == -9:  # SIGKILL: nobody else here sends it
            return DoesNotFit("the system killed the worker, as it does when memory runs out")
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 2000))
        lines = self._log.read().decode("utf-8", errors="replace").strip().splitlines()
        last = f" Its last line: {lines[-1]}" if lines else ""
        return MeasurementError(f"the worker process ended by itself (exit code {code}).{last}")


def worker_environment() -> dict[str, str]:
    """This environment, with the worker's import path where the packages are not installed but run from a checkout."""
    environment = dict(os.environ)
    root = str(Path(__file__).resolve().parent.parent)
    installed = {str(Path(sysconfig.get_paths()[key]).resolve()) for key in ("purelib", "platlib")}
    if root not in installed:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    return environment
