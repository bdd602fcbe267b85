"""Measurement as data: what was timed, raw, warm-up apart; statistics are derived from it in planner.estimate."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.prober import LoadReply, SaveReply
from planner.strata import Kind, Strata
from presets.schema import Adapter, Attention, BasePrecision, Precision
from trainer.batching import BatchPlan
from trainer.job import Device, Job, Loss


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class StepSignature:
    """What changes the cost of a micro-step. Jobs that share it share a worker and its timings."""

    model: str
    base_precision: BasePrecision
    precision: Precision
    adapter: Adapter
    lora_rank: int  # 0 where there is no adapter, and so for the other three
    lora_targets: str
    lora_rslora: bool
    lora_dropout: float
    attention: Attention
    gradient_checkpointing: bool
    device: Device
    num_threads: int  # CPU threads; 0: torch's own choice
    loss: Loss
    compile: bool = False
    share_beginnings: bool = True

    @classmethod
    def of(cls, job: Job) -> StepSignature:
        preset = job.preset
        lora = preset.adapter == "lora"
        return cls(
            model=job.model,
            base_precision=job.base_precision,
            precision=job.precision,
            adapter=preset.adapter,
            lora_rank=preset.lora_rank if lora else 0,
            lora_targets=preset.lora_targets if lora else "",
            lora_rslora=preset.lora_rslora and lora,
            lora_dropout=preset.lora_dropout if lora else 0.0,
            attention=preset.attention,
            gradient_checkpointing=preset.gradient_checkpointing,
            device=job.device,
            num_threads=job.num_threads or 0,
            loss=job.loss,
            compile=job.compile,
            share_beginnings=job.share_beginnings,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlannedRow:
    """One row of the table to be: a job and its batch plan. A reference row is timed for the speed factor only."""

    name: str
    job: Job
    plan: BatchPlan
    is_reference: bool = False

    @property
    def kind(self) -> Kind:
        return Kind(micro_batch_size=self.job.micro_batch_size, packed=self.job.packing)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroSample:
    """One timed micro-batch. `seconds` is None inside a window that was timed as a whole."""

    stratum: int
    rows: int
    width: int  # tokens
    tokens: int  # real ones
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuConditions:
    """One reading of the GPU. None: the driver does not say."""

    sm_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None
    temperature_c: int | None = None
    power_watts: float | None = None
    throttle: tuple[str, ...] = ()
    other_processes: int | None = None
    other_memory_bytes: int | None = None  # held by other processes
    other_share: float | None = None  # of the GPU's time, that their kernels ran


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """What went on since the reading before. Shares are of the whole machine's CPU time; None is unknown."""

    seconds: float
    load: float | None = None  # processes that run or want to, mean of the last minute
    steal: float | None = None  # taken by the host of a virtual machine
    others: float | None = None  # used by processes that are not ours
    gpu: GpuConditions | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One micro-batch of each stratum, in random order, and an optimizer step."""

    started: float  # seconds on the measuring clock
    samples: tuple[MicroSample, ...]
    optimizer_seconds: tuple[float, ...]
    conditions: Conditions | None = None  # None: not looked at


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowSample:
    """Micro-steps and optimizer step of one window (or its first part), timed as one."""

    samples: tuple[MicroSample, ...]
    seconds: float
    # Of its micro-batches, the strata of those whose shape its process had not met before; none on a CPU.
    new_shapes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class NewShape:
    """What a micro-step of one stratum takes more where its shape is new, in seconds, and its standard error."""

    stratum: int
    seconds: float
    error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedSamples:
    """Seconds of what a run does beside its steps. None or empty: not measured."""

    evaluation: tuple[MicroSample, ...] = ()  # batches of held-out examples
    evaluation_once: float = 0.0  # by which a process's first evaluation takes longer than a later one
    save: SaveReply | None = None
    answer_seconds: float | None = None  # one sample answer, of `answer_tokens` tokens at most
    answer_tokens: int = 0
    first_token_seconds: float = 0.0  # of an answer of one token: most of it goes over the prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Everything measured of one step signature."""

    signature: StepSignature
    load: LoadReply | None = None
    warmup: tuple[Round, ...] = ()
    rounds: tuple[Round, ...] = ()
    windows: tuple[WindowSample, ...] = ()
    fixed: FixedSamples = FixedSamples()
    one_off_seconds: float = 0.0  # what the first micro-steps of a process take beyond the later ones; 0 on a CPU
    first_time_share: float = 0.0  # by which new micro-batches took longer the first time, to the end; 0 on a CPU
    new_shape_seconds: float = 0.0  # that a micro-step takes more where its shape is new; not in the two above
    new_shape_error: float = 0.0  # standard error of it, seconds
    new_shapes_apart: tuple[NewShape, ...] = ()  # strata where it is plainly another
    seconds_spent: float = 0.0  # timing; process starts, memory and fixed parts not counted
    ended_by: str = ""  # "precision", "budget" or "rounds"
    error: str | None = None


def new_shape_seconds(measurement: Measurement, counts: Mapping[int, int]) -> tuple[float, float]:
    """What so many new shapes of each stratum take more in all, in seconds, and its standard error."""
    apart = {one.stratum: one for one in measurement.new_shapes_apart}
    others = sum(count for stratum, count in counts.items() if stratum not in apart)
    known = [(count, apart[stratum]) for stratum, count in counts.items() if stratum in apart]
    seconds = others * measurement.new_shape_seconds + sum(count * one.seconds for count, one in known)
    # One and the same figure for all the others, a figure of its own for each that differs.
    error = math.hypot(others * measurement.new_shape_error, *(count * one.error for count, one in known))
    return seconds, error


LEFT_OUT = "left out: a smaller one was slower already"  # the error of a verdict that is no failure


@dataclass(frozen=True, kw_only=True, slots=True)
class RowVerdict:
    """Whether a row fits, at the worst micro-batch of its plan."""

    name: str
    signature: StepSignature
    fits: bool | None = None  # None: not known, see error
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    headroom_bytes: int | None = None  # still free at the peak
    worst_rows: int = 0
    worst_width: int = 0
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Busier:
    """Others take more of the CPU's time now than while it was timed."""

    share: float  # of it, that they take now, while nothing is timed
    slower: float  # seconds of a run beside them over those measured, at the least


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurements:
    """What one call of `measure` found."""

    strata: Strata
    measurements: tuple[Measurement, ...]
    rows: tuple[RowVerdict, ...]
    in_turns: bool  # the signatures were on the device together
    call: str = field(default_factory=lambda: uuid.uuid4().hex)  # tells it from every other one
    busier: Busier | None = None  # of an earlier one: others take plainly more of the CPU's time now
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def of(self, signature: StepSignature) -> Measurement | None:
        return next((one for one in self.measurements if one.signature == signature), None)

    def verdict(self, name: str) -> RowVerdict | None:
        return next((one for one in self.rows if one.name == name), None)
