"""Packing is offered only where packed documents do not see each other, on the model at hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import FAMILIES, grouped, random_data, small_model, with_lora

from trainer import documents
from trainer.agreement import packing_agrees, settle_packing
from trainer.arrangement import MULTIPLE, arrange
from trainer.collate import MicroBatch, collate
from trainer.data import prepare_data
from trainer.job import DataSpec
from trainer.model import load_model
from trainer.step import clear_gradients, make_stepper, micro_step

# Longer than the sliding windows of 8 tokens, shorter ones among them.
DATA = random_data([40, 3, 25, 12, 2, 31])
FP32: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_packing_agrees_on_families_that_keep_documents_apart(family: str, attention: str) -> None:
    model = with_lora(small_model(family, attention=attention)).float()
    assert packing_agrees(model, DATA, **FP32) is None
    assert model.training


def test_a_family_that_builds_its_mask_without_the_positions_is_refused() -> None:
    assert "packed logits differ" in str(packing_agrees(small_model("opt").float(), DATA, **FP32))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rounding_of_half_precision_is_not_taken_for_a_leak(precision: str) -> None:
    assert packing_agrees(small_model("qwen3").float(), DATA, device="cpu", precision=precision) is None


def leaking(family: str = "llama") -> Any:
    """A model that takes positions but draws no border between documents, as one without a packed mask would."""
    import torch

    model = small_model(family).float()
    real = type(model.model).forward

    def forward(self: Any, **named: Any) -> Any:
        rows, width = named["input_ids"].shape
        # An explicit mask switches the detection of packed documents off: plain causal attention over the whole row.
        named["attention_mask"] = torch.ones((rows, 1, width, width), dtype=torch.bool).tril()
        return real(self, **named)

    model.model.forward = forward.__get__(model.model)
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_leaks_is_refused(precision: str) -> None:
    assert "packed logits differ" in str(packing_agrees(leaking(), DATA, device="cpu", precision=precision))


def test_a_leak_into_a_later_short_document_alone_is_seen() -> None:
    """Only the first token after a border sees one token too many: the worst position counts, not the average."""
    data = random_data([200, 60])
    model = small_model("llama").float()
    assert packing_agrees(model, data, **FP32) is None
    real = model.forward

    def forward(**named: Any) -> Any:
        output = real(**named)
        positions = named.get("position_ids")
        if positions is not None:
            at = int((positions[0, 1:] == 0).nonzero()[0, 0]) + 1
            output.logits[0, at] = output.logits[0, at - 1]
        return output

    model.forward = forward
    assert "packed logits differ" in str(packing_agrees(model, data, **FP32))


def test_a_model_that_carries_a_state_over_the_border_is_refused() -> None:
    """Linear attention and convolutions run along the row, whatever the positions say."""
    model = small_model("llama").float()
    model.model.layers[0].register_forward_hook(lambda _m, _i, output: output.cumsum(dim=1) * 0.1 + output)
    assert "packed logits differ" in str(packing_agrees(model, DATA, **FP32))


def test_a_leak_too_small_for_the_tolerance_is_still_no_agreement() -> None:
    import torch

    model = leaking()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-6)
    assert "could not be told from rounding" in str(packing_agrees(model, DATA, **FP32))


def test_a_model_that_takes_no_positions_is_refused() -> None:
    model = small_model("llama").float()
    real = model.forward

    def forward(input_ids: Any, use_cache: bool) -> Any:
        return real(input_ids=input_ids, use_cache=use_cache)

    model.forward = forward
    assert "packed rows fail on this model (TypeError" in str(packing_agrees(model, DATA, **FP32))


def test_the_row_length_is_kept_and_examples_that_fit_no_row_together_are_a_reason() -> None:
    model = small_model("llama").float()
    widths: list[int] = []
    model.model.register_forward_hook(lambda _m, _i, output: widths.append(output[0].shape[1]))
    assert packing_agrees(model, DATA, packed_length=32, **FP32) is None
    assert 20 < max(widths) <= 32
    assert packing_agrees(model, random_data([30, 30]), packed_length=32, **FP32) == "no two examples fit into one row"


def test_real_data_on_the_tiny_model_also_quantized(make_job: Any, tiny_model: Any, chat_file: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra 'quant' is not installed")
    data = prepare_data(DataSpec(source=str(chat_file)), model=str(tiny_model), max_length=128)
    for base in ("fp32", "4bit", "8bit"):
        job = make_job(base_precision=base)
        model = load_model(job, need_weights=True).model
        found = packing_agrees(model, data, base_precision=base, examples=np.arange(40), **FP32)
        assert found is None, base


DOCUMENT_WISE = [family for family in FAMILIES if family != "gemma2"]  # whose capped scores SDPA cannot do


@pytest.fixture(params=["one by one", "in groups"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How documents are attended to: as on a CPU, or as on a GPU."""
    if request.param == "in groups":
        monkeypatch.setattr(MicroBatch, "to", grouped)
    return str(request.param)


@pytest.mark.parametrize("family", DOCUMENT_WISE)
def test_attention_document_by_document_gives_the_separate_logits(family: str, way: str) -> None:
    """Also in a family (opt) whose mask over the row does not keep documents apart, and with sliding windows."""
    model = with_lora(small_model(family)).float()
    documents.use(model, apart=True)
    assert packing_agrees(model, DATA, **FP32) is None


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])  # grouped heads, sliding windows, both in turns
def test_groups_of_documents_have_the_gradient_of_one_document_at_a_time(family: str) -> None:
    """Several rows, padding at their ends, documents of a token and more than one group."""
    model = with_lora(small_model(family)).float()
    documents.use(model, apart=True)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():  # LoRA's B, whose zeros would hide most of the gradient
            torch.nn.init.normal_(parameter, std=0.1)
    stepper = make_stepper(model, "cpu", "fp32")
    data = random_data([40, 3, 25, 12, 1, 31, 9, 17])
    batch = collate([np.array([0, 1, 2]), np.array([3, 4, 5, 6]), np.array([7])], data)
    losses = [float(micro_step(stepper, batch, scale=0.01))]
    alone = [parameter.grad.clone() for parameter in stepper.parameters]
    clear_gradients(stepper.parameters)
    losses.append(float(micro_step(stepper, grouped(batch), scale=0.01)))
    beside = [parameter.grad.clone() for parameter in stepper.parameters]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(alone, beside, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(one.norm())
    assert min(float(one.norm()) for one in alone) > 0


@given(st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=8), min_size=1, max_size=4))
def test_every_position_has_one_place_and_groups_are_not_much_longer_than_their_documents(
    rows: list[list[int]],
) -> None:
    width = max(sum(row) for row in rows)
    spans = []
    for number, row in enumerate(rows):
        ends = np.cumsum([*row, width - sum(row)])
        spans += [
            (number, int(end - size), int(end), 0, 0) for end, size in zip(ends, (*row, width - sum(row)), strict=True)
        ]
    filled = tuple(span for span in spans if span[2] > span[1])
    found = arrange(filled, width)
    places, back = found.places.numpy(), found.back.numpy()
    assert (places[back] == np.arange(width * len(rows))).all()
    assert len(places) == sum(found.sizes)
    at = 0
    whole = {tuple(range(row * width + start, row * width + end)) for row, start, end, *_ in filled}
    for count, wide in found.groups:
        for line in places[at : at + count * wide].reshape(count, wide).tolist():
            document = tuple(dict.fromkeys(line))  # padding repeats the last position
            assert document in whole
            whole.remove(document)
            assert wide <= 2 * len(document) + MULTIPLE
        at += count * wide
    assert not whole


def test_a_sliding_window_forgotten_would_be_seen(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    model = small_model("mistral").float()
    documents.use(model, apart=True)
    monkeypatch.setattr(documents, "band", lambda *_: None)
    assert "packed logits differ" in str(packing_agrees(model, DATA, **FP32))


def test_documents_that_lie_one_token_off_would_be_seen() -> None:
    model = small_model("llama").float()
    documents.use(model, apart=True)
    real = model.forward

    def forward(**named: Any) -> Any:
        found = named.get("documents")
        if found is not None:
            first, second, *rest = found
            end = first[2] + 1
            named["documents"] = ((*first[:2], end, 0, 0), (second[0], end, *second[2:]), *rest)
        return real(**named)

    model.forward = forward
    assert "packed logits differ" in str(packing_agrees(model, DATA, **FP32))


def test_packing_is_settled_document_by_document_where_that_agrees(make_job: Any) -> None:
    job = make_job(packing=True, packed_length=64)
    model = small_model("llama").float()
    assert settle_packing(model, DATA, job) is None
    assert documents.are_used(model)


def test_packing_is_settled_with_the_mask_where_documents_alone_give_other_logits(
    make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model("mistral").float()
    monkeypatch.setattr(documents, "band", lambda *_: None)  # as in a model with a pattern that is not known
    assert settle_packing(model, DATA, make_job(packing=True, packed_length=64)) is None
    assert not documents.are_used(model)


def test_eager_attention_and_its_caps_are_left_alone(make_job: Any) -> None:
    model = small_model("gemma2").float()
    assert settle_packing(model, DATA, make_job(packing=True, packed_length=64, attention="eager")) is None
    assert model.config._attn_implementation == "eager"


def test_a_model_for_which_packing_is_wrong_is_not_trained_packed(make_job: Any) -> None:
    """A state carried along the row crosses the border either way."""
    model = small_model("llama").float()
    model.model.layers[0].register_forward_hook(lambda _m, _i, output: output.cumsum(dim=1) * 0.1 + output)
    assert "packed logits differ" in str(settle_packing(model, DATA, make_job(packing=True, packed_length=64)))
    assert not documents.are_used(model)


def test_documents_change_nothing_for_rows_that_hold_one() -> None:
    import torch

    model = small_model("mistral").float()
    ids = torch.arange(1, 33)[None]
    before = model(input_ids=ids, use_cache=False).logits
    documents.use(model, apart=True)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    assert torch.equal(
        model.generate(ids, max_new_tokens=3, do_sample=False),
        small_model("mistral").float().generate(ids, max_new_tokens=3, do_sample=False),
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_logits_of_a_whole_row_are_never_held(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 150,000 words those of a row of 4,096 tokens take 2.5 GB, and the check needs them three ways."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                self.numel = max(self.numel, found.numel())
            return found

    vocabulary, tokens = 50_000, 160
    model = small_model(family).float()
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    data = random_data([tokens // 4] * 4)
    chunk = 4 * vocabulary * 8  # eight positions at a time
    monkeypatch.setattr("trainer.lean.CHUNK_BYTES", {"cpu": chunk, "cuda": chunk})
    with Largest() as seen:
        assert packing_agrees(model, data, **FP32) is None
    assert 8 * vocabulary <= seen.numel < tokens * vocabulary / 4  # the weights are the largest


def test_a_model_without_an_output_layer_to_cut_off_is_compared_by_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("trainer.lean.find_lean_head", lambda *_, **__: asked.append(1) or "it has none")
    assert packing_agrees(small_model("llama").float(), DATA, **FP32) is None
    assert "packed logits differ" in str(packing_agrees(leaking(), DATA, **FP32))
    assert len(asked) == 2


def test_logits_that_are_no_numbers_are_no_agreement() -> None:
    model = small_model("llama").float()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    assert "packed logits differ" in str(packing_agrees(model, DATA, **FP32))
