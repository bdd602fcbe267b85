"""What a run shows and writes while it goes: progress bar or plain lines, metrics.jsonl, train.log, trackers."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from presets.text import printable
from trainer.tokens import FloatArray
from trainer.trackers import Trackers

PLAIN_LINE_SECONDS = 15.0


class Monitor:
    """One run's display and files. `planned` are the planned seconds (or work) of each window, (num_windows,)."""

    def __init__(
        self, run: Path, name: str, planned: FloatArray, *, is_time: bool, done: int, trackers: Trackers | None = None
    ):
        self.planned = np.concatenate([[0.0], np.cumsum(planned)])
        self.is_time = is_time  # planned is in seconds, so drift can be said
        self.run, self.name, self.trackers = run, printable(name), trackers
        self.total = len(planned)
        self.started_at = done
        self.elapsed = 0.0  # seconds of this process's loop
        self.log = _file_logger(run / "train.log")
        _forget_after(run / "metrics.jsonl", done)
        _forget_after(run / "evaluations.jsonl", done)
        self.metrics = open(run / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115  # closed by close()
        self.last_line = time.monotonic()
        self.bar: Any = None
        self.task: Any = None
        if sys.stderr.isatty():
            self._open_bar(done)

    def _open_bar(self, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}", markup=False),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task(self.name, total=self.total, completed=done, told="")
        self.bar.start()

    def say(self, text: str) -> None:
        """One line for the user and the log."""
        text = printable(text)  # notes repeat what stands in data files
        self.log.info(text)
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def seconds_left(self, done: int) -> float | None:
        """From the remaining work: what is left of the plan, at the pace this process has had so far."""
        left = float(self.planned[-1] - self.planned[done])
        worked = float(self.planned[done] - self.planned[self.started_at])
        if worked <= 0:
            return left if self.is_time else None
        return left * self.elapsed / worked

    def drift(self, done: int) -> float | None:
        """Seconds taken over seconds planned, minus 1; None before there is anything to compare."""
        worked = float(self.planned[done] - self.planned[self.started_at])
        return self.elapsed / worked - 1 if self.is_time and worked > 0 else None

    def step(self, done: int, seconds: float, values: dict[str, float | int | bool | None]) -> None:
        """One finished window: `done` windows are behind us, `seconds` is what this one took."""
        self.elapsed += seconds
        planned = float(self.planned[done] - self.planned[done - 1]) if self.is_time else None
        line = {"step": done, **values, "seconds": round(seconds, 6), "planned_seconds": planned}
        line |= {"seconds_left": self.seconds_left(done), "drift": self.drift(done)}  # for who watches from elsewhere
        # NaN and infinity are not JSON; they only occur on the step that stops a run.
        clean = {
            key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in line.items()
        }
        self.metrics.write(json.dumps(clean) + "\n")
        self.metrics.flush()
        if self.trackers is not None:
            numbers = {key: value for key, value in clean.items() if isinstance(value, (int, float))}
            self.trackers.log(numbers, step=done)
        told = self._told(done, values)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, told=told)
        now = time.monotonic()
        if now - self.last_line >= PLAIN_LINE_SECONDS or done == self.total:
            self.last_line = now
            self.log.info(f"step {done}/{self.total}  {told}")
            if self.bar is None:
                print(f"{self.name}: step {done}/{self.total}  {told}", file=sys.stderr, flush=True)

    def evaluation(self, step: int, loss: float, perplexity: float) -> None:
        """A held-out loss after `step` windows; one that a resume takes again follows the earlier one."""
        with open(self.run / "evaluations.jsonl", "a", encoding="utf-8") as file:
            values = {"loss": loss, "perplexity": perplexity}
            finite = {name: value if np.isfinite(value) else None for name, value in values.items()}
            file.write(json.dumps({"step": step, **finite}) + "\n")
        if self.trackers is not None:
            self.trackers.log({"eval_loss": loss}, step=step)

    def _told(self, done: int, values: dict[str, float | int | bool | None]) -> str:
        parts = [f"loss {values['loss']:.3f}", f"{values['tokens_per_second']:,.0f} tok/s"]
        memory = values.get("memory_bytes")
        if memory:
            parts.append(f"{memory / 1024**3:.2f} GiB")
        left = self.seconds_left(done)
        if left is not None and done < self.total:
            at = datetime.now() + timedelta(seconds=left)
            parts.append(f"{_short(left)} left, done {at:%a %H:%M}")
        drift = self.drift(done)
        if drift is not None:
            parts.append(f"{drift:+.0%} on plan")
        return "  ".join(parts)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        if self.trackers is not None:
            self.trackers.finish()
        self.metrics.close()
        for handler in list(self.log.handlers):
            handler.close()
            self.log.removeHandler(handler)


def _short(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _file_logger(path: Path) -> logging.Logger:
    logger = logging.getLogger(f"trainer.run.{path}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(handler)
    return logger


def _forget_after(path: Path, done: int) -> None:
    """Drop the lines of steps that a resume will repeat, and a last line cut off by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= done:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(aside, path)
