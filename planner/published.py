"""The published mode: what the guide says of each preset, beside what its formula gives. Nothing here is measured.

The formula's part works for any number of examples and any step time. The guide's own hours were printed for one case,
63,000 messages at 30 s per step, and stand only beside that case; quality, VRAM and risk do not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from planner import formula
from presets.schema import Phase, Preset, Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedPhase:
    """One phase of a published row; `num_steps` is 0 where the examples end before the phase begins."""

    gradient_accumulation_steps: int
    learning_rate: float
    num_steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedRow:
    """One preset by the published formula. Times in seconds, rounded to whole ones as the guide prints them."""

    name: str
    micro_batch_size: int
    gradient_accumulation_steps: int  # of the first phase, where there are phases
    global_batch_size: int
    num_epochs: int | float
    learning_rate: float
    precision: str
    phases: tuple[PublishedPhase, ...]  # empty where the preset has none
    num_examples_seen: int  # examples x epochs, over all stages
    num_steps: int
    step_time: float  # seconds per step at fp32, as given
    speed_factor: float
    seconds: int  # by the formula, overhead excluded
    seconds_low: int  # with the guide's overhead
    seconds_high: int
    hours_low: float | None  # as printed in the guide; None where it prints none or for another case
    hours_high: float | None
    quality: str | None
    vram: str | None
    risk: str | None
    note: str | None


def is_the_guides_case(dataset_size: int, step_time: float) -> bool:
    """Whether the guide's printed hours belong to this case: 63,000 messages at 30 s per step."""
    return dataset_size == formula.GUIDE_DATASET_SIZE and step_time == formula.GUIDE_SECONDS_PER_STEP


def published_rows(dataset_size: int, step_time: float, presets: Iterable[Preset]) -> tuple[PublishedRow, ...]:
    """One row per preset: the formula for `dataset_size` training examples at `step_time` seconds per fp32 step.

    Raises:
        ValueError: a size below 1, or a step time that is not a finite number above 0.
    """
    formula.require_whole("dataset_size", dataset_size)
    formula.require_positive("step_time", step_time)
    return tuple(_row(dataset_size, step_time, preset) for preset in presets)


def published_notes(dataset_size: int, step_time: float, rows: Iterable[PublishedRow]) -> tuple[str, ...]:
    """What has to be said under the published table: where the figures come from, and what the formula leaves out."""
    rows = tuple(rows)
    notes = [
        "Published figures, not measured: they come from a guide written for 63,000 messages on an RTX 2080 Ti. "
        "Leave out --step-time to measure on this device.",
        f"The formula charges a step the same at any gradient accumulation (GA): {step_time:g} s here, / 1.3 with "
        "FP16. On a real device a step at GA 32 does twice the work of one at GA 16, so GA alone saves next to "
        "nothing.",
        "Steps are rounded to the nearest whole; a real run also trains its last, partial window.",
        "With overhead: the formula's time + 1.4 h to 2.2 h, the span between formula and printed time in the guide's "
        "three worked examples (baseline, recommended, aggressive). The other published times do not follow from the "
        "formula.",
    ]
    if not is_the_guides_case(dataset_size, step_time):
        notes.append(
            f"The guide's own hours are left out: they are for {formula.GUIDE_DATASET_SIZE:,} messages at "
            f"{formula.GUIDE_SECONDS_PER_STEP:g} s per step, and this is {dataset_size:,} at {step_time:g} s. Its "
            f"overhead is from that case too."
        )
    for row in rows:
        if row.note:
            notes.append(f"{row.name}: {row.note}.")
        notes += [
            f"{row.name}: phase {number} (GA {phase.gradient_accumulation_steps}) is never reached with "
            f"{dataset_size:,} examples."
            for number, phase in enumerate(row.phases, start=1)
            if phase.num_steps == 0
        ]
    return tuple(notes)


def _row(dataset_size: int, step_time: float, preset: Preset) -> PublishedRow:
    micro, examples = preset.micro_batch_size, 0
    phases: tuple[PublishedPhase, ...] = ()
    if preset.phases:
        phases, examples = _phases(dataset_size, preset)
        num_steps = sum(phase.num_steps for phase in phases)
    else:
        examples = _seen(preset, dataset_size)
        num_steps = formula.steps(examples, preset.gradient_accumulation_steps, micro)
    # The guide knows FP16 and "without"; bf16 and tf32 are without, since it has no figure for them.
    factor = formula.speed_factor(fp16=preset.precision == "fp16")
    seconds = formula.seconds(num_steps, step_time, factor)
    low, high = formula.with_overhead(seconds)
    published = preset.published
    printed = is_the_guides_case(dataset_size, step_time)
    first_accumulation = phases[0].gradient_accumulation_steps if phases else preset.gradient_accumulation_steps
    return PublishedRow(
        name=preset.name,
        micro_batch_size=micro,
        gradient_accumulation_steps=first_accumulation,
        global_batch_size=micro * first_accumulation,
        num_epochs=preset.num_epochs,
        learning_rate=phases[0].learning_rate if phases else preset.learning_rate,
        precision=preset.precision,
        phases=phases,
        num_examples_seen=examples,
        num_steps=num_steps,
        step_time=step_time,
        speed_factor=factor,
        seconds=_nearest(seconds),
        seconds_low=_nearest(low),
        seconds_high=_nearest(high),
        hours_low=published.hours_low if printed else None,
        hours_high=published.hours_high if printed else None,
        quality=published.quality,
        vram=published.vram,
        risk=published.risk,
        note=published.note,
    )


def _phases(dataset_size: int, preset: Preset) -> tuple[tuple[PublishedPhase, ...], int]:
    """The preset's phases with their steps, and the examples that all of them see together."""
    micro = preset.micro_batch_size
    if preset.phases[0].is_stage:
        seen = [_sample(phase.sampling, dataset_size) * (phase.num_epochs or 1) for phase in preset.phases]
        counts = [
            formula.steps(examples, phase.gradient_accumulation_steps, micro)
            for examples, phase in zip(seen, preset.phases, strict=True)
        ]
        return _counted(preset.phases, counts), sum(seen)
    total = left = _seen(preset, dataset_size)
    counts = []
    for phase in preset.phases:
        window = micro * phase.gradient_accumulation_steps
        if left == 0:
            counts.append(0)
        elif phase.num_steps is not None and phase.num_steps * window <= left:
            counts.append(phase.num_steps)
            left -= phase.num_steps * window
        else:  # the examples end inside this phase
            counts.append(formula.steps(left, phase.gradient_accumulation_steps, micro))
            left = 0
    return _counted(preset.phases, counts), total - left


def _counted(phases: tuple[Phase, ...], counts: list[int]) -> tuple[PublishedPhase, ...]:
    return tuple(
        PublishedPhase(
            gradient_accumulation_steps=phase.gradient_accumulation_steps,
            learning_rate=phase.learning_rate,
            num_steps=count,
        )
        for phase, count in zip(phases, counts, strict=True)
    )


def _seen(preset: Preset, available: int) -> int:
    """Examples x epochs; under one epoch a share of the examples."""
    return max(1, round(_sample(preset.sampling, available) * preset.num_epochs))


def _sample(sampling: Sampling, available: int) -> int:
    """How many of `available` examples a pass uses: the trainer's rule, here without numpy."""
    if sampling.size is not None:
        return min(sampling.size, available)
    ratio = sampling.ratio
    if ratio is None:
        ratio = 0.5 if sampling.strategy == "prioritized" else 1.0
    return max(1, round(available * ratio))


def _nearest(seconds: float) -> int:
    return int(seconds + 0.5)
