"""Micro-steps in a row: by the host's clock with a wait at each, by the GPU's own with one at the end."""

from __future__ import annotations

import time

import pytest
import torch

from planner.stopwatch import ClockMeter, EventMeter


def test_the_host_s_clock_is_read_after_a_wait_at_each_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    waits = []

    def wait() -> None:
        waits.append(now[0])
        now[0] += 0.5

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = ClockMeter(wait)
    meter.begin()
    for seconds in (1.0, 2.0):
        now[0] += seconds
        meter.mark()
    assert len(waits) == 3
    assert meter.seconds() == [1.5, 2.5]
    now[0] += 100.0  # nobody's
    meter.begin()
    now[0] += 3.0
    meter.mark()
    assert meter.seconds() == [1.5, 2.5, 3.5]


def test_the_gpu_s_clock_needs_no_wait_between_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    milliseconds = iter((10.0, 40.0, 100.0, 500.0, 520.0))

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.at = -1.0

        def record(self) -> None:
            told.append("mark")
            self.at = next(milliseconds)

        def elapsed_time(self, other: Event) -> float:
            assert told[-1] == "wait"  # an event that the GPU has not come to has no time
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    meter = EventMeter()
    meter.begin()
    meter.mark()
    meter.mark()
    assert told == ["wait", "mark", "mark", "mark"]
    assert meter.seconds() == pytest.approx([0.030, 0.060])
    meter.begin()
    meter.mark()
    assert told[-3:] == ["wait", "mark", "mark"]
    assert meter.seconds() == pytest.approx([0.030, 0.060, 0.020])
