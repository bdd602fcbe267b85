"""Presets + `.env` + options + device -> Jobs. No torch."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from planner.counts import error_of, parse_count
from planner.hardware import DeviceFacts, resolve_base_precision, resolve_precision
from presets.demo import demo_folder
from presets.env import YOURS, Settings, yours_preset
from presets.errors import OptionError, PresetError, SettingsError, did_you_mean
from presets.home import expanded
from presets.schema import (
    Adapter,
    Attention,
    BasePrecision,
    Precision,
    Preset,
    SampleScore,
    SamplingStrategy,
)
from presets.user import all_names, find_preset, is_path
from trainer.job import DataSpec, EvaluationSpec, Job, TrainOn

COLUMN_ROLES = (
    "messages", "prompt", "completion", "question", "answer", "instruction", "input", "output", "text",
    "engagement", "created_at",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What was asked for on the command line (or through the library); None where nothing was said."""

    dataset: str | None = None
    model: str | None = None
    columns: str | None = None  # "prompt=q,completion=a"
    tokens_per_example: int | None = None
    train_on: TrainOn = "assistant"
    skip_bad_lines: bool = False
    limit: int | None = None
    micro_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    precision: Precision | None = None
    base_precision: BasePrecision | None = None
    adapter: Adapter | None = None
    learning_rate: float | None = None
    epochs: int | float | None = None
    max_length: int | None = None
    sample_size: int | None = None
    sample_ratio: float | None = None
    sampling_strategy: SamplingStrategy | None = None
    sample_score: SampleScore | None = None
    attention: Attention | None = None
    gradient_checkpointing: bool | None = None
    packing: bool = False
    share_beginnings: bool | None = None
    lean_loss: bool = False
    group_by_length: bool = False
    compile: bool = False
    seed: int | None = None
    device: str | None = None
    num_devices: int | None = None
    num_threads: int | None = None
    eval_fraction: float | None = None
    samples: int | None = None
    trust_remote_code: bool = False
    tracker: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A job, or why this configuration cannot be one; and what a user should know of it."""

    preset: Preset
    job: Job | None
    notes: tuple[str, ...] = ()
    sampled: str = ""  # how a sample is taken, where nobody has said it; "" where somebody has, or none is taken
    error: str | None = None


def presets_to_compare(
    settings: Settings, names: tuple[str, ...] = (), say: Callable[[str], None] = lambda text: None
) -> tuple[Preset, ...]:
    """The named presets (all where none is named), "yours" last where settings make one; each once.

    Args:
        say: told of a preset of the user's own that cannot be used, where none was named.

    Raises:
        PresetError: an unknown name, "yours" without a setting, or two presets of one name.
    """
    yours = yours_preset(settings)
    found: dict[str, Preset] = {}
    for name in names or (*all_names(), *(("yours",) if yours else ())):
        try:
            preset = _preset(name, yours)
        except PresetError as reason:
            if names:
                raise
            say(f"left out: {reason}")
            continue
        if found.setdefault(preset.name, preset) != preset:
            raise PresetError(f"two different presets are called '{preset.name}'. Give one of the files another name.")
    return tuple(found.values())


def _preset(name: str, yours: Preset | None) -> Preset:
    if name == "yours":
        if yours is None:
            raise PresetError(
                "'yours' is made from .env or the environment, and neither sets anything of it. "
                "Set for example GRADIENT_ACCUMULATION_STEPS=32 in .env."
            )
        return yours
    known = [*all_names(), "yours"]
    if name not in known and not is_path(name):
        raise PresetError(f"no preset '{name}'.{did_you_mean(name, known)} Run 'plan presets' to list them.")
    return find_preset(name)


def resolve_model(options: Options, settings: Settings) -> tuple[str, str]:
    """(model folder or hub name, where it was named)."""
    if options.model:
        return options.model, "--model"
    if settings.model:
        return settings.model, f"MODEL in {settings.origin.get('MODEL', '.env')}"
    return str(demo_folder()), "the bundled demo model"


def resolve_data(options: Options, settings: Settings, *, running: bool) -> DataSpec:
    """Which data: the option, then DATASET, then the bundled messages.

    Raises:
        SettingsError: a number that is no count, a count for a run, or --columns that cannot be read.
    """
    named, where = _dataset(options, settings)
    common: dict[str, Any] = {
        "columns": parse_columns(options.columns),
        "train_on": options.train_on,
        "skip_bad_lines": options.skip_bad_lines,
        "limit": options.limit,
    }
    count = parse_count(named, where)
    if count is None:
        if options.tokens_per_example is not None:
            raise error_of(where)(
                "--tokens-per-example goes with a count (--dataset 63000); a file has its own lengths."
            )
        source = named if named == "bundled" or not expanded(named).exists() else str(expanded(named).resolve())
        return DataSpec(source=source, **common)
    if running:
        setting, is_set, place = where.partition(" in ")
        instead = f"take {setting} out of {place}" if is_set else f"leave {where} out"
        raise error_of(where)(
            f"{where} is {named}, a count: enough for planning, but a run needs messages. "
            f"Give a file (--dataset messages.jsonl), or {instead} to train on the bundled messages."
        )
    return DataSpec(source="count", num_examples=count, tokens_per_example=options.tokens_per_example, **common)


def _dataset(options: Options, settings: Settings) -> tuple[str, str]:
    """(what was named, where it was named)."""
    if options.dataset or not settings.dataset:
        return options.dataset or "bundled", "--dataset"
    return settings.dataset, f"DATASET in {settings.origin.get('DATASET', '.env')}"


def parse_columns(text: str | None) -> tuple[tuple[str, str], ...]:
    """ "prompt=q,completion=a" -> (("prompt", "q"), ("completion", "a")).

    Raises:
        OptionError: not of that form, or an unknown role.
    """
    pairs = []
    for part in (text or "").split(","):
        if not part.strip():
            continue
        role, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column:
            raise OptionError(f"--columns has '{part}'; it must look like prompt=COLUMN,completion=COLUMN.")
        if role not in COLUMN_ROLES:
            raise OptionError(
                f"--columns has '{role}'.{did_you_mean(role, COLUMN_ROLES)} Known: {', '.join(COLUMN_ROLES)}."
            )
        pairs.append((role, column))
    return tuple(pairs)


def resolve_job(preset: Preset, options: Options, settings: Settings, facts: DeviceFacts, data: DataSpec) -> Resolved:
    """One configuration as a job on this device. What cannot be done becomes its error, so that others still show.

    Raises:
        PresetError: an option's value is out of range for any configuration.
    """
    applied, notes = _with_options(preset, options)  # an option's value that no preset may have is an error at once
    try:
        precision, note = resolve_precision(applied.precision, facts)
        _check_quantization(applied)
        job = Job(
            name=preset.name,
            preset=applied,
            model=_model_path(resolve_model(options, settings)[0]),
            data=data,
            device=facts.kind,
            precision=precision,
            base_precision=resolve_base_precision(applied, precision),
            micro_batch_size=options.micro_batch_size or applied.micro_batch_size,
            num_devices=_num_devices(options, facts),
            num_threads=options.num_threads,
            seed=options.seed if options.seed is not None else settings.seed if settings.seed is not None else 42,
            packing=options.packing,
            share_beginnings=options.share_beginnings is not False,
            loss="lean" if options.lean_loss else "plain",
            group_by_length=options.group_by_length,
            compile=options.compile,
            evaluation=_evaluation(options),
            trust_remote_code=options.trust_remote_code,
            tracker=options.tracker,
        )
    except SettingsError as reason:
        return Resolved(preset=applied, job=None, error=str(reason))
    sampled = _chosen_sampling(preset, applied, options, settings)
    return Resolved(preset=applied, job=job, notes=(*notes, *((note,) if note else ())), sampled=sampled)


def _check_quantization(preset: Preset) -> None:
    """Before a process is started for it.

    Raises:
        SettingsError: a base in 8 or 4 bits is asked for without the package that makes it.
    """
    if preset.base_precision in ("8bit", "4bit") and importlib.util.find_spec("bitsandbytes") is None:
        raise SettingsError(
            f"base_precision is '{preset.base_precision}', which needs bitsandbytes. "
            "Install it (pip install bitsandbytes) or choose base_precision fp16."
        )


def _model_path(model: str) -> str:
    """A local folder as an absolute path, so that a job can be resumed from another working directory."""
    folder = expanded(model)
    return str(folder.resolve()) if folder.is_dir() else model


def _num_devices(options: Options, facts: DeviceFacts) -> int:
    if options.num_devices is not None:
        return options.num_devices
    return facts.num_devices if facts.kind == "cuda" else 1


def _evaluation(options: Options) -> EvaluationSpec:
    spec = EvaluationSpec()
    if options.samples is not None:
        if options.samples < 0:
            raise SettingsError(f"--samples is {options.samples}; it must be at least 0.")
        spec = replace(spec, num_samples=options.samples)
    if options.eval_fraction is None:
        return spec
    if not 0 <= options.eval_fraction < 1:
        raise SettingsError(f"--eval-fraction is {options.eval_fraction}; it must be at least 0 and below 1.")
    return replace(spec, fraction=options.eval_fraction)


def _with_options(preset: Preset, options: Options) -> tuple[Preset, list[str]]:
    changes: dict[str, Any] = {}
    notes = []
    direct = {
        "precision": options.precision,
        "base_precision": options.base_precision,
        "adapter": options.adapter,
        "learning_rate": options.learning_rate,
        "num_epochs": options.epochs,
        "max_length": options.max_length,
        "attention": options.attention,
        "gradient_checkpointing": options.gradient_checkpointing,
        "sampling_strategy": options.sampling_strategy,
        "sample_score": options.sample_score,
    }
    changes.update({name: value for name, value in direct.items() if value is not None})
    if options.sample_size is not None or options.sample_ratio is not None:
        changes.update(sample_size=options.sample_size, sample_ratio=options.sample_ratio)
        if options.sample_size is not None and options.sampling_strategy is None and preset.sampling.takes_all:
            changes["sampling_strategy"] = (
                "top"  # SAMPLE_SIZE means the top N messages; a preset that samples knows how
            )
    if options.gradient_accumulation_steps is not None:
        changes["gradient_accumulation_steps"] = options.gradient_accumulation_steps
        if options.micro_batch_size is not None:
            changes["micro_batch_size"] = options.micro_batch_size  # both given: their product is the global batch
    if preset.phases and changes:
        own = {"gradient_accumulation_steps", "learning_rate", "num_epochs"} & set(changes)
        if any(phase.is_stage for phase in preset.phases):
            own |= {"sample_size", "sample_ratio", "sampling_strategy", "sample_score"} & set(changes)
        for name in own - ({"num_epochs"} if not preset.phases[0].is_stage else set()):
            if getattr(preset, name) != changes[name]:
                notes.append(f"keeps the {name} of its own phases")
            del changes[name]
        changes.pop("micro_batch_size", None)
    return (replace(preset, **changes) if changes else preset), sorted(set(notes))


def _chosen_sampling(preset: Preset, applied: Preset, options: Options, settings: Settings) -> str:
    """What a sample is made of where nobody has said so: the published rule for a size, or the preset's own way."""
    sampling, because = applied.sampling, "no --sampling-strategy was named"
    if options.sampling_strategy is not None or (applied.phases and applied.phases[0].is_stage) or sampling.takes_all:
        return ""
    if options.sample_size is None and options.sample_ratio is None:
        if preset.name != YOURS or settings.sample_size is None or settings.sampling_strategy is not None:
            return ""
        because = "SAMPLING_STRATEGY is not set"
    elif not preset.sampling.takes_all:
        return f"keeps its own sampling strategy, '{sampling.strategy}', as {because}"
    if sampling.strategy == "top":
        much = f"{sampling.size:,}" if sampling.size is not None else f"{100 * (sampling.ratio or 1):g}%"
        return f"takes the top {much} by {sampling.score}, as {because}; 'random' draws them from all"
    return f"draws its sample at random, as {because}"


def option_fields() -> tuple[str, ...]:
    """Names of all options, for the command line's own check that it declares each."""
    return tuple(field.name for field in dataclasses.fields(Options))


def resolve_count(options: Options, settings: Settings) -> int:
    """The number of training examples for the published mode, which reads no data.

    Raises:
        SettingsError: --dataset is not a count.
    """
    named, where = _dataset(options, settings)
    if named == "bundled":
        raise error_of(where)("--step-time needs a count of examples: plan --dataset 63000 --step-time 30.")
    count = parse_count(named, where)
    if count is None:
        raise error_of(where)(
            f"--step-time measures and reads nothing, so {where} must be a count, not '{named}': "
            "plan --dataset 63000 --step-time 30."
        )
    return count
