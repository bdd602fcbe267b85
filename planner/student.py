"""Quantiles of Student's t. Standard library only."""

from __future__ import annotations


def t_quantile(degrees: int) -> float:
    """95 % quantile of Student's t, for two-sided 90 %. A table below 5 degrees, then Cornish-Fisher (good to 1e-3)."""
    table = {1: 6.3138, 2: 2.9200, 3: 2.3534, 4: 2.1318}
    if degrees in table:
        return table[degrees]
    z = 1.6448536
    v = float(degrees)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )
