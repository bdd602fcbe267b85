"""Checkpoints: safetensors and JSON, written aside and then renamed, so that a whole one always exists.

A checkpoint lies on a window boundary. It holds what trains (the adapter, or all weights in full fine-tuning), the
optimizer's moments, the loss scaler, the random states and the position in the batch plan: all that the next window
depends on. SHA256SUMS tells a whole one from one that a power cut or a disk has spoiled; those are set aside.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from presets import jsonio
from presets.errors import NonFiniteLossError, RunError
from presets.text import listed, shown
from trainer.disk import LEAST_KEPT, sync, sync_tree, told_in_one_line
from trainer.sums import NAME as SUMS
from trainer.sums import changed_since, denied_by_sums, write_sums

if TYPE_CHECKING:
    import torch

    from trainer.step import Stepper

FORMAT = 3  # 1: without sizes and checksums. 2: the digest of config.json was another one, or there was none
TENSORS = ("model.safetensors", "optimizer.safetensors", "random.safetensors")
SUMMED = (*TENSORS, "state.json")


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
    num_resumes: int = 0
    plan_digest: str | None = None  # of the batch plan that `windows_done` counts in
    data_digest: str | None = None  # of the examples that the plan names; None in checkpoints of before
    base_digest: str | None = None  # of the weights under an adapter; None also where they cannot be told
    config_digest: str | None = None  # of the model's config.json; None in checkpoints of before


class _Damaged(RunError):
    """It cannot be read; another one may."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """state.json: what is not a tensor."""

    format: int
    progress: Progress
    scaler: dict[str, float]
    optimizer_steps: dict[str, float]
    python_random: tuple[int, ...]
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of each file of tensors


def save_checkpoint(folder: Path, stepper: Stepper, progress: Progress, random_states: dict[str, torch.Tensor]) -> Path:
    """Write `folder/step-NNNNNN` whole or not at all; returns it. One already there is left as it is.

    Raises:
        RunError: the disk is full or the folder cannot be written; nothing half-written stays.
    """
    from safetensors.torch import save_file

    target = folder / f"step-{progress.windows_done:06d}"
    if looks_whole(target):
        return target
    aside = folder / f".{target.name}.{os.getpid()}.tmp"
    tensors, steps = _optimizer_tensors(stepper)
    try:
        with told_in_one_line(target, folder.parent):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)  # half removed
            shutil.rmtree(
                aside, ignore_errors=True
            )  # of a killed process of this number: in a container it is the same
            aside.mkdir()
            for name, content in zip(TENSORS, (trainable_tensors(stepper.model), tensors, random_states), strict=True):
                save_file(content, aside / name)
            state = _State(
                format=FORMAT,
                progress=progress,
                scaler={key: float(value) for key, value in stepper.scaler.state_dict().items()}
                if stepper.scaler
                else {},
                optimizer_steps=steps,
                python_random=tuple(random.getstate()[1]),
                sizes={name: (aside / name).stat().st_size for name in TENSORS},
            )
            (aside / "state.json").write_text(jsonio.to_json(state), encoding="utf-8")
            write_sums(aside, SUMMED)
            sync_tree(aside)
            os.replace(aside, target)
            sync(folder)
    except RunError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def require_finite(stepper: Stepper, step: int) -> None:
    """Never write a checkpoint that no resume could go on from. Every process asks: all hold the same weights.

    Raises:
        NonFiniteLossError: a weight that trains is NaN or infinite after so many steps.
    """
    import torch

    whole = torch.stack([torch.isfinite(parameter.detach()).all() for parameter in stepper.parameters])
    if not bool(whole.all()):
        raise NonFiniteLossError(
            f"step {step}: weights have become NaN or infinite. No checkpoint is written of them, "
            "and the last one is kept. Lower the learning rate, or use fp32."
        )


def load_checkpoint(path: Path, stepper: Stepper, rank: int) -> Progress:
    """Put a checkpoint's weights, moments, scaler and random state back; returns where it stands.

    Raises:
        RunError: it is damaged, of another version of the planner, or of another model. Nothing was put back then.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = _read_state(path)
        changed = changed_since(path, SUMMED) if state.format > 1 or (path / SUMS).exists() else None
        if changed is not None:
            raise _Damaged(f"{path}: the checkpoint is damaged ({changed} is not as it was written).")
        weights, moments, randoms = (load_file(path / name) for name in TENSORS)
    except (OSError, SafetensorError, UnicodeDecodeError) as reason:
        raise _Damaged(f"{path}: the checkpoint is damaged ({reason}).") from None
    if state.progress.windows_done != number_of(path):
        raise _Damaged(f"{path}: the checkpoint is damaged (it is of step {state.progress.windows_done}).")
    named = dict(trainable_parameters(stepper.model))
    if named.keys() != weights.keys() or any(named[name].shape != weights[name].shape for name in named):
        raise RunError(f"{path}: the checkpoint's weights are not this model's. Was the model folder changed?")
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
    return state.progress if state.format > 2 else replace(state.progress, config_digest=None)


def _read_state(path: Path) -> _State:
    """What is not a tensor of a checkpoint, of a format that this version reads.

    Raises:
        RunError: another version wrote it. It is whole, and not to be set aside.
        _Damaged: it is no state.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    file = path / "state.json"
    text = file.read_text(encoding="utf-8")
    try:
        plain = jsonio.loads(text)
    except ValueError as reason:
        raise _Damaged(f"{file}: damaged: not JSON ({reason}).") from None
    why = _of_another_version(plain)
    if why is not None and not denied_by_sums(path, file.name):  # else a bit of it has turned over
        raise RunError(
            f"{path}: the checkpoint was written by another version of the planner ({why}). Go on with that version; "
            "the checkpoint is left as it was."
        )
    return jsonio.from_plain(_State, plain, what=f"{file}: damaged", error=_Damaged)


def _of_another_version(plain: Any) -> str | None:
    """What of a state this version cannot know; None where there is nothing of the kind."""
    if not isinstance(plain, dict):
        return None
    version = plain.get("format")
    if isinstance(version, int) and not isinstance(version, bool) and not 1 <= version <= FORMAT:
        return f"checkpoint format {version}, this version reads 1 to {FORMAT}"
    known = {one.name for one in fields(_State)}
    unknown = [key for key in plain if key not in known]
    if isinstance(plain.get("progress"), dict):
        known = {one.name for one in fields(Progress)}
        unknown += [key for key in plain["progress"] if key not in known]
    return f"this one does not know {listed(map(shown, unknown))}" if unknown else None


def number_of(path: Path) -> int | None:
    """The step in a checkpoint's name; None where the name is no checkpoint's."""
    found = re.fullmatch(r"step-(\d{6,12})", path.name)
    return int(found.group(1)) if found else None


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by their names, the oldest first; a damaged one is among them."""
    numbered = [(number_of(path), path) for path in folder.glob("step-*") if path.is_dir()]
    return [path for number, path in sorted((number, path) for number, path in numbered if number is not None)]


def looks_whole(path: Path) -> bool:
    """Whether a checkpoint's files are there and as long as they were written; their content is not read."""
    try:
        # Not by `_read_state`: that takes ten times as long, and this is asked of every checkpoint at each new one.
        state = jsonio.loads((path / "state.json").read_text(encoding="utf-8"))
        return state["format"] == 1 or {name: (path / name).stat().st_size for name in TENSORS} == state["sizes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_newest(folder: Path, stepper: Stepper, rank: int, main: bool) -> tuple[Progress, Path | None, list[str]]:
    """The newest checkpoint that is whole. Damaged ones are set aside (renamed) and named in the notes.

    Raises:
        RunError: there are checkpoints and none of them can be read, or the newest is not of this model or version.
    """
    notes: list[str] = []
    checkpoints = find_checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            return load_checkpoint(path, stepper, rank), path, notes
        except _Damaged as reason:
            set_aside = path.with_name(f"damaged-{path.name}")
            notes.append(f"{reason} It is set aside as {set_aside.name}.")
            if main:
                shutil.rmtree(set_aside, ignore_errors=True)  # of an earlier time
                os.replace(path, set_aside)
    if checkpoints:
        raise RunError(
            " ".join(notes) + " No whole checkpoint is left: 'plan --resume' once more starts from the beginning."
        )
    return Progress(), None, notes


def rotate(folder: Path, keep: int, best: int | None) -> None:
    """Remove what is older than the newest `keep` whole checkpoints, two at least, but for the best one.

    Called when the newest one is on the disk. One that is damaged does not count, and a newer one than those that
    are kept stays for a resume to name.
    """
    checkpoints = find_checkpoints(folder)
    whole = [path for path in checkpoints if looks_whole(path)]
    spared = whole[-max(LEAST_KEPT, keep) :]
    for path in checkpoints[: checkpoints.index(spared[0])] if spared else ():
        if number_of(path) != best:
            remove(path)
    for leftover in folder.glob(".step-*.tmp"):  # of a process that was killed while writing or removing
        shutil.rmtree(leftover, ignore_errors=True)


def remove(path: Path) -> None:
    """Take a checkpoint away.

    Renamed first, so that a kill in the middle does not leave half a checkpoint under a whole one's name.
    """
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
