"""Splits that memory alone keeps from being tried: with what takes less memory they may be faster. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from planner.chain import Timed
from planner.memory import HOPELESS
from planner.twin import Change
from trainer.job import Job

MOST_LARGER = 2  # of the packed rows and of the separate ones each, the next larger


def reliefs(job: Job) -> list[tuple[Change, ...]]:
    """What makes a step take less memory at the same gradient, the cheapest first."""
    lean = [Change(name="lean loss", loss="lean")] if job.loss == "plain" else []
    checkpointing = [Change(name="checkpointing", gradient_checkpointing=True)]
    if job.preset.gradient_checkpointing:
        checkpointing = []
    return list(dict.fromkeys(tuple(one) for one in (lean, checkpointing, lean + checkpointing) if one))


def bounded_by_memory(
    timed: Sequence[Timed], too_large: Sequence[tuple[tuple[Change, ...], Job]]
) -> list[tuple[Change, ...]]:
    """The layouts worth another try with less memory: the next larger ones, where larger was faster up to the bound.

    Packed and separate rows are judged apart: where a smaller layout of the kind was the fastest, or the kind's best is
    plainly slower than the other's, more memory would not help.

    Args:
        timed: the layouts of one preset that fit, the fastest first.
        too_large: those that do not, with their jobs.
    """
    found: list[tuple[Change, ...]] = []
    for is_packed in (False, True):
        fitting = [one for one in timed if one.job.packing is is_packed]
        if fitting:
            is_largest = size(fitting[0].job) == max(size(one.job) for one in fitting)
            if not is_largest or fitting[0].seconds > HOPELESS * timed[0].seconds:
                continue
        left = sorted((size(job), number) for number, (_, job) in enumerate(too_large) if job.packing is is_packed)
        found += [too_large[number][0] for _, number in left[:MOST_LARGER]]
    return found


def size(job: Job) -> int:
    """What a micro-batch holds at most: tokens of packed rows, else examples."""
    return job.micro_batch_size * (job.row_length or 1)
