"""Safety verdicts: what the published guide rules out, and what the field knows besides. No I/O, no torch.

Only the guide's three rules block a run (`--force` runs it all the same). The others are remarks. Sources: the guide's
"Not recommended" list; for LoRA's batches and learning rates Schulman et al., "LoRA Without Regret", Thinking Machines
Lab, September 2025, which finds the best rate of LoRA about ten times that of full fine-tuning, and that large batches
cost LoRA more than full fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass

from presets.schema import Preset
from trainer.batching import BatchPlan
from trainer.job import Job

LARGEST_GLOBAL_BATCH = 128  # published
HIGHEST_LEARNING_RATE = 5e-4  # published
LORA_GLOBAL_BATCH = 32
FULL_LEARNING_RATE = 5e-5  # above it: what LoRA takes; below it: what full fine-tuning takes
SHARE_OF_AN_EPOCH = 1 / 50  # of one window
FEW_STEPS = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One remark on a configuration, one line, with its reason."""

    text: str
    blocks: bool = False  # a run needs --force


def verdicts(job: Job, plan: BatchPlan) -> tuple[Verdict, ...]:
    """What speaks against a job over its batch plan; what blocks comes first."""
    preset = job.preset
    found = [
        Verdict(text=f"{text}. Not recommended by the published guide: --run needs --force", blocks=True)
        for text in _ruled_out(job)
    ]
    largest = max(job.global_batch_sizes)
    rates = _learning_rates(preset)
    if preset.adapter == "lora" and LORA_GLOBAL_BATCH < largest <= LARGEST_GLOBAL_BATCH:
        found.append(
            Verdict(text=f"a global batch of {largest} with LoRA, which learns best at {LORA_GLOBAL_BATCH} or less")
        )
    if preset.adapter == "lora" and max(rates) < FULL_LEARNING_RATE:
        found.append(
            Verdict(
                text=f"a learning rate of {max(rates):g} with LoRA, which wants about ten times that of full "
                "fine-tuning: 1e-4 to 5e-4 is usual"
            )
        )
    if preset.adapter == "full" and FULL_LEARNING_RATE < max(rates) <= HIGHEST_LEARNING_RATE:
        found.append(
            Verdict(
                text=f"a learning rate of {max(rates):g} with full fine-tuning, which wants about a tenth of LoRA's: "
                "1e-5 to 5e-5 is usual"
            )
        )
    passes = plan.num_examples if preset.num_epochs < 1 else plan.num_examples / max(1, _passes(preset))
    if passes > 0 and largest > SHARE_OF_AN_EPOCH * passes:
        found.append(
            Verdict(
                text=f"a step takes {min(largest, round(passes))} of {round(passes):,} examples, more than 1/50 of a "
                "pass: the model moves in few, coarse steps. A smaller global batch would learn more from the same data"
            )
        )
    if plan.num_steps < FEW_STEPS:
        found.append(
            Verdict(
                text=f"only {plan.num_steps} optimizer step{'s' if plan.num_steps > 1 else ''}: warm-up and decay "
                f"hardly act under {FEW_STEPS}. More epochs or a smaller global batch make more"
            )
        )
    return tuple(found)


def blocking(found: tuple[Verdict, ...]) -> tuple[str, ...]:
    """The texts of those that block."""
    return tuple(one.text for one in found if one.blocks)


def _ruled_out(job: Job) -> list[str]:
    preset = job.preset
    found = []
    largest = max(job.global_batch_sizes)
    if largest > LARGEST_GLOBAL_BATCH:
        found.append(
            f"a global batch of {largest} is over {LARGEST_GLOBAL_BATCH}: few steps learn less from the same messages"
        )
    highest = max(_learning_rates(preset))
    if highest > HIGHEST_LEARNING_RATE:
        found.append(f"a learning rate of {highest:g} is over {HIGHEST_LEARNING_RATE:g}: training may diverge")
    if preset.num_epochs < 1:
        found.append(f"{preset.num_epochs:g} epochs are under one: part of the messages would never be seen")
    return found


def _learning_rates(preset: Preset) -> tuple[float, ...]:
    return tuple(phase.learning_rate for phase in preset.phases) or (preset.learning_rate,)


def _passes(preset: Preset) -> float:
    if preset.phases and preset.phases[0].is_stage:
        return sum(phase.num_epochs or 1 for phase in preset.phases)
    return preset.num_epochs
