"""What a run does beside its steps, timed once or a few times: evaluation, checkpoint, adapter, sample answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.group import Group
from planner.measurement import MicroSample
from planner.memory import MemoryProbe
from planner.prober import Prober
from trainer.evaluate import answerable, evaluation_batches
from trainer.tokens import TokenizedDataset

EVALUATION_BATCHES = 5
ANSWER_TOKENS = 16


def measure_fixed(group: Group, prober: Prober, data: TokenizedDataset, memory: MemoryProbe) -> None:
    """Fill in `group.fixed`, part by part: what fails leaves the parts before it, and the timings stand.

    Args:
        memory: told where what was timed holds more than the steps.

    Raises:
        PlanError, DoesNotFit: of the part that failed.
    """
    held_out = group.fitting[0].plan.evaluation
    spec = group.fitting[0].job.evaluation
    timed = prober.peak()
    # A GPU's allocator keeps the holes that many shapes make. Resident memory on a CPU does not, and timing
    # piles gradients up beside long micro-batches as no window does: there the probe's own figure stands.
    holes = timed.reserved_bytes - group.reserved if group.signature.device == "cuda" else 0
    memory.raise_peaks(group, by=holes, headroom=timed.headroom_bytes)
    if len(held_out):
        sizes = memory.evaluated_at_once(group)
        # Rows of one signature evaluate as they train, in batches of different sizes: the smallest and the largest.
        batches = [
            evaluation_batches(data, held_out, group.signature.device, size) for size in sorted({sizes[0], sizes[-1]})
        ]
        places = [np.linspace(0, len(one) - 1, EVALUATION_BATCHES).round().astype(int) for one in batches]
        chosen = [one[place] for one, at in zip(batches, places, strict=True) for place in np.unique(at)]
        # What is first in a process is slow. On a CPU that is one batch, which is run again at the end. On a GPU each
        # shape has its kernels to load and choose, once: all are run again, and what it took longer is counted once.
        again = [chosen[0]] if group.signature.device == "cpu" else chosen
        taken = prober.evaluate([batch.tolist() for batch in (*chosen, *again)])
        first, second = taken[: len(chosen)], taken[len(chosen) :]
        seconds = [*second, *first[len(second) :]]
        longer = sum(first) - sum(second)  # of a run, whose batches have one size
        once = 0.0 if group.signature.device == "cpu" else max(0.0, longer / len(batches))
        samples = tuple(
            MicroSample(
                stratum=-1,
                rows=len(batch),
                width=int(data.lengths[batch].max()),
                tokens=int(data.lengths[batch].sum()),
                seconds=value,
            )
            for batch, value in zip(chosen, seconds, strict=True)
        )
        group.fixed = replace(group.fixed, evaluation=samples, evaluation_once=once)
    group.fixed = replace(group.fixed, save=prober.save())
    asked = answerable(data, held_out, 1)
    tokens = min(ANSWER_TOKENS, spec.max_new_tokens)
    if len(asked) and spec.num_samples and tokens and group.load is not None and group.load.has_tokenizer:
        prober.answer(asked.tolist(), 1)  # as the first of a process it is slow
        first_token = prober.answer(asked.tolist(), 1)
        group.fixed = replace(
            group.fixed,
            first_token_seconds=first_token,
            answer_seconds=prober.answer(asked.tolist(), tokens),
            answer_tokens=tokens,
        )
    ended = prober.peak()
    if group.signature.device == "cuda" and ended.reserved_bytes > timed.reserved_bytes:
        memory.raise_peaks(group, by=ended.reserved_bytes - timed.reserved_bytes, headroom=ended.headroom_bytes)
