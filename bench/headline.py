"""The promise itself: the published baseline beside recommended and aggressive, as written and tuned.

    python bench/headline.py --minutes 120 --out bench/results/headline-DATE.json

Two sets of text: the bundled short chat messages on the bundled model, and GSM8K rows on a small Llama that our own
trainer taught other rows first (LoRA on random weights learns next to nothing). `plan tune` searches each tuned preset
once; then every seed runs each contestant by the command that a user types, in shuffled order, so that a change of the
machine's speed meets all alike. Quoted are ratios within a seed:

- speed: seconds of the training loop against (a) the baseline as published (micro-batch 1, fp32, SDPA; TF32 and FP16 do
  not exist on a CPU and both sides run in fp32 there), and (b) the same preset untuned;
- quality: the *drop* of the held-out loss against that of the same global batch untuned. Within 2 %, or inside the
  spread of the seeds, counts as equal;
- the control: a packer that leaks on purpose, its documents under one causal mask. It must not pass for equal;
- the floor: operations that must be done (4 a token and frozen parameter, 6 a trained one, attention on top) over the
  rate of a matrix product measured beside the run. Baseline over floor is the most that any tuning could give.

Written after each run; a second call with the same --out goes on where the first stopped.

`--device cuda` runs GSM8K alone, on a model of the shape that --shape names (bench/accuracy.py), taught other rows by
the trainer's own steps; presets run in the precision that they name (FP16), the baseline in fp32 without TF32.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "bench"))
sys.path.insert(0, str(REPOSITORY))

import accuracy  # noqa: E402
import common  # noqa: E402
import trainers  # noqa: E402

BASELINE, LEAK = "baseline", "recommended, leaking packer"
TUNED = ("recommended", "aggressive")
MODELS = {
    "chat": "the bundled Llama (2.6 M parameters), bundled messages",
    "gsm8k": "trainers.py's Llama (4 layers, hidden 256), taught other GSM8K rows by our trainer",
}
CONTESTANTS = (BASELINE, *TUNED, *(f"{name}, tuned" for name in TUNED), LEAK)
GOALS = {"recommended": 2.6, "aggressive": 4.4}  # published, over the baseline
TOLERANCE = 0.02  # of the drop
RUN_BUDGETS = {"cpu": "3", "cuda": "6"}  # seconds of timing before each run
PRETRAINING = slice(3000, 4000)  # GSM8K records that the base model learns from; training takes the first ones
LEAKING_ROW = 1024  # tokens
GPU_PRETRAINING = slice(2000, 7473)
GPU_PRETRAINING_ROW = 4096  # tokens; four rows a step


def main() -> int:
    arguments = _arguments()
    if arguments.worker == "pretrain":
        return _pretrain(arguments.work) if arguments.device == "cpu" else _teach(arguments)
    if arguments.worker == "leak":
        return _leak(arguments.work)
    texts = ["chat"] * (arguments.device == "cpu") + ["gsm8k"] * common.GSM8K.is_file()
    contestants = [one for one in CONTESTANTS if not arguments.without or one not in arguments.without.split("; ")]
    arguments.work.mkdir(parents=True, exist_ok=True)
    settings = {"rows": arguments.rows, "seeds": arguments.seeds, "tune_budget": arguments.budget}
    settings |= {} if arguments.device == "cpu" else {"device": arguments.device, "shape": arguments.shape}
    result: dict[str, Any] = common.earlier(arguments.out, settings, {"runs": [], "tuned": {}})
    until = time.monotonic() + 60 * arguments.minutes
    done = {(run["text"], run["seed"], run["contestant"]) for run in result["runs"]}
    for seed in range(arguments.seeds):
        for text in texts:
            _prepare(text, arguments)
            if text not in result["tuned"]:
                result["tuned"][text] = _tune(text, arguments)
            between = [one for one in contestants if one not in (BASELINE, LEAK)]
            last = [LEAK] * (LEAK in contestants)  # it copies a job
            order = [BASELINE, *random.sample(between, len(between)), *last]
            for contestant in order:
                if (text, seed, contestant) in done:
                    continue
                if time.monotonic() > until:
                    print("headline: the time is up; the same command goes on", file=sys.stderr)
                    _print(result)
                    return 0
                result["runs"].append(_run(text, seed, contestant, arguments))
                result |= {
                    "what": "training time and loss drop, presets as written and tuned against the published baseline",
                    "date": date.today().isoformat(),
                    "settings": settings,
                    "models": MODELS
                    if arguments.device == "cpu"
                    else {"gsm8k": f"the shape of {arguments.shape}, taught other GSM8K rows by our trainer's steps"},
                    "hardware": common.hardware(arguments.device),
                    "versions": {one: importlib.metadata.version(one) for one in accuracy.VERSIONED},
                    "commit": common.commit(),
                    "verdict": verdict(result["runs"]),
                }
                common.write(arguments.out, result)
    _print(result)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Baseline against tuned presets: speed-up and loss drop.")
    parser.add_argument("--minutes", type=float, default=120.0, help="no further run starts after this")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000, help="examples of each text")
    parser.add_argument("--budget", type=float, default=60.0, help="of `plan tune`, seconds")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "headline")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", default="llama-1b", help="of the model on a GPU")
    parser.add_argument("--without", default="", help="contestants left out, separated by '; '")
    parser.add_argument("--steps", type=int, default=50, help="that teach the model on a GPU")
    parser.add_argument("--out", type=Path, default=common.RESULTS / f"headline-{date.today().isoformat()}.json")
    parser.add_argument("--worker", choices=("pretrain", "leak"), help=argparse.SUPPRESS)
    return parser.parse_args()


# -- what is trained on ------------------------------------------------------------------------------------------------


def _prepare(text: str, arguments: argparse.Namespace) -> None:
    """The text's file and, for GSM8K, its model; once."""
    from presets.demo.messages import generate_messages

    if text == "chat":
        lines = [json.dumps(one) for one in generate_messages(arguments.rows)]
    else:
        lines = common.GSM8K.read_text(encoding="utf-8").splitlines()[: arguments.rows]
        if not (arguments.work / "taught" / "config.json").is_file():
            _worker("pretrain", arguments.work, arguments)
    (arguments.work / f"{text}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _pretrain(work: Path) -> int:
    """The GSM8K base model: a fresh one, taught all tokens of other rows by our own full fine-tuning."""
    from presets.schema import load_preset
    from trainer.job import DataSpec, EvaluationSpec, Job
    from trainer.loop import train

    fresh = argparse.Namespace(folder=work, threads=os.cpu_count() or 1, pretrain_steps=0)
    trainers.prepare(fresh)
    lines = common.GSM8K.read_text(encoding="utf-8").splitlines()
    (work / "pretraining.jsonl").write_text("\n".join(lines[PRETRAINING]) + "\n", encoding="utf-8")
    preset = replace(
        load_preset("baseline"),
        micro_batch_size=4,
        gradient_accumulation_steps=2,
        adapter="full",
        learning_rate=2e-3,
    )
    job = Job(
        name="pretraining",
        preset=preset,
        model=str(work / "model"),
        data=DataSpec(source=str(work / "pretraining.jsonl"), train_on="all"),
        device="cpu",
        precision="fp32",
        base_precision="fp32",
        micro_batch_size=4,
        packing=True,
        packed_length=1024,
        loss="lean",
        evaluation=EvaluationSpec(times_during_training=0, num_samples=0),
    )
    run = work / "pretraining"
    shutil.rmtree(run, ignore_errors=True)  # of a call that was cut off
    run.mkdir()
    (run / "job.json").write_text(job.to_json(), encoding="utf-8")
    record = train(run)
    assert record is not None
    print(f"pretraining: {record.actual.eval_loss_before} -> {record.actual.eval_loss_after}", file=sys.stderr)
    shutil.copytree(run / "model", work / "taught")
    return 0


def _teach(arguments: argparse.Namespace) -> int:
    """The GPU's base model: random weights, taught all tokens of other rows by the trainer's own steps.

    Not by a whole run, whose checkpoint would write weights and moments of the full model to the disk.
    """
    import torch

    from presets.schema import load_preset
    from trainer.agreement import settle_packing
    from trainer.data import prepare_data
    from trainer.feed import feed
    from trainer.job import DataSpec, EvaluationSpec, Job
    from trainer.model import load_model
    from trainer.planning import learning_rates, plan_job
    from trainer.step import make_stepper, micro_step, optimizer_step

    work, device = arguments.work, arguments.device
    precision: Any = "bf16" if device == "cuda" else "fp32"
    shapes = accuracy.GPU_SHAPES | accuracy.CPU_SHAPES
    accuracy.make_model(shapes[arguments.shape], work / "model", weights_on=device)
    lines = common.GSM8K.read_text(encoding="utf-8").splitlines()
    (work / "pretraining.jsonl").write_text("\n".join(lines[GPU_PRETRAINING]) + "\n", encoding="utf-8")
    preset = replace(
        load_preset("baseline"),
        micro_batch_size=1,
        gradient_accumulation_steps=80,
        precision=precision,
        adapter="full",
        learning_rate=5e-4,
    )
    job = Job(
        name="pretraining",
        preset=preset,
        model=str(work / "model"),
        data=DataSpec(source=str(work / "pretraining.jsonl"), train_on="all"),
        device=device,
        precision=precision,
        base_precision="fp32",
        micro_batch_size=1,
        packing=True,
        packed_length=GPU_PRETRAINING_ROW,
        evaluation=EvaluationSpec(fraction=0.0, minimum=0, times_during_training=0, num_samples=0),
    )
    data = prepare_data(job.data, model=job.model, max_length=preset.max_length, seed=job.seed)
    plan = plan_job(job, data).plan
    loaded = load_model(job, need_weights=True)
    settle_packing(loaded.model, data, job)
    stepper = make_stepper(loaded.model, device, precision, loss="lean")
    rates = learning_rates(preset, plan)
    num_steps = min(arguments.steps, plan.num_steps)
    supervised = data.num_supervised
    losses = []
    for step in range(num_steps):
        micros = range(int(plan.window_offsets[step]), int(plan.window_offsets[step + 1]))
        targets = int(supervised[plan.documents_of_window(step)].sum())
        parts = feed((plan.rows_of_micro_batch(micro) for micro in micros), data, device)
        total = torch.stack([micro_step(stepper, batch, scale=1.0 / targets) for batch in parts]).sum()
        losses.append(float(total) / targets)
        optimizer_step(stepper, float(rates[step]))
    print(f"pretraining: {num_steps} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}", file=sys.stderr)
    loaded.model.to(torch.bfloat16).save_pretrained(work / "taught")
    for path in (work / "model").glob("*token*"):
        shutil.copy(path, work / "taught")
    for path in (work / "model").glob("*.jinja"):
        shutil.copy(path, work / "taught")
    return 0


# -- the contestants ---------------------------------------------------------------------------------------------------


def _command(text: str, arguments: argparse.Namespace, *more: str) -> dict[str, Any]:
    """The last JSON object that a `plan` command prints; an error ends the bench."""
    command = [sys.executable, "-P", "-m", "planner.cli", *more, "--dataset", str(arguments.work / f"{text}.jsonl")]
    command += ["--device", arguments.device, "--json"]
    command += ["--eval-fraction", "0.17"] if arguments.device == "cuda" else []  # few rows: hold out more of them
    if text == "gsm8k":
        command += ["--model", str(arguments.work / "taught"), "--columns", "prompt=question,completion=answer"]
    environment = accuracy.environment() | {"PLAN_HOME": str(arguments.work / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"headline: {' '.join(more)} failed\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout))


def _tune(text: str, arguments: argparse.Namespace) -> dict[str, Any]:
    print(f"{text}: plan tune {' '.join(TUNED)}", file=sys.stderr)
    found = _command(text, arguments, "tune", *TUNED, "--budget", str(arguments.budget))
    untuned = {row["name"]: row["note"] for row in found["rows"] if not row.get("tuned_from")}
    return {"rows": [row for row in found["rows"] if row.get("tuned_from")], "notes": untuned}


def _run(text: str, seed: int, contestant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    flops = accuracy.matmul_flops(arguments.device)
    folder = arguments.work / "runs" / f"{text}-{seed}-{contestant.replace(', ', '-').replace(' ', '-')}"
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(exist_ok=True)
    preset, _, how = contestant.partition(", ")
    if contestant == LEAK:
        folder.mkdir()
        shutil.copy(arguments.work / "runs" / f"{text}-{seed}-recommended" / "job.json", folder / "job.json")
        _worker("leak", folder, arguments)
    else:
        more = [
            "--run",
            preset,
            "--seed",
            str(seed),
            "--output",
            str(folder),
            "--budget",
            RUN_BUDGETS[arguments.device],
        ]
        more += ["--samples", "0"] if arguments.device == "cuda" else []
        _command(text, arguments, *more, *(["--tuned"] if how == "tuned" else []))
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    actual, job = record["actual"], record["job"]
    drop = actual["eval_loss_before"] - actual["eval_loss_after"]
    one = {
        "text": text,
        "seed": seed,
        "contestant": contestant,
        "predicted": record["predicted"],
        "actual": actual,
        "train_seconds": actual["train_seconds"],
        "seconds": actual["seconds"],
        "num_tokens": actual["num_tokens"],
        "num_steps": actual["num_steps"],
        "eval_loss_before": actual["eval_loss_before"],
        "eval_loss_after": actual["eval_loss_after"],
        "drop": drop,
        "matmul_flops": flops,
        "floor_seconds": _operations(folder) / flops,
        "setting": {key: job[key] for key in ("micro_batch_size", "packing", "packed_length", "loss", "num_threads")},
    }
    print(f"{text}, seed {seed}, {contestant}: {one['train_seconds']:.1f} s, loss drop {drop:.3f}", file=sys.stderr)
    return one


def _operations(run: Path) -> float:
    """What must be computed, whatever the split: matrix products of real tokens, and attention inside documents."""
    from trainer.batching import BatchPlan
    from trainer.data import prepare_data
    from trainer.job import Job
    from trainer.model import load_model
    from trainer.planning import with_evaluation_on_top

    job, plan = Job.read(run / "job.json"), BatchPlan.load(run / "batch_plan.npz")
    spec = with_evaluation_on_top(job.data, job.evaluation)
    data = prepare_data(spec, model=job.model, max_length=job.preset.max_length, seed=job.seed, trust_remote_code=False)
    lengths = data.lengths[plan.order].astype(float)
    loaded = load_model(job, need_weights=False)
    frozen = trained = 0
    for name, parameter in loaded.model.named_parameters():
        if parameter.ndim < 2 or "embed_tokens" in name:  # norms and the table look-up multiply no matrix
            continue
        frozen, trained = (
            (frozen, trained + parameter.numel()) if parameter.requires_grad else (frozen + parameter.numel(), trained)
        )
    config = loaded.model.config
    targets = float(data.num_supervised[plan.order].sum())
    output = config.vocab_size * config.hidden_size  # tied or not, only the positions that count need it
    if not config.tie_word_embeddings:
        frozen -= output
    # Scores and weighted sums, forward and twice backward, half of it under the causal mask.
    attention = 6.0 * config.num_hidden_layers * config.hidden_size * float((lengths**2).sum())
    return (4.0 * frozen + 6.0 * trained) * float(lengths.sum()) + 4.0 * output * targets + attention


def _worker(name: str, folder: Path, arguments: argparse.Namespace) -> None:
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "--work", str(folder)]
    command += ["--device", arguments.device, "--shape", arguments.shape, "--steps", str(arguments.steps)]
    environment = accuracy.environment() | {"PLAN_HOME": str(arguments.work / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"headline: the worker '{name}' failed\n{done.stderr[-3000:]}")
    print(done.stderr.strip().splitlines()[-1], file=sys.stderr)


def _leak(run: Path) -> int:
    """The job of a run folder, packed with nothing to keep the documents apart, as where position_ids are lost."""
    from trainer import feed, loop
    from trainer.job import Job
    from trainer.process import quiet_waiting

    quiet_waiting()
    job = replace(Job.read(run / "job.json"), packing=True, packed_length=LEAKING_ROW)
    (run / "job.json").write_text(job.to_json(), encoding="utf-8")
    watched_loop: Any = loop
    watched_loop.settle_packing = lambda *_, **__: None  # it would refuse
    watched: Any = feed
    batch_on = watched.batch_on

    def leaking(*given: Any) -> Any:
        return replace(batch_on(*given), position_ids=None, documents=None, arrangement=None)

    watched.batch_on = leaking
    record = loop.train(run)
    return 0 if record is not None else 1


# -- what it says ------------------------------------------------------------------------------------------------------


def verdict(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Speed-ups and drops by text and preset, from the seeds for which both sides ran."""
    found: dict[str, Any] = {}
    by = {(run["text"], run["seed"], run["contestant"]): run for run in runs}
    for text in sorted({run["text"] for run in runs}):
        seeds = sorted({run["seed"] for run in runs if run["text"] == text})

        def pairs(one: str, other: str, text: str = text, seeds: list[int] = seeds) -> list[tuple[Any, Any]]:
            keys = [((text, seed, one), (text, seed, other)) for seed in seeds]
            return [(by[left], by[right]) for left, right in keys if left in by and right in by]

        rows: dict[str, Any] = {}
        for preset in TUNED:
            tuned = f"{preset}, tuned"
            rows[preset] = {
                "over_baseline_untuned": _ratios(pairs(BASELINE, preset), "train_seconds"),
                "over_baseline": _ratios(pairs(BASELINE, tuned), "train_seconds"),
                "over_untuned": _ratios(pairs(preset, tuned), "train_seconds"),
                "goal": GOALS[preset],
                "quality": _equal(pairs(tuned, preset)),
            }
        floors = [run["train_seconds"] / run["floor_seconds"] for run in runs if _is(run, text, BASELINE)]
        found[text] = {
            "presets": rows,
            "leaking_packer": _equal(pairs(LEAK, "recommended")),
            "most_that_tuning_could_give": statistics.median(floors) if floors else None,
        }
    return found


def _is(run: dict[str, Any], text: str, contestant: str) -> bool:
    return run["text"] == text and run["contestant"] == contestant


def _ratios(pairs: list[tuple[Any, Any]], key: str) -> dict[str, Any] | None:
    ratios = [one[key] / other[key] for one, other in pairs]
    return {"ratios": ratios, "median": statistics.median(ratios)} if ratios else None


def _equal(pairs: list[tuple[Any, Any]]) -> dict[str, Any] | None:
    """Whether the first ones' loss drops are those of the others: within 2 %, or inside the spread of the seeds."""
    if not pairs or not all(other["drop"] for _, other in pairs):
        return None
    ratios = [one["drop"] / other["drop"] for one, other in pairs]
    drops = [other["drop"] for _, other in pairs]
    off = statistics.mean(one["drop"] - other["drop"] for one, other in pairs)
    spread = statistics.stdev(drops) if len(drops) > 1 else 0.0
    within = abs(statistics.mean(ratios) - 1) <= TOLERANCE
    return {
        "drop_ratios": ratios,
        "mean_difference": off,
        "spread_of_seeds": spread,
        "within_2_percent": within,
        "is_equal": within or abs(off) <= spread,
    }


def _print(result: dict[str, Any]) -> None:
    from tabulate import tabulate

    rows = []
    for text, found in result.get("verdict", {}).items():
        for preset, one in found["presets"].items():
            if one["over_baseline"] is None:
                continue
            quality = one["quality"]
            rows.append(
                [
                    text,
                    preset,
                    *(f"{one[key]['median']:.2f}" if one[key] else "" for key in list(one)[:3]),
                    f"{one['goal']:.1f}",
                    f"{found['most_that_tuning_could_give']:.1f}",
                    " ".join(f"{ratio:.3f}" for ratio in quality["drop_ratios"]) if quality else "",
                    "" if not quality else "equal" if quality["is_equal"] else "NOT equal",
                ]
            )
        leak = found["leaking_packer"]
        if leak:
            ratios = " ".join(f"{ratio:.3f}" for ratio in leak["drop_ratios"])
            rows.append([text, LEAK, "", "", "", "", "", ratios, "EQUAL" if leak["is_equal"] else "not equal"])
    headers = ["text", "preset", "untuned/base", "(a) tuned/base", "(b) tuned/untuned", "goal", "floor", "drop", "loss"]
    print(tabulate(rows, headers, disable_numparse=True))


if __name__ == "__main__":
    sys.exit(main())
