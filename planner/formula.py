"""The published closed form: steps, seconds, overhead and learning rates. Standard library only, no I/O.

    time = (dataset_size / batch_size / gradient_accumulation_steps) x time_per_step / speed_factor

Source: the published guide, "How to Reduce Training Time: from 35 hours down to 8-18 hours", written for one case: LoRA
on 63,000 chat messages, one epoch, batch size 1, an RTX 2080 Ti.

What the formula leaves out: it charges an optimizer step the same at any gradient accumulation (GA), although a step at
GA 32 does twice the forward and backward passes of one at GA 16. Measured, GA alone saves well under 1 %. It also knows
nothing of sequence lengths, and a real run flushes its last, partial window, so its plan can have one step more.
"""

from __future__ import annotations

import math

GUIDE_DATASET_SIZE = 63_000  # messages
GUIDE_SECONDS_PER_STEP = 30.0  # of the baseline, at fp32
SPEED_FACTOR_WITH_FP16 = 1.3
SPEED_FACTOR_WITHOUT_FP16 = 1.0
OVERHEAD_SECONDS_LOW = 1.4 * 3600  # recommended: 14 h printed, 12.6 h by the formula
OVERHEAD_SECONDS_HIGH = 2.2 * 3600  # baseline: 35 h printed, 32.8 h by the formula


def steps(dataset_size: int, gradient_accumulation_steps: int, batch_size: int = 1) -> int:
    """Optimizer steps for `dataset_size` examples: dataset_size / batch_size / GA to the nearest whole, halves up.

    `dataset_size` counts examples seen: for several epochs, examples x epochs. A run has at least one step. Source: the
    published guide, which prints 3,937.5 as 3,938 and 984.375 as 984. It leaves out that a real run flushes its last,
    partial window (985 steps where this says 984).

    Raises:
        ValueError: a number that is not whole or below 1.
    """
    require_whole("dataset_size", dataset_size)
    require_whole("gradient_accumulation_steps", gradient_accumulation_steps)
    require_whole("batch_size", batch_size)
    window = batch_size * gradient_accumulation_steps
    # Whole numbers throughout: round() sends halves to the even neighbour, and a float quotient can miss the half.
    return max(1, (2 * dataset_size + window) // (2 * window))


def seconds(steps: int, seconds_per_step: float, speed_factor: float = 1.0) -> float:
    """Training time in seconds, overhead excluded: steps x seconds_per_step / speed_factor.

    Source: the published guide. It leaves out that a step costs more the more micro-batches it accumulates: filled with
    one figure for every GA, it gives GA credit that it has not earned.

    Raises:
        ValueError: a number that is not finite or not above 0, or steps that are not whole.
    """
    require_whole("steps", steps)
    require_positive("seconds_per_step", seconds_per_step)
    require_positive("speed_factor", speed_factor)
    return steps * seconds_per_step / speed_factor


def hours(seconds: float) -> float:
    """Seconds as hours.

    Raises:
        ValueError: a number that is not finite or not above 0.
    """
    require_positive("seconds", seconds)
    return seconds / 3600


def with_overhead(seconds: float) -> tuple[float, float]:
    """The formula's seconds plus the guide's overhead (model loading, saving, evaluation): low and high, in seconds.

    In the guide's three worked examples the printed hours exceed the formula's by 1.4 h to 2.2 h. It leaves out what
    the overhead depends on: the same hours are added to a short run as to a long one.

    Raises:
        ValueError: a number that is not finite or not above 0.
    """
    require_positive("seconds", seconds)
    return seconds + OVERHEAD_SECONDS_LOW, seconds + OVERHEAD_SECONDS_HIGH


def speed_factor(*, fp16: bool) -> float:
    """The guide's factor: 1.3 with FP16, 1.0 without. It leaves out the device: on some, FP16 gains nothing."""
    return SPEED_FACTOR_WITH_FP16 if fp16 else SPEED_FACTOR_WITHOUT_FP16


def learning_rate_by_doubling(base: float, base_batch_size: int, batch_size: int) -> float:
    """The guide's table as a rule: base x (1 + 0.25 x log2(batch_size / base_batch_size)).

    Source: the published guide, 16 -> 2.0e-4, 32 -> 2.5e-4 (x 1.25), 64 -> 3.0e-4 (x 1.5). The quarter is of the base,
    so two doublings give x 1.5, not x 1.5625. The table has three rows; what lies between and beyond is our reading.

    Raises:
        ValueError: a number that is not finite or not above 0, or a batch so small (base / 16) that the rule ends at 0.
    """
    _require_learning_rate_arguments(base, base_batch_size, batch_size)
    factor = 1 + 0.25 * math.log2(batch_size / base_batch_size)
    if factor <= 0:
        raise ValueError(
            f"batch_size is {batch_size} with base_batch_size {base_batch_size}; the rule needs more than a sixteenth "
            f"of the base, below that it gives no positive learning rate"
        )
    return base * factor


def learning_rate_by_square_root(base: float, base_batch_size: int, batch_size: int) -> float:
    """The square-root rule: base x sqrt(batch_size / base_batch_size).

    2e-4 from a batch of 16 to one of 32 gives 2.83e-4. Source: the published guide, which prints 2.8e-4 and calls the
    rule linear; linear would give 4e-4.

    Raises:
        ValueError: a number that is not finite or not above 0.
    """
    _require_learning_rate_arguments(base, base_batch_size, batch_size)
    return base * math.sqrt(batch_size / base_batch_size)


def _require_learning_rate_arguments(base: float, base_batch_size: int, batch_size: int) -> None:
    require_positive("base", base)
    require_whole("base_batch_size", base_batch_size)
    require_whole("batch_size", batch_size)


def require_whole(name: str, value: int) -> None:
    """Raises: ValueError where `value` is not a whole number, at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, at least 1")


def require_positive(name: str, value: float) -> None:
    """Raises: ValueError where `value` is not a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value!r}; it must be a finite number above 0")
