"""Checkpoints: safetensors and JSON, written aside and then renamed, so that a whole one always exists.

A checkpoint lies on a window boundary. It holds what trains (the adapter, or all weights in full fine-tuning), the
optimizer's moments, the loss scaler, the random states and the position in the batch plan: all that the next window
depends on.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from presets import jsonio
from presets.errors import RunError

if TYPE_CHECKING:
    import torch

    from trainer.step import Stepper

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run stands, on a window boundary."""

    windows_done: int = 0  # position in the batch plan
    applied_steps: int = 0  # optimizer steps that changed weights
    skipped_steps: int = 0  # fp16 overflows
    split: int = 1  # each planned micro-batch is executed in this many parts, after running out of memory
    wall_seconds: float = 0.0  # since the first process started, up to this checkpoint
    tokens: int = 0  # real ones consumed
    train_seconds: float = 0.0  # of the loop, over all starts
    loss_sum: float = 0.0  # of token losses, since the start
    loss_tokens: int = 0
    eval_loss_before: float | None = None
    last_eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """state.json: what is not a tensor."""

    format: int
    progress: Progress
    scaler: dict[str, float]
    optimizer_steps: dict[str, float]
    python_random: tuple[int, ...]


def save_checkpoint(folder: Path, stepper: Stepper, progress: Progress, random_states: dict[str, torch.Tensor]) -> Path:
    """Write `folder/step-NNNNNN` whole or not at all; returns it. One already there is left as it is.

    Raises:
        RunError: the disk is full or the folder cannot be written; nothing half-written stays.
    """
    from safetensors.torch import save_file

    target = folder / f"step-{progress.windows_done:06d}"
    if (target / "state.json").is_file():
        return target
    shutil.rmtree(target, ignore_errors=True)  # half removed
    aside = folder / f".{target.name}.{os.getpid()}.tmp"
    tensors, steps = _optimizer_tensors(stepper)
    state = _State(
        format=FORMAT,
        progress=progress,
        scaler={key: float(value) for key, value in stepper.scaler.state_dict().items()} if stepper.scaler else {},
        optimizer_steps=steps,
        python_random=tuple(random.getstate()[1]),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # of a killed process with this number: in a container it is the same
        aside.mkdir()
        save_file(trainable_tensors(stepper.model), aside / "model.safetensors")
        save_file(tensors, aside / "optimizer.safetensors")
        save_file(random_states, aside / "random.safetensors")
        (aside / "state.json").write_text(jsonio.to_json(state), encoding="utf-8")
        for file in aside.iterdir():
            _sync(file)
        _sync(aside)
        os.replace(aside, target)
        _sync(folder)
    except OSError as reason:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(f"{target}: the checkpoint cannot be written ({reason.strerror or reason}).") from None
    return target


def load_checkpoint(path: Path, stepper: Stepper, rank: int) -> Progress:
    """Put a checkpoint's weights, moments, scaler and random state back; returns where it stands.

    Raises:
        RunError: it is damaged, of another format, or of another model.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = jsonio.from_json(
            _State, (path / "state.json").read_text(encoding="utf-8"), what=f"{path}/state.json", error=RunError
        )
        if state.format != FORMAT:
            raise RunError(f"{path}: checkpoint format {state.format}, this version reads {FORMAT}.")
        weights = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        randoms = load_file(path / "random.safetensors")
    except (OSError, SafetensorError, UnicodeDecodeError) as reason:
        raise RunError(f"{path}: the checkpoint is damaged ({reason}).") from None
    named = dict(trainable_parameters(stepper.model))
    if named.keys() != weights.keys() or any(named[name].shape != weights[name].shape for name in named):
        raise RunError(f"{path}: the checkpoint's weights are not this model's.")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
    _restore_optimizer(stepper, moments, state.optimizer_steps)
    if stepper.scaler is not None and state.scaler:
        integers = ("growth_interval", "_growth_tracker")
        stepper.scaler.load_state_dict(
            {key: int(value) if key in integers else value for key, value in state.scaler.items()}
        )
    restore_random_state({key: value for key, value in randoms.items() if key.endswith(f".{rank}")})
    random.setstate((3, state.python_random, None))
    return state.progress


def find_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def load_newest(folder: Path, stepper: Stepper, rank: int, main: bool) -> tuple[Progress, Path | None, list[str]]:
    """The newest checkpoint that is whole. Damaged ones are set aside (renamed) and named in the notes.

    Raises:
        RunError: there are checkpoints and none of them can be read.
    """
    notes: list[str] = []
    checkpoints = find_checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            return load_checkpoint(path, stepper, rank), path, notes
        except RunError as reason:
            notes.append(f"{reason} It is set aside.")
            if main:
                set_aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(set_aside, ignore_errors=True)  # of an earlier time
                os.replace(path, set_aside)
    if checkpoints:
        raise RunError(" ".join(notes) + " No whole checkpoint is left: start the run anew.")
    return Progress(), None, notes


def rotate(folder: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    checkpoints = find_checkpoints(folder)
    spared = set(checkpoints[-max(1, keep) :])
    for path in checkpoints:
        if path not in spared and path.name != f"step-{best or 0:06d}":
            _remove(path)
    for leftover in folder.glob(".step-*.tmp"):  # of a process that was killed while writing or removing
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(path: Path) -> None:
    """Renamed first, so that a kill in the middle does not leave half a checkpoint under a whole one's name."""
    aside = path.with_name(f".{path.name}.old.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
    except OSError:
        aside = path
    shutil.rmtree(aside, ignore_errors=True)


def trainable_parameters(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of what trains."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def trainable_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The weights that train, as safetensors takes them."""
    return {name: parameter.detach().contiguous().cpu() for name, parameter in trainable_parameters(model)}


def random_state(rank: int) -> dict[str, torch.Tensor]:
    """This process's random state: torch's on the CPU and on its GPU."""
    import torch

    states = {f"cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"cuda.{rank}"] = torch.cuda.get_rng_state()
    return states


def restore_random_state(states: dict[str, torch.Tensor]) -> None:
    """Put back what `random_state` took."""
    import torch

    for name, state in states.items():
        if name.startswith("cpu."):
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)


def _optimizer_tensors(stepper: Stepper) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    tensors: dict[str, torch.Tensor] = {}
    steps: dict[str, float] = {}
    for name, parameter in trainable_parameters(stepper.model):
        for key, value in stepper.optimizer.state.get(parameter, {}).items():
            if key == "step":
                steps[name] = float(value)
            else:
                tensors[f"{name}|{key}"] = value.detach().contiguous().cpu()
    return tensors, steps


def _restore_optimizer(stepper: Stepper, tensors: dict[str, torch.Tensor], steps: dict[str, float]) -> None:
    import torch

    stepper.optimizer.state.clear()
    fused = any(group.get("fused") for group in stepper.optimizer.param_groups)
    for name, parameter in trainable_parameters(stepper.model):
        if name not in steps:
            continue  # no optimizer step was taken before this checkpoint
        device = parameter.device
        state: dict[str, Any] = {
            key.split("|", 1)[1]: value.to(device) for key, value in tensors.items() if key.split("|", 1)[0] == name
        }
        # AdamW keeps its step count on the CPU, except in the fused kernel.
        state["step"] = torch.tensor(steps[name], dtype=torch.float32, device=device if fused else "cpu")
        stepper.optimizer.state[parameter] = state


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
