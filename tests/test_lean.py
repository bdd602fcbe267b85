"""The lean loss is the plain loss, on every kind of model, or it is not used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import FAMILIES, VOCABULARY, random_data, small_model, with_lora

from planner.measurement import StepSignature
from trainer.collate import MicroBatch, collate
from trainer.evaluate import evaluate
from trainer.job import Job
from trainer.loop import train
from trainer.model import load_model
from trainer.step import autocast, make_stepper, micro_step, token_losses

KINDS = ("full", "lora", "lora on the output layer")
THREE_ROWS = 4 * VOCABULARY * 3  # bytes of logits: chunks of three positions


def a_model(family: str, kind: str) -> Any:
    model = small_model(family)
    return model if kind == "full" else with_lora(model, "all-linear" if kind == "lora" else ["lm_head"])


def a_batch(rows: list[list[int]] | None = None, seed: int = 0) -> MicroBatch:
    data = random_data([30, 17, 22, 9], seed=seed)
    return collate([np.array(row) for row in rows or [[0], [1, 3], [2]]], data)


def gradients(model: Any, *batches: MicroBatch, head: Any, precision: str = "fp32", scale: float = 0.01) -> Any:
    stepper = make_stepper(model, "cpu", precision)
    stepper.head = head
    for batch in batches:
        micro_step(stepper, batch, scale=scale)
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    if stepper.scaler is not None:
        found = {name: gradient / stepper.scaler.get_scale() for name, gradient in found.items()}
    model.zero_grad()
    return found


def difference(one: Any, other: Any) -> float:
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).norm() / one[n].norm().clamp_min(1e-12)) for n in one if one[n].norm() > 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_plain_ones_on_every_family(family: str, kind: str) -> None:
    import torch

    from trainer.lean import find_lean_head, lean_loss_agrees

    model = a_model(family, kind)
    head = find_lean_head(model, precision="fp32", chunk_bytes=THREE_ROWS)
    assert not isinstance(head, str)
    assert head.chunk_rows == 3
    batches = a_batch(), a_batch([[3], [1]], seed=1)
    plain = gradients(model, *batches, head=None)
    assert all(float(gradient.norm()) > 0 for name, gradient in plain.items() if "bias" not in name)
    assert difference(plain, gradients(model, *batches, head=head)) < 1e-10
    for reduction in ("sum", "none"):
        expected = token_losses(model, batches[0], reduction=reduction)
        found = token_losses(model, batches[0], reduction=reduction, head=head)
        assert found.dtype == expected.dtype
        assert torch.allclose(found, expected, rtol=1e-12, atol=0)
    assert lean_loss_agrees(model, head, precision="fp32", tolerance=1e-10) is None


@pytest.mark.parametrize(("family", "setting"), [("gemma2", "final_logit_softcapping"), ("cohere", "logit_scale")])
def test_a_loss_that_skipped_the_models_own_scaling_would_be_seen(family: str, setting: str) -> None:
    """The test above is sharp: without the cap or the scale the small models' losses are others."""
    model = a_model(family, "lora")
    expected = float(token_losses(model, a_batch()).detach())
    causal = model.get_base_model()
    setattr(causal.config, setting, None if "soft" in setting else 1.0)
    if hasattr(causal, "logit_scale"):
        causal.logit_scale = 1.0
    assert float(token_losses(model, a_batch()).detach()) != pytest.approx(expected, rel=0.01)


def test_losses_of_single_tokens_have_gradients_too() -> None:
    from trainer.lean import find_lean_head

    model = a_model("qwen3", "full")
    head = find_lean_head(model, precision="fp32", chunk_bytes=THREE_ROWS)
    found = []
    for cut in (None, head):
        each = token_losses(model, a_batch(), reduction="none", head=cut)
        (each**2).sum().backward()  # weighs them unequally, as a plain sum would not
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    assert difference(*found) < 1e-10


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_only_supervised_positions_reach_the_output_layer_and_never_more_than_a_chunk(kind: str) -> None:
    from trainer.lean import find_lean_head

    model = a_model("llama-tied", kind)
    head = find_lean_head(model, precision="fp32", chunk_bytes=THREE_ROWS)
    batch = a_batch()
    seen: list[int] = []
    layer = model.get_output_embeddings() if kind == "full" else model.get_base_model().get_output_embeddings()
    handle = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[:-1].numel()))
    token_losses(model, batch, head=head).backward()
    handle.remove()
    assert max(seen) == 3
    assert sum(seen) == len(batch.targets) < batch.input_ids.numel()


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 3e-2), ("fp16", 4e-3)])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_half_precision_agrees_although_each_tokens_share_of_the_window_is_tiny(
    precision: str, tolerance: float, kind: str
) -> None:
    from trainer.lean import find_lean_head, lean_loss_agrees

    model = a_model("qwen3", kind).float()
    head = find_lean_head(model, precision=precision, chunk_bytes=THREE_ROWS)
    assert lean_loss_agrees(model, head, precision=precision) is None
    plain = gradients(model, a_batch(), head=None, precision=precision, scale=1e-6)
    assert difference(plain, gradients(model, a_batch(), head=head, precision=precision, scale=1e-6)) < tolerance


def test_fp16_gradients_of_well_known_tokens_do_not_vanish_before_the_loss_scale_reaches_them() -> None:
    """They are below what fp16 holds: the loss scale must be in them before they are rounded, as in the plain path."""
    import dataclasses

    import torch

    from trainer.lean import find_lean_head

    model = a_model("llama", "lora").float()
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(12.0)
        batch = a_batch()
        logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.predicts]
        best = logits.topk(2).values
        sure = (best[:, 0] - best[:, 1] - 18).abs() < 3  # the others' probabilities are below 1e-6
    assert int(sure.sum()) > 2
    batch = dataclasses.replace(batch, predicts=batch.predicts[sure], targets=logits.argmax(-1)[sure])
    head = find_lean_head(model, precision="fp16", chunk_bytes=THREE_ROWS)
    plain = gradients(model, batch, head=None, precision="fp16", scale=0.1)
    found = gradients(model, batch, head=head, precision="fp16", scale=0.1)
    whole = sum(float(gradient.norm()) ** 2 for gradient in plain.values()) ** 0.5
    assert whole > 0
    assert sum(float((found[n] - plain[n]).norm()) ** 2 for n in plain) ** 0.5 < 0.02 * whole


def test_a_window_in_which_this_process_has_no_target_adds_nothing() -> None:
    from trainer.lean import find_lean_head

    model = a_model("llama", "full")
    head = find_lean_head(model, precision="fp32")
    found = gradients(model, collate([], random_data([5])), head=head)
    assert found.keys() == gradients(model, collate([], random_data([5])), head=None).keys()
    assert all(float(gradient.norm()) == 0 for gradient in found.values())


def test_gradient_checkpointing_agrees(make_job: Any) -> None:
    from trainer.lean import lean_head

    model = load_model(make_job(gradient_checkpointing=True), need_weights=True).model
    head = lean_head(model, precision="fp32")
    assert not isinstance(head, str)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert difference(gradients(model, a_batch(), head=None), gradients(model, a_batch(), head=head)) < 1e-5


@pytest.mark.parametrize("base_precision", ["4bit", "8bit"])
def test_a_quantized_base_agrees(make_job: Any, base_precision: str) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra 'quant' is not installed")
    model = load_model(make_job(base_precision=base_precision), need_weights=True).model
    stepper = make_stepper(model, "cpu", "fp32", loss="lean")
    assert stepper.lean_refused is None
    assert difference(gradients(model, a_batch(), head=None), gradients(model, a_batch(), head=stepper.head)) < 1e-4


@pytest.mark.parametrize("kind", ["full", "lora on the output layer"])
def test_data_parallel_wrapping_gets_one_gradient_a_parameter(tmp_path: Path, kind: str) -> None:
    """Its reducer refuses a parameter that is marked ready twice, as one backward pass a chunk would do.

    In a process of its own that leaves without destructors: the reducer's joins a thread of gloo's while it holds
    Python's lock, and once in a while that thread waits for the same lock (seen with torch 2.13).
    """
    call = f"test_lean.check_data_parallel_wrapping({str(tmp_path / 'store')!r}, {kind!r})"
    folder = str(Path(__file__).parent)
    script = f"import os, sys; sys.path.insert(0, {folder!r}); import test_lean; {call}; os._exit(0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def check_data_parallel_wrapping(store: str, kind: str) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from trainer.lean import lean_head

    model = a_model("qwen3", kind)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    plain = gradients(model, a_batch(), head=None)
    wrapped = DistributedDataParallel(model)
    head = lean_head(wrapped, precision="fp32")
    assert not isinstance(head, str)
    for _ in range(2):
        found = gradients(wrapped, a_batch(), head=head)
        assert difference(plain, {name.removeprefix("module."): g for name, g in found.items()}) < 1e-10


# --- where it would be wrong, it is not used --------------------------------------------------------------------------


def mixing_model() -> Any:
    """A model whose logits at one position depend on those at the others: it cannot be cut."""
    import transformers

    class Mixing(transformers.LlamaForCausalLM):
        def forward(self, *arguments: Any, **named: Any) -> Any:
            output = super().forward(*arguments, **named)
            output.logits = output.logits - 0.5 * output.logits.mean(dim=1, keepdim=True)
            return output

    model = small_model("llama")
    model.__class__ = Mixing
    return model


def test_a_model_that_cannot_be_cut_keeps_the_plain_loss_and_says_why() -> None:
    model = mixing_model()
    stepper = make_stepper(model, "cpu", "fp32", loss="lean")
    assert stepper.head is None
    assert "differs from the plain one's" in str(stepper.lean_refused)
    assert make_stepper(small_model("llama"), "cpu", "fp32", loss="lean").lean_refused is None
    assert make_stepper(small_model("llama"), "cpu", "fp32").head is None


def test_a_model_whose_backbone_is_not_called_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.lean import find_lean_head

    model = small_model("llama")
    monkeypatch.setattr(type(model), "base_model", property(lambda self: self), raising=False)
    monkeypatch.setattr(type(model), "get_decoder", lambda self: self)
    assert find_lean_head(model, precision="fp32") == "its backbone is not called as a module of its own"


def test_the_check_sees_a_tied_weight_whose_gradient_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import lean

    monkeypatch.setattr(lean, "_leaves", lambda _tensor: ())
    assert "gradient differs" in str(lean.lean_head(a_model("llama-tied", "full"), precision="fp32"))
    assert "gradient differs" in str(
        lean.lean_head(with_lora(small_model("llama"), ["q_proj", "lm_head"]), precision="fp32")
    )


def test_the_check_sees_a_chunk_that_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import lean

    chunks = lean.LeanHead.chunks
    monkeypatch.setattr(lean.LeanHead, "chunks", lambda self, count: chunks(self, count)[:-1])
    assert "loss differs" in str(lean.lean_head(a_model("llama", "lora"), precision="fp32"))


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.lean import find_lean_head

    model = a_model("llama", "lora")
    before = gradients(model, a_batch(), head=None)
    head = find_lean_head(model, precision="fp32", chunk_bytes=THREE_ROWS)
    assert not isinstance(head, str)

    def fails(*_arguments: Any, **_named: Any) -> Any:
        raise RuntimeError("out of memory")

    for module, hook in ((head.backbone, "register_forward_pre_hook"), (head.causal.lm_head, "register_forward_hook")):
        handle = getattr(module, hook)(fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            token_losses(model, a_batch(), head=head)
        handle.remove()
    assert difference(before, gradients(model, a_batch(), head=None)) == 0
    assert "forward" not in vars(head.backbone)


def test_the_check_leaves_weights_gradients_mode_and_random_state_alone() -> None:
    import torch

    from trainer.lean import lean_head

    model = a_model("llama", "lora")
    weights = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    assert not isinstance(lean_head(model, precision="fp32"), str)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(state, torch.random.get_rng_state())


# --- as a setting -----------------------------------------------------------------------------------------------------


def test_a_job_written_before_the_setting_existed_reads_as_plain(make_job: Any) -> None:
    old = json.loads(make_job().to_json())
    del old["loss"]
    assert Job.from_json(json.dumps(old)).loss == "plain"
    lean = make_job(loss="lean")
    assert Job.from_json(lean.to_json()) == lean
    assert StepSignature.of(lean) != StepSignature.of(make_job())


def test_a_run_learns_the_same_with_either_loss_and_says_so_where_lean_is_refused(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import lean

    plain = train(make_run("plain", num_epochs=1))
    used: list[int] = []
    real = lean.lean_losses
    monkeypatch.setattr(lean, "lean_losses", lambda *a, **k: used.append(1) or real(*a, **k))
    slim = train(make_run("lean", num_epochs=1, loss="lean"))
    assert plain is not None
    assert slim is not None
    assert len(used) > slim.actual.num_steps  # training and evaluation
    assert slim.actual.train_loss == pytest.approx(plain.actual.train_loss, rel=1e-4)
    assert slim.actual.eval_loss_after == pytest.approx(plain.actual.eval_loss_after, rel=1e-4)
    assert not any("lean" in note for note in slim.notes)
    monkeypatch.setattr(lean, "lean_loss_agrees", lambda *_a, **_k: "it is a test")
    refused = train(make_run("refused", num_epochs=1, loss="lean"))
    assert refused is not None
    assert "the plain loss is used instead of the lean one: it is a test" in refused.notes
    assert refused.actual.train_loss == plain.actual.train_loss


def test_evaluation_takes_the_lean_loss_where_training_does() -> None:
    from trainer.lean import find_lean_head

    model = a_model("gemma2", "lora")
    data = random_data([30, 17, 22, 9])
    head = find_lean_head(model, precision="fp32", chunk_bytes=THREE_ROWS)
    with autocast("cpu", "fp32"):
        found = [
            evaluate(model, data, np.arange(4), device="cpu", precision="fp32", head=cut)
            for cut in (None, head)  # type: ignore[arg-type]
        ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[1].loss == pytest.approx(found[0].loss, rel=1e-12)
