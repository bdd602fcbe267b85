"""What only a CUDA device can show. Skipped without one; bench/gpu_check.sh runs them where there is one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def stepper_of(model: Path, precision: str, make_job: Any) -> Any:
    from trainer.model import load_model
    from trainer.step import make_stepper

    base = precision if precision in ("fp16", "bf16") else "fp32"
    job = make_job(model=str(model), device="cuda", precision=precision, base_precision=base)
    loaded = load_model(job, need_weights=True)
    return make_stepper(loaded.model, "cuda", precision), loaded.model


def batches(model: Path, data: Any, rows: list[list[int]]) -> Any:
    from trainer.collate import collate

    return collate([np.array(row, dtype=np.int64) for row in rows], data).to("cuda")


@pytest.fixture
def data() -> Any:
    from fakes import make_data

    return make_data(np.random.default_rng(3).integers(12, 60, 64))


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_every_precision_trains_fp32_adapters_and_the_loss_falls(
    precision: str, tiny_model: Path, data: Any, make_job: Any
) -> None:
    from trainer.step import micro_step, optimizer_step

    if precision in ("bf16", "tf32") and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    stepper, _ = stepper_of(tiny_model, precision, make_job)
    assert {one.dtype for one in stepper.parameters} == {torch.float32}
    batch = batches(tiny_model, data, [[0], [1], [2], [3]])
    targets = int(data.num_supervised[:4].sum())
    losses, applied = [], 0
    for _ in range(30):
        losses.append(float(micro_step(stepper, batch, scale=1.0 / targets)) / targets)
        applied += optimizer_step(stepper, 5e-3).applied
    assert all(np.isfinite(losses))
    assert losses[-1] < 0.98 * losses[0]
    assert applied >= 15  # fp16 starts with a loss scale that may overflow a few times


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_gradients_are_near_those_of_fp32(
    precision: str, tiny_model: Path, data: Any, make_job: Any
) -> None:
    from trainer.step import micro_step

    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    found = {}
    for kind in ("fp32", precision):
        torch.manual_seed(0)
        stepper, _ = stepper_of(tiny_model, kind, make_job)
        micro_step(stepper, batches(tiny_model, data, [[0], [1], [2], [3]]), scale=1.0 / 100)
        scale = stepper.scaler.get_scale() if stepper.scaler is not None else 1.0
        found[kind] = torch.cat([one.grad.flatten() / scale for one in stepper.parameters if one.grad is not None])
    difference = (found[precision] - found["fp32"]).norm() / found["fp32"].norm()
    assert difference < (0.02 if precision == "fp16" else 0.1)


@pytest.mark.parametrize("beginning", [0, 30])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_documents_in_groups_have_the_gradient_of_rows_of_their_own(
    precision: str, beginning: int, tiny_model: Path, data: Any, make_job: Any
) -> None:
    from small_models import with_beginning

    from trainer import documents
    from trainer.step import clear_gradients, micro_step

    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    if beginning:
        data = with_beginning(data, beginning)
    stepper, model = stepper_of(tiny_model, precision, make_job)
    documents.use(model, apart=True)
    found = []
    for rows in ([[0, 1, 2, 3], [4, 5], [6]], [[number] for number in range(7)]):
        batch = batches(tiny_model, data, rows)
        assert (batch.arrangement is not None) == any(len(row) > 1 for row in rows)
        if batch.arrangement is not None:
            assert [len(others) for _, others in batch.arrangement.repeated] == ([3, 1] if beginning else [])
        micro_step(stepper, batch, scale=0.01)
        found.append(torch.cat([one.grad.flatten() for one in stepper.parameters if one.grad is not None]))
        clear_gradients(stepper.parameters)
    difference = float((found[0] - found[1]).norm() / found[1].norm())
    assert difference < {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}[precision]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_packed_rows_are_kept_apart(precision: str, tiny_model: Path, data: Any, make_job: Any) -> None:
    from trainer.agreement import packing_agrees

    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    _, model = stepper_of(tiny_model, precision, make_job)
    assert packing_agrees(model, data, device="cuda", precision=precision, packed_length=256) is None


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_norms_rotary_positions_and_copies_of_adapters_give_the_libraries_gradients(
    precision: str, tiny_model: Path, data: Any, make_job: Any
) -> None:
    """By PyTorch's fused kernels and one cast for all adapters; compared with fp32 through the libraries' own lines."""
    import sys

    from trainer.norms import _Kernels
    from trainer.rotary import NAME, Turned
    from trainer.step import clear_gradients, micro_step

    def gradients(stepper: Any) -> Any:
        clear_gradients(stepper.parameters)
        scaler, stepper.scaler = stepper.scaler, None
        for row in ([0, 1], [2, 3]):
            micro_step(stepper, batches(tiny_model, data, [[one] for one in row]), scale=1e-2)
        stepper.scaler = scaler
        return torch.cat([one.grad.flatten() for one in stepper.parameters])

    def as_the_libraries(stepper: Any, model: Any) -> Any:
        stepper.halves = None
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                del module.forward  # raises where it was not replaced
        for name in {type(module).__module__ for module in model.modules()}:
            if isinstance(found := vars(sys.modules[name]).get(NAME), Turned):
                setattr(sys.modules[name], NAME, found.plain)
        return gradients(stepper)

    exact = as_the_libraries(*stepper_of(tiny_model, "fp32", make_job))
    used: list[int] = []
    own, _Kernels.forward = _Kernels.forward, staticmethod(lambda *given: used.append(1) or own(*given))
    try:
        stepper, model = stepper_of(tiny_model, precision, make_job)
        used.clear()
        ours = gradients(stepper)
    finally:
        _Kernels.forward = staticmethod(own)
    assert len(used) > 4, "the fused kernels were not used"
    assert (stepper.halves is not None) == (precision != "fp32")
    theirs = as_the_libraries(stepper, model)
    wrong, plain = (float((one - exact).norm() / exact.norm()) for one in (ours, theirs))
    assert wrong < (1e-4 if precision == "fp32" else 1.3 * plain)


def test_attention_of_grouped_heads_in_fp32_holds_no_square_of_the_tokens(tiny_model: Path, make_job: Any) -> None:
    from trainer import kernels

    stepper_of(tiny_model, "fp32", make_job)  # settles the kernels of the process
    assert not torch.backends.cuda.cudnn_sdp_enabled()

    class Module:
        num_key_value_groups = 4
        is_causal = True

    tokens = 2048
    query, key, value = (torch.randn(1, heads, tokens, 64, device="cuda", requires_grad=True) for heads in (16, 4, 4))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = kernels.attention(Module(), query, key, value, None)[0]
    held = torch.cuda.memory_allocated() - before
    result.sum().backward()
    square = 16 * tokens * tokens * 4  # bytes of one head's scores, all heads
    assert held < square / 4
    assert torch.cuda.max_memory_allocated() - before < square


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("loss", ["plain", "lean"])
@pytest.mark.parametrize("rows", [[[0], [1]], [[0, 1, 2], [3]]], ids=["plain rows", "packed"])
def test_no_micro_step_waits_for_the_gpu(
    precision: str,
    loss: str,
    rows: list[list[int]],
    tiny_model: Path,
    data: Any,
    make_job: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The host then launches the next one while the GPU still computes this one."""
    from trainer import packed
    from trainer.collate import batch_on
    from trainer.model import load_model
    from trainer.step import make_stepper, micro_step

    base = "fp16" if precision == "fp16" else "fp32"
    job = make_job(model=str(tiny_model), device="cuda", precision=precision, base_precision=base, loss=loss)
    stepper = make_stepper(load_model(job, need_weights=True).model, "cuda", precision, loss=loss)
    assert stepper.lean_refused is None
    batch = batch_on("cuda", [np.array(row, dtype=np.int64) for row in rows], data)

    def watched() -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            micro_step(stepper, batch, scale=0.01)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    micro_step(stepper, batch, scale=0.01)  # the first one loads and settles
    watched()
    monkeypatch.setattr(packed, "known", lambda *, packed: contextlib.nullcontext())
    with pytest.raises(RuntimeError, match="synchroniz"):
        watched()


def test_large_evaluation_batches_give_the_loss_of_small_ones(tiny_model: Path, data: Any, make_job: Any) -> None:
    from trainer import evaluate

    _, model = stepper_of(tiny_model, "fp32", make_job)
    every = np.arange(len(data))
    sizes = [len(evaluate.evaluation_batches(data, every, "cuda", at_once)) for at_once in (0, 1 << 14)]
    assert sizes[0] > sizes[1]
    small, large = (
        evaluate.evaluate(model, data, every, device="cuda", precision="fp32", at_once=at_once)
        for at_once in (0, 1 << 14)
    )
    assert small is not None
    assert large is not None
    assert large.loss == pytest.approx(small.loss, rel=1e-5)
    assert large.num_tokens == small.num_tokens


def test_micro_steps_are_timed_in_windows_by_the_gpu_s_clock(tiny_model: Path, data: Any, make_job: Any) -> None:
    from planner.workload import Worker

    job = make_job(model=str(tiny_model), device="cuda", precision="fp32", base_precision="fp32")
    worker = Worker(job, data, None)
    worker.load()
    micro_batches = [[[0]], [[1], [2]], [[3]], [[4]]]
    for begins in ([], [2], [1, 2, 3]):
        seconds = worker.run(micro_batches, begins, [0, 0, 0, 0])
        assert len(seconds) == 4
        assert all(0 < one < 5 for one in seconds)
    assert worker.window([[[0, 1, 2], [3]]], 60) > 0
    assert all(parameter.grad is None for parameter in worker.stepper.parameters)
