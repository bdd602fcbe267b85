"""On a GPU micro-batches of about one width share it; what they train does not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import grouped, random_data, small_model, with_lora

from trainer import documents
from trainer.collate import MicroBatch, batch_on, collate
from trainer.feed import feed
from trainer.step import clear_gradients, make_stepper, micro_step
from trainer.widths import shared_width

DATA = random_data([70, 131, 135, 33, 41, 200, 9])
PLAIN, PACKED = [[0], [1], [3]], [[0, 3, 4, 6], [2], [1, 6, 3]]


@given(st.integers(1, 2**40))
def test_a_width_is_rounded_up_by_a_sixty_fourth_at_most(width: int) -> None:
    found = shared_width(width)
    assert width <= found <= width * (1 + 1 / 64)
    assert shared_width(found) == found


def test_between_a_number_and_its_double_there_are_few_widths() -> None:
    widths = np.arange(4097, 8193)
    found = shared_width(widths)
    assert found.tolist() == [shared_width(int(width)) for width in widths]
    assert len(np.unique(found)) == 64
    assert shared_width(8192) == 8192  # the usual lengths of packed rows are their own
    assert shared_width(0) == 0


@given(st.integers(1, 8192), st.integers(2, 8192))
def test_a_packed_row_s_rest_has_few_widths_and_little_padding_beside_the_longest(width: int, longest: int) -> None:
    found = shared_width(width, longest)
    assert width <= found <= width + max(longest // 32, width // 64)
    if width > longest // 4:
        assert found == shared_width(width)
    rests = shared_width(np.arange(1, longest + 1), longest)
    assert (np.diff(rests) >= 0).all()
    if longest >= 32:
        assert len(np.unique(rests[: 8 * (longest // 32)])) == 8


def test_a_micro_batch_is_as_wide_as_the_rows_of_its_plan_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its own plan: one worker is given those of several."""
    monkeypatch.setattr(MicroBatch, "to", lambda batch, device: batch)
    monkeypatch.setattr("torch.cuda.set_device", lambda index: None)
    rest = [np.array([0, 3])]  # 103 tokens
    batches = list(feed([rest, rest, rest], DATA, "cuda", [4096, 0, 410]))
    assert [batch.input_ids.shape for batch in batches] == [(1, 128), (1, 103), (1, 103)]
    assert {batch.num_tokens for batch in batches} == {103}


@pytest.mark.parametrize(("device", "width"), [("cpu", 131), ("cuda", 132), ("cuda:1", 132), ("mps", 132)])
def test_micro_batches_share_widths_on_all_but_a_cpu(device: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MicroBatch, "to", lambda batch, device: batch)
    assert batch_on(device, [np.array([1])], DATA).input_ids.shape == (1, width)


def test_no_position_of_padding_lies_beyond_those_of_documents() -> None:
    """Where a model goes by the largest position (LongRoPE), the documents beside it would get other frequencies."""
    batch = collate([np.array([0, 1, 3, 4, 2]), np.array([4, 6])], DATA)  # the longest of these has 135 tokens
    assert batch.position_ids is not None
    assert batch.input_ids.shape[1] == 410
    assert int(batch.position_ids.max()) == 134 < DATA.longest
    assert batch.position_ids[1, 50:].tolist() == [*range(135), *range(135), *range(90)]


def test_plain_micro_batches_never_become_wider_than_the_longest_example() -> None:

    def width(*rows: list[int]) -> int:
        return collate([np.array(row) for row in rows], DATA, shared=True).input_ids.shape[1]

    assert width([1]) == 132
    assert width([5]) == 200 < shared_width(201)  # the model may have positions for no more
    assert width([5, 6], [0]) == shared_width(209) == 210
    assert collate([], DATA, shared=True).input_ids.shape == (1, 1)


@pytest.mark.parametrize("way", ["by a mask", "one by one", "in groups"])
@pytest.mark.parametrize("rows", [PLAIN, PACKED], ids=["plain rows", "packed"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_a_shared_width_changes_neither_loss_nor_gradient(family: str, rows: list[list[int]], way: str) -> None:
    model = with_lora(small_model(family))
    documents.use(model, apart=way != "by a mask")
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():  # LoRA's B, whose zeros would hide most of the gradient
            parameter.data.normal_(std=0.1)
    stepper = make_stepper(model, "cpu", "fp32")

    def run(shared: bool) -> tuple[int, float, list[Any]]:
        batch = collate([np.array(row) for row in rows], DATA, shared=shared)
        loss = float(micro_step(stepper, grouped(batch) if way == "in groups" else batch, scale=0.01))
        found = [parameter.grad.clone() for parameter in stepper.parameters]
        clear_gradients(stepper.parameters)
        return batch.input_ids.shape[1], loss, found

    (width, loss, gradient), (shared_to, shared_loss, shared_gradient) = run(False), run(True)
    assert shared_to == shared_width(width) > width
    assert shared_loss == pytest.approx(loss, rel=1e-6)
    for one, other in zip(gradient, shared_gradient, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(one.norm())
        assert float(one.norm()) > 0


def test_a_little_padding_is_the_end_of_the_last_document_and_much_is_one_of_its_own() -> None:
    batch = collate([np.array([0, 1]), np.array([3, 4]), np.array([2])], DATA, shared=True)  # 201, 74 and 135 tokens
    spans = ((0, 0, 70), (0, 70, 202), (1, 0, 33), (1, 33, 74), (1, 74, 202), (2, 0, 202))
    assert batch.documents == tuple((*span, 0, 0) for span in spans)
