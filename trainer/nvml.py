"""What NVIDIA's driver tells of the first visible GPU: heat, power, memory. No torch; nothing where there is none."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from typing import Any
from uuid import UUID


def visible_devices(setting: str | None, count: int) -> list[int | str]:
    """NVML indices or UUIDs that `CUDA_VISIBLE_DEVICES` leaves visible, in its order.

    As in CUDA, an entry that names no device hides itself and all that follow.
    """
    if setting is None:
        return list(range(count))
    found: list[int | str] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdigit() and int(entry) < count:
            found.append(int(entry))
        elif entry.startswith(("GPU-", "MIG-")):
            found.append(entry)
        else:
            break
    return found


def is_order_known(nvml: Any, visible: list[int | str]) -> bool:
    """Whether NVML's numbers are CUDA's. NVML counts by slot; CUDA puts the fastest first, unless it is told not to."""
    if not visible or not isinstance(visible[0], int) or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return True
    names, count = set(), nvml.nvmlDeviceGetCount()
    for number in range(count if count > 1 else 0):
        with suppress(nvml.NVMLError):  # a card of others, or one that is lost: CUDA leaves it out too
            names.add(nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(number)))
    return len(names) <= 1


def first_uuid() -> str | None:
    """The UUID of CUDA's first GPU as NVML writes it, from the driver itself: no context is opened, nothing allocated.

    None where the driver is not here or sees no device.
    """
    device, uuid = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
        failed = failed or cuda.cuDeviceGetUuid(ctypes.byref(uuid), device)
    except (OSError, AttributeError):  # there is none, or a stub of it
        return None
    return None if failed else f"GPU-{UUID(bytes=bytes(uuid))}"


def first_gpu(nvml: Any) -> int | str | None:
    """CUDA's first GPU, as NVML's number or UUID of it; None where there is none, or it is not known which it is."""
    visible = visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES"), nvml.nvmlDeviceGetCount())
    if not visible:
        return None
    return visible[0] if is_order_known(nvml, visible) else first_uuid()


class VisibleGpu:
    """A handle on the first visible GPU; what it cannot say is None. `nvml` is the library, None without a GPU."""

    def __init__(self) -> None:
        self.nvml: Any = None
        self._handle: Any = None
        try:
            import pynvml
        except ImportError:
            return
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            first = first_gpu(pynvml)
            if first is not None:
                by = pynvml.nvmlDeviceGetHandleByIndex if isinstance(first, int) else pynvml.nvmlDeviceGetHandleByUUID
                self._handle = by(first)
                self.nvml = pynvml

    def ask(self, function: str, *arguments: Any) -> Any:
        """What NVML's function says of this GPU; None where it, the card or the driver has no answer."""
        if self.nvml is None:
            return None
        try:
            return getattr(self.nvml, function)(self._handle, *arguments)
        except (self.nvml.NVMLError, AttributeError):  # not every card and driver answers everything
            return None

    def samples(self, function: str, since: int) -> list[Any] | None:
        """What NVML recorded after a moment in microseconds: an empty list where that is nothing, None as for `ask`."""
        if self.nvml is None:
            return None
        try:
            return list(getattr(self.nvml, function)(self._handle, since))
        except self.nvml.NVMLError as reason:
            return [] if getattr(reason, "value", None) == self.nvml.NVML_ERROR_NOT_FOUND else None
        except AttributeError:
            return None

    def temperature_c(self) -> int | None:
        """Of the chip, in °C."""
        found: int | None = self.ask("nvmlDeviceGetTemperature", getattr(self.nvml, "NVML_TEMPERATURE_GPU", 0))
        return found

    def power_watts(self) -> float | None:
        """Drawn now."""
        found = self.ask("nvmlDeviceGetPowerUsage")
        return None if found is None else float(found) / 1000

    def memory_bytes(self) -> tuple[int, int] | None:
        """(in use by anyone, all of it)."""
        found = self.ask("nvmlDeviceGetMemoryInfo")
        return None if found is None else (int(found.used), int(found.total))
