"""The published settings, read from `.env` and the environment. Neither is changed.

    GRADIENT_ACCUMULATION_STEPS  USE_FP16  LEARNING_RATE  EPOCHS  SAMPLE_SIZE  SAMPLE_RATIO  SAMPLING_STRATEGY
    MODEL  DATASET  OUTPUT  MICRO_BATCH_SIZE  MAX_LENGTH  SEED

The environment beats `.env`; command-line options beat both, but not here. A training setting makes the row "yours";
MODEL, DATASET, OUTPUT and SEED fill what presets leave open.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import logging
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from presets.errors import SettingsError
from presets.schema import Preset, SamplingStrategy

DOTENV = ".env"
ENVIRONMENT = "the environment"
YOURS = "yours"

# What the published guide takes where a setting is not given.
DEFAULT_GRADIENT_ACCUMULATION_STEPS = 16
DEFAULT_LEARNING_RATE = 2e-4
DEFAULT_EPOCHS = 1

_NOT_TRAINING = ("model", "dataset", "output", "seed")
# Of an unknown key to a known one, from which a slip of the pen is likelier than another program's key.
_LIKENESS = 0.85
_SHORTEST_LIKENED = 6  # letters; shorter names (MODE, SEEDS) are too often somebody else's
_LONGEST_SHOWN = 40  # characters of a refused value


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The settings that were given; None where one was not. `origin` tells where, by published name."""

    gradient_accumulation_steps: int | None = None
    use_fp16: bool | None = None
    learning_rate: float | None = None
    epochs: int | float | None = None
    sample_size: int | None = None  # examples
    sample_ratio: float | None = None  # 0-1
    sampling_strategy: SamplingStrategy | None = None
    micro_batch_size: int | None = None
    max_length: int | None = None  # tokens
    model: str | None = None
    dataset: str | None = None
    output: str | None = None
    seed: int | None = None
    origin: Mapping[str, str] = field(default_factory=dict)  # "EPOCHS" -> ".env" or "the environment"
    warnings: tuple[str, ...] = ()  # lines for stderr

    @property
    def has_training_settings(self) -> bool:
        """Whether any setting is given that makes the row "yours"."""
        return any(getattr(self, name) is not None for name in _fields() if name not in _NOT_TRAINING)


class _Refused(ValueError):
    """A value that breaks its rule; the message is the rule."""


def read_settings(folder: Path, environ: Mapping[str, str]) -> Settings:
    """The settings of `folder`/.env and `environ`, checked. An empty value counts as not given.

    Unknown keys are left alone, since `.env` files hold other programs' keys too; one that looks like a slip of the pen
    gives a warning.

    Raises:
        SettingsError: `.env` cannot be read, or values break their rules; all problems at once.
    """
    found, written, warnings = _read_dotenv(folder / DOTENV)
    origin: dict[str, str] = {}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, read in _READERS.items():
        key = name.upper()
        text, source = environ.get(key, "").strip(), ENVIRONMENT
        if not text:
            text, source = (found.get(key) or "").strip(), DOTENV
        if not text:
            continue
        origin[key] = source
        try:
            values[name] = read(text)
        except _Refused as rule:
            if source == DOTENV:
                text = written.get(key) or text  # ${NAME} as it stands there: what it stands for may be a secret
            problems.append(f"{key} is {_shown(text)} in {source}; it must be {rule}. Correct it or take it out.")
    if "sample_size" in values and "sample_ratio" in values:
        problems.append(
            f"SAMPLE_SIZE ({origin['SAMPLE_SIZE']}) and SAMPLE_RATIO ({origin['SAMPLE_RATIO']}) are both set; "
            f"they contradict each other. Take one of them out."
        )
    if problems:
        raise SettingsError("\n".join(problems))
    return Settings(**values, origin=origin, warnings=tuple(warnings))


def yours_preset(settings: Settings) -> Preset | None:
    """The preset "yours": the given settings over the published defaults. None where no training setting is given."""
    if not settings.has_training_settings:
        return None
    strategy = settings.sampling_strategy
    if strategy is None:
        # The guide: "SAMPLE_SIZE: a count, the top N messages".
        strategy = "random" if settings.sample_size is None else "top"
    optional = {name: getattr(settings, name) for name in ("micro_batch_size", "max_length")}
    return Preset(
        name=YOURS,
        summary="your settings from .env or the environment",
        gradient_accumulation_steps=_or(settings.gradient_accumulation_steps, DEFAULT_GRADIENT_ACCUMULATION_STEPS),
        learning_rate=_or(settings.learning_rate, DEFAULT_LEARNING_RATE),
        precision="fp16" if settings.use_fp16 else "fp32",
        num_epochs=_or(settings.epochs, DEFAULT_EPOCHS),
        sample_size=settings.sample_size,
        sample_ratio=settings.sample_ratio,
        sampling_strategy=strategy,
        **{name: value for name, value in optional.items() if value is not None},
    )


T = typing.TypeVar("T")


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _fields() -> list[str]:
    return [item.name for item in dataclasses.fields(Settings) if item.name not in ("origin", "warnings")]


def _read_dotenv(path: Path) -> tuple[dict[str, str | None], dict[str, str | None], list[str]]:
    """The keys of a `.env` file, the same with ${NAME} not filled in, and warnings; nothing where there is no file.

    Raises:
        SettingsError: it is there and cannot be read, or is not UTF-8.
    """
    if not path.is_file():  # some projects have a folder of that name, with a virtual environment in it
        return {}, {}, []
    try:
        text = path.read_bytes().decode("utf-8-sig")  # Windows' Notepad starts a file with a byte-order mark
    except OSError as reason:
        raise SettingsError(f"{path}: cannot be read ({reason.strerror}). Mend its permissions.") from None
    except UnicodeDecodeError as reason:
        raise SettingsError(f"{path}: not UTF-8 (byte {reason.start}). Save it as UTF-8.") from None
    from dotenv import dotenv_values

    # ${NAME} in a value is filled in by python-dotenv, from the file and the process's own environment.
    with _dotenv_warnings() as unreadable:
        found = dotenv_values(stream=io.StringIO(text))
    with _dotenv_warnings():
        written = dotenv_values(stream=io.StringIO(text), interpolate=False)
    warnings = [f"{DOTENV}, line {line}: not NAME=value; the line is left out." for line in unreadable]
    return dict(found), dict(written), warnings + [warning for key in found if (warning := _slip_of_the_pen(key))]


@contextmanager
def _dotenv_warnings() -> Iterator[list[object]]:
    """Collects the numbers of the lines that python-dotenv cannot parse, which it only logs."""
    lines: list[object] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            arguments = record.args if isinstance(record.args, tuple) else ()
            lines.append(arguments[0] if arguments else "?")

    logger, handler = logging.getLogger("dotenv.main"), Collect(logging.WARNING)
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.propagate = before
        logger.removeHandler(handler)


def _slip_of_the_pen(key: str) -> str | None:
    known = [name.upper() for name in _READERS]
    if key in known:
        return None
    if key.upper() in known:
        return f"{DOTENV}: {key}: did you mean {key.upper()}? It is left out."
    likened = [name for name in known if len(name) >= _SHORTEST_LIKENED]
    close = difflib.get_close_matches(key.upper(), likened, n=1, cutoff=_LIKENESS)
    return f"{DOTENV}: {_shown(key, quoted=False)}: did you mean {close[0]}? It is left out." if close else None


def _shown(text: str, *, quoted: bool = True) -> str:
    cut = text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."
    return repr(cut) if quoted else repr(cut)[1:-1]


# Readers: text -> value, or _Refused with the rule.


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        # A pattern, since int() also takes "1_000", digits of other scripts and numbers of a thousand digits.
        if re.fullmatch(r"[+-]?[0-9]{1,18}", text) and low <= int(text) <= high:
            return int(text)
        raise _Refused(f"a whole number from {low} to {high}")

    return read


def _number(rule: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text) if text.isascii() and "_" not in text else math.nan
        except ValueError:
            value = math.nan
        if math.isfinite(value) and holds(value):
            return value
        raise _Refused(rule)

    return read


def _epochs(text: str) -> int | float:
    try:
        return _whole(1, 1_000)(text)
    except _Refused as rule:
        read = _number(f"{rule}, or a share of one below 1", lambda value: 0 < value < 1)
        return read(text)


def _truth(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise _Refused("true or false")


def _strategy(text: str) -> str:
    options = typing.get_args(SamplingStrategy)
    if text.lower() in options:
        return text.lower()
    raise _Refused("one of " + ", ".join(f"'{option}'" for option in options))


def _name(text: str) -> str:
    if text.isprintable():
        return text
    raise _Refused("a name or path without control characters")


_READERS: dict[str, Callable[[str], object]] = {
    "gradient_accumulation_steps": _whole(1, 65_536),
    "use_fp16": _truth,
    "learning_rate": _number("a number above 0 and below 1", lambda value: 0 < value < 1),
    "epochs": _epochs,
    "sample_size": _whole(1, 10**9),
    "sample_ratio": _number("a number above 0 and at most 1", lambda value: 0 < value <= 1),
    "sampling_strategy": _strategy,
    "micro_batch_size": _whole(1, 65_536),
    "max_length": _whole(2, 1_048_576),
    "model": _name,
    "dataset": _name,
    "output": _name,
    "seed": _whole(0, 2**32 - 1),
}
