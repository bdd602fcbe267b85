"""Predicted beside actual, when a run is done."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from planner.figures import UNKNOWN, duration, duration_range, gib
from planner.history import is_other_company
from presets.text import printable
from trainer.job import Job
from trainer.record import RunRecord

if TYPE_CHECKING:
    from trainer.finished import Check

FEW_STEPS = 100  # optimizer steps below which a poor result says more of the run's length than of its settings


def outcome_text(record: RunRecord, folder: Path) -> str:
    """Predicted beside actual, for a finished run."""
    predicted, actual = record.predicted, record.actual
    rows = [
        _outcome("whole run", predicted.seconds, actual.seconds, duration),
        _outcome("training loop", predicted.train_seconds, actual.train_seconds, duration),
        _outcome("peak memory", predicted.peak_memory_bytes, actual.peak_memory_bytes, gib),
    ]
    lines = [
        tabulate(rows, headers=("", "predicted", "actual", "difference"), tablefmt="simple", disable_numparse=True)
    ]
    if predicted.seconds_low is not None and predicted.seconds_high is not None and actual.seconds is not None:
        inside = predicted.seconds_low <= actual.seconds <= predicted.seconds_high
        spread = duration_range(predicted.seconds_low, predicted.seconds_high)
        doubt = " (not a 90 % range)" if predicted.calibrated is False else ""
        verdict = f"The predicted range {spread}{doubt} {'holds' if inside else 'does NOT hold'} the actual time."
        if actual.num_resumes:
            verdict = (
                f"Stopped and resumed {actual.num_resumes} time(s): its time says little of the prediction ({spread})."
            )
        else:
            verdict += _company(predicted.others_share, actual.others_share)
        lines.append(verdict)
    if actual.eval_loss_before and actual.eval_loss_after is not None:
        change = actual.eval_loss_after / actual.eval_loss_before - 1
        losses = f"Held-out loss {actual.eval_loss_before:.3f} -> {actual.eval_loss_after:.3f} ({change:+.0%})"
        samples = folder / "samples.md"
        where = f"; sample answers before and after: {printable(str(samples))}" if samples.is_file() else ""
        lines.append(losses + where)
    kind = "adapter" if record.job.preset.adapter == "lora" else "model"
    lines.append(f"The {kind}: {printable(str(folder / kind))}")
    run = printable(shlex.quote(str(folder)))
    merge = f", plan merge {run}" if kind == "adapter" else ""
    lines.append(f"Next: plan check {run}, plan chat {run}, plan report {run}{merge}")
    return "\n".join(lines)


def _company(then: float | None, now: float | None) -> str:
    """Who else was there, where that explains why a run took another time than was predicted."""
    if then is None or now is None or not is_other_company(then, now):
        return ""
    return (
        f" Others (programs, or this machine's host) took {now:.0%} of the CPU's time while it ran, and {then:.0%} "
        "while it was timed: later estimates are not corrected by it."
    )


def _outcome(
    name: str, predicted: float | None, actual: float | None, text: Callable[[float | None], str]
) -> tuple[str, str, str, str]:
    known = predicted is not None and actual is not None and predicted > 0
    difference = f"{actual / predicted - 1:+.0%}" if known and actual is not None and predicted is not None else UNKNOWN
    return name, text(predicted), text(actual), difference


def check_text(check: Check, job: Job, num_steps: int) -> str:
    """The quality of a finished run, and what to do where it is poor: the published guide's advice, and ours.

    Args:
        num_steps: optimizer steps that the run made.
    """
    before, after = check.before, check.after
    rows = [
        ("held-out loss", f"{before.loss:.4f}", f"{after.loss:.4f}"),
        ("perplexity", f"{before.perplexity:.2f}", f"{after.perplexity:.2f}"),
    ]
    lines = [
        tabulate(
            rows,
            headers=(f"{after.num_examples} examples", "before", "after"),
            tablefmt="simple",
            disable_numparse=True,
        )
    ]
    for first, second in check.answers:
        lines += ["", *(f"{title:<9}{_flat(text)}" for title, text in (
            ("prompt", first.prompt), ("before", first.answer), ("after", second.answer), ("expected", first.expected)
        ))]  # fmt: skip
    remedies = []
    if num_steps < FEW_STEPS:
        remedies.append(f"train for longer: {num_steps} optimizer steps are few (more epochs, more data)")
    if max(job.gradient_accumulation_steps) > 32:
        remedies.append("reduce gradient accumulation to 32")
    remedies.append(f"raise the learning rate slightly (it was {job.preset.learning_rate:g})")
    lines += ["", f"If the quality is poor: {', or '.join(remedies)}."]
    return "\n".join(lines)


def _flat(text: str) -> str:
    return printable(" ".join(text.split()))
