"""A search on a fake device whose truth is known, as the tests of `planner.tune` make it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fakes import FakeDevice, FakeProber, chat_lengths, make_data, make_job

from planner.prober import LoadReply, MicroRows
from planner.tune import tune
from planner.twin import Twin, Wanted
from trainer.job import Job
from trainer.tokens import TokenizedDataset

LENGTHS = chat_lengths(1500, longest=512)
DATA = make_data(LENGTHS)


class Device(FakeDevice):
    """A fake device on which lean losses, attention and threads have a cost too."""

    lean_factor: float = 1.0
    eager_factor: float = 1.1

    def factory(self, job: Job) -> FakeProber:
        return Prober(self, job)


class Prober(FakeProber):
    device: Device

    def _seconds(self, rows: MicroRows, longest_row: int = 0) -> float:
        seconds = super()._seconds(rows, longest_row)
        if self.job.loss == "lean":
            seconds *= self.device.lean_factor
        if self.job.preset.attention == "eager":
            seconds *= self.device.eager_factor
        if self.job.num_threads == 1:
            seconds *= 1.5
        return seconds

    def load(self) -> LoadReply:
        refused = self.device.lean_refused if self.job.loss == "lean" else None
        return replace(super().load(), lean_refused=refused)


def device_of(**changes: Any) -> Device:
    lean, eager = changes.pop("lean_factor", 1.0), changes.pop("eager_factor", 1.1)
    made = Device(LENGTHS, **changes)
    made.lean_factor, made.eager_factor = lean, eager
    return made


def tuned(
    device: Device, /, *names: str, data: TokenizedDataset = DATA, budget: float = 90.0, **job: Any
) -> tuple[Twin, ...]:
    baseline = make_job("baseline", device=job.get("device", "cpu"))
    wanted = [Wanted(name=name, job=make_job(name, **job), baseline=baseline) for name in names or ("recommended",)]
    found = tune(wanted, data, device.factory, budget_seconds=budget, clock=device.clock, seed=device.seed)
    assert all(isinstance(one, Twin) for one in found)
    return found  # type: ignore[return-value]


class Saving(Device):
    """Checkpointing fits four times as much, and takes a quarter longer; the lean loss fits a little more."""

    slower: float = 1.25

    def factory(self, job: Job) -> FakeProber:
        return SavingProber(self, job)


class SavingProber(Prober):
    device: Saving

    def _seconds(self, rows: MicroRows, longest_row: int = 0) -> float:
        longest = int(LENGTHS.max())
        saves = self.job.preset.gradient_checkpointing
        self.device.fits_padded_tokens = 8 * longest if saves else 2 * longest
        return super()._seconds(rows, longest_row) * (self.device.slower if saves else 1)


def saving(**changes: Any) -> Saving:
    device = Saving(LENGTHS, per_token=1e-5, per_token_width=0.0, memory=64 << 30, **changes)
    device.packing_refused = "it leaks"
    return device
