"""Rules for numbers, as text: what a value is and what it must be. Empty where it keeps to them."""

from __future__ import annotations

from presets.text import shown

# Far above anything that trains, far below what overflows an array or a machine's memory.
MOST_SEQUENCES = 65_536  # in a micro-batch, or micro-batches in a step
MOST_TOKENS = 1_048_576  # in an example
MOST_EXAMPLES = 10**9
MOST_STEPS = 10**9
MOST_EPOCHS = 1_000_000
MOST_SEED = 2**32 - 1


def whole(name: str, value: int | None, low: int, high: int) -> list[str]:
    """None is no value, and so breaks no rule."""
    if value is None or low <= value <= high:
        return []
    rule = f"at least {low}" if value < low else f"at most {high:,}"
    return [f"{name} is {shown(value)}; it must be {rule}"]


def number(name: str, value: float | None, low: float, high: float, *, above: bool = False) -> list[str]:
    """`above`: `low` itself is too low. Not a number breaks every rule."""
    if value is None or ((low < value if above else low <= value) and value <= high):  # no comparison holds for NaN
        return []
    return [f"{name} is {shown(value)}; it must be {'above' if above else 'at least'} {low:g} and at most {high:g}"]


def text(name: str, value: str | None, *, most: int = 4096) -> list[str]:
    """Something, on one line, that every file system and terminal takes."""
    if value is None or (value.strip() and len(value) <= most and "\0" not in value):
        return []
    return [f"{name} is {shown(value)}; it must be text of 1 to {most:,} characters"]
