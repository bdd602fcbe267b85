"""What a device can do, and what a job then computes in."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from planner import hardware
from planner.hardware import DeviceFacts, detect_device, resolve_base_precision, resolve_precision
from presets.errors import SettingsError
from presets.schema import load_preset
from trainer import nvml
from trainer.nvml import VisibleGpu, visible_devices

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


class FakeNvml:
    """A machine with these cards, by slot."""

    class NVMLError(Exception):
        pass

    def __init__(self, *names: str) -> None:
        self.names, self.asked = names, ""

    def __getattr__(self, name: str) -> Any:
        found = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: len(self.names),
            "nvmlDeviceGetHandleByIndex": lambda number: self.names[number],
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            "nvmlDeviceGetName": lambda handle: handle,
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=2, free=1, used=1),
            "nvmlDeviceGetCudaComputeCapability": lambda handle: (8, 0),
            "nvmlSystemGetDriverVersion": lambda: "1",
        }
        return found[name]


@pytest.mark.parametrize(
    ("cards", "order", "visible", "is_known"),
    [
        (("GT 710", "RTX 4090"), None, None, False),  # CUDA's first is the 4090, NVML's the card in the first slot
        (("GT 710", "RTX 4090"), "FASTEST_FIRST", "0,1", False),
        (("GT 710", "RTX 4090"), "PCI_BUS_ID", None, True),
        (("GT 710", "RTX 4090"), None, "GPU-ab", True),
        (("H100", "H100"), None, None, True),
        (("RTX 2080 Ti",), None, None, True),
    ],
)
def test_a_card_is_not_taken_for_another_where_nvml_and_cuda_count_differently(
    monkeypatch: pytest.MonkeyPatch, cards: tuple[str, ...], order: str | None, visible: str | None, is_known: bool
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(*cards))
    monkeypatch.setattr(hardware, "torch_cuda_version", lambda: "12.8")
    of_torch = hardware.DeviceFacts(name="as torch says", kind="cuda", memory_bytes=2, free_bytes=1)
    monkeypatch.setattr(hardware, "_cuda_by_torch", lambda driver=None: of_torch)
    for name, value in (("CUDA_DEVICE_ORDER", order), ("CUDA_VISIBLE_DEVICES", visible)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    first = visible if visible == "GPU-ab" else cards[0]
    monkeypatch.setattr(nvml.ctypes, "CDLL", Driver)  # the driver says which is CUDA's first
    uuid = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert detect_device("cuda").name == (first if is_known else uuid)
    assert VisibleGpu().ask("nvmlDeviceGetName") == (first if is_known else uuid)
    monkeypatch.setattr(Driver, "works", False)
    assert detect_device("cuda").name == (first if is_known else "as torch says")
    assert VisibleGpu().ask("nvmlDeviceGetName") == (first if is_known else None)


class Driver:
    """CUDA's, as ctypes loads it."""

    works = True

    def __init__(self, name: str) -> None:
        if not self.works:
            raise OSError(name)

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = 7
        return 0

    def cuDeviceGetUuid(self, uuid: Any, device: Any) -> int:
        assert device.value == 7
        uuid._obj[:] = range(16)
        return 0


def test_a_card_that_does_not_answer_leaves_the_others_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class OneIsLost(FakeNvml):
        def __getattr__(self, name: str) -> Any:
            def by_number(number: int) -> str:
                if number == 1:
                    raise FakeNvml.NVMLError
                return self.names[number]

            return by_number if name == "nvmlDeviceGetHandleByIndex" else super().__getattr__(name)

    monkeypatch.setitem(sys.modules, "pynvml", OneIsLost("H100", "of others"))
    monkeypatch.setattr(hardware, "torch_cuda_version", lambda: "12.8")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert detect_device("cuda").name == "H100"
    assert VisibleGpu().ask("nvmlDeviceGetName") == "H100"


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
