"""What a run holds while it goes: job, data, plan, model, progress. Made and executed by `trainer.loop`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.batching import BatchPlan
from trainer.checkpoint import Progress
from trainer.collate import MicroBatch
from trainer.company import Company
from trainer.job import Job
from trainer.monitor import Monitor
from trainer.record import Predicted
from trainer.step import Stepper
from trainer.tokens import FloatArray, IntArray, TokenizedDataset


class Clock:
    """Adds up where the seconds go."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._taken: dict[str, tuple[float, float, int]] = {}  # seconds of the first, of the later ones, their number

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begun
            self.parts[name] = self.parts.get(name, 0.0) + seconds
            if name in self._taken:
                first, later, number = self._taken[name]
                self._taken[name] = (first, later + seconds, number + 1)
            else:
                self._taken[name] = (seconds, 0.0, 0)

    def each(self) -> dict[str, float]:
        """Seconds that one of each part takes; the first, which is often slow, counts only where it is the only one."""
        return {name: later / number if number else first for name, (first, later, number) in self._taken.items()}


@dataclass(slots=True, eq=False)
class Run:
    """Everything the loop holds while it runs."""

    job: Job
    folder: Path
    data: TokenizedDataset
    plan: BatchPlan
    rates: FloatArray
    supervised: IntArray  # targets of each window
    accelerator: Any
    stepper: Stepper
    tokenizer: Any
    clock: Clock
    progress: Progress
    predicted: Predicted
    notes: list[str]
    largest: int = 0  # padded tokens of the plan's largest micro-batch; on a CPU nobody asks, nor for the next
    longest_row: int = 0  # tokens in its longest packed row; 0: rows are not packed
    monitor: Monitor | None = None
    company: Company | None = None  # where one process trains on a CPU
    num_resumes: int = 0
    wall_before: float = 0.0
    paused_seconds: float = 0.0  # in which this process, or the machine, stood still
    slept_before: float = 0.0  # seconds of the machine's sleep before this process
    stop_signal: int = 0
    stop_asked_at: float = 0.0  # on the monotonic clock, where there is a stop_signal
    ask_every: int = 1  # micro-steps between two exchanges of news, with several processes
    batches: Generator[MicroBatch] | None = None  # that are still to come, as `progress` has it; see trainer.window

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def ask_to_stop(self, signal_number: int) -> None:
        """Stop at the next micro-step; who asks again changes nothing."""
        if not self.stop_signal:
            self.stop_asked_at = time.monotonic()
            self.stop_signal = signal_number

    def drop_batches(self) -> None:
        """Let go of what was made ahead; what comes next is made anew."""
        if self.batches is not None:
            self.batches.close()
            self.batches = None

    def say(self, text: str) -> None:
        if self.monitor is not None:
            self.monitor.say(text)

    def tell(self, note: str) -> None:
        """Say it and keep it in the record."""
        self.notes.append(note)
        self.say(note)


def sizes_on_gpu(job: Job, plan: BatchPlan, lengths: IntArray) -> tuple[int, int]:
    """Padded tokens of a plan's largest micro-batch, and tokens in its longest packed row (0: rows are not packed).

    Both 0 on a CPU, where nobody asks for them.
    """
    if job.device == "cpu":
        return 0, 0
    shapes = plan.micro_shapes(lengths)
    return shapes.largest, shapes.longest_row(job.packing)
