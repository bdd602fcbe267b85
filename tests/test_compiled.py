"""torch.compile: the same loss and gradients, and where it cannot be, the layers stay as they were and it is said."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from presets.errors import ModelError
from trainer import compiled
from trainer.collate import collate
from trainer.compiled import compile_layers, probe_rows, require_compiler
from trainer.data import prepare_data
from trainer.job import DataSpec
from trainer.model import load_model
from trainer.step import Stepper, make_stepper, micro_step
from trainer.tokens import TokenizedDataset

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler (g++)")


@pytest.fixture
def data(tiny_model: Path, chat_file: Path) -> TokenizedDataset:
    return prepare_data(DataSpec(source=str(chat_file)), model=str(tiny_model), max_length=128)


def stepper_of(job: Any) -> Stepper:
    import torch

    model = load_model(job, need_weights=True).model
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return make_stepper(model, "cpu", job.precision, loss=job.loss)


def gradients(stepper: Stepper, batch: Any) -> tuple[float, dict[str, Any]]:
    loss = float(micro_step(stepper, batch, scale=0.01))
    found = {name: p.grad.clone() for name, p in stepper.model.named_parameters() if p.grad is not None}
    stepper.model.zero_grad()
    return loss, found


@pytest.fixture
def one_layer(tiny_model: Path, tmp_path: Path) -> str:
    """The tiny model with a single layer: each takes the compiler as long as the first."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "one-layer"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model, num_hidden_layers=1)).save_pretrained(folder)
    return str(folder)


@needs_compiler
@pytest.mark.slow
def test_compiled_layers_give_the_same_loss_and_gradients_at_every_shape_and_leave_the_rest_alone(
    make_job: Any, data: TokenizedDataset, one_layer: str
) -> None:
    import torch
    from torch._dynamo.utils import counters

    job = make_job(model=one_layer, compile=True, loss="lean", micro=2)
    plain, fast = stepper_of(replace(job, loss="plain")), stepper_of(job)
    assert fast.head is not None
    before = torch.get_rng_state()
    counters.clear()
    assert compile_layers(fast, job, data) is None
    assert counters["stats"]["unique_graphs"] > 0  # something was compiled
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in fast.parameters)
    assert list(fast.model.state_dict()) == list(plain.model.state_dict())
    graphs = counters["stats"]["unique_graphs"]
    packed = [[np.array([0, 1]), np.array([2, 3, 4])]]
    for rows in ([[np.array([at]), np.array([at + 1])] for at in range(0, 12, 2)], packed):
        for each in rows:
            batch = collate(each, data)
            expected, found = gradients(plain, batch), gradients(fast, batch)
            assert found[0] == pytest.approx(expected[0], rel=1e-5)
            for name, gradient in expected[1].items():
                assert float((found[1][name] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-8, name
        if rows is not packed:
            assert counters["stats"]["unique_graphs"] == graphs  # other widths compile nothing more
    fast.model.eval()
    with torch.no_grad():  # evaluation goes the old way
        fast.model(input_ids=collate([np.array([7])], data).input_ids, use_cache=False)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_counts_its_compile_time_apart(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from trainer.loop import train

    # Traced, and not translated to C++: that takes a minute, and what the run does with the layers is the same.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))

    record = train(make_run(compile=True, micro=2))
    assert record is not None
    assert record.status == "finished"
    assert record.actual.breakdown is not None
    assert record.actual.breakdown.compile > 0
    assert not any("not compiled" in note for note in record.notes)


def test_layers_that_differ_or_fail_when_compiled_stay_as_they_were(
    make_job: Any, data: TokenizedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(compiled, "require_compiler", lambda job: None)
    job = make_job(compile=True)
    plain, fast = stepper_of(job), stepper_of(job)
    batch = collate([np.array([0])], data)

    def broken(forward: Any, **settings: Any) -> Any:
        return lambda *positional, **named: forward(*positional, **named) * 1.01

    def failing(forward: Any, **settings: Any) -> Any:
        raise RuntimeError("no such kernel\nand more")

    for wrong, words in ((broken, "differs from the uncompiled"), (failing, "no such kernel")):
        monkeypatch.setattr(torch, "compile", wrong)
        refused = compile_layers(fast, job, data)
        assert refused is not None
        assert words in refused
        assert "\n" not in refused
        expected, found = gradients(plain, batch), gradients(fast, batch)
        assert found[0] == expected[0]
        assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())


def test_without_a_compiler_one_line_says_what_to_do(make_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ModelError, match=r"--compile needs a C\+\+ compiler, and g\+\+ was not found\. Install") as one:
        require_compiler(make_job(compile=True))
    assert "\n" not in str(one.value)
    monkeypatch.setenv("CXX", "mycc")
    with pytest.raises(ModelError, match="CXX=mycc was not found"):
        require_compiler(make_job(compile=True))


def test_the_shapes_compiled_for_are_those_of_the_jobs_own_micro_batches(make_job: Any, data: TokenizedDataset) -> None:
    long, middle, short = probe_rows(make_job(compile=True, micro=4), data)
    assert [len(rows) for rows in (long, middle, short)] == [4, 4, 4]
    widths = [max(int(data.lengths[row].sum()) for row in rows) for rows in (long, middle, short)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == data.lengths.max()
    packed = probe_rows(replace(make_job(compile=True), packing=True), data)
    assert all(len(row) == 2 for rows in packed for row in rows)
