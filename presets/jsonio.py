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
    """A dataclass as indented JSON text."""
    return json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(cls: type[T], text: str, *, what: str = "JSON", error: type[PlanError] = PlanError) -> T:
    """A `cls` from JSON text.

    Raises:
        error: not JSON, unknown or missing keys, wrong types; the message starts with `what`.
    """
    try:
        plain = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as reason:
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
    if origin in (typing.Union, types.UnionType) and value is not None:
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
    if not fits:
        problems.append(f"{path or 'value'} is {value!r}; it must be {describe_type(hint)}")
    return converted


def _build_dataclass(cls: type, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{path or 'the file'} must be an object")
        return None
    hints, fields = _hints_and_fields(cls)
    problems += [f"unknown key '{_join(path, key)}'" for key in value if key not in fields]
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
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
