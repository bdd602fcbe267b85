"""`plan doctor`: what this machine has, what is wrong with it, and the command that mends it. No torch.

Each check is a function of facts that are read beforehand, so that every finding can be tested without the machine.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from planner.conditions import OTHERS
from planner.figures import gib
from planner.hardware import DeviceFacts, detect_device, system_memory, torch_cuda_version, torch_version
from presets.errors import SettingsError
from presets.home import plan_home
from trainer.company import Company

State = Literal["ok", "note", "wrong"]
GIB = 1024**3
LITTLE_DISK = 10 * GIB  # a run of a small model writes checkpoints, an adapter and tokenised data
NO_DISK = 2 * GIB
LOOK = 0.7  # seconds, at who else uses the CPU
LITTLE_FREE = 0.5  # of the device's memory
# The oldest driver that runs a CUDA version, by its major number: NVIDIA's CUDA compatibility table (Linux).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One finding: what was looked at, how it is, and where it is not well what to do."""

    what: str
    text: str
    state: State = "ok"
    remedy: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the findings are made from. None is unknown."""

    python: tuple[int, int]
    system: str
    packages: dict[str, str | None]  # version, None where it is missing
    torch_cuda: str | None  # the CUDA version that torch was built for; None: none
    gpus: tuple[tuple[str, int], ...]  # (name, bytes) as the driver sees them, whatever torch can use
    driver: str | None
    device: DeviceFacts | None
    memory: tuple[int | None, int | None]  # total, free
    disks: dict[str, int | None]  # purpose -> free bytes; None where the folder cannot be written
    hub_offline: bool = False
    taken: float | None = None  # threads of others that want to run, per core


def look() -> Machine:
    """Read the facts of this machine."""
    company = Company()
    names = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "matplotlib")
    gpus, driver = _driver_view()
    try:
        device: DeviceFacts | None = detect_device()
    except SettingsError:
        device = None
    return Machine(
        python=(sys.version_info[0], sys.version_info[1]),
        system=platform.system(),
        packages={name: _version(name) for name in names},
        torch_cuda=torch_cuda_version(),
        gpus=gpus,
        driver=driver,
        device=device,
        memory=system_memory(),
        disks={
            "runs (this folder)": _free_disk(Path.cwd()),
            "measurements and tokenised data": _free_disk(plan_home()),
        },
        hub_offline=os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True"),
        taken=company.demand(LOOK),
    )


def examine(machine: Machine) -> tuple[Found, ...]:
    """All findings, in the order in which a person would ask."""
    checks: tuple[Callable[[Machine], list[Found]], ...] = (
        _python,
        _torch,
        _gpu,
        _memory,
        _load,
        _packages,
        _disk,
        _hub,
    )
    return tuple(found for check in checks for found in check(machine))


def _python(machine: Machine) -> list[Found]:
    text = f"{machine.python[0]}.{machine.python[1]} on {machine.system}"
    if (3, 11) <= machine.python <= (3, 13):
        return [Found(what="Python", text=text)]
    remedy = "make a virtual environment with Python 3.11, 3.12 or 3.13"
    return [Found(what="Python", text=f"{text}: not tested", state="note", remedy=remedy)]


def _torch(machine: Machine) -> list[Found]:
    version = machine.packages.get("torch")
    if version is None:
        return [Found(what="torch", text="not installed", state="wrong", remedy="pip install torch")]
    if machine.gpus and machine.torch_cuda is None:
        return [
            Found(
                what="torch",
                text=f"{version}, a build without CUDA, beside {machine.gpus[0][0]}: training would run on the CPU",
                state="wrong",
                remedy=_cuda_build(machine.driver),
            )
        ]
    built = f"built for CUDA {machine.torch_cuda}" if machine.torch_cuda else "a build for the CPU"
    return [Found(what="torch", text=f"{version}, {built}")]


def _cuda_build(driver: str | None) -> str:
    """The command that installs a torch which this driver can run."""
    major = (driver or "").split(".")[0]
    known = int(major) if major.isdigit() else max(OLDEST_DRIVER.values())
    wheel = "cu130" if known >= OLDEST_DRIVER[13] else "cu126" if known >= OLDEST_DRIVER[12] else None
    if wheel is None:
        return f"install NVIDIA driver {OLDEST_DRIVER[12]} or newer, then a torch built for CUDA"
    return f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{wheel}"


def _gpu(machine: Machine) -> list[Found]:
    found = [Found(what="GPU", text=f"{name}, {gib(size)}") for name, size in machine.gpus]
    if not found:
        device = machine.device
        text = "none: the CPU trains" if device is None or device.kind == "cpu" else f"{device.name} ({device.kind})"
        found = [Found(what="GPU", text=text)]
    major = machine.driver.split(".")[0] if machine.driver else ""
    if machine.gpus and machine.torch_cuda and major.isdigit():
        needed = OLDEST_DRIVER.get(int(machine.torch_cuda.split(".")[0]))
        if needed is not None and int(major) < needed:
            found.append(
                Found(
                    what="driver",
                    text=f"{machine.driver}, too old for CUDA {machine.torch_cuda}, which needs {needed} or newer",
                    state="wrong",
                    remedy=f"install NVIDIA driver {needed} or newer, or a torch built for an older CUDA",
                )
            )
        else:
            found.append(Found(what="driver", text=machine.driver or "unknown"))
    if machine.gpus and machine.torch_cuda and machine.device is not None and machine.device.kind != "cuda":
        found.append(
            Found(
                what="GPU",
                text="there is one, but none is visible to torch",
                state="wrong",
                remedy="look at CUDA_VISIBLE_DEVICES, and whether the container was started with --gpus all",
            )
        )
    return found


def _memory(machine: Machine) -> list[Found]:
    found = []
    device = machine.device
    if device is not None and device.kind == "cuda" and device.memory_bytes and device.free_bytes is not None:
        text = f"{gib(device.free_bytes)} of {gib(device.memory_bytes)} free"
        if device.free_bytes < LITTLE_FREE * device.memory_bytes:
            found.append(
                Found(
                    what="GPU memory",
                    text=f"{text}: another program holds the rest",
                    state="note",
                    remedy="nvidia-smi shows which; close it before you plan",
                )
            )
        else:
            found.append(Found(what="GPU memory", text=text))
    total, free = machine.memory
    found.append(Found(what="memory", text=f"{gib(free)} of {gib(total)} free"))
    return found


def _packages(machine: Machine) -> list[Found]:
    found = []
    for name in ("transformers", "peft", "accelerate", "datasets"):
        version = machine.packages.get(name)
        if version is None:
            found.append(Found(what=name, text="not installed", state="wrong", remedy=f"pip install {name}"))
        else:
            found.append(Found(what=name, text=version))
    for name, use in (("bitsandbytes", "4-bit and 8-bit bases"), ("matplotlib", "charts in reports")):
        version = machine.packages.get(name)
        remedy = None if version else f"pip install {name}"
        text = version or f"not installed: no {use}"
        found.append(Found(what=name, text=text, state="ok" if version else "note", remedy=remedy))
    return found


def _disk(machine: Machine) -> list[Found]:
    found = []
    for purpose, free in machine.disks.items():
        what = f"disk for {purpose}"
        if free is None:
            remedy = "choose another folder: --output for runs, PLAN_HOME for the rest"
            found.append(Found(what=what, text="cannot be written", state="wrong", remedy=remedy))
        elif free < LITTLE_DISK:
            state: State = "wrong" if free < NO_DISK else "note"
            remedy = "free some, or choose another disk: --output for runs, PLAN_HOME for the rest"
            found.append(Found(what=what, text=f"only {gib(free)} free", state=state, remedy=remedy))
        else:
            found.append(Found(what=what, text=f"{gib(free)} free"))
    return found


def _load(machine: Machine) -> list[Found]:
    if machine.taken is None:
        return []
    taken = min(1.0, machine.taken)
    if taken <= OTHERS or (machine.device is not None and machine.device.kind != "cpu"):  # beside a GPU hardly matters
        return [Found(what="load", text=f"other programs take {taken:.0%} of the CPU's time")]
    remedy = "close them before measuring and training, unless they will run beside both"
    return [Found(what="load", text=f"other programs take {taken:.0%} of the CPU's time", state="note", remedy=remedy)]


def _hub(machine: Machine) -> list[Found]:
    if not machine.hub_offline:
        return []
    text = "HF_HUB_OFFLINE is set: models and data come from local folders and the cache alone"
    return [Found(what="hub", text=text, state="note", remedy="unset HF_HUB_OFFLINE to download")]


# --- reading ----------------------------------------------------------------------------------------------------------


def _version(name: str) -> str | None:
    try:
        return torch_version() if name == "torch" else importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver_view() -> tuple[tuple[tuple[str, int], ...], str | None]:
    """The GPUs that NVIDIA's driver sees, and its version."""
    try:
        import pynvml as nvml
    except ImportError:
        return (), None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return (), None
    try:
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name = nvml.nvmlDeviceGetName(handle)
            name = name.decode() if isinstance(name, bytes) else str(name)
            found.append((name, int(nvml.nvmlDeviceGetMemoryInfo(handle).total)))
        driver = nvml.nvmlSystemGetDriverVersion()
        return tuple(found), driver.decode() if isinstance(driver, bytes) else str(driver)
    except nvml.NVMLError:
        return (), None
    finally:
        nvml.nvmlShutdown()


def _free_disk(folder: Path) -> int | None:
    """Free bytes where a folder lies or would be made; None where it cannot be written."""
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return shutil.disk_usage(folder).free if os.access(folder, os.W_OK | os.X_OK) else None
    except OSError:  # a folder that may not be searched, a name that no file can have
        return None
