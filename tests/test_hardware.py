"""What a device can do, and what a job then computes in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from planner import hardware
from planner.hardware import DeviceFacts, detect_device, resolve_base_precision, resolve_precision
from presets.errors import SettingsError
from presets.schema import load_preset
from trainer.nvml import visible_devices

CPU = DeviceFacts(name="cpu", kind="cpu", memory_bytes=1, free_bytes=1)
CPU_BF16 = replace(CPU, supports_bf16=True)
MPS = DeviceFacts(name="Apple", kind="mps", memory_bytes=1, free_bytes=1)
TURING = DeviceFacts(name="T4", kind="cuda", memory_bytes=1, free_bytes=1, capability=(7, 5), supports_fp16=True)
AMPERE = replace(TURING, name="A100", capability=(8, 0), supports_bf16=True, supports_tf32=True)


@pytest.mark.parametrize(
    ("requested", "facts", "effective", "note"),
    [
        ("fp32", CPU, "fp32", None),
        ("fp16", CPU, "fp32", "fp16 is not available on this CPU: measured and run in fp32"),
        ("bf16", CPU, "fp32", "bf16 is not available on this CPU: measured and run in fp32"),
        ("bf16", CPU_BF16, "bf16", None),
        ("tf32", CPU, "fp32", "tf32 is not available on this CPU: measured and run in fp32"),
        ("fp16", MPS, "fp32", "fp16 is not available on this Apple GPU: measured and run in fp32"),
        ("fp16", TURING, "fp16", None),
        ("bf16", TURING, "fp16", "bf16 needs compute capability 8.0, this GPU has 7.5: measured and run in fp16"),
        ("tf32", TURING, "fp32", "tf32 needs compute capability 8.0, this GPU has 7.5: measured and run in fp32"),
        ("bf16", AMPERE, "bf16", None),
        ("tf32", AMPERE, "tf32", None),
    ],
)
def test_a_precision_that_the_device_lacks_is_replaced_and_said(requested, facts, effective, note) -> None:  # type: ignore[no-untyped-def]
    assert resolve_precision(requested, facts) == (effective, note)


@pytest.mark.parametrize(
    ("adapter", "base", "effective", "resolved"),
    [
        ("lora", "auto", "fp16", "fp16"),
        ("lora", "auto", "bf16", "bf16"),
        ("lora", "auto", "fp32", "fp32"),
        ("lora", "auto", "tf32", "fp32"),
        ("lora", "4bit", "fp32", "4bit"),
        ("lora", "fp32", "fp16", "fp32"),
        ("lora", "fp16", "fp32", "fp32"),
        ("full", "auto", "fp16", "fp32"),
        ("full", "bf16", "bf16", "fp32"),
    ],
)
def test_frozen_weights_are_stored_in_what_is_computed_and_trained_ones_in_fp32(  # type: ignore[no-untyped-def]
    adapter, base, effective, resolved
) -> None:
    preset = replace(load_preset("baseline"), adapter=adapter, base_precision=base)
    assert resolve_base_precision(preset, effective) == resolved


def test_cpu_facts_are_found_without_torch() -> None:
    facts = detect_device("cpu")
    assert facts.kind == "cpu"
    assert facts.name
    assert facts.memory_bytes is not None
    assert facts.free_bytes is not None
    assert 0 < facts.free_bytes <= facts.memory_bytes
    assert not facts.supports_fp16


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(SettingsError, match="'tpu'; it must be one of"):
        detect_device("tpu")


def test_a_missing_gpu_is_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_cuda_by_nvml", lambda: None)
    monkeypatch.setattr(hardware, "torch_cuda_version", lambda: None)
    with pytest.raises(SettingsError, match="not built for CUDA"):
        detect_device("cuda")


@pytest.mark.parametrize(
    ("setting", "visible"),
    [(None, [0, 1, 2]), ("", []), ("2,0", [2, 0]), ("-1", []), ("1,9,0", [1]), ("GPU-ab, 1", ["GPU-ab", 1])],
)
def test_cuda_visible_devices_is_read_as_cuda_does(setting: str | None, visible: list[int | str]) -> None:
    assert visible_devices(setting, 3) == visible


def test_a_container_s_memory_limit_counts_without_its_page_cache(tmp_path: Path) -> None:
    for name, text in (
        ("memory.max", "1000\n"),
        ("memory.current", "600\n"),
        ("memory.stat", "x 1\ninactive_file 100\n"),
    ):
        (tmp_path / name).write_text(text)
    assert hardware._cgroup_memory(tmp_path) == (1000, 500)
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware._cgroup_memory(tmp_path) == (None, 0)
