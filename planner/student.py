"""Quantiles of Student's t. Standard library only."""

from __future__ import annotations

_TABLE_95 = {1: 6.3138, 2: 2.9200, 3: 2.3534, 4: 2.1318}
_TABLE_99 = {1: 31.8205, 2: 6.9646, 3: 4.5407, 4: 3.7469, 5: 3.3649, 6: 3.1427}


def t_quantile(degrees: int) -> float:
    """95 % quantile of Student's t, for two-sided 90 %. A table below 5 degrees, then Cornish-Fisher (good to 1e-3)."""
    return _TABLE_95.get(degrees) or _cornish_fisher(1.6448536, degrees)


def t_quantile_99(degrees: int) -> float:
    """99 % quantile of Student's t, for two-sided 98 %. A table below 7 degrees, then Cornish-Fisher (good to 3e-3)."""
    return _TABLE_99.get(degrees) or _cornish_fisher(2.3263479, degrees)


def _cornish_fisher(z: float, degrees: int) -> float:
    v = float(degrees)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )
