"""What a run shows and writes while it goes: progress bar or plain lines, metrics.jsonl, train.log, trackers."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from presets import jsonio
from presets.text import printable
from trainer.ahead import LONGEST, Ahead
from trainer.bar import GIB, TrainingBar
from trainer.tokens import FloatArray
from trainer.trackers import Trackers

PLAIN_LINE_SECONDS = 15.0
# A step that takes this many times what it should and this much longer was not slow: the process, or the machine, stood
# still (a laptop's lid, a stopped job, a moved virtual machine).
PAUSE_FACTOR = 20.0
PAUSE_SECONDS = 30.0


class Monitor:
    """One run's display and files.

    Args:
        planned: seconds (or work) of each window, (num_windows,).
        ahead: what comes beside the windows; None: nothing.
    """

    def __init__(
        self,
        run: Path,
        name: str,
        planned: FloatArray,
        *,
        is_time: bool,
        done: int,
        ahead: Ahead | None = None,
        trackers: Trackers | None = None,
        device: str = "cpu",
    ) -> None:
        self.ahead = ahead
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
        self.bar = TrainingBar(self.name, self.total, done, device=device) if sys.stderr.isatty() else None

    def say(self, text: str) -> None:
        """One line for the user and the log."""
        text = printable(text)  # notes repeat what stands in data files
        self.log.info(text)
        with _shown():
            if self.bar is not None:
                self.bar.say(text)
            else:
                print(text, file=sys.stderr, flush=True)

    def seconds_left(self, done: int) -> float | None:
        """Seconds to the end of the run, when the step `done` has just ended; None before there is a pace.

        What is left of the plan, at the pace this process has had so far, and what comes beside the steps.
        """
        left = float(self.planned[-1] - self.planned[done])
        worked = float(self.planned[done] - self.planned[self.started_at])
        if worked > 0:
            left *= self.elapsed / worked
        elif left > 0 and not self.is_time:
            return None
        return left + (self.ahead.seconds(done) if self.ahead is not None else 0.0)

    def drift(self, done: int) -> float | None:
        """Seconds of the steps taken over those planned, minus 1; None before there is anything to compare."""
        worked = float(self.planned[done] - self.planned[self.started_at])
        return self.elapsed / worked - 1 if self.is_time and worked > 0 else None

    def paused(self, done: int, seconds: float) -> float:
        """Seconds of a window in which nothing went on; 0 for one that was merely slow. `done` counts it already.

        What it should have taken follows from the pace so far, or from the plan where it is the first.
        """
        work = float(self.planned[done] - self.planned[done - 1])
        worked = float(self.planned[done - 1] - self.planned[self.started_at])
        if worked > 0:
            expected = work * self.elapsed / worked
        elif self.is_time:
            expected = work
        else:
            return 0.0
        return seconds - expected if seconds > max(PAUSE_FACTOR * expected, expected + PAUSE_SECONDS) else 0.0

    def step(
        self, done: int, seconds: float, values: dict[str, float | int | bool | None], *, paused: float = 0.0
    ) -> None:
        """One finished window: `done` windows are behind us, `seconds` is what this one took.

        Args:
            paused: the part of `seconds` in which nothing went on; it says nothing of the pace.
        """
        self.elapsed += seconds - paused
        planned = float(self.planned[done] - self.planned[done - 1]) if self.is_time else None
        line = {"step": done, **values, "seconds": round(seconds, 6), "planned_seconds": planned}
        if paused:
            line["paused_seconds"] = round(paused, 6)
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
        if self.bar is not None:
            with _shown():
                self.bar.update(done, clean["loss"], clean.get("memory_bytes"), self._told(done, values))
        now = time.monotonic()
        if now - self.last_line >= PLAIN_LINE_SECONDS or done == self.total:
            self.last_line = now
            told = "  ".join([*_state(values), *self._told(done, values)])
            self.log.info(f"step {done}/{self.total}  {told}")
            if self.bar is None:
                with _shown():
                    print(f"{self.name}: step {done}/{self.total}  {told}", file=sys.stderr, flush=True)

    def evaluation(self, step: int, loss: float, perplexity: float, seconds: float) -> None:
        """A held-out loss after `step` windows, and how long it took; one that a resume takes again follows."""
        with open(self.run / "evaluations.jsonl", "a", encoding="utf-8") as file:
            values = {"loss": loss, "perplexity": perplexity, "seconds": round(seconds, 6)}
            finite = {name: value if np.isfinite(value) else None for name, value in values.items()}
            file.write(json.dumps({"step": step, **finite}) + "\n")
        if self.trackers is not None:
            self.trackers.log({"eval_loss": loss}, step=step)

    def _told(self, done: int, values: dict[str, float | int | bool | None]) -> list[str]:
        parts = [f"{values['tokens_per_second']:,.0f} tok/s"]
        left = self.seconds_left(done)
        if left is not None and np.isfinite(left) and (done < self.total or left >= 0.5):
            # A damaged estimate or evaluation may say anything.
            done_at = f", done {_moment(timedelta(seconds=left))}" if abs(left) < LONGEST else ""
            parts.append(f"{_short(left)} left{done_at}")
        drift = self.drift(done)
        if drift is not None:
            word = "behind" if drift > 0 else "ahead of"
            parts.append(f"{abs(drift):.0%} {word} plan" if abs(drift) >= 0.005 else "on plan")
        return parts

    def sync(self) -> None:
        """Wait until the lines so far are on the disk: a checkpoint must not know of steps that they do not."""
        self.metrics.flush()
        os.fsync(self.metrics.fileno())

    def close(self) -> None:
        if self.bar is not None:
            with _shown():
                self.bar.close()
            self.bar = None
        if self.trackers is not None:
            self.trackers.finish()
        # What is left in its buffer is the line that could not be written, and that was told of: on a full disk closing
        # would raise once more, in place of the message that says what to do.
        with contextlib.suppress(OSError):
            self.metrics.close()
        for handler in list(self.log.handlers):
            with contextlib.suppress(OSError):  # as above
                handler.close()
            self.log.removeHandler(handler)


@contextlib.contextmanager
def _shown() -> Iterator[None]:
    """Show something. Where the terminal is gone (a closed window), nothing is shown any more and the run goes on.

    A run that is told to stop because its terminal goes still has its checkpoint to write.
    """
    try:
        yield
    except OSError as reason:
        if reason.errno not in (errno.EIO, errno.EPIPE):
            raise
        # What is still in the stream's buffer goes there too; else Python would fail over it at its end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)


def _state(values: dict[str, float | int | bool | None]) -> list[str]:
    loss, memory = values["loss"], values.get("memory_bytes")  # no loss: nothing in the window was to be learnt
    return [*([] if loss is None else [f"loss {loss:.3f}"]), *([f"{memory / GIB:.2f} GiB"] if memory else [])]


def _short(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class _LogFile(logging.FileHandler):
    """The log repeats what the terminal was told. Where it alone cannot be written, the run goes on without a word."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: what a run cannot do without is told of by those that write it."""


def _file_logger(path: Path) -> logging.Logger:
    logger = logging.getLogger(f"trainer.run.{path}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = _LogFile(path, encoding="utf-8")
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
            if jsonio.loads(line, strict=False)["step"] <= done:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    jsonio.write_atomically(path, "".join(line + "\n" for line in kept))


def _moment(ahead: timedelta) -> str:
    """A moment ahead as "Mon 12:05"; with its date where the weekday alone would mean two days."""
    moment = datetime.now() + ahead
    return f"{moment:%a %H:%M}" if ahead <= timedelta(days=6) else f"{moment:%a} {moment.day} {moment:%b %H:%M}"
