"""Changes of the step alone: which there are for a job, and with whose layouts they are looked for. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from planner.chain import Timed
from planner.larger import size
from planner.twin import Change, Wanted
from trainer.job import Job
from trainer.process import cores, threads_of_a_process

ALIKE = 2.0  # layouts of one kind within this factor gain from the same changes
ROUND_MICROS = 11  # micro-batches of a round, about: see planner.measure
ENOUGH_ROUNDS = 5  # of all layouts together; with fewer, fewer layouts are looked at


def step_changes(job: Job, written: Job, *, quantized: bool) -> list[Change]:
    """Every change of this job's step that leaves its gradient as it is; with `quantized` also some that do not.

    Args:
        written: the preset's job: what was added to it to make it fit is not taken off again.
    """
    preset = job.preset
    found: list[Change] = []
    if job.loss == "plain":
        found.append(Change(name="lean loss", loss="lean"))
    other = Change(name="attention", attention="eager" if preset.attention == "sdpa" else "sdpa")
    # Eager attention knows no documents: it does the whole packed row, tokens x tokens, under a mask.
    if not (job.packing and other.attention == "eager"):
        found.append(other)
    if written.preset.gradient_checkpointing:
        found.append(Change(name="checkpointing", gradient_checkpointing=False))
    if job.compile:
        found.append(Change(name="compiled", compile=False))
    if job.device == "cpu":
        # No more than a process's share: one worker is timed, which would not see what the others are then left.
        most = threads_of_a_process(None, job.num_devices) or cores()
        now = job.num_threads or most
        found += [Change(name="threads", num_threads=number) for number in sorted({most, now // 2} - {now, 0})]
    if quantized and preset.adapter == "lora":
        found += [
            Change(name="quantized base", base_precision=kind, is_neutral=False)
            for kind in ("8bit", "4bit")
            if job.base_precision != kind
        ]
    return found


def leaders(
    wanted: Sequence[Wanted],
    best: Mapping[str, Sequence[Timed]],
    micro_batches: Mapping[str, int],
    changes: Mapping[str, int],
    seconds: float,
) -> dict[str, str]:
    """With which preset's layout each preset's changes are looked for: an own or a like one, where time allows.

    Args:
        best: each preset's layouts, the fastest first.
        micro_batches: of each preset's plan with its fastest layout, per device.
        changes: how many there are to be looked at with it.
        seconds: that the timing may take.
    """
    led: list[str] = []
    taken = 0.0
    found: dict[str, str] = {}
    for one in wanted:
        fastest = best[one.name][0]
        like = next((name for name in led if _alike(best[name][0], fastest)), None)
        if like is None:
            micro = fastest.seconds / max(1, micro_batches[one.name])
            times = 2 if fastest.job.device == "cuda" else 1  # there each is run twice
            needed = ENOUGH_ROUNDS * ROUND_MICROS * times * micro * (1 + changes[one.name])
            if not led or taken + needed <= seconds:
                led.append(one.name)
                taken += needed
                like = one.name
        if like is None:  # else the one that is the least unlike
            like = min(led, key=lambda name: best[name][0].job.packing is not fastest.job.packing)
        found[one.name] = like
    return found


def _alike(one: Timed, other: Timed) -> bool:
    if one.relief != other.relief or one.job.packing is not other.job.packing:
        return False
    return 1 / ALIKE <= size(one.job) / size(other.job) <= ALIKE
