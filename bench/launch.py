"""What a micro-step costs where launching kernels sets its pace: ours beside the Trainer's way, in turns.

    python bench/launch.py --device cuda --model FOLDER --out bench/results/launch-DATE.json

The contestants share weights, data and precision (bf16 on a GPU; fp32 on a CPU): our micro-step as it is and over
layers as peft and transformers have them, each with the plain and the lean loss, as it is but for one of the parts
(norms, rotary positions, copies of the adapters, adapters with one input together, gated MLPs), and what Transformers'
Trainer calls (an attention mask, labels, the model's own loss) over the libraries' own layers. Quoted are medians of
ratios within a turn. Beside them stand the kernels that one micro-step launches and how long the GPU was busy with
them: the rest of the time it waited.

Without --model, a model of 16 layers so narrow that a CPU, too, spends its time on calls and not on arithmetic.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "bench"))
sys.path.insert(0, str(REPOSITORY))

import accuracy  # noqa: E402
import common  # noqa: E402

NARROW = accuracy.Shape("llama", 64, 128, 16, 4, 2)
TRAINERS = "the Trainer's way"
PARTS = ("adapters", "norms", "rotary", "copies", "siblings", "mlps")  # fused, norms, rotary, halves, siblings, gated


class Parts:
    """The same model with some of our layers and the rest as the libraries have them: no weight is held twice."""

    def __init__(self, model: Any) -> None:
        from trainer.fused import fuse_adapters
        from trainer.gated import fuse_mlps
        from trainer.norms import fuse_norms
        from trainer.rotary import NAME, Turned, fuse_rotary
        from trainer.siblings import join_siblings, siblings_of

        self._forwards = []
        for part, fuse in (("adapters", fuse_adapters), ("norms", fuse_norms), ("mlps", fuse_mlps)):
            before = set(map(id, self._replaced(model)))
            print(f"{fuse(model)} {part}")
            new = [module for module in self._replaced(model) if id(module) not in before]
            self._forwards += [(module, vars(module)["forward"], part) for module in new]
        print(f"{fuse_rotary(model)} rotary functions, {join_siblings(model)} groups of adapters with one input")
        self._siblings = siblings_of(model)
        names = {type(module).__module__ for module in model.modules()}
        found = [(sys.modules[name], vars(sys.modules[name]).get(NAME)) for name in names]
        self._turned = [(module, function) for module, function in found if isinstance(function, Turned)]
        self._name = NAME

    @staticmethod
    def _replaced(model: Any) -> list[Any]:
        return [module for module in model.modules() if "forward" in vars(module)]

    def switch(self, on: set[str]) -> None:
        for module, forward, part in self._forwards:
            if part in on:
                module.forward = forward
            else:
                vars(module).pop("forward", None)
        for module, function in self._turned:
            setattr(module, self._name, function if "rotary" in on else function.plain)
        for group in self._siblings:
            for layer in group.layers:
                layer.siblings = group if "siblings" in on else None


def main() -> int:
    parser = argparse.ArgumentParser(description="Seconds of a micro-step, ours beside the Trainer's way.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--width", type=int, help="tokens in a row; 480 on a GPU, 8 on a CPU")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, default=common.RESULTS / f"launch-{date.today().isoformat()}.json")
    arguments = parser.parse_args()
    width = arguments.width or (480 if arguments.device == "cuda" else 8)
    with tempfile.TemporaryDirectory(prefix="launch-") as name:
        model = arguments.model or Path(name) / "model"
        if arguments.model is None:
            accuracy.make_model(NARROW, model, weights_on=arguments.device)
        found = compare(str(model), arguments.device, arguments.rows, width, arguments.turns)
    result = {
        "what": "seconds of one micro-step, in turns in one process",
        "date": date.today().isoformat(),
        "model": arguments.model.name if arguments.model else "16 layers, hidden 64",
        "rows": arguments.rows,
        "width": width,
        "turns": arguments.turns,
        "hardware": common.hardware(arguments.device),
        "versions": {one: importlib.metadata.version(one) for one in accuracy.VERSIONED},
        "commit": common.commit(),
    } | found
    common.write(arguments.out, result)
    for title, one in found["contestants"].items():
        print(f"{title:<42} {1000 * one['median_seconds']:>8.1f} ms  {one['over_trainers_way']:.2f} of {TRAINERS}")
    for title, one in found.get("profile", {}).items():
        print(
            f"{title:<42} {one['kernels']:>7,} kernels, busy {1e3 * one['busy_seconds']:.1f} ms, {one['calls']:,} calls"
        )
    return 0


def compare(model: str, device: str, rows: int, width: int, turns: int) -> dict[str, Any]:
    """Each contestant once a turn; medians, and medians of the ratios to the Trainer's way."""
    import torch

    from trainer.step import clear_gradients, make_stepper, micro_step, synchronize

    precision = "bf16" if device == "cuda" else "fp32"
    ids = torch.randint(5, 300, (rows, width), generator=torch.Generator().manual_seed(0))
    batch = _batch(ids).to(device)
    loaded = _load(model, device, precision)
    parts = Parts(loaded)
    steppers = {loss: make_stepper(loaded, device, precision, loss=loss) for loss in ("plain", "lean")}

    def ours(loss: str, *without: str) -> Callable[[], Any]:
        copies = steppers[loss].halves

        def act() -> None:
            parts.switch(set(PARTS) - set(without))
            steppers[loss].halves = None if {"copies", "adapters"} & set(without) else copies
            micro_step(steppers[loss], batch, scale=1.0 / len(batch.targets))
            steppers[loss].halves = copies

        return act

    def theirs() -> None:
        parts.switch(set())
        _trainers_way(loaded, ids.to(device), precision, device)

    contestants: dict[str, Callable[[], Any]] = {f"ours, {loss} loss": ours(loss) for loss in steppers}
    first_seconds = _seconds(contestants["ours, plain loss"], device)  # the first backward pass of the process
    contestants |= {f"ours without {part}, plain loss": ours("plain", part) for part in PARTS}
    contestants |= {f"ours, the libraries' layers, {loss} loss": ours(loss, *PARTS) for loss in steppers}
    contestants[TRAINERS] = theirs
    for act in contestants.values():
        for _ in range(3):
            act()
    taken: dict[str, list[float]] = {title: [] for title in contestants}
    for turn in range(turns):
        titles = list(contestants)
        for title in titles if turn % 2 == 0 else titles[::-1]:
            taken[title].append(_seconds(contestants[title], device))
    parameters = [parameter for parameter in loaded.parameters() if parameter.requires_grad]
    clear_gradients(parameters)
    synchronize(device)
    found: dict[str, Any] = {
        "precision": precision,
        "first_micro_step_seconds": first_seconds,
        "contestants": {
            title: {
                "median_seconds": statistics.median(values),
                "over_trainers_way": statistics.median(
                    one / other for one, other in zip(values, taken[TRAINERS], strict=True)
                ),
                "seconds": values,
            }
            for title, values in taken.items()
        },
    }
    if device == "cuda":
        found["profile"] = {title: _profile(act) for title, act in contestants.items()}
    return found


def _batch(ids: Any) -> Any:
    """Rows of one length whose last third is learnt from, as an answer is."""
    import torch

    from trainer.collate import MicroBatch

    rows, width = ids.shape
    counts = torch.zeros_like(ids, dtype=torch.bool)
    counts[:, -(width // 3) :] = True
    places = counts.ravel().nonzero().ravel()
    return MicroBatch(
        input_ids=ids, position_ids=None, predicts=places - 1, targets=ids.ravel()[places], num_tokens=rows * width
    )


def _load(model: str, device: str, precision: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from trainer.kernels import avoid_plans_for_each_shape

    if device == "cuda":
        avoid_plans_for_each_shape()  # for the Trainer's way as well
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa")
    base.config.use_cache = False
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    found: Any = get_peft_model(base, config)
    return found.to(device).train()


def _trainers_way(model: Any, ids: Any, precision: str, device: str) -> None:
    import torch

    from trainer.step import autocast

    labels = ids.clone()
    labels[:, : -(ids.shape[1] // 3)] = -100
    count = (labels != -100).sum()
    with autocast(device, precision):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, num_items_in_batch=count).loss
    loss.backward()


def _seconds(act: Callable[[], Any], device: str) -> float:
    from trainer.step import synchronize

    synchronize(device)
    begun = time.perf_counter()
    act()
    synchronize(device)
    return time.perf_counter() - begun


def _profile(act: Callable[[], Any]) -> dict[str, Any]:
    """Kernels launched by one micro-step, seconds that the GPU was busy with them, and what took its time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        act()
        torch.cuda.synchronize()
    averages = watched.key_averages()
    kernels = [one for one in averages if one.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(one.self_device_time_total for one in kernels)
    longest = sorted(kernels, key=lambda one: -one.self_device_time_total)[:8]
    callers = sorted((one for one in averages if one not in kernels), key=lambda one: -one.self_cpu_time_total)[:12]
    return {
        "kernels": sum(one.count for one in kernels),
        "busy_seconds": busy / 1e6,
        "calls": sum(one.count for one in averages if one.key.startswith("aten::")),
        "longest_kernels": {one.key[:80]: [one.count, one.self_device_time_total / 1e6] for one in longest},
        "longest_calls": {one.key[:80]: [one.count, one.self_cpu_time_total / 1e6] for one in callers},
    }


if __name__ == "__main__":
    sys.exit(main())
