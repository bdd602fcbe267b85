"""Job: everything a run needs, resolved; to and from JSON. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from presets import jsonio, rules
from presets.errors import SettingsError
from presets.schema import BasePrecision, Precision, Preset
from presets.text import shown

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

    def problems(self) -> list[str]:
        """Every broken rule, as text."""
        found = rules.text("data.source", self.source)
        found += rules.whole("data.num_examples", self.num_examples, 1, rules.MOST_EXAMPLES)
        found += rules.whole("data.tokens_per_example", self.tokens_per_example, 2, rules.MOST_TOKENS)
        found += rules.whole("data.limit", self.limit, 1, rules.MOST_EXAMPLES)
        if self.is_count and self.num_examples is None:
            found.append("data.source is 'count' without data.num_examples; give the count")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSpec:
    """The held-out part and how often it is used."""

    fraction: float = 0.02
    minimum: int = 8  # examples
    maximum: int = 1000
    times_during_training: int = 3  # between the one before and the one after
    num_samples: int = 4  # answers written before and after, side by side
    max_new_tokens: int = 64

    def problems(self) -> list[str]:
        """Every broken rule, as text."""
        found = []
        if not 0 <= self.fraction < 1:
            found.append(f"evaluation.fraction is {self.fraction}; it must be at least 0 and below 1")
        for name in ("minimum", "maximum"):
            found += rules.whole(f"evaluation.{name}", getattr(self, name), 0, rules.MOST_EXAMPLES)
        if self.minimum > self.maximum and not found:
            found.append(f"evaluation.minimum is {self.minimum} and evaluation.maximum {self.maximum}; exchange them")
        found += rules.whole("evaluation.times_during_training", self.times_during_training, 0, 10_000)
        found += rules.whole("evaluation.num_samples", self.num_samples, 0, 10_000)
        return found + rules.whole("evaluation.max_new_tokens", self.max_new_tokens, 1, rules.MOST_TOKENS)


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
    share_beginnings: bool = True  # packed rows hold once what their documents begin with, see `attends_apart`
    compile: bool = False  # torch.compile the layers, before the first step
    loss: Loss = "plain"  # lean: the output layer sees supervised positions only, a chunk at a time; the same number
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoint_every: int | None = None  # optimizer steps; None: see trainer.planning.with_checkpoint_interval
    keep_checkpoints: int = 2
    trust_remote_code: bool = False
    tracker: str | None = None

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise SettingsError("; ".join(problems) + ".")
        for size in self.global_batch_sizes:
            self._accumulation(size)

    def _problems(self) -> list[str]:
        found = rules.text("name", self.name, most=255)
        if "/" in self.name or "\\" in self.name or self.name in (".", ".."):
            found.append(f"name is {shown(self.name)}; it must be no path, since a folder is named after it")
        found += rules.text("model", self.model)
        found += rules.whole("micro_batch_size", self.micro_batch_size, 1, rules.MOST_SEQUENCES)
        found += rules.whole("num_devices", self.num_devices, 1, 1024)
        found += rules.whole("num_threads", self.num_threads, 1, 1024)
        found += rules.whole("seed", self.seed, 0, rules.MOST_SEED)
        found += rules.whole("packed_length", self.packed_length, 2, 64 * rules.MOST_TOKENS)  # a row holds 2 tokens
        found += rules.whole("checkpoint_every", self.checkpoint_every, 1, rules.MOST_STEPS)
        found += rules.whole("keep_checkpoints", self.keep_checkpoints, 1, 10_000)
        found += rules.text("tracker", self.tracker, most=255)
        if self.base_precision == "auto":
            found.append("base_precision is 'auto' in a job; it must be resolved first")
        return found + self.data.problems() + self.evaluation.problems()

    @property
    def global_batch_sizes(self) -> tuple[int, ...]:
        """Sequences per optimizer step: one per phase, or a single one."""
        micro = self.preset.micro_batch_size
        if self.preset.phases:
            return tuple(micro * phase.gradient_accumulation_steps for phase in self.preset.phases)
        return (self.preset.global_batch_size,)

    @property
    def row_length(self) -> int:
        """Tokens that a packed row may hold; 0 where rows are not packed."""
        return (self.packed_length or self.preset.max_length) if self.packing else 0

    @property
    def attends_apart(self) -> bool:
        """Whether packed documents are attended to one by one where the model allows it (`trainer.documents`).

        Compiled layers would be compiled anew for each arrangement of documents.
        """
        return self.preset.attention == "sdpa" and not self.compile

    @property
    def shares_beginnings(self) -> bool:
        """Whether its rows, where they are packed, hold once what their documents begin with (`trainer.beginning`)."""
        return self.share_beginnings and self.attends_apart

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
