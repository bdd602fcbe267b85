"""A fake GPU behind a host that launches its work: what the GPU waits for, and what is hidden behind it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from fakes import FakeDevice, FakeProber

from planner.prober import MicroRows
from trainer.batching import BatchPlan
from trainer.job import Job
from trainer.widths import shared_width

FORWARD_LAUNCHES, FORWARD_WORK = 0.45, 1 / 3  # of a micro-step's


@dataclass
class HostedDevice(FakeDevice):
    """The GPU takes base + per_token x padded + ... for a micro-step, and ends it no sooner than the host launched it.

    The host runs ahead by what the queue holds, and waits for the GPU where a window ends: the next one's forward pass,
    a third of the GPU's work and nearly half of the launches, then finds nothing to hide behind. Noise is the host's.
    """

    base: float = 0.001
    per_token: float = 13e-6
    per_token_width: float = 0.0
    half_speed_up: float = 1.0
    launch: float = 0.07  # host's seconds of a micro-step
    launch_new: float = 0.025  # more, where the shape is new
    launch_optimizer: float = 0.005
    queue: float = 0.25  # of a micro-step's launches that may wait for the GPU: some thousand

    def factory(self, job: Job) -> HostedProber:
        return HostedProber(self, job)

    def run_seconds(self, plan: BatchPlan, seed: int, *, packed: bool = False) -> float:
        """What one run of a plan takes, with noise of its own."""
        random = np.random.default_rng([seed, 0xFC])
        shapes, timeline = plan.micro_shapes(self.lengths), Timeline(self, random)
        for first, last in zip(plan.window_offsets[:-1].tolist(), plan.window_offsets[1:].tolist(), strict=True):
            for micro in range(first, last):
                timeline.micro_step(int(shapes.rows[micro]), int(shapes.width[micro]), shapes.widest * packed)
            timeline.optimizer_step()
        return timeline.synchronize()


class Timeline:
    """When the host has launched and when the GPU is done, of one process."""

    def __init__(self, device: HostedDevice, random: np.random.Generator, now: float = 0.0) -> None:
        self.device, self.random = device, random
        self.host = self.gpu = now
        self.met: set[tuple[int, int]] = set()

    def micro_step(self, rows: int, width: int, longest_row: int = 0) -> float:
        """The moment in which the GPU is done with it."""
        device, shape = self.device, (rows, shared_width(width, longest_row))
        launched = (device.launch + device.launch_new * (shape not in self.met)) * self._noise()
        self.met.add(shape)
        computed = device.base + (device.per_token + device.per_token_width * width) * rows * width
        for of_host, of_gpu in ((FORWARD_LAUNCHES, FORWARD_WORK), (1 - FORWARD_LAUNCHES, 1 - FORWARD_WORK)):
            begun = max(self.host, self.gpu - device.queue * device.launch)
            launch = of_host * launched
            self.gpu = max(max(self.gpu, begun) + of_gpu * computed, begun + launch)
            self.host = max(begun + launch, self.gpu - device.queue * device.launch)
        return self.gpu

    def optimizer_step(self) -> float:
        self.synchronize()
        self.host += self.device.launch_optimizer * self._noise()
        self.gpu = self.host
        return self.gpu

    def synchronize(self, now: float = 0.0) -> float:
        self.host = self.gpu = max(self.host, self.gpu, now)
        return self.gpu

    def _noise(self) -> float:
        spread = np.sqrt(np.log1p(self.device.noise**2))
        return float(np.exp(self.random.normal(-(spread**2) / 2, spread)))


class HostedProber(FakeProber):
    """One worker; its clock is the device's."""

    def __init__(self, device: HostedDevice, job: Job) -> None:
        super().__init__(device, job)
        self.timeline = Timeline(device, device.random, device.now)

    def evaluate(self, batches: list[list[int]]) -> list[float]:
        """A forward pass: the longer of the host's share and of the GPU's."""
        self._note("evaluate")
        device, taken = self.device, []
        for batch in batches:
            computed = FORWARD_WORK * device.per_token * device.shape([[example] for example in batch])[0]
            taken.append(max(FORWARD_LAUNCHES * device.launch, computed))
        return taken

    def _seconds_of(
        self, micro_batches: list[MicroRows], waits: Collection[int], longest_rows: list[int]
    ) -> list[float]:
        """Of micro-steps, waiting for the GPU before some of them and at the end."""
        before, seconds = self.timeline.synchronize(self.device.now), []
        for place, (rows, longest) in enumerate(zip(micro_batches, longest_rows, strict=True)):
            if place in waits:
                before = self.timeline.synchronize()
            after = self.timeline.micro_step(len(rows), self.device.shape(rows)[1], longest)
            seconds.append(after - before)
            before = after
        self.device.now = self.timeline.synchronize()
        return seconds

    def run(self, micro_batches: list[MicroRows], begins: list[int], longest_rows: list[int]) -> list[float]:
        self._note("run")
        self.device.drawn += [(self.job.precision, rows) for rows in micro_batches]
        return self._seconds_of(micro_batches, begins, longest_rows)

    def optimizer(self, repeat: int) -> list[float]:
        self._note("optimizer")
        before = self.timeline.synchronize(self.device.now)
        marks = [before, *(self.timeline.optimizer_step() for _ in range(repeat))]
        self.device.now = marks[-1]
        return np.diff(marks).tolist()

    def window(self, micro_batches: list[MicroRows], longest_row: int) -> float:
        self._note("window")
        begun = self.timeline.synchronize(self.device.now)
        for rows in micro_batches:
            self.timeline.micro_step(len(rows), self.device.shape(rows)[1], longest_row)
        self.device.now = self.timeline.optimizer_step()
        return self.device.now - begun

    def _one_by_one(self, every: list[MicroRows]) -> list[float]:
        return self._seconds_of(every, range(len(every)), [0] * len(every))
