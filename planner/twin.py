"""The tuned twin of a preset: which changes, what each of them gave, and the job that comes of them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.job import Job


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One setting of a job that leaves its gradient as it is (or, where `is_neutral` is false, does not)."""

    name: str  # "micro-batch", "packing", "lean loss" ...
    micro_batch_size: int | None = None
    packed_length: int | None = None  # packs, in rows of this many tokens
    loss: str | None = None
    attention: str | None = None
    gradient_checkpointing: bool | None = None
    num_threads: int | None = None
    base_precision: str | None = None
    is_neutral: bool = True

    def applied(self, job: Job) -> Job:
        """The job with this change.

        Raises:
            SettingsError: the global batch cannot be split so.
        """
        changes: dict[str, object] = {}
        if self.micro_batch_size is not None:
            changes["micro_batch_size"] = self.micro_batch_size
        if self.packed_length is not None:
            changes |= {"packing": True, "packed_length": self.packed_length}
        for name in ("loss", "num_threads", "base_precision"):
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name)
        preset = {
            name: getattr(self, name)
            for name in ("attention", "gradient_checkpointing")
            if getattr(self, name) is not None
        }
        if preset:
            changes["preset"] = replace(job.preset, **preset)
        return replace(job, **changes)  # type: ignore[arg-type]

    @property
    def text(self) -> str:
        """As the table has it: "micro-batch 8", "packed to 1,024 tokens"."""
        if self.packed_length is not None:
            return f"packed to {self.packed_length:,} tokens"
        if self.micro_batch_size is not None:
            return f"micro-batch {self.micro_batch_size}"
        if self.loss is not None:
            return "lean loss"
        if self.attention is not None:
            return f"{self.attention} attention"
        if self.gradient_checkpointing is not None:
            return "checkpointing" if self.gradient_checkpointing else "no checkpointing"
        if self.num_threads is not None:
            return f"{self.num_threads} CPU thread{'s' if self.num_threads > 1 else ''}"
        return f"base in {self.base_precision}"


def changed(job: Job, changes: Sequence[Change]) -> Job:
    """The job with all of these changes.

    Raises:
        SettingsError: the global batch cannot be split so.
    """
    for change in changes:
        job = change.applied(job)
    return job


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One link of the chain from the baseline to the twin."""

    name: str  # "accumulation", "fp16", or a change's text
    seconds: float  # of the training loop after it
    factor: float  # seconds before / seconds after
    is_kept: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Twin:
    """What was found for one preset. Kept in the history; its job is the preset's with `changes`."""

    preset: str
    changes: tuple[Change, ...]  # none: as written is the fastest
    links: tuple[Link, ...]  # from the baseline as written; the product of the factors is `speedup`
    written_seconds: float  # of the training loop, as written, beside `seconds` in turns
    seconds: float
    baseline_seconds: float
    refused: tuple[str, ...] = ()  # what was not offered, and why
    tuned_at: str = ""

    @property
    def speedup(self) -> float:
        """Over the baseline as written."""
        return self.baseline_seconds / self.seconds

    @property
    def gain(self) -> float:
        """Over the same preset as written."""
        return self.written_seconds / self.seconds

    def job(self, job: Job) -> Job:
        """The tuned job of this preset's job as written."""
        return changed(job, self.changes)

    @property
    def text(self) -> str:
        return ", ".join(change.text for change in self.changes) or "as written"

    @property
    def explained(self) -> str:
        """Each link's share, in the order in which they were applied."""
        kept = [f"{one.name} {one.factor:.2f}x" for one in self.links if one.is_kept]
        dropped = [f"{one.name} {one.factor:.2f}x" for one in self.links if not one.is_kept]
        return ", ".join(kept) + (f"; tried and left out: {', '.join(dropped)}" if dropped else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One preset to be tuned, as written, and the baseline that its speed-up is counted from."""

    name: str
    job: Job
    baseline: Job
