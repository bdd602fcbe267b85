"""What a run promised and what it did: estimate.json before it, record.json after it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from presets import jsonio
from presets.errors import RunError
from trainer.batching import BatchPlan
from trainer.job import Job
from trainer.tokens import FloatArray, IntArray


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Seconds of a micro-batch: base + per_token x padded tokens + per_token_width x padded tokens x width."""

    base: float
    per_token: float
    per_token_width: float
    optimizer: float  # seconds of one optimizer step

    def window_seconds(self, plan: BatchPlan, lengths: IntArray) -> FloatArray:
        """Planned seconds of each window, (num_windows,); on several devices a round lasts as long as its slowest."""
        shapes = plan.micro_shapes(lengths)
        tokens = shapes.padded_tokens.astype(np.float64)
        micro = self.base + self.per_token * tokens + self.per_token_width * tokens * shapes.width
        slowest = micro.reshape(-1, plan.num_devices).max(axis=1)
        rounds = plan.window_offsets // plan.num_devices
        running = np.concatenate([[0.0], np.cumsum(slowest)])
        return np.asarray(running[rounds[1:]] - running[rounds[:-1]] + self.optimizer)


TOKENS_ONLY = CostModel(base=0.0, per_token=1.0, per_token_width=0.0, optimizer=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakdown:
    """Where the seconds go, or went."""

    start: float = 0.0  # process start and imports
    data: float = 0.0
    load: float = 0.0
    compile: float = 0.0
    train: float = 0.0
    evaluation: float = 0.0
    samples: float = 0.0
    checkpoints: float = 0.0
    save: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """The estimate a run was started with. Unknown is None."""

    seconds: float | None = None  # from process start to the written record
    seconds_low: float | None = None
    seconds_high: float | None = None
    train_seconds: float | None = None  # the loop alone
    peak_memory_bytes: int | None = None
    cost: CostModel | None = None
    num_examples: int | None = None  # consumed, counted once per epoch
    # As measured, before past runs corrected it: later corrections are made from this, never from a corrected figure.
    raw_seconds: float | None = None
    raw_seconds_low: float | None = None
    raw_seconds_high: float | None = None
    raw_train_seconds: float | None = None
    correction_factor: float | None = None  # None: not corrected
    correction_runs: int | None = None
    signature_key: str | None = None  # runs that share it are comparable
    parts: Breakdown | None = None  # of `seconds`; a part that is unknown counts as 0
    # False: no 90 % range: the machine was not steady, or too little was timed to tell. None: not told, by records of
    # earlier versions.
    calibrated: bool | None = None
    is_tuned: bool = False  # the run is of the preset's tuned twin
    measured_as: str | None = None  # the measurement it comes from: predictions from the same one share its error
    others_share: float | None = None  # of the CPU's time, taken by others and the host while it was timed

    def window_seconds(self, plan: BatchPlan, lengths: IntArray) -> FloatArray:
        """Planned seconds of each window, (num_windows,), which add up to `train_seconds`; tokens where none are known.

        The fitted cost gives the windows' shares. Their sum is not the estimate's, which follows what was timed in each
        class of micro-batches where the fit does not.
        """
        shares = (self.cost or TOKENS_ONLY).window_seconds(plan, lengths)
        total = float(shares.sum())
        if self.cost is None or self.train_seconds is None or total <= 0:
            return shares
        return np.asarray(shares * (self.train_seconds / total))


@dataclass(frozen=True, kw_only=True, slots=True)
class Actual:
    """What happened. Unknown is None."""

    seconds: float | None = None
    train_seconds: float | None = None  # without `paused_seconds`
    paused_seconds: float | None = None  # of `seconds`: the process, or the machine, stood still
    peak_memory_bytes: int | None = None
    num_steps: int | None = None
    num_examples: int | None = None
    num_tokens: int | None = None
    train_loss: float | None = None
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None
    applied_steps: int | None = None
    skipped_steps: int | None = None
    micro_batch_split: int | None = None  # above 1: memory ran out and micro-batches were executed in parts
    num_resumes: int | None = None
    breakdown: Breakdown | None = None
    others_share: float | None = None  # of the CPU's time, taken by others and the host; where one process trains on it


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """One run, from promise to result."""

    status: str  # "finished", "stopped" or "failed"
    job: Job
    predicted: Predicted
    actual: Actual
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    error: str | None = None

    def write(self, path: Path) -> None:
        jsonio.write_atomically(path, jsonio.to_json(self))

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Raises: RunError where the file is missing or damaged."""
        try:
            return jsonio.from_json(cls, path.read_text(encoding="utf-8"), what=str(path), error=RunError)
        except (OSError, UnicodeDecodeError) as reason:
            raise RunError(f"{path}: cannot be read ({reason}).") from None


def read_predicted(run: Path) -> Predicted:
    """The estimate of a run folder; all unknown where there is none.

    Raises:
        RunError: it is damaged.
    """
    path = run / "estimate.json"
    if not path.exists():
        return Predicted()
    try:
        return jsonio.from_json(Predicted, path.read_text(encoding="utf-8"), what=str(path), error=RunError)
    except (OSError, UnicodeDecodeError, RunError) as reason:
        said = str(reason).removeprefix(f"{path}: ").rstrip(".")
        raise RunError(
            f"{path}: the estimate cannot be read ({said}). Remove the file: the run then goes on without it."
        ) from None
