"""Which examples a pass uses, and which are held out. numpy only, seeded, exact counts."""

from __future__ import annotations

import numpy as np

from presets.errors import DataError
from presets.schema import Sampling
from trainer.tokens import FloatArray, IntArray

RECENT_SECONDS = 3 * 30.44 * 86_400  # "the last 3 months" of the published rule, counted from the newest message
TOP_QUARTILE = 0.75  # high engagement: the top quartile of the score


def evaluation_size(num_examples: int, fraction: float, minimum: int, maximum: int) -> int:
    """Examples to hold out of `num_examples`: the fraction, within [minimum, maximum], never more than a third."""
    if fraction <= 0 or num_examples < 2:
        return 0
    wanted = min(max(round(num_examples * fraction), minimum), maximum)
    return min(wanted, max(1, num_examples // 3))


def split_evaluation(num_examples: int, num_evaluation: int, seed: int) -> tuple[IntArray, IntArray]:
    """(training, evaluation) indices, each ascending; together every example exactly once."""
    order = np.random.default_rng([seed, 0xE7A1]).permutation(num_examples)
    return np.sort(order[num_evaluation:]), np.sort(order[:num_evaluation])


def select(
    sampling: Sampling,
    candidates: IntArray,
    *,
    engagement: FloatArray | None,
    created_at: FloatArray | None,
    loss: FloatArray | None = None,
    seed: int,
) -> tuple[IntArray, tuple[str, ...]]:
    """The chosen ones among `candidates` (ascending), and a note for each thing a user should know.

    Score arrays are indexed by example, over the whole data set. `loss` is the model's own loss per example.

    Raises:
        DataError: the strategy needs a score that the data does not have.
    """
    if sampling.takes_all or len(candidates) == 0:
        return candidates, ()
    wanted, notes = _wanted(sampling, len(candidates))
    if wanted >= len(candidates):
        return candidates, notes
    if sampling.strategy == "random":
        chosen = np.random.default_rng([seed, 0x5A]).choice(candidates, size=wanted, replace=False)
        return np.sort(chosen), notes
    if sampling.strategy == "prioritized" and sampling.score == "engagement":  # told of both at once
        fields = {"engagement": engagement, "created_at": created_at}
        missing = tuple(name for name, values in fields.items() if not _is_known(values, candidates))
        if missing:
            raise DataError(_without(missing, sampling.strategy))
    score = _score(sampling, candidates, engagement, created_at, loss)
    if sampling.strategy == "top":
        return np.sort(candidates[_best(score, wanted)]), notes
    created = _field(created_at, candidates, "created_at", "prioritized")
    chosen, said = _prioritized(score, created, wanted, seed)
    return np.sort(candidates[chosen]), notes + said


def _wanted(sampling: Sampling, available: int) -> tuple[int, tuple[str, ...]]:
    if sampling.size is not None:
        if sampling.size > available:
            return available, (f"asked for {sampling.size:,} examples, there are {available:,}: all of them are used",)
        return sampling.size, ()
    ratio = 1.0 if sampling.ratio is None else sampling.ratio
    if sampling.strategy == "prioritized" and sampling.ratio is None:
        ratio = 0.5  # the published rule's own share of routine messages; a ratio in the settings overrides it
    return max(1, round(available * ratio)), ()


def _score(
    sampling: Sampling,
    candidates: IntArray,
    engagement: FloatArray | None,
    created_at: FloatArray | None,
    loss: FloatArray | None,
) -> FloatArray:
    if sampling.score == "loss":
        return _field(loss, candidates, "loss", sampling.strategy)
    if sampling.score == "recency":
        return _field(created_at, candidates, "created_at", sampling.strategy)
    return _field(engagement, candidates, "engagement", sampling.strategy)


def _field(values: FloatArray | None, candidates: IntArray, name: str, strategy: str) -> FloatArray:
    if values is None or not _is_known(values, candidates):
        raise DataError(_without((name,), strategy))
    chosen = values[candidates].astype(np.float64)
    return np.where(np.isfinite(chosen), chosen, -np.inf)  # an example without the field ranks last


def _is_known(values: FloatArray | None, candidates: IntArray) -> bool:
    return values is not None and bool(np.isfinite(values[candidates]).any())


def _without(names: tuple[str, ...], strategy: str) -> str:
    fields = " and ".join(f"'{name}'" for name in names)
    columns = ",".join(f"{name}=COLUMN" for name in names)
    return (
        f"sampling '{strategy}' needs the field{'s'[: len(names) - 1]} {fields}, which this data does not have. "
        f"Name {'their columns' if len(names) > 1 else 'its column'} with --columns {columns}, or choose "
        "--sampling-strategy random."
    )


def _best(score: FloatArray, count: int) -> IntArray:
    """Positions of the `count` highest scores; equal ones in the order of the data."""
    return np.argsort(-score, kind="stable")[:count]


def _prioritized(score: FloatArray, created: FloatArray, wanted: int, seed: int) -> tuple[IntArray, tuple[str, ...]]:
    """The published rule: all of high engagement, all recent ones, half of the older routine ones, to the ratio.

    Too many must-haves: the highest scores win. Room to spare after half of the routine ones: more of them, so that
    the ratio is met exactly.
    """
    finite = score[np.isfinite(score)]
    # "The top quartile" must not become everything where many scores are equal (a threshold of 0 likes, say).
    threshold = float(np.quantile(finite, TOP_QUARTILE))
    high = score >= threshold if threshold > float(finite.min()) else score > threshold
    recent = created >= created[np.isfinite(created)].max() - RECENT_SECONDS
    must = np.flatnonzero(high | recent)
    routine = np.flatnonzero(~(high | recent))
    if len(must) >= wanted:
        kept = must[_best(score[must], wanted)]
        note = (
            f"{len(must):,} examples are recent or of high engagement, more than the {wanted:,} that the "
            f"ratio allows; the {wanted:,} with the highest scores are used"
        )
        return kept, ((note,) if len(must) > wanted else ())
    fill = wanted - len(must)
    drawn = np.random.default_rng([seed, 0x9B]).permutation(routine)[:fill]
    half = (len(routine) + 1) // 2
    note = (
        f"takes {int(high.sum()):,} of high engagement, {int((recent & ~high).sum()):,} more recent, "
        f"{len(drawn):,} of {len(routine):,} older routine ones"
    )
    if fill != half:
        note += f" (half of them would be {half:,}; the ratio decides)"
    return np.concatenate([must, drawn]), (note,)
