"""Predicted beside actual, when a run is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tabulate import tabulate

from planner.report import UNKNOWN, duration, duration_range, gib, printable
from trainer.record import RunRecord


def outcome_text(record: RunRecord, folder: Path) -> str:
    """Predicted beside actual, for a finished run."""
    predicted, actual = record.predicted, record.actual
    rows = [
        _outcome("whole run", predicted.seconds, actual.seconds, duration),
        _outcome("training loop", predicted.train_seconds, actual.train_seconds, duration),
        _outcome("peak memory", predicted.peak_memory_bytes, actual.peak_memory_bytes, gib),
    ]
    lines = [tabulate(rows, headers=("", "predicted", "actual", "difference"), tablefmt="simple", disable_numparse=True)]
    if predicted.seconds_low is not None and predicted.seconds_high is not None and actual.seconds is not None:
        inside = predicted.seconds_low <= actual.seconds <= predicted.seconds_high
        spread = duration_range(predicted.seconds_low, predicted.seconds_high)
        lines.append(f"The predicted range {spread} {'holds' if inside else 'does NOT hold'} the actual time.")
    if actual.eval_loss_before is not None and actual.eval_loss_after is not None:
        change = actual.eval_loss_after / actual.eval_loss_before - 1
        lines.append(
            f"Held-out loss {actual.eval_loss_before:.3f} -> {actual.eval_loss_after:.3f} ({change:+.0%}); "
            f"sample answers before and after: {printable(str(folder / 'samples.md'))}"
        )
    kind = "adapter" if record.job.preset.adapter == "lora" else "model"
    lines.append(f"The {kind}: {printable(str(folder / kind))}")
    return "\n".join(lines)


def _outcome(
    name: str, predicted: float | None, actual: float | None, text: Callable[[float | None], str]
) -> tuple[str, str, str, str]:
    known = predicted is not None and actual is not None and predicted > 0
    difference = f"{actual / predicted - 1:+.0%}" if known and actual is not None and predicted is not None else UNKNOWN
    return name, text(predicted), text(actual), difference
