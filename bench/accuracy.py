"""Predicted against actual, by the commands that a user would type: profile, then run, on real-shaped models.

    python bench/accuracy.py --repeats 2 --out bench/results/accuracy-DATE.json

Every pair is `plan --run ... --fresh` in a process of its own: it measures, predicts, writes estimate.json, trains, and
records what happened. The cases are shuffled within each repeat, so that none sits in one hour of the day. Results are
written after each pair; a second call with the same --out goes on where the first stopped.

Naive rivals stand beside the prediction, each with all that it needs for free:

- first steps x N: the mean of the run's own first five steps times their number, as a progress bar does;
- mean length x N: our own fitted cost at the mean length times the number of micro-batches: no strata, no tail;
- 6 x parameters x tokens / FLOPS: 4 for frozen parameters and 6 for trained ones, over the rate of a matrix product
  measured just before.

All of them predict the training loop. The prediction of the whole run, start to written record, stands beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "bench"))

import common  # noqa: E402

FIRST_STEPS = 5
TOLD = ("not steady", "other programs", "first time", "first steps", "whole windows", "timed for", "was spent")
VERSIONED = ("torch", "transformers", "peft", "accelerate", "numpy")


@dataclass(frozen=True, slots=True)
class Shape:
    """A model by its configuration; random weights cost the same as trained ones."""

    kind: str  # a transformers model type
    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int = 0  # 0: the tokenizer's
    head: int = 0  # size of an attention head; 0: hidden / heads


# CPU: models of a few million parameters, so that a pair takes two or three minutes.
CPU_SHAPES = {
    "qwen3-6m": Shape("qwen3", 256, 704, 6, 4, 2),
    "llama-12m": Shape("llama", 384, 1024, 6, 6, 6),
    "mistral-9m": Shape("mistral", 320, 1280, 5, 4, 2),
}
# GPU: the shapes of Qwen3-0.6B, Qwen3-1.7B, Llama-3.2-1B and -3B, and Llama-3.1-8B.
GPU_SHAPES = {
    "qwen3-0.6b": Shape("qwen3", 1024, 3072, 28, 16, 8, 151936, 128),
    "qwen3-1.7b": Shape("qwen3", 2048, 6144, 28, 16, 8, 151936),
    "llama-1b": Shape("llama", 2048, 8192, 16, 32, 8, 128256),
    "llama-3b": Shape("llama", 3072, 8192, 28, 24, 8, 128256),
    "llama-8b": Shape("llama", 4096, 14336, 32, 32, 8, 128256),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration: what is added to `plan --run baseline`."""

    name: str
    model: str
    options: tuple[str, ...]


def packed(length: int) -> tuple[str, ...]:
    return ("--packing", "--max-length", str(length))


def micro(size: int) -> tuple[str, ...]:
    return ("--micro-batch-size", str(size))


CPU_CASES = (
    Case("LoRA", "qwen3-6m", ("--limit", "420")),
    Case("LoRA, micro 4", "qwen3-6m", ("--limit", "460", "--micro-batch-size", "4")),
    Case("LoRA, packed", "qwen3-6m", ("--limit", "420", "--packing", "--max-length", "512")),
    Case("LoRA, checkpointing", "llama-12m", ("--limit", "240", "--gradient-checkpointing")),
    Case("LoRA", "llama-12m", ("--limit", "300")),
    Case("full", "llama-12m", ("--limit", "240", "--adapter", "full")),
    Case("full, checkpointing", "qwen3-6m", ("--limit", "300", "--adapter", "full", "--gradient-checkpointing")),
    Case("full, micro 2", "mistral-9m", ("--limit", "260", "--adapter", "full", "--micro-batch-size", "2")),
    Case("LoRA, eager", "mistral-9m", ("--limit", "280", "--attention", "eager")),
    Case("LoRA, cut at 128", "llama-12m", ("--limit", "420", "--max-length", "128")),
)
# Numbers of records for some 15 s on an H200. Most have micro-steps that the GPU sets the pace of (13 us a token of 1 B
# in bf16, as seen; by parameters with the others); the last two wait for the host, which takes 3 to 5 ms a layer there.
BF16, FP16 = ("--precision", "bf16"), ("--precision", "fp16")
LEAN = ("--lean-loss",)
GPU_CASES = (
    Case("LoRA bf16, packed 8192, lean", "llama-1b", (*BF16, *LEAN, *packed(8192), "--limit", "1900")),
    Case("LoRA bf16, micro 16", "qwen3-1.7b", (*BF16, "--limit", "1100", *micro(16))),
    Case("LoRA bf16, packed 4096", "llama-3b", (*BF16, *packed(4096), "--limit", "770")),
    Case("LoRA fp32, micro 4", "llama-1b", ("--precision", "fp32", "--limit", "270", *micro(4))),
    Case(
        "LoRA bf16, micro 8, checkpointing",
        "llama-8b",
        (*BF16, "--limit", "270", *micro(8), "--gradient-checkpointing"),
    ),
    Case("LoRA fp16, packed 8192", "qwen3-1.7b", (*FP16, *packed(8192), "--limit", "1400")),
    Case("LoRA bf16, micro 8", "llama-3b", (*BF16, "--limit", "560", *micro(8))),
    Case("LoRA fp16, packed 16384", "llama-1b", (*FP16, *packed(16384), "--limit", "1900")),
    Case("LoRA fp16, packed 8192, lean", "llama-3b", (*FP16, *LEAN, *packed(8192), "--limit", "770")),
    Case("LoRA tf32, micro 8", "llama-1b", ("--precision", "tf32", "--limit", "850", *micro(8))),
    Case("LoRA bf16, micro 4", "llama-8b", (*BF16, "--limit", "360", *micro(4))),
    Case("LoRA bf16, micro 4", "llama-1b", (*BF16, "--limit", "830", *micro(4))),
)


def make_model(shape: Shape, folder: Path, *, weights_on: str) -> None:
    """A checkpoint with random weights and a tokenizer trained on the spot, as users save theirs."""
    import torch
    from small_tokenizer import CHATML, make_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>", pad="<|endoftext|>")
    config = AutoConfig.for_model(
        shape.kind,
        vocab_size=shape.vocabulary or len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head or shape.hidden // shape.heads,
        max_position_embeddings=16384 if weights_on == "cuda" else 4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(weights_on):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if weights_on == "cuda" else torch.float32
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_known_flops: dict[str, float] = {}


def matmul_flops(device: str) -> float:
    """Operations per second of a square matrix product in the precision that the cases use, in a process of its own.

    A CPU that others use too is asked each time, a GPU once.
    """
    if device in _known_flops:
        return _known_flops[device]
    size, dtype = (8192, "bfloat16") if device == "cuda" else (1024, "float32")
    script = f"""
import time, torch
a = torch.randn({size}, {size}, device={device!r}, dtype=torch.{dtype})
wait = torch.cuda.synchronize if {device!r} == "cuda" else (lambda: None)
for _ in range(3): a @ a
wait(); begun = time.perf_counter()
for _ in range(10): a @ a
wait(); print(10 * 2 * {size}**3 / (time.perf_counter() - begun))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    if device == "cuda":
        _known_flops[device] = float(done.stdout)
    return float(done.stdout)


def run_pair(case: Case, model: Path, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One profile and the run that follows it; what was promised and what happened."""
    flops = matmul_flops(arguments.device)
    command = [sys.executable, "-P", "-m", "planner.cli", "--run", "baseline", "--model", str(model)]
    command += [
        "--dataset",
        str(arguments.data.resolve()),
        "--columns",
        "prompt=question,completion=answer",
        "--device",
        arguments.device,
    ]
    command += [
        "--samples",
        str(arguments.samples),
        "--budget",
        str(arguments.budget),
        "--output",
        str(folder),
        "--fresh",
        *case.options,
    ]
    begun = time.time()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1][:300], "exit_code": done.returncode}
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [one for one in steps if "seconds" in one]
    log = (folder / "train.log").read_text(encoding="utf-8").splitlines()
    predicted, actual = record["predicted"], record["actual"]
    return {
        "started": datetime.fromtimestamp(begun, UTC).isoformat(timespec="seconds"),
        "profile_and_run_seconds": round(time.time() - begun, 1),
        "predicted": predicted,
        "actual": actual,
        "predicted_parts": json.loads((folder / "estimate.json").read_text(encoding="utf-8")).get("parts"),
        "step_seconds": [round(one["seconds"], 4) for one in steps],
        "planned_step_seconds": [round(one["planned_seconds"], 4) for one in steps],
        "checkpoint_seconds": [float(line.split()[-2]) for line in log if "checkpoint of step" in line],
        "rivals": rivals(folder, steps, predicted, flops),
        "matmul_flops": flops,
        "notes": [line.strip() for line in done.stdout.splitlines() if any(part in line for part in TOLD)],
    }


def rivals(folder: Path, steps: list[dict[str, Any]], predicted: dict[str, Any], flops: float) -> dict[str, float]:
    """Seconds of the training loop as the naive ways have them."""
    from trainer.batching import BatchPlan
    from trainer.data import prepare_data
    from trainer.job import Job
    from trainer.model import inspect_model
    from trainer.planning import with_evaluation_on_top

    job = Job.read(folder / "job.json")
    plan = BatchPlan.load(folder / "batch_plan.npz")
    data = prepare_data(
        with_evaluation_on_top(job.data, job.evaluation),
        model=job.model,
        max_length=job.preset.max_length,
        seed=job.seed,
        trust_remote_code=False,
    )
    shapes = plan.micro_shapes(data.lengths)
    first = np.mean([one["seconds"] for one in steps[:FIRST_STEPS]]) * len(steps)
    cost = predicted["cost"]
    rows, width = shapes.rows.mean(), shapes.width.mean()
    micro = cost["base"] + (cost["per_token"] + cost["per_token_width"] * width) * rows * width
    mean = micro * len(shapes.rows) + cost["optimizer"] * plan.num_steps
    parameters = sum(math.prod(shape) for shape in tensor_shapes(Path(job.model)))
    operations = (6 if job.preset.adapter == "full" else 4) * parameters * float(shapes.tokens.sum())
    assert inspect_model(job.model).has_weights
    return {"first steps x N": float(first), "mean length x N": float(mean), "FLOPS": operations / flops}


def tensor_shapes(model: Path) -> list[tuple[int, ...]]:
    from safetensors import safe_open

    shapes = []
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            shapes += [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    return shapes


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def binomial_interval(k: int, n: int) -> tuple[float, float]:
    """90 % Clopper-Pearson interval of a share, by bisection of the binomial tail."""

    def tail(p: float, low: int, high: int) -> float:
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(low, high + 1))

    def solve(low: int, high: int, rising: bool) -> float:
        left, right = 0.0, 1.0
        for _ in range(60):
            middle = (left + right) / 2
            if (tail(middle, low, high) < 0.05) == rising:
                left = middle
            else:
                right = middle
        return (left + right) / 2

    return (0.0 if k == 0 else solve(k, n, True)), (1.0 if k == n else solve(0, k, False))


def table(pairs: list[dict[str, Any]]) -> str:
    lines = [
        f"{'case':<38} {'predicted':>9} {'range':>15} {'actual':>8} {'error':>7} {'held':>5} {'memory':>7} "
        f"{'first x N':>9} {'mean x N':>9} {'FLOPS':>8}"
    ]
    for one in pairs:
        name = f"{one['model']} {one['case']}"[:38]
        if "error" in one:
            lines.append(f"{name:<38} {one['error']}")
            continue
        predicted, actual, rival = one["predicted"], one["actual"], one["rivals"]
        span = f"{predicted['seconds_low']:.0f}-{predicted['seconds_high']:.0f}"
        held = predicted["seconds_low"] <= actual["seconds"] <= predicted["seconds_high"]
        loop = actual["train_seconds"]
        lines.append(
            f"{name:<38} {predicted['seconds']:>8.1f}s {span:>15} {actual['seconds']:>7.1f}s "
            f"{predicted['seconds'] / actual['seconds'] - 1:>+7.1%} {'yes' if held else 'NO':>5} "
            f"{predicted['peak_memory_bytes'] / actual['peak_memory_bytes'] - 1:>+7.1%} "
            f"{rival['first steps x N'] / loop - 1:>+9.1%} {rival['mean length x N'] / loop - 1:>+9.1%} "
            f"{rival['FLOPS'] / loop - 1:>+8.0%}"
        )
    return "\n".join(lines)


def summary(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and worst errors of ours and of the rivals, and how often the interval held."""
    good = [one for one in pairs if "error" not in one]
    if not good:
        return {"pairs": 0}

    def spread(values: list[float]) -> dict[str, float]:
        sizes = sorted(abs(value) for value in values)
        return {"median_abs": float(np.median(sizes)), "worst_abs": sizes[-1], "median": float(np.median(values))}

    held = sum(o["predicted"]["seconds_low"] <= o["actual"]["seconds"] <= o["predicted"]["seconds_high"] for o in good)
    low, high = binomial_interval(held, len(good))
    ours = [one["predicted"]["train_seconds"] / one["actual"]["train_seconds"] - 1 for one in good]
    whole = [one["predicted"]["seconds"] / one["actual"]["seconds"] - 1 for one in good]
    memory = [one["predicted"]["peak_memory_bytes"] / one["actual"]["peak_memory_bytes"] - 1 for one in good]
    found = {
        "pairs": len(good),
        "failed": len(pairs) - len(good),
        "held": held,
        "held_interval_90": [low, high],
        "whole run": spread(whole),
        "training loop": spread(ours),
        "peak memory": spread(memory),
    }
    for name in ("first steps x N", "mean length x N", "FLOPS"):
        found[name] = spread([one["rivals"][name] / one["actual"]["train_seconds"] - 1 for one in good])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--budget", type=float, default=30.0)
    parser.add_argument("--samples", type=int, default=4, help="answers that a run writes before and after")
    parser.add_argument("--scale", type=float, default=1.0, help="of the cases' numbers of records")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="numbers of cases, comma-separated; all")
    parser.add_argument("--minutes", type=float, default=0.0, help="start no pair after this many")
    parser.add_argument("--data", type=Path, default=common.GSM8K, help="JSONL with question and answer")
    parser.add_argument("--models", type=Path, help="keep the models here, and take those that are there")
    parser.add_argument("--keep", type=Path, help="copy each pair's measurement and small files there, to look into")
    parser.add_argument("--prepare", action="store_true", help="only make the models of the cases")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        print(f"accuracy: skipped, there is no {arguments.data.name}; name one with --data")
        return 0
    begun = time.monotonic()
    cases = list(GPU_CASES if arguments.device == "cuda" else CPU_CASES)
    shapes = GPU_SHAPES if arguments.device == "cuda" else CPU_SHAPES
    if arguments.scale != 1:
        cases = [scaled(case, arguments.scale) for case in cases]
    if arguments.only:
        cases = [cases[int(number)] for number in arguments.only.split(",")]
    order = [(repeat, case) for repeat in range(arguments.repeats) for case in shuffled(cases, arguments.seed + repeat)]
    content: dict[str, Any] = {"pairs": []}
    if arguments.out and arguments.out.exists():
        content = json.loads(arguments.out.read_text(encoding="utf-8"))
        content["pairs"] = [one for one in content["pairs"] if "error" not in one]  # those are tried again
    done = {(one["repeat"], one["model"], one["case"]) for one in content["pairs"] if "error" not in one}
    content |= {
        "what": "predicted against actual: plan --run, profile then run",
        "date": str(datetime.now(UTC).date()),
        "command": "python bench/accuracy.py " + " ".join(sys.argv[1:]),
        "hardware": content.get("hardware") or common.hardware(arguments.device),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
        "commit": common.commit(),
        "cases": [{"name": case.name, "model": case.model, "options": case.options} for case in cases],
        "shapes": {name: {key: getattr(shape, key) for key in Shape.__slots__} for name, shape in shapes.items()},
    }
    with tempfile.TemporaryDirectory(prefix="accuracy-") as name:
        home = Path(name)
        os.environ["PLAN_HOME"] = str(home / "plan-home")  # past runs would correct the estimates: not wanted here
        for repeat, case in order:
            if (repeat, case.model, case.name) in done:
                continue
            if arguments.minutes and time.monotonic() - begun > 60 * arguments.minutes:
                break
            model = (arguments.models or home) / case.model
            if not (model / "config.json").exists():
                make_model(shapes[case.model], model, weights_on=arguments.device)
            if arguments.prepare:
                continue
            shutil.rmtree(home / "plan-home", ignore_errors=True)
            folder = home / f"run-{time.monotonic_ns()}"
            found = run_pair(case, model, arguments, folder)
            if arguments.keep:
                keep_small_files((home / "plan-home", folder), arguments.keep, f"{len(content['pairs']):02d}")
            content["pairs"].append({"repeat": repeat, "model": case.model, "case": case.name} | found)
            content["summary"] = summary(content["pairs"])
            print(table(content["pairs"][-1:]).splitlines()[-1], flush=True)
            if arguments.out:
                common.write(arguments.out, content)
    print(table(content["pairs"]))
    print(json.dumps(summary(content["pairs"]), indent=1))
    return 0


def keep_small_files(folders: tuple[Path, ...], keep: Path, prefix: str) -> None:
    """Measurement, log, metrics, estimate: what tells where a prediction went wrong; no weights."""
    keep.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        for path in folder.glob("*"):
            if path.suffix in {".sqlite", ".json", ".jsonl", ".log"}:
                shutil.copy(path, keep / f"{prefix}-{path.name}")


def scaled(case: Case, scale: float) -> Case:
    options = list(case.options)
    place = options.index("--limit") + 1
    options[place] = str(round(scale * int(options[place])))
    return Case(case.name, case.model, tuple(options))


def shuffled(cases: list[Case], seed: int) -> list[Case]:
    found = list(cases)
    random.Random(seed).shuffle(found)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
