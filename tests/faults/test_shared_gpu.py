"""Two plans at once on one GPU: what the one holds is not free for the other. A card of known size stands in for it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import chat_lengths, make_data, make_job

from planner import hardware
from planner.estimate import memory_warning
from planner.measurement import RowVerdict, StepSignature
from planner.workload import Worker

GIB = 1 << 30


@dataclass
class Card:
    """24 GiB, and who holds how much of it."""

    held: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    now: str = ""  # whose process asks

    @property
    def free(self) -> int:
        return 24 * GIB - sum(self.held.values())

    def hold(self, plan: str, amount: int) -> None:
        self.held[plan] = amount
        self.most[plan] = max(amount, self.most.get(plan, 0))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    import torch

    made = Card()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (made.free, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: made.held.get(made.now, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda *_: made.most.get(made.now, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: made.most.get(made.now, 0))
    return made


def worker() -> Worker:
    return Worker(make_job(device="cuda"), make_data(chat_lengths(10)), None)


def verdict_of(card: Card, plan: str) -> RowVerdict:
    card.now = plan
    reply = worker().peak()
    return RowVerdict(
        name="baseline",
        signature=StepSignature.of(make_job(device="cuda")),
        fits=True,
        peak_allocated_bytes=reply.allocated_bytes,
        peak_reserved_bytes=reply.reserved_bytes,
        headroom_bytes=reply.headroom_bytes,
    )


def test_what_another_plan_holds_is_not_counted_as_room(card: Card) -> None:
    card.hold("first", 10 * GIB)
    alone = verdict_of(card, "first")
    assert alone.headroom_bytes == 14 * GIB
    assert memory_warning(alone, make_job(device="cuda")) is None
    card.hold("second", 13 * GIB)
    both = [verdict_of(card, plan) for plan in ("first", "second")]
    assert [one.headroom_bytes for one in both] == [1 * GIB, 1 * GIB]
    card.hold("second", int(13.8 * GIB))
    assert "memory is tight: 0.2 GiB stay free beside a peak of 10.0 GiB" in str(
        memory_warning(verdict_of(card, "first"), make_job(device="cuda"))
    )
    del card.held["second"]
    assert verdict_of(card, "first").headroom_bytes == 14 * GIB


def test_the_card_s_free_memory_is_asked_for_anew_by_each_plan(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """By it a stored "it fits" is measured again: tests/test_reuse.py."""

    class NVMLError(Exception):
        pass

    nvml: Any = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=24 * GIB, free=card.free),
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0),
        nvmlDeviceGetName=lambda handle: "a card",
        nvmlSystemGetDriverVersion=lambda: "1.0",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(hardware, "torch_cuda_version", lambda: "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    facts = hardware.detect_device("cuda")
    assert facts.free_bytes == 24 * GIB
    card.hold("another plan", 20 * GIB)
    assert hardware.free_bytes(facts) == 4 * GIB
    assert hardware.detect_device("cuda").free_bytes == 4 * GIB
