"""The tuned twin of a preset: which changes, what each of them gave, and the job that comes of them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.job import Job

TUNED = "tuned"
TOO_SHORT = "what the time did not suffice to tell from chance: give more with --budget"


def twin_name(preset: str) -> str:
    """The name of a preset's tuned twin: of its row, and of its runs in the history."""
    return f"{preset}, {TUNED}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One setting of a job that leaves its gradient as it is (or, where `is_neutral` is false, does not)."""

    name: str  # "micro-batch", "packing", "lean loss" ...
    micro_batch_size: int | None = None
    packed_length: int | None = None  # packs, in rows of this many tokens
    share_beginnings: bool | None = None
    loss: str | None = None
    attention: str | None = None
    gradient_checkpointing: bool | None = None
    num_threads: int | None = None
    base_precision: str | None = None
    compile: bool | None = None
    is_neutral: bool = True

    @property
    def is_layout(self) -> bool:
        """Whether it says how the global batch is split or packed."""
        return self.packed_length is not None or self.micro_batch_size is not None

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
        for name in ("share_beginnings", "loss", "num_threads", "base_precision", "compile"):
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
        if self.compile is not None:
            return "compiled" if self.compile else "not compiled"
        return f"base in {self.base_precision}"


def changed(job: Job, changes: Sequence[Change]) -> Job:
    """The job with all of these changes.

    Raises:
        SettingsError: the global batch cannot be split so.
    """
    for change in changes:
        job = change.applied(job)
    return job


def split_text(job: Job) -> str:
    """ "packed to 512 tokens", "micro-batch 8": how the job's batches are split, whether as written or not."""
    packed = f"packed to {job.packed_length or job.preset.max_length:,} tokens" if job.packing else ""
    alone = f"micro-batch {job.micro_batch_size}"
    return packed if packed and job.micro_batch_size == 1 else f"{packed}, {alone}" if packed else alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One link of the chain from the baseline to the twin."""

    name: str  # "accumulation", "fp16", or a change's text
    seconds: float  # of the training loop after it
    factor: float  # seconds before / seconds after
    is_kept: bool = True
    low: float | None = None  # of the factor's 90 % range; None: from too few rounds, or of an earlier version
    high: float | None = None

    @property
    def verdict(self) -> str:
        """Why it is not kept, where it is not."""
        if self.low is None or self.high is None:
            return "no range is known"
        if self.high < 1:
            return "slower"
        why = "not told from chance" if self.low <= 1 else "too little to be seen in a run"
        return f"{self.low:.2f}-{self.high:.2f}: {why}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Twin:
    """What was found for one preset. Kept in the history; its job is the preset's with `changes`."""

    preset: str
    changes: tuple[Change, ...]  # none: as written is the fastest
    links: tuple[Link, ...]  # from the baseline as written; the product of the factors is `loop_speedup`
    written_seconds: float | None  # of the training loop, as written, beside `seconds` in turns; None: does not fit
    seconds: float
    baseline_seconds: float | None  # None: the baseline does not fit
    refused: tuple[str, ...] = ()  # what was not offered, and why
    tuned_at: str = ""
    budget_seconds: float = 0.0  # of the search

    @property
    def loop_speedup(self) -> float | None:
        """Of the training loop alone, over the baseline as written; `planner.speedup` makes a whole run's of it."""
        return None if self.baseline_seconds is None else self.baseline_seconds / self.seconds

    @property
    def written_loop_speedup(self) -> float | None:
        """The same of the preset as written."""
        known = self.baseline_seconds is not None and self.written_seconds is not None
        return self.baseline_seconds / self.written_seconds if known else None  # type: ignore[operator]

    @property
    def loop_gain(self) -> float | None:
        """Of the training loop alone, over the same preset as written."""
        return None if self.written_seconds is None else self.written_seconds / self.seconds

    @property
    def was_too_short(self) -> bool:
        """Whether its search could not tell all that it tried from chance."""
        return TOO_SHORT in self.refused

    def job(self, job: Job) -> Job:
        """The tuned job of this preset's job as written."""
        return changed(job, self.changes)

    @property
    def text(self) -> str:
        return ", ".join(change.text for change in self.changes) or "as written"

    @property
    def explained(self) -> str:
        """Each link's share of the training loop's speed-up, in the order in which they were applied."""
        kept = [f"{one.name} {one.factor:.2f}x" for one in self.links if one.is_kept]
        dropped = [f"{one.name} {one.factor:.2f}x ({one.verdict})" for one in self.links if not one.is_kept]
        return ", ".join(kept) + (f"; tried and left out: {', '.join(dropped)}" if dropped else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One preset to be tuned, as written, and the baseline that its speed-up is counted from."""

    name: str
    job: Job
    baseline: Job


@dataclass(frozen=True, kw_only=True, slots=True)
class Untimed:
    """A preset of which nothing could be timed, and why."""

    preset: str
    reason: str
