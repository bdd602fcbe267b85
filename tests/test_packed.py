"""No micro-step reads a number from the device: the host would wait there until all that it launched is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from small_models import random_data, small_model, with_lora

from trainer import documents, packed
from trainer.collate import MicroBatch, collate
from trainer.step import clear_gradients, make_stepper, micro_step

torch = pytest.importorskip("torch")

DATA = random_data([30, 17, 22, 9])
ROWS = {"plain rows": [[0], [1], [2]], "packed": [[0], [1, 3], [2]]}
READS = ("_local_scalar_dense", "nonzero", "aten.equal", "masked_select", "unique")


@contextlib.contextmanager
def unknown(*, packed: bool) -> Iterator[None]:
    """In place of `packed.known`: transformers looks for itself."""
    yield


def batch_of(rows: list[list[int]]) -> MicroBatch:
    return collate([np.array(row) for row in rows], DATA)


def reads_of(run: Any) -> list[str]:
    """Operations of a call that give the host a number, or a shape that depends on one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(name in str(function) for name in READS):
                found.append(str(function))
            return function(*args, **(kwargs or {}))

    # Backward passes on the CPU run in the thread that asks for them, where the mode holds.
    with Watch():
        run()
    return found


@pytest.mark.parametrize("loss", ["plain", "lean"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "gpt2"])
def test_no_micro_step_reads_from_the_device(
    family: str, rows: list[list[int]], loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper = make_stepper(with_lora(small_model(family)).float(), "cpu", "fp32", loss=loss)
    assert stepper.lean_refused is None
    batch = batch_of(rows)
    micro_step(stepper, batch, scale=0.01)
    assert reads_of(lambda: micro_step(stepper, batch, scale=0.01)) == []
    monkeypatch.setattr(packed, "known", unknown)
    assert reads_of(lambda: micro_step(stepper, batch, scale=0.01))


@pytest.mark.parametrize("apart", [False, True], ids=["by a mask", "by themselves"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_what_is_known_gives_the_numbers_of_what_transformers_finds(
    family: str, rows: list[list[int]], apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_lora(small_model(family)).float()
    documents.use(model, apart=apart)
    stepper = make_stepper(model, "cpu", "fp32")
    batch = batch_of(rows)

    def run() -> tuple[float, list[Any]]:
        value = float(micro_step(stepper, batch, scale=0.01))
        found = [parameter.grad.clone() for parameter in stepper.parameters]
        clear_gradients(stepper.parameters)
        return value, found

    known = run()
    monkeypatch.setattr(packed, "known", unknown)
    looked = run()
    assert known[0] == looked[0]
    assert all(torch.equal(one, other) for one, other in zip(known[1], looked[1], strict=True))


def test_what_is_known_wrongly_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows that are taken for plain ones see each other, so that the tests above compare something."""
    model = small_model("llama").float()
    batch = batch_of(ROWS["packed"])
    right = float(micro_step(make_stepper(model, "cpu", "fp32"), batch, scale=0.01))
    known = packed.known
    monkeypatch.setattr(packed, "known", lambda *, packed: known(packed=False))
    assert float(micro_step(make_stepper(model, "cpu", "fp32"), batch, scale=0.01)) != pytest.approx(right, rel=1e-4)


def test_outside_of_a_micro_step_transformers_looks_for_itself() -> None:
    from transformers import masking_utils

    with packed.known(packed=False):
        pass
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    assert masking_utils.find_packed_sequence_indices(positions).tolist() == [[0, 0, 0, 1, 1]]
    assert masking_utils.find_packed_sequence_indices(torch.arange(5)[None]) is None
    with packed.known(packed=True):
        assert masking_utils.find_packed_sequence_indices(positions).tolist() == [[0, 0, 0, 1, 1]]
