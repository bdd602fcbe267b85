"""The gradient of a window is the mean over its supervised tokens, however the window is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import make_data
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import random_data, small_model, with_lora

from trainer import documents
from trainer.batching import BatchPlan, Pass, Stretch, make_batch_plan
from trainer.collate import collate
from trainer.data import prepare_data
from trainer.job import DataSpec
from trainer.model import load_model
from trainer.step import make_stepper, micro_step, token_losses
from trainer.tokens import TokenizedDataset


@pytest.fixture
def data(tiny_model: Path, chat_file: Path) -> TokenizedDataset:
    return prepare_data(DataSpec(source=str(chat_file)), model=str(tiny_model), max_length=128)


def plan_of(data: TokenizedDataset, micro: int, examples: int = 8, packed: int | None = None) -> BatchPlan:
    stretches = (Stretch(phase=0, global_batch_size=8),)
    passes = (Pass(examples=np.arange(examples), num_epochs=1, stretches=stretches),)
    return make_batch_plan(data.lengths, passes, micro_batch_size=micro, packed_length=packed)


def window_gradient(
    model: Any, data: TokenizedDataset, plan: BatchPlan, window: int = 0, head: Any = None
) -> dict[str, Any]:
    stepper = make_stepper(model, "cpu", "fp32")
    stepper.head = head
    targets = int(plan.per_window(data.num_supervised)[window])
    for micro in range(plan.window_offsets[window], plan.window_offsets[window + 1]):
        micro_step(stepper, collate(plan.rows_of_micro_batch(micro), data), scale=1 / targets)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return gradients


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).norm() / one[n].norm().clamp_min(1e-12)) for n in one if one[n].norm() > 1e-9)


def moved(model: Any) -> Any:
    """LoRA's B starts at zero, and A's gradient with it: weights a little away from there exercise both."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "documents"])
@pytest.mark.parametrize(("double", "tolerance"), [(False, 1e-5), (True, 1e-12)])
def test_gradient_is_the_same_for_every_split_of_a_global_batch(
    make_job: Any,
    data: TokenizedDataset,
    adapter: str,
    attention: str,
    double: bool,
    tolerance: float,
    monkeypatch: Any,
) -> None:
    import torch.nn.functional as F

    kind = "sdpa" if attention == "documents" else attention
    model = moved(load_model(make_job(adapter=adapter, attention=kind), need_weights=True).model)
    if attention == "documents":
        documents.use(model, apart=True)
    if double:
        model.double()
        # Eager attention takes its softmax in fp32 whatever the model is in, and the rounding of that depends on the
        # padded width and on the number of threads.
        softmax = F.softmax
        monkeypatch.setattr(F, "softmax", lambda scores, dim, dtype: softmax(scores, dim=dim))
    reference = window_gradient(model, data, plan_of(data, 8))
    assert len({int(n) for n in data.num_supervised[:8]}) > 4  # unequal masks, or the test would prove little
    for plan in (plan_of(data, 4), plan_of(data, 1), plan_of(data, 1, packed=256), plan_of(data, 2, packed=100)):
        assert largest_difference(reference, window_gradient(model, data, plan)) < tolerance


@pytest.fixture(scope="module")
def two_models() -> dict[str, Any]:
    """An adapter on a model with a sliding window, and a whole model whose output layer is its embedding."""
    return {"lora": with_lora(small_model("mistral")).float(), "full": small_model("qwen3").float()}


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=3, max_size=14),
    size=st.integers(2, 8),
    micro=st.integers(1, 8),
    devices=st.integers(1, 3),
    packed=st.one_of(st.none(), st.integers(8, 200)),  # rows shorter and longer than any example
    sort=st.booleans(),
    kind=st.sampled_from(["lora", "full"]),
    lean=st.booleans(),
    apart=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_tuned_plan_has_the_windows_and_gradients_of_the_untuned_one(
    two_models: dict[str, Any],
    lengths: list[int],
    size: int,
    micro: int,
    devices: int,
    packed: int | None,
    sort: bool,
    kind: str,
    lean: bool,
    apart: bool,
    seed: int,
) -> None:
    from trainer.lean import find_lean_head

    model, data = two_models[kind], random_data(lengths, seed=seed, supervised=0.7)
    documents.use(model, apart=apart)
    passes = (
        Pass(examples=np.arange(len(lengths)), num_epochs=1, stretches=(Stretch(phase=0, global_batch_size=size),)),
    )
    untuned = make_batch_plan(data.lengths, passes, micro_batch_size=1, seed=seed, sort_window=False)
    tuned = make_batch_plan(
        data.lengths,
        passes,
        micro_batch_size=micro,
        num_devices=devices,
        seed=seed,
        sort_window=sort,
        packed_length=packed,
    )
    assert tuned.num_steps == untuned.num_steps
    head = find_lean_head(model, precision="fp32", chunk_bytes=4 * 97 * 5) if lean else None
    for window in {0, tuned.num_steps - 1}:  # the last one may be partial
        here = sorted(untuned.documents_of_window(window).tolist())
        assert sorted(tuned.documents_of_window(window).tolist()) == here
        if data.num_supervised[here].sum() == 0:
            continue
        reference, found = (
            window_gradient(model, data, untuned, window),
            window_gradient(model, data, tuned, window, head),
        )
        # Of the whole: where a window's documents have two tokens, some parameters' true gradient is exactly zero.
        whole = sum(float(gradient.norm()) ** 2 for gradient in reference.values()) ** 0.5
        assert max(float((found[name] - reference[name]).norm()) for name in reference) <= 1e-5 * whole


def test_a_mean_per_micro_batch_would_give_another_gradient(make_job: Any, data: TokenizedDataset) -> None:
    """The defect of transformers#34191, put in on purpose: the test above is able to see it."""
    model = moved(load_model(make_job(), need_weights=True).model)
    reference = window_gradient(model, data, plan_of(data, 8))
    stepper = make_stepper(model, "cpu", "fp32")
    plan = plan_of(data, 1)
    for micro in range(8):
        batch = collate(plan.rows_of_micro_batch(micro), data)
        micro_step(stepper, batch, scale=1 / len(batch.targets) / 8)
    naive = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert largest_difference(reference, naive) > 1e-2


def test_a_partial_last_window_is_normalised_by_what_it_holds(make_job: Any, data: TokenizedDataset) -> None:
    import torch

    model = moved(load_model(make_job(), need_weights=True).model)
    plan = plan_of(data, 2, examples=11)
    gradient = window_gradient(model, data, plan, window=1)
    rows = [np.array([example]) for example in plan.documents_of_window(1)]
    assert len(rows) == 3
    losses = torch.cat([token_losses(model, collate([row], data), reduction="none") for row in rows])
    losses.mean().backward()
    direct = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert largest_difference(direct, gradient) < 1e-5


def test_the_loss_is_the_models_own(make_job: Any, data: TokenizedDataset) -> None:
    """transformers computes the same mean loss from labels, so positions are shifted by exactly one."""
    import torch

    model = load_model(make_job(), need_weights=True).model
    for example in range(5):
        batch = collate([np.array([example])], data)
        start, end = data.offsets[example], data.offsets[example + 1]
        labels = torch.from_numpy(
            np.where(data.supervised[start:end], data.token_ids[start:end], -100).astype(np.int64)
        )
        theirs = model(input_ids=batch.input_ids, labels=labels[None]).loss
        ours = token_losses(model, batch) / len(batch.targets)
        assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_equal_each_documents_own(make_job: Any, data: TokenizedDataset, attention: str) -> None:
    import torch

    model = load_model(make_job(attention=attention), need_weights=True).model.double().eval()
    batch = collate([np.array([0, 1, 2])], data.as_planned(shares_beginnings=False))
    with torch.no_grad():
        packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
        leaked = model(input_ids=batch.input_ids, use_cache=False).logits[0]
        at = 0
        for example in range(3):
            alone = model(input_ids=collate([np.array([example])], data).input_ids, use_cache=False).logits[0]
            here = slice(at, at + len(alone))
            assert torch.allclose(packed[here], alone, atol=1e-10)
            assert example == 0 or not torch.allclose(leaked[here], alone, atol=1e-3)  # without positions they mix
            at += len(alone)


def test_padding_changes_no_token_loss(make_job: Any, data: TokenizedDataset) -> None:
    import torch

    model = load_model(make_job(), need_weights=True).model.double()
    together = token_losses(model, collate([np.array([i]) for i in range(6)], data), reduction="none")
    alone = torch.cat([token_losses(model, collate([np.array([i])], data), reduction="none") for i in range(6)])
    assert torch.allclose(together, alone, atol=1e-10)


def test_gradient_checkpointing_with_lora_gives_the_same_gradients(make_job: Any, data: TokenizedDataset) -> None:
    plain = moved(load_model(make_job(), need_weights=True).model)
    saving = moved(load_model(make_job(gradient_checkpointing=True), need_weights=True).model)
    assert any(getattr(module, "gradient_checkpointing", False) for module in saving.modules())
    plan = plan_of(data, 2)
    one, other = window_gradient(plain, data, plan), window_gradient(saving, data, plan)
    assert all(gradient.norm() > 0 for gradient in other.values())
    assert largest_difference(one, other) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_trains_is_fp32_whatever_the_base_is_stored_in(make_job: Any, precision: str) -> None:
    import torch

    model = load_model(make_job(precision=precision, base_precision="bf16"), need_weights=True).model
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in frozen}


def test_a_four_bit_model_has_the_same_gradients_after_an_evaluation(make_job: Any, data: TokenizedDataset) -> None:
    """On some CPUs bitsandbytes repacks weights in eval mode, for a kernel that has no backward pass."""
    pytest.importorskip("bitsandbytes", reason="the extra 'quant' is not installed")
    from trainer.evaluate import evaluate

    model = moved(load_model(make_job(base_precision="4bit"), need_weights=True).model)
    plan = plan_of(data, 1)
    before = window_gradient(model, data, plan)
    evaluate(model, data, np.arange(10), device="cpu", precision="fp32")
    model.eval()
    ids = collate([np.array([0])], data).input_ids[:, :8]
    model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.train()
    assert all(gradient.norm() > 0 for gradient in before.values())
    assert largest_difference(before, window_gradient(model, data, plan)) < 1e-5


@pytest.mark.parametrize("rows", [[[0], [1]], [[0, 1]]])
def test_a_target_that_is_the_padding_token_stays_a_target_and_padding_is_none(rows: list[list[int]]) -> None:
    """Where the padding token is the stop token too, leaving it out by its id would teach no answer to end."""
    data = make_data(np.array([4, 7]))
    pad = int(data.token_ids[3])
    batch = collate([np.array(row) for row in rows], data, pad_token_id=pad)
    assert batch.targets.tolist() == [*data.token_ids[1:4].tolist(), *data.token_ids[5:11].tolist()]
    assert batch.targets.tolist().count(pad) == 1


def test_an_empty_share_of_a_window_adds_nothing(make_job: Any, data: TokenizedDataset) -> None:
    model = moved(load_model(make_job(), need_weights=True).model)
    stepper = make_stepper(model, "cpu", "fp32")
    loss = micro_step(stepper, collate([], data), scale=1.0)
    assert float(loss) == 0.0
    assert all(float(p.grad.norm()) == 0.0 for p in stepper.parameters if p.grad is not None)


def test_every_gradient_is_added_up_once_whatever_its_size_and_layout(monkeypatch: Any) -> None:
    """Against a second process that is put in place of torch's collective: its gradients are all ones."""
    import torch
    import torch.distributed as dist

    from trainer import step

    theirs_used = torch.tensor([1, 1, 1, 1, 1, 0], dtype=torch.int32)
    calls: list[int] = []

    def all_reduce(tensor: Any, op: Any = dist.ReduceOp.SUM) -> None:
        if op == dist.ReduceOp.MAX:
            tensor.copy_(torch.maximum(tensor, theirs_used))
        else:
            assert tensor.is_contiguous()
            calls.append(tensor.numel())
            tensor += 1

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(step, "BUCKET_ELEMENTS", 10)
    shapes = [(2, 3), (4,), (3, 1), (5, 4), (3, 5), (7,)]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for number, parameter in enumerate(parameters[:-2]):
        parameter.grad = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape) * (number + 1)
    parameters[3].grad = parameters[3].grad.T.contiguous().T  # not contiguous
    expected = [parameter.grad + 1 for parameter in parameters[:-2]]
    step.add_up_gradients(parameters)
    for parameter, gradient in zip(parameters[:-2], expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert torch.equal(parameters[4].grad, torch.ones(3, 5))  # only the other process has used it
    assert parameters[5].grad is None  # nobody has: weight decay must not move it
    assert calls == [10, 3, 20, 15]
