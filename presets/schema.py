"""Presets: one TOML file each, loaded into a validated frozen dataclass. Standard library only."""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
import types
import typing
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from presets import rules
from presets.errors import PresetError, did_you_mean
from presets.text import shown

Precision = Literal["fp32", "tf32", "fp16", "bf16"]
BasePrecision = Literal["auto", "fp32", "fp16", "bf16", "8bit", "4bit"]
Adapter = Literal["lora", "full"]
Attention = Literal["sdpa", "eager"]
SamplingStrategy = Literal["random", "top", "prioritized"]
SampleScore = Literal["engagement", "recency", "loss"]

_MOST_RANK = 65_536

PRESET_ORDER = (
    "baseline", "recommended", "aggressive", "today", "iterate", "two-stage", "progressive", "prioritized",
)  # fmt: skip
DEFAULT_PRESET = "recommended"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Which of the training examples a pass uses. All None: every example."""

    strategy: SamplingStrategy = "random"
    size: int | None = None  # examples
    ratio: float | None = None  # of the training examples, 0-1
    score: SampleScore = "engagement"  # what "top" and "prioritized" rank by

    @property
    def takes_all(self) -> bool:
        return self.size is None and (self.ratio is None or self.ratio == 1.0) and self.strategy != "prioritized"

    def problems(self) -> list[str]:
        found = []
        found += rules.whole("sample_size", self.size, 1, rules.MOST_EXAMPLES)
        found += rules.number("sample_ratio", self.ratio, 0, 1, above=True)
        if self.size is not None and self.ratio is not None:
            found.append("sample_size and sample_ratio are both set; give one of them")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of a run with its own accumulation and learning rate.

    A phase with `num_epochs` is a *stage*: its own passes over its own sample, with its own warm-up and decay.
    A phase without is a stretch of one shared pass: `num_steps` optimizer steps, or None for the rest of it.
    """

    gradient_accumulation_steps: int
    learning_rate: float
    num_steps: int | None = None
    num_epochs: int | None = None
    sample_size: int | None = None
    sample_ratio: float | None = None
    sampling_strategy: SamplingStrategy = "random"
    sample_score: SampleScore = "engagement"

    @property
    def is_stage(self) -> bool:
        return self.num_epochs is not None

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            strategy=self.sampling_strategy, size=self.sample_size, ratio=self.sample_ratio, score=self.sample_score
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What the published guide says of a preset. Data, never mixed with measurements."""

    hours_low: float | None = None
    hours_high: float | None = None
    quality: str | None = None
    vram: str | None = None
    risk: str | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        problems = [
            problem
            for name in ("hours_low", "hours_high")
            for problem in rules.number(f"published_{name}", getattr(self, name), 0, 1e6)
        ]
        if problems:
            raise PresetError("; ".join(problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """What a run does with any model and any data. Global batch = micro_batch_size x gradient_accumulation_steps."""

    name: str
    summary: str
    gradient_accumulation_steps: int
    learning_rate: float
    precision: Precision
    micro_batch_size: int = 1
    num_epochs: int | float = 1  # whole; or below 1: that share of the examples, once, drawn at random
    sample_size: int | None = None
    sample_ratio: float | None = None
    sampling_strategy: SamplingStrategy = "random"
    sample_score: SampleScore = "engagement"
    max_length: int = 1024  # tokens
    adapter: Adapter = "lora"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: str = "all-linear"
    lora_rslora: bool = False
    base_precision: BasePrecision = "auto"
    attention: Attention = "sdpa"
    gradient_checkpointing: bool = False
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    phases: tuple[Phase, ...] = ()
    published: Published = Published()

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise PresetError(f"preset '{self.name}': " + "; ".join(problems) + ".")

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step (of the first phase, where a preset has phases)."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            strategy=self.sampling_strategy, size=self.sample_size, ratio=self.sample_ratio, score=self.sample_score
        )

    def problems(self) -> list[str]:
        """Every broken rule, as text; empty when the preset is sound."""
        found = []
        for field in ("gradient_accumulation_steps", "micro_batch_size"):
            found += rules.whole(field, getattr(self, field), 1, rules.MOST_SEQUENCES)
        epochs = self.num_epochs
        is_whole = 1 <= epochs <= rules.MOST_EPOCHS and epochs == int(epochs)
        if not is_whole and not 0 < self.num_epochs < 1:
            found.append(
                f"num_epochs is {shown(epochs)}; it must be a whole number of at least 1 and at most "
                f"{rules.MOST_EPOCHS:,}, or a share of one below 1"
            )
        if self.max_length < 2:
            found.append(f"max_length is {shown(self.max_length)}; a sequence needs at least 2 tokens")
        found += rules.whole("max_length", max(2, self.max_length), 2, rules.MOST_TOKENS)
        found += _learning_rate_problems("learning_rate", self.learning_rate)
        if self.adapter == "lora" and self.lora_rank == 0:
            found.append("lora_rank is 0 with adapter 'lora'; it must be at least 1")
        else:
            found += rules.whole("lora_rank", self.lora_rank, 1 if self.adapter == "lora" else 0, _MOST_RANK)
        found += rules.number("lora_alpha", self.lora_alpha, 0, 1e6, above=self.adapter == "lora")
        found += rules.text("lora_targets", self.lora_targets)
        for field in ("lora_dropout", "warmup_ratio"):
            if not 0 <= getattr(self, field) < 1:
                found.append(f"{field} is {getattr(self, field)}; it must be at least 0 and below 1")
        for field in ("weight_decay", "max_grad_norm"):
            found += rules.number(field, getattr(self, field), 0, 1e12)
        found += rules.text("name", self.name, most=255)
        if self.adapter == "full" and self.base_precision in ("8bit", "4bit"):
            found.append(
                f"base_precision is '{self.base_precision}' with adapter 'full'; quantized weights cannot be trained, "
                f"use adapter 'lora'"
            )
        found += self.sampling.problems()
        found += self._phase_problems()
        return found

    def _phase_problems(self) -> list[str]:
        found = []
        if self.phases and len({phase.is_stage for phase in self.phases}) > 1:
            found.append("some phases have num_epochs and some do not; either all are stages or none is")
        for number, phase in enumerate(self.phases, start=1):
            where = f"phase {number}: "
            steps = phase.gradient_accumulation_steps
            found += [
                where + text for text in rules.whole("gradient_accumulation_steps", steps, 1, rules.MOST_SEQUENCES)
            ]
            found += [where + text for text in _learning_rate_problems("learning_rate", phase.learning_rate)]
            found += [where + text for text in phase.sampling.problems()]
            found += [where + text for text in rules.whole("num_epochs", phase.num_epochs, 1, rules.MOST_EPOCHS)]
            found += [where + text for text in rules.whole("num_steps", phase.num_steps, 1, rules.MOST_STEPS)]
            if phase.is_stage and phase.num_steps is not None:
                found.append(where + "num_steps and num_epochs are both set; give one of them")
            if not phase.is_stage and not phase.sampling.takes_all:
                found.append(where + "only a stage (a phase with num_epochs) can take its own sample")
            if not phase.is_stage and phase.num_steps is None and number < len(self.phases):
                found.append(where + "only the last phase may leave num_steps open")
        return found


def _learning_rate_problems(field: str, value: float) -> list[str]:
    if math.isfinite(value) and 0 < value < 1:
        return []
    return [f"{field} is {shown(value)}; it must be a number above 0 and below 1"]


def preset_names(folder: Path | None = None) -> list[str]:
    """Names of the presets in `folder` (default: the bundled ones), the published order first."""
    stems = {path.stem for path in _folder(folder).iterdir() if path.name.endswith(".toml")}  # type: ignore[attr-defined]
    known = [name for name in PRESET_ORDER if name in stems]
    return known + sorted(stems - set(known))


def load_preset(name: str, folder: Path | None = None) -> Preset:
    """The preset called `name`.

    Raises:
        PresetError: no such preset, not TOML, unknown keys, wrong types or values; all problems at once.
    """
    names = preset_names(folder)
    if name not in names:
        raise PresetError(f"no preset '{name}'.{did_you_mean(name, names)} Run 'plan presets' to list them.")
    text = (_folder(folder) / f"{name}.toml").read_text(encoding="utf-8")
    return parse_preset(name, text)


@functools.lru_cache(maxsize=64)  # a table asks for each preset three times
def parse_preset(name: str, text: str) -> Preset:
    """A preset from the text of its TOML file; `name` is the file's stem.

    Raises:
        PresetError: as `load_preset`.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PresetError(f"preset '{name}': not TOML ({error}).") from None
    except RecursionError:
        raise PresetError(f"preset '{name}': not TOML that can be read (nested too deeply).") from None
    except ValueError as error:  # e.g. a number of thousands of digits, or a date that no calendar has
        raise PresetError(f"preset '{name}': not TOML that can be read ({str(error).split(';')[0]}).") from None
    problems: list[str] = []
    published = {key.removeprefix("published_"): table.pop(key) for key in list(table) if key.startswith("published_")}
    phases = table.pop("phase", [])
    if not (isinstance(phases, list) and all(isinstance(phase, dict) for phase in phases)):
        problems.append("phase must be written as [[phase]] tables")
        phases = []
    fields = _check(Preset, table, problems, skip={"name", "phases", "published"})
    published = _check(Published, published, problems, prefix="published_")
    phase_fields = [
        _check(Phase, phase, problems, prefix=f"phase {number}: ") for number, phase in enumerate(phases, start=1)
    ]
    if problems:  # of the keys that can be read the values are checked too, so that all is told at once
        try:
            Preset(name=name, **{**_stand_ins(Preset, fields), **fields})
        except PresetError as reason:
            problems.append(str(reason).removeprefix(f"preset '{name}': ").rstrip("."))
        raise PresetError(f"preset '{name}': " + "; ".join(problems) + ".")
    try:
        said = Published(**published)
    except PresetError as reason:
        problems.append(str(reason))
        said = Published()
    try:
        preset = Preset(name=name, phases=tuple(Phase(**phase) for phase in phase_fields), published=said, **fields)
    except PresetError as reason:
        problems.append(str(reason).removeprefix(f"preset '{name}': ").rstrip("."))
    if problems:
        raise PresetError(f"preset '{name}': " + "; ".join(problems) + ".")
    return preset


def _stand_ins(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    """Harmless values for the required fields that are not given."""
    hints = typing.get_type_hints(cls)
    harmless = {int: 1, float: 1e-4, str: "-", bool: False}
    return {
        field.name: typing.get_args(hints[field.name])[0]
        if typing.get_origin(hints[field.name]) is Literal
        else harmless[hints[field.name]]
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in (*given, "name")
    }


def _folder(folder: Path | None) -> Any:  # Path or importlib's Traversable
    return resources.files("presets") if folder is None else folder


def _check(
    cls: type, table: dict[str, Any], problems: list[str], *, prefix: str = "", skip: set[str] | None = None
) -> dict[str, Any]:
    """The keys of `table` that fit the fields of dataclass `cls`; what does not fit is added to `problems`."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in (skip or set())}
    good: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            problems.append(
                f"unknown key '{prefix}{key[:60]}'.{did_you_mean(key, fields)}".rstrip(".?")
                + ("?" if did_you_mean(key, fields) else "")
            )
            continue
        fits, converted = fit_type(hints[key], value)
        if fits:
            good[key] = converted
        else:
            problems.append(f"{prefix}{key} is {shown(value)}; it must be {describe_type(hints[key])}")
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in table:
            problems.append(f"{prefix}{key} is missing")
    return good


def fit_type(hint: Any, value: Any) -> tuple[bool, Any]:
    """Whether a value read from TOML or JSON fits a field's type, and the value in that type."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint) and isinstance(value, str), value
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            fits, converted = fit_type(option, value)
            if fits:
                return True, converted
        return False, value
    if hint is float:
        converted = _as_float(value)
        return isinstance(converted, float), converted
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if hint is type(None):
        return value is None, value
    return isinstance(value, hint), value


def _as_float(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
    except OverflowError:  # a whole number beyond every float
        return value


def describe_type(hint: Any) -> str:
    """A field's type in a user's words."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(f"'{option}'" for option in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe_type(option) for option in typing.get_args(hint) if option is not type(None))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))
