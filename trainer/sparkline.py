"""A row of numbers as a row of blocks."""

from __future__ import annotations

import itertools

BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 24) -> str:
    """The course of some numbers in one line of blocks, the newest on the right; of many, means of equal stretches."""
    known = [value for value in values if value == value and abs(value) != float("inf")]
    if not known:
        return ""
    if len(known) > width:
        edges = [round(place * len(known) / width) for place in range(width + 1)]
        known = [sum(known[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(known), max(known)
    if high == low:
        return BLOCKS[0] * len(known)
    return "".join(BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in known)
