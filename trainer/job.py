"""Job: everything a run needs, resolved; to and from JSON. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from presets import jsonio
from presets.errors import SettingsError
from presets.schema import BasePrecision, Precision, Preset

TrainOn = Literal["assistant", "all"]
Device = Literal["cpu", "cuda", "mps"]
Loss = Literal["plain", "lean"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """Where the examples come from and how they are read.

    `source` is a path, a hub name, "bundled" (the demo messages) or "count" (`num_examples` invented examples whose
    lengths are drawn from the bundled distribution, or are all `tokens_per_example`).
    """

    source: str
    num_examples: int | None = None  # for source "count": training examples, the evaluation ones come on top
    tokens_per_example: int | None = None
    columns: tuple[tuple[str, str], ...] = ()  # (role in the record, column name), e.g. ("prompt", "q")
    train_on: TrainOn = "assistant"
    skip_bad_lines: bool = False
    limit: int | None = None  # use only the first N records of a file or hub data set

    @property
    def is_count(self) -> bool:
        return self.source == "count"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSpec:
    """The held-out part and how often it is used."""

    fraction: float = 0.02
    minimum: int = 8  # examples
    maximum: int = 1000
    times_during_training: int = 3  # between the one before and the one after
    num_samples: int = 4  # answers written before and after, side by side
    max_new_tokens: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run, resolved: nothing in it is left to a default that another floor would have to know."""

    name: str  # of the preset or "yours"
    preset: Preset  # with options applied
    model: str  # folder or hub name
    data: DataSpec
    device: Device
    precision: Precision  # in which the run really computes
    base_precision: BasePrecision  # in which the frozen weights are stored; never "auto"
    micro_batch_size: int
    num_devices: int = 1
    num_threads: int | None = None  # CPU threads; None: torch's own choice
    seed: int = 42
    sort_window: bool = True  # longest first inside a window; its examples stay the same
    group_by_length: bool = False  # windows of examples alike in length: other batches, not quality-neutral
    packing: bool = False
    packed_length: int | None = None  # tokens in a packed row; None: the preset's max_length
    compile: bool = False  # torch.compile the layers, before the first step
    loss: Loss = "plain"  # lean: the output layer sees supervised positions only, a chunk at a time; the same number
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoint_every: int | None = None  # optimizer steps; None: ten times a run
    keep_checkpoints: int = 2
    trust_remote_code: bool = False
    tracker: str | None = None

    def __post_init__(self) -> None:
        if not self.name or self.name in (".", "..") or set(self.name) & set("/\\\0"):
            raise SettingsError(
                f"name is {self.name!r}; it names a folder, so it must be a plain name without / or \\."
            )
        if self.micro_batch_size < 1:
            raise SettingsError(f"micro_batch_size is {self.micro_batch_size}; it must be at least 1.")
        if self.num_devices < 1:
            raise SettingsError(f"num_devices is {self.num_devices}; it must be at least 1.")
        if self.packed_length is not None and self.packed_length < 2:
            raise SettingsError(f"packed_length is {self.packed_length}; a row needs room for at least 2 tokens.")
        if self.base_precision == "auto":
            raise SettingsError("base_precision is 'auto' in a job; it must be resolved first.")
        for size in self.global_batch_sizes:
            self._accumulation(size)

    @property
    def global_batch_sizes(self) -> tuple[int, ...]:
        """Sequences per optimizer step: one per phase, or a single one."""
        micro = self.preset.micro_batch_size
        if self.preset.phases:
            return tuple(micro * phase.gradient_accumulation_steps for phase in self.preset.phases)
        return (self.preset.global_batch_size,)

    @property
    def gradient_accumulation_steps(self) -> tuple[int, ...]:
        """Micro-batches per optimizer step and device, one per phase: what holds the global batch on these devices."""
        return tuple(self._accumulation(size) for size in self.global_batch_sizes)

    def _accumulation(self, global_batch_size: int) -> int:
        per_round = self.micro_batch_size * self.num_devices
        if global_batch_size % per_round:
            raise SettingsError(
                f"a global batch of {global_batch_size} cannot be split into micro-batches of {self.micro_batch_size} "
                f"on {self.num_devices} device(s): {global_batch_size} is not a multiple of {per_round}. "
                f"Choose another --micro-batch-size or number of devices."
            )
        return global_batch_size // per_round

    def to_json(self) -> str:
        return jsonio.to_json(self)

    @classmethod
    def from_json(cls, text: str, *, what: str = "job.json") -> Job:
        """Raises: SettingsError, naming every problem."""
        return jsonio.from_json(cls, text, what=what, error=SettingsError)

    @classmethod
    def read(cls, path: Path) -> Job:
        """Raises: SettingsError where the file is missing, unreadable or not a job."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), what=str(path))
        except (OSError, UnicodeDecodeError) as reason:
            raise SettingsError(f"{path}: cannot be read ({reason}).") from None
