"""Micro-batches made ahead: the same bytes in the same order, and nothing raised before its turn."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pytest
from fakes import make_data, make_job, make_row
from small_models import random_data

from trainer.collate import MicroBatch, collate
from trainer.feed import feed, one_ahead
from trainer.run import sizes_on_gpu

DATA = random_data([5, 9, 3, 12, 7, 7, 2, 30])
PARTS = [[np.array([0, 3])], [np.array([1]), np.array([2])], [], [np.array([7])], [np.array([4, 5, 6])]]


def as_bytes(batch: MicroBatch) -> tuple[Any, ...]:
    tensors = (batch.input_ids, batch.position_ids, batch.predicts, batch.targets)
    return (*(None if one is None else one.numpy().tobytes() for one in tensors), batch.num_tokens, batch.documents)


def test_made_ahead_or_in_their_turn_the_batches_are_the_same_bytes_in_the_same_order() -> None:
    def make(rows: list[Any]) -> MicroBatch:
        return collate(rows, DATA)

    expected = [as_bytes(make(rows)) for rows in PARTS]
    assert [as_bytes(batch) for batch in feed(PARTS, DATA, "cpu")] == expected
    assert [as_bytes(batch) for batch in one_ahead(make, PARTS)] == expected
    assert list(one_ahead(make, [])) == []


def test_the_next_one_is_made_by_another_thread_while_the_one_before_is_in_use() -> None:
    made = {number: threading.Event() for number in range(4)}
    threads = set()

    def make(number: int) -> int:
        threads.add(threading.current_thread())
        made[number].set()
        return number

    for number in one_ahead(make, range(4)):
        if number < 3:
            assert made[number + 1].wait(timeout=10)
        assert number >= 2 or not made[number + 2].is_set()  # one ahead, and not more: batches take memory
    assert len(threads) == 1
    assert threading.current_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_a_failure_comes_where_its_batch_would_have_come_and_an_early_end_leaves_no_thread() -> None:
    def make(number: int) -> int:
        if number == 1:
            raise MemoryError("no room")
        return number

    batches = one_ahead(make, range(3))
    assert next(batches) == 0
    with pytest.raises(MemoryError, match="no room"):
        next(batches)
    left = one_ahead(make, [0, 2, 2, 2])
    assert next(left) == 0
    left.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


def test_making_batches_ahead_leaves_the_random_state_alone() -> None:
    import random

    import torch

    before = (torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate())  # type: ignore[union-attr]
    list(feed(PARTS, DATA, "cpu"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tobytes(), random.getstate()) == before[1:]  # type: ignore[union-attr]


@pytest.mark.parametrize("micro", [1, 4])
def test_a_run_fed_by_the_thread_ends_with_the_same_adapter(
    make_run: Any, monkeypatch: pytest.MonkeyPatch, micro: int
) -> None:
    """The thread is used on a GPU only; here it is made to work on the CPU."""
    from trainer import loop, window

    plain, ahead = (make_run(name, micro=micro, lora_dropout=0.1) for name in ("plain", "ahead"))
    loop.train(plain)
    monkeypatch.setattr(
        window, "feed", lambda parts, data, device, row_length: one_ahead(lambda rows: collate(rows, data), parts)
    )
    loop.train(ahead)
    name = "adapter/adapter_model.safetensors"
    assert (plain / name).read_bytes() == (ahead / name).read_bytes()


def test_a_run_on_a_gpu_knows_its_plan_s_largest_micro_batch_and_longest_packed_row() -> None:
    lengths = np.random.default_rng(2).integers(50, 400, 200)
    for packing, device, of in ((True, "cuda", True), (False, "cuda", True), (True, "cpu", False)):
        job = make_job(device=device, packing=packing, packed_length=1024, micro_batch_size=1 if packing else 4)
        plan = make_row(job, make_data(lengths)).plan
        shapes = plan.micro_shapes(lengths)
        expected = (int(shapes.padded_tokens.max()), int(shapes.width.max()) * packing) if of else (0, 0)
        assert sizes_on_gpu(job, plan, lengths) == expected


def test_windows_share_one_feed_that_makes_the_next_window_s_first_micro_batch_ahead(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import loop, window

    made: list[int] = []
    begun: list[int] = []  # micro-batches made when a window began
    longest: list[int] = []

    def fed(parts: Any, data: Any, device: str, longest_rows: Any) -> Any:
        longest.extend(itertools.islice(longest_rows, 3))
        return one_ahead(lambda rows: made.append(1) or collate(rows, data), parts)

    real = window._micro_steps

    def watched(run: Any) -> Any:
        begun.append(len(made))
        return real(run)

    monkeypatch.setattr(window, "feed", fed)
    monkeypatch.setattr(window, "_micro_steps", watched)
    monkeypatch.setattr(loop, "sizes_on_gpu", lambda *_given: (0, 77))
    record = loop.train(make_run(micro=4))
    assert record is not None
    per_window = sum(made) // len(begun)
    assert longest == [77, 77, 77]  # the plan's: what a rest is rounded up by
    assert begun[0] == 0
    assert begun[1:] == [number * per_window + 1 for number in range(1, len(begun))]
