"""A step signature while it is measured: its rows, its worker, and what was found so far."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from planner.first_times import FirstTimes, Shape
from planner.measurement import FixedSamples, PlannedRow, Round, RowVerdict, StepSignature, WindowSample
from planner.prober import LoadReply, MicroRows, Prober
from trainer.batching import BatchPlan
from trainer.tokens import TokenizedDataset


@dataclass(slots=True, eq=False)
class Group:
    """A step signature while it is measured."""

    signature: StepSignature
    rows: list[PlannedRow]
    prober: Prober | None = None
    load: LoadReply | None = None
    verdicts: dict[str, RowVerdict] = field(default_factory=dict)
    reserved: int = 0  # bytes, at the largest micro-batch that fits
    largest_key: float = 0.0  # of the micro-batches that fit
    probed: dict[float, float] = field(default_factory=dict)  # padded tokens of worst micro-batches -> their seconds
    rounds: list[Round] = field(default_factory=list)  # the first of them may be warm-up
    windows: list[tuple[int, WindowSample]] = field(default_factory=list)  # (rounds before it, window)
    fixed: FixedSamples = field(default_factory=FixedSamples)
    # Of its present process: by how much the first micro-step took longer than the same again, and what the others did.
    first_seconds: float = 0.0
    first_times: FirstTimes = field(default_factory=FirstTimes)
    spent: float = 0.0
    round_seconds: float = 0.0  # that the last round took
    ended_by: str = ""
    error: str | None = None
    is_postponed: bool = False  # ran out of memory beside others; to be timed alone

    @property
    def fitting(self) -> list[PlannedRow]:
        return [row for row in self.rows if self.verdicts[row.name].fits]

    @property
    def is_live(self) -> bool:
        return self.error is None and not self.is_postponed and bool(self.fitting)

    @property
    def seconds_per_padded_token(self) -> float:
        """At the largest micro-batch that was probed: a first idea of what a round costs."""
        largest = max(self.probed, default=0.0)
        return self.probed[largest] / largest if largest else 0.0

    def probed_seconds(self, padded: float) -> float:
        """A first idea of what a micro-batch of so many padded tokens takes, from those of like size."""
        known = sorted(self.probed)
        return float(np.interp(padded, known, [self.probed[tokens] for tokens in known])) if known else 0.0

    @property
    def is_reference(self) -> bool:
        return all(row.is_reference for row in self.rows)

    def close(self) -> None:
        if self.prober is not None:
            self.prober.stop()
            self.prober = None


def shape_of(plan: BatchPlan, rows: MicroRows, data: TokenizedDataset) -> Shape:
    """Rows and width of a micro-batch, as its batch plan has it; a GPU's is rounded up, see `trainer.widths`."""
    return len(rows), max((data.row_tokens(row, shared=plan.shares_beginnings) for row in rows), default=0)


def rows_of(plan: BatchPlan, micro: int) -> MicroRows:
    """The rows of a micro-batch as a prober takes them."""
    return [row.tolist() for row in plan.rows_of_micro_batch(micro)]
