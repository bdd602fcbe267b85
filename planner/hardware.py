"""Device facts and what follows from them: never a guess. NVML, /proc and psutil; torch only where asked."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from presets.errors import SettingsError
from presets.schema import BasePrecision, Precision, Preset
from trainer.job import Device
from trainer.nvml import first_gpu, visible_devices

AMPERE = (8, 0)  # the first compute capability with bf16 and TF32 units; below it torch only emulates bf16


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFacts:
    """One kind of device, as found now. None is "unknown"."""

    name: str
    kind: Device
    memory_bytes: int | None  # total
    free_bytes: int | None  # now
    capability: tuple[int, int] | None = None  # CUDA compute capability
    num_devices: int = 1
    driver: str | None = None
    torch_version: str | None = None
    supports_fp16: bool = False  # fast enough, and with a loss scaler, to train in
    supports_bf16: bool = False
    supports_tf32: bool = False


def detect_device(prefer: str | None = None, *, use_torch: bool = False) -> DeviceFacts:
    """Facts about the device that a job will use: a GPU where torch can use one, else the CPU.

    Args:
        prefer: "cuda", "mps" or "cpu"; None chooses.
        use_torch: ask torch instead of NVML, which costs a second but also sees ROCm devices.

    Raises:
        SettingsError: the preferred device is not there.
    """
    if prefer not in (None, "cuda", "mps", "cpu"):
        raise SettingsError(f"device is '{prefer}'; it must be one of 'cuda', 'mps', 'cpu'.")
    if prefer in (None, "cuda"):
        found = _cuda_by_torch() if use_torch else _cuda_by_nvml()
        if found is not None:
            return found
        if prefer == "cuda":
            raise SettingsError(f"device is 'cuda', but {_why_no_cuda()}. Choose --device cpu, or mend that.")
    if prefer in (None, "mps"):
        if platform.system() == "Darwin" and platform.machine() == "arm64" and torch_version() is not None:
            return _mps()
        if prefer == "mps":
            raise SettingsError("device is 'mps', but this is no Apple-silicon machine. Choose --device cpu.")
    return _cpu()


def resolve_precision(requested: Precision, facts: DeviceFacts) -> tuple[Precision, str | None]:
    """The precision in which a job really computes on a device, and a note where it is not the requested one."""
    effective: Precision = requested
    why = ""
    if requested == "fp16" and not facts.supports_fp16:
        effective, why = "fp32", f"fp16 is not available on this {_kind(facts)}"
    elif requested == "bf16" and not facts.supports_bf16:
        if facts.kind == "cuda" and facts.supports_fp16:
            effective, why = "fp16", f"bf16 needs compute capability 8.0, this GPU has {_capability(facts)}"
        else:
            effective, why = "fp32", f"bf16 is not available on this {_kind(facts)}"
    elif requested == "tf32" and not facts.supports_tf32:
        effective = "fp32"
        if facts.kind == "cuda":
            why = f"tf32 needs compute capability 8.0, this GPU has {_capability(facts)}"
        else:
            why = f"tf32 is not available on this {_kind(facts)}"
    if effective == requested:
        return requested, None
    return effective, f"{why}: measured and run in {effective}"


def resolve_base_precision(preset: Preset, effective: Precision) -> BasePrecision:
    """The precision in which frozen weights are stored; never "auto".

    Weights that train are always fp32. Half-precision weights without half-precision computation would compute in half
    precision all the same (nothing casts them up), so they too become fp32.
    """
    if preset.adapter == "full":
        return "fp32"
    if preset.base_precision in ("4bit", "8bit", "fp32"):
        return preset.base_precision
    if effective not in ("fp16", "bf16"):
        return "fp32"
    return effective if preset.base_precision == "auto" else preset.base_precision


def torch_version() -> str | None:
    """torch's version without importing it; None where it is not installed."""
    import importlib.metadata  # 40 ms, of which the published table needs none

    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def free_bytes(facts: DeviceFacts) -> int | None:
    """Memory that is free on the device now."""
    return detect_device(facts.kind).free_bytes


def _kind(facts: DeviceFacts) -> str:
    return {"cpu": "CPU", "cuda": "GPU", "mps": "Apple GPU"}[facts.kind]


def _capability(facts: DeviceFacts) -> str:
    return "an unknown one" if facts.capability is None else "{}.{}".format(*facts.capability)


# --- CUDA ---------------------------------------------------------------------------------------------------------


def torch_cuda_version() -> str | None:
    """The CUDA version that the installed torch was built for, from its version file; None for a build without.

    Importing torch to ask it costs a second.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda(?:\s*:[^=]*)?\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found.group(1) if found else None


def _why_no_cuda() -> str:
    if torch_version() is None:
        return "torch is not installed"
    if torch_cuda_version() is None:
        return f"the installed torch ({torch_version()}) is not built for CUDA"
    return "no CUDA device is visible"


def _cuda_by_nvml() -> DeviceFacts | None:
    if torch_cuda_version() is None:
        return None
    try:
        import pynvml as nvml
    except ImportError:
        return _cuda_by_torch()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        visible = visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES"), nvml.nvmlDeviceGetCount())
        if not visible:
            return None
        first = first_gpu(nvml)
        if first is None:
            return _cuda_by_torch(_text(nvml.nvmlSystemGetDriverVersion()))
        handle = (
            nvml.nvmlDeviceGetHandleByIndex(first) if isinstance(first, int) else nvml.nvmlDeviceGetHandleByUUID(first)
        )
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        return _cuda_facts(
            name=_text(nvml.nvmlDeviceGetName(handle)),
            total=int(memory.total),
            free=int(memory.free),
            capability=(int(major), int(minor)),
            num_devices=len(visible),
            driver=_text(nvml.nvmlSystemGetDriverVersion()),
        )
    except nvml.NVMLError:
        return _cuda_by_torch()
    finally:
        nvml.nvmlShutdown()


def _cuda_by_torch(driver: str | None = None) -> DeviceFacts | None:
    if torch_version() is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    return _cuda_facts(
        name=torch.cuda.get_device_name(),
        total=total,
        free=free,
        capability=(major, minor),
        num_devices=torch.cuda.device_count(),
        driver=driver,
    )


def _cuda_facts(
    *, name: str, total: int, free: int, capability: tuple[int, int], num_devices: int, driver: str | None
) -> DeviceFacts:
    return DeviceFacts(
        name=name,
        kind="cuda",
        memory_bytes=total,
        free_bytes=free,
        capability=capability,
        num_devices=num_devices,
        driver=driver,
        torch_version=torch_version(),
        supports_fp16=True,
        supports_bf16=capability >= AMPERE,  # torch.cuda.is_bf16_supported() also counts emulation
        supports_tf32=capability >= AMPERE,
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


# --- CPU and Apple ------------------------------------------------------------------------------------------------


def _mps() -> DeviceFacts:
    total, free = system_memory()
    # Autocast on MPS has no dependable loss scaler, so half precision is not offered.
    return DeviceFacts(
        name=f"Apple GPU ({cpu_name()})",
        kind="mps",
        memory_bytes=total,
        free_bytes=free,
        torch_version=torch_version(),
    )


def _cpu() -> DeviceFacts:
    total, free = system_memory()
    flags = set(re.findall(r"^flags\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)[:1])
    words = set(" ".join(flags).split())
    return DeviceFacts(
        name=cpu_name(),
        kind="cpu",
        memory_bytes=total,
        free_bytes=free,
        torch_version=torch_version(),
        supports_bf16=bool(words & {"avx512_bf16", "amx_bf16"}),
    )


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_name() -> str:
    """The processor's model, as the system names it."""
    match = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    name = match.group(1).strip() if match else platform.processor() or platform.machine() or "CPU"
    return " ".join(name.split())


def system_memory() -> tuple[int | None, int | None]:
    """(total, free) bytes of what this process may use: a container's limit counts, not only the machine's memory."""
    import psutil

    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    limit, used = _cgroup_memory()
    if limit is not None and limit < total:
        total = limit
        free = min(free, max(0, limit - used))
    return total, free


def _cgroup_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int]:
    """(limit, used) bytes of the control group, page cache that can be dropped not counted; (None, 0) without limit."""
    try:
        limit = (root / "memory.max").read_text().strip()
        if not limit.isdigit():
            return None, 0
        used = int((root / "memory.current").read_text())
        match = re.search(r"^inactive_file (\d+)$", (root / "memory.stat").read_text(), re.MULTILINE)
        return int(limit), used - (int(match.group(1)) if match else 0)
    except (OSError, ValueError):
        return None, 0
