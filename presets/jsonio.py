"""Frozen dataclasses to and from JSON, strictly: unknown keys and wrong types are errors, nothing is guessed."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from presets.errors import PlanError
from presets.schema import describe_type, fit_type
from presets.text import listed, shown

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """A dataclass as dicts, lists, text and numbers; NaN and infinity become None, since JSON has neither."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(value: Any) -> str:
    """A dataclass as indented JSON text, without control characters; a name that is no UTF-8 comes back as it was."""
    return harmless(json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False)) + "\n"


def harmless(text: str, *, ascii_only: bool = False) -> str:
    """JSON text with what moves a cursor or turns a line round as JSON escapes; it says the same.

    Outside of strings JSON has nothing but plain ASCII, so that whatever is escaped here stood in one.
    """
    if text.replace("\n", "").isprintable() and not (ascii_only and not text.isascii()):
        return text

    def safe(char: str) -> bool:
        return char == "\n" or (char.isprintable() and (char.isascii() or not ascii_only))

    return "".join(char if safe(char) else json.dumps(char)[1:-1] for char in text)


def loads(text: str | bytes, *, strict: bool = True) -> Any:
    """JSON as Python has it.

    Args:
        strict: refuse NaN and infinity, which JSON does not have and pandas writes all the same.

    Raises:
        ValueError: it is no JSON, of whatever kind: nested too deeply, a number too long, not UTF-8.
    """
    try:
        return json.loads(text, parse_constant=_no_constant if strict else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError as reason:
        if "integer string conversion" in str(reason):  # Python's advice is to a programmer
            raise ValueError("a number of thousands of digits") from None
        raise


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name}, which JSON does not have")


def from_json(cls: type[T], text: str, *, what: str = "JSON", error: type[PlanError] = PlanError) -> T:
    """A `cls` from JSON text.

    Raises:
        error: not JSON, unknown or missing keys, wrong types; the message starts with `what`.
    """
    try:
        plain = loads(text)
    except ValueError as reason:
        raise error(f"{what}: not JSON ({reason}).") from None
    return from_plain(cls, plain, what=what, error=error)


def from_plain(cls: type[T], plain: Any, *, what: str = "JSON", error: type[PlanError] = PlanError) -> T:
    """A `cls` from dicts and lists, as `from_json`."""
    problems: list[str] = []
    value = _build(cls, plain, "", problems)
    if problems:
        raise error(f"{what}: " + "; ".join(problems) + ".")
    return typing.cast(T, value)


def _build(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build_dataclass(hint, value, path, problems)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        nested = [
            option for option in arguments if dataclasses.is_dataclass(option) or typing.get_origin(option) is tuple
        ]
        if nested:
            return _build(nested[0], value, path, problems)
    if origin is tuple:
        if not isinstance(value, list):
            problems.append(f"{path or 'value'} must be a list")
            return ()
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_build(arguments[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value))
        if len(value) != len(arguments):
            problems.append(f"{path or 'value'} must have {len(arguments)} items")
            return ()
        return tuple(
            _build(arg, item, f"{path}[{i}]", problems)
            for i, (arg, item) in enumerate(zip(arguments, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            problems.append(f"{path or 'value'} must be an object")
            return {}
        return {key: _build(arguments[1], item, f"{path}.{key}", problems) for key, item in value.items()}
    fits, converted = fit_type(hint, value)
    if not fits or (isinstance(converted, float) and not math.isfinite(converted)):  # 1e999 is infinity to Python
        problems.append(f"{path or 'value'} is {shown(value)}; it must be {describe_type(hint)}")
    return converted


def _build_dataclass(cls: type, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{path or 'the file'} must be an object")
        return None
    hints, fields = _hints_and_fields(cls)
    unknown = [_join(path, key) for key in value if key not in fields]
    if unknown:
        problems.append(f"unknown key {listed(map(shown, unknown))}")
    before = len(problems)
    arguments: dict[str, Any] = {}
    for key, field in fields.items():
        if key in value:
            arguments[key] = _build(hints[key], value[key], _join(path, key), problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{_join(path, key)} is missing")
    if len(problems) > before:
        return None
    try:
        return cls(**arguments)
    except (PlanError, ValueError) as reason:
        problems.append(str(reason).rstrip("."))
        return None


@functools.cache  # reading the hints costs a hundred times what one small object does, and a measurement has thousands
def _hints_and_fields(cls: type) -> tuple[dict[str, Any], dict[str, dataclasses.Field[Any]]]:
    return typing.get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees either the old or the whole new one, also after a power cut."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)  # half of it on a full disk is in nobody's way
        raise
