"""The live view of a run in a terminal: a bar, the course of the loss, and the card's memory, heat and power."""

from __future__ import annotations

import sys
import time
from typing import Any

from trainer.nvml import VisibleGpu
from trainer.sparkline import BLOCKS, sparkline

EVERY_SECONDS = 0.5  # between two updates, so that showing costs a run of many short steps nothing
GIB = 1024**3


class TrainingBar:
    """Two lines at the foot of the terminal while a run goes on; what is said meanwhile scrolls by above them."""

    def __init__(self, name: str, total: int, done: int, *, device: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.text import Text

        class TwoLines(Progress):
            def get_renderables(self) -> Any:
                yield from super().get_renderables()
                for task in self.tasks:
                    yield Text(task.fields["told"], overflow="ellipsis", no_wrap=True)

        self._gauge = _Gauge(device)
        self._losses: list[float] = []
        self._blocks = _has_blocks()
        self._shown_at = float("-inf")
        self._bar = TwoLines(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}", markup=False),
            console=Console(stderr=True),
            refresh_per_second=2,  # rich draws in a thread of its own, which takes turns with the one that trains
        )
        self._task = self._bar.add_task(name, total=total, completed=done, told="", loss="")
        self._total = total
        self._bar.start()

    def say(self, text: str) -> None:
        """A line above the bar."""
        # The terminal wraps it: a line break of our own would stand inside the command that is to be copied.
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, done: int, loss: float | None, memory_bytes: float | None, told: list[str]) -> None:
        """After a step: `done` steps are behind, `told` is what else stands in the second line."""
        if loss is not None:
            self._losses.append(loss)
        now = time.monotonic()
        if now - self._shown_at < EVERY_SECONDS and done < self._total:
            return
        self._shown_at = now
        course = f" {sparkline(self._losses)}" if self._blocks else ""
        self._bar.update(
            self._task,
            completed=done,
            loss=f"loss {self._losses[-1]:.3f}{course}" if self._losses else "",
            told="  ".join([*self._gauge.read(memory_bytes), *told]),
        )

    def close(self) -> None:
        """Leave the bar as it stands, and give the terminal back."""
        self._bar.stop()


class _Gauge:
    """Memory against what there is; on a GPU its heat and power."""

    def __init__(self, device: str) -> None:
        self._gpu = VisibleGpu() if device.startswith("cuda") else None
        self._total = _total_memory() if self._gpu is None else None
        if self._gpu is not None and (memory := self._gpu.memory_bytes()) is not None:
            self._total = memory[1]

    def read(self, memory_bytes: float | None) -> list[str]:
        said = []
        if memory_bytes:
            of = f" of {self._total / GIB:.1f}" if self._total else ""
            said.append(f"{memory_bytes / GIB:.2f}{of} GiB")
        if self._gpu is not None:
            if (heat := self._gpu.temperature_c()) is not None:
                said.append(f"{heat} °C")
            if (power := self._gpu.power_watts()) is not None:
                said.append(f"{power:.0f} W")
        return said


def _total_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _has_blocks() -> bool:
    try:
        BLOCKS.encode(sys.stderr.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
