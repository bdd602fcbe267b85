"""A device with a known cost function, on which no time passes: the planner's test seam, filled in."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np

from planner.measurement import PlannedRow
from planner.prober import DoesNotFit, LoadReply, MemoryReply, MicroRows, PeakReply, SaveReply
from presets.errors import MeasurementError
from presets.schema import load_preset
from trainer.batching import BatchPlan
from trainer.job import DataSpec, EvaluationSpec, Job
from trainer.planning import plan_job
from trainer.tokens import DataReport, TokenizedDataset
from trainer.widths import shared_width

_JOB_FIELDS = {one.name for one in fields(Job)}


def make_data(lengths: np.ndarray) -> TokenizedDataset:
    """Examples of these lengths; every token but the first is a target."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    supervised = np.ones(offsets[-1], dtype=bool)
    supervised[offsets[:-1]] = False
    ids = (np.arange(offsets[-1]) % 50 + 3).astype(np.int32)
    report = DataReport(source="fake", num_records=len(lengths))
    return TokenizedDataset(token_ids=ids, supervised=supervised, offsets=offsets, report=report)


def chat_lengths(count: int, *, seed: int = 5, sigma: float = 0.8, longest: int = 1024) -> np.ndarray:
    """Lengths like those of chat messages: log-normal, with a long tail."""
    drawn = np.random.default_rng(seed).lognormal(4.3, sigma, count)
    return np.clip(drawn.round(), 4, longest).astype(np.int64)


def make_job(name: str = "baseline", *, model: str = "model", micro_batch_size: int = 1, **changes: object) -> Job:
    """A job of a bundled preset on a data set of its own; `changes` are fields of the job or of its preset."""
    preset_changes = {key: changes.pop(key) for key in list(changes) if key not in _JOB_FIELDS}
    preset = replace(load_preset(name), **preset_changes)  # type: ignore[arg-type]
    job = Job(
        name=name,
        preset=preset,
        model=model,
        data=DataSpec(source="fake"),
        device="cpu",
        precision="fp32",
        base_precision="fp32",
        micro_batch_size=micro_batch_size,
        evaluation=EvaluationSpec(minimum=0, maximum=8),
    )
    return replace(job, **changes)  # type: ignore[arg-type]


def make_row(job: Job, data: TokenizedDataset, name: str | None = None) -> PlannedRow:
    return PlannedRow(name=name or job.name, job=job, plan=plan_job(job, data).plan)


@dataclass
class FakeDevice:
    """Seconds of a micro-batch: base + per_token x padded + per_token_width x padded x width, by noise and speed.

    Noise is log-normal with mean 1 and standard deviation `noise`. Its clock moves by what it charges.
    """

    lengths: np.ndarray
    base: float = 0.010
    per_token: float = 0.0004
    per_token_width: float = 2e-7
    optimizer: float = 0.020
    noise: float = 0.0
    seed: int = 0
    slow_first: int = 0  # micro-steps of each worker that take three times as long
    variants: int = 0  # kernels, each for some shapes, that a worker loads when it first meets such a shape
    variant_seconds: float = 0.0  # that loading one takes
    new_shape_seconds: float = 0.0  # that a shape takes more the first time that a process meets it
    loading_evaluation: float = 0.0  # more seconds of a batch of held-out examples, its first time in a process
    evaluation_bytes: int = 0  # of a padded token of held-out examples; 0: less than a step in any case
    drift: float = 0.0  # slower by this share every minute
    spikes: float = 0.0  # share of the timings that take `spike_factor` times as long
    spike_factor: float = 3.0
    throttle: float = 1.0  # two modes: seconds in the slow one / seconds in the fast one
    dwell: float = 6.0  # mean seconds between two changes of the mode
    fits_padded_tokens: int | None = None
    fits_in_turns: int | None = None  # padded tokens that still fit among other shapes, while timing
    memory: int = 8 << 30
    bytes_per_token: int = 1 << 20
    packing_refused: str | None = None
    lean_refused: str | None = None
    growth: int = 0  # bytes by which the peak of many shapes exceeds that of the largest alone
    window_factor: float = 1.0
    half_speed_up: float = 2.0  # of fp16
    broken: tuple[str, ...] = ()  # precisions whose worker fails
    now: float = 0.0
    log: list[tuple[str, str]] = field(default_factory=list)  # (precision, command)
    drawn: list[tuple[str, MicroRows]] = field(default_factory=list)
    alive: int = 0
    most_alive: int = 0

    def __post_init__(self) -> None:
        self.tokens: list[int] = self.lengths.tolist()  # single numbers are read faster from a list
        self.random = np.random.default_rng([self.seed, 0xFA])
        self.is_throttled = bool(self.random.random() < 0.5)
        self.next_change = float(self.random.exponential(self.dwell))

    def clock(self) -> float:
        return self.now

    def factory(self, job: Job) -> FakeProber:
        return FakeProber(self, job)

    def shape(self, rows: MicroRows) -> tuple[int, int]:
        width = max(sum(map(self.tokens.__getitem__, row)) for row in rows)
        return len(rows) * width, width

    def cost(self, rows: MicroRows) -> float:
        padded, width = self.shape(rows)
        return self.base + self.per_token * padded + self.per_token_width * padded * width

    def true_micro_seconds(self, plan: BatchPlan) -> np.ndarray:
        shapes = plan.micro_shapes(self.lengths)
        padded = shapes.padded_tokens
        return np.asarray(self.base + self.per_token * padded + self.per_token_width * padded * shapes.width)

    def true_seconds(self, plan: BatchPlan) -> float:
        """What the steps of a plan take on this device, noise (of mean 1) left out, spikes counted."""
        mean = 1 + self.spikes * (self.spike_factor - 1)
        return mean * (float(self.true_micro_seconds(plan).sum()) + plan.num_steps * self.optimizer)

    def run_seconds(self, plan: BatchPlan, seed: int, *, packed: bool = False) -> float:
        """What one run of a plan takes: as `true_seconds`, each micro-step and optimizer step with noise of its own."""
        random = np.random.default_rng([seed, 0xFB])
        spread = np.sqrt(np.log1p(self.noise**2))
        micro = self.true_micro_seconds(plan)
        charged = np.concatenate([micro, np.full(plan.num_steps, self.optimizer)])
        charged *= np.exp(random.normal(-(spread**2) / 2, spread, len(charged)))
        charged[random.random(len(charged)) < self.spikes] *= self.spike_factor
        loaded = len(np.unique(self.variant(plan.micro_shapes(self.lengths).padded_tokens))) if self.variants else 0
        new = 0
        if self.new_shape_seconds:
            shapes = plan.micro_shapes(self.lengths)
            new = len(
                set(zip(shapes.rows.tolist(), shared_width(shapes.width, shapes.widest * packed).tolist(), strict=True))
            )
        return float(charged.sum()) + loaded * self.variant_seconds + new * self.new_shape_seconds

    def variant(self, padded: np.ndarray) -> np.ndarray:
        """Which kernel a shape takes."""
        return np.asarray(padded // 32 % self.variants)

    def pass_time(self, seconds: float) -> float:
        spread = np.sqrt(np.log1p(self.noise**2))
        factor = float(np.exp(self.random.normal(-(spread**2) / 2, spread))) if self.noise else 1.0
        if self.spikes and self.random.random() < self.spikes:
            factor *= self.spike_factor
        while self.throttle != 1.0 and self.now >= self.next_change:
            self.is_throttled = not self.is_throttled
            self.next_change += float(self.random.exponential(self.dwell))
        if self.is_throttled and self.throttle != 1.0:
            factor *= self.throttle
        charged = seconds * factor * (1 + self.drift * self.now / 60)
        self.now += charged
        return charged


class FakeProber:
    """One worker on a fake device."""

    def __init__(self, device: FakeDevice, job: Job) -> None:
        self.device, self.job = device, job
        self.speed = device.half_speed_up if job.precision in ("fp16", "bf16") else 1.0
        self.slow_left = device.slow_first
        self.known: set[int] = set()  # kernels that are loaded
        self.met: set[tuple[int, int]] = set()  # shapes
        self.evaluated: set[tuple[int, ...]] = set()  # batches
        self.held = 0
        self.stopped = False
        device.alive += 1
        device.most_alive = max(device.most_alive, device.alive)

    def _seconds(self, rows: MicroRows, longest_row: int = 0) -> float:
        padded, width = self.device.shape(rows)
        if self.device.fits_padded_tokens is not None and padded > self.device.fits_padded_tokens:
            raise DoesNotFit(f"tried to allocate {padded} tokens")
        slow = 3.0 if self.slow_left > 0 else 1.0
        self.slow_left -= 1
        shape = (len(rows), shared_width(width, longest_row))
        new = shape not in self.met
        self.met.add(shape)
        return slow * self.device.cost(rows) / self.speed + self._loading(padded) + new * self.device.new_shape_seconds

    def _loading(self, padded: int) -> float:
        if not self.device.variants:
            return 0.0
        variant = int(self.device.variant(np.array(padded)))
        is_new = variant not in self.known
        self.known.add(variant)
        return self.device.variant_seconds * is_new

    def _note(self, command: str) -> None:
        assert not self.stopped
        if self.job.precision in self.device.broken:
            raise MeasurementError("the worker process ended by itself (exit code 1).")
        self.device.log.append((self.job.precision, command))

    def load(self) -> LoadReply:
        self._note("load")
        return LoadReply(
            start_seconds=0.5,
            import_seconds=4.0,
            load_seconds=1.0,
            num_parameters=1000,
            num_trainable_parameters=100,
            weights="random",
        )

    def run(self, micro_batches: list[MicroRows], begins: list[int], longest_rows: list[int]) -> list[float]:
        self._note("run")
        most = self.device.fits_in_turns
        if most is not None and any(self.device.shape(rows)[0] > most for rows in micro_batches):
            raise DoesNotFit("no block is large enough any more")
        self.device.drawn += [(self.job.precision, rows) for rows in micro_batches]
        return [
            self.device.pass_time(self._seconds(rows, longest))
            for rows, longest in zip(micro_batches, longest_rows, strict=True)
        ]

    def optimizer(self, repeat: int) -> list[float]:
        self._note("optimizer")
        return [self.device.pass_time(self.device.optimizer) for _ in range(repeat)]

    def window(self, micro_batches: list[MicroRows], longest_row: int) -> float:
        self._note("window")
        parts = sum(self.device.pass_time(self._seconds(rows, longest_row)) for rows in micro_batches)
        return self.device.window_factor * (parts + self.device.pass_time(self.device.optimizer))

    def memory(self, windows: list[list[MicroRows]], more: list[list[MicroRows]], seconds: float) -> MemoryReply:
        self._note("memory")
        every = [rows for window in windows for rows in window]
        taken = self._one_by_one(every)
        peak = max(self.device.shape(rows)[0] for rows in every) * self.device.bytes_per_token
        self.held = peak
        return MemoryReply(
            allocated_bytes=peak,
            reserved_bytes=peak,
            micro_step_seconds=max(taken),
            taken=tuple(taken),
            token_seconds=min(seconds / self.device.shape(rows)[0] for seconds, rows in zip(taken, every, strict=True)),
        )

    def _one_by_one(self, every: list[MicroRows]) -> list[float]:
        """Seconds of micro-steps, waiting at each."""
        return [self.device.pass_time(self._seconds(rows)) for rows in every]

    def packing_refused(self, packed_length: int) -> str | None:
        self._note("packing")
        return self.device.packing_refused

    def peak(self) -> PeakReply:
        self._note("peak")
        peak = self.held + self.device.growth
        return PeakReply(allocated_bytes=peak, reserved_bytes=peak, headroom_bytes=self.device.memory - peak)

    def free(self) -> int:
        self._note("free")
        return self.device.memory

    def evaluate(self, batches: list[list[int]]) -> list[float]:
        self._note("evaluate")
        taken = []
        for batch in batches:
            rows = [[example] for example in batch]
            self.held = max(self.held, self.device.evaluation_bytes * self.device.shape(rows)[0])
            loading = self.device.loading_evaluation if tuple(batch) not in self.evaluated else 0.0
            self.evaluated.add(tuple(batch))
            taken.append(self.device.cost(rows) / 3 + loading)
        return taken

    def save(self) -> SaveReply:
        self._note("save")
        return SaveReply(checkpoint_seconds=0.2, adapter_seconds=0.1, removal_seconds=0.03)

    def answer(self, examples: list[int], max_new_tokens: int) -> float:
        self._note("answer")
        return 0.01 * len(examples) * max_new_tokens

    def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            self.device.alive -= 1
