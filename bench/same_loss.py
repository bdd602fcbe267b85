"""Loss and gradient norm per step against Transformers' Trainer and TRL's SFTTrainer, everything else the same.

    python bench/same_loss.py

Checkpoint, first adapter, data order and settings are shared. Every contestant trains in a process of its own, fp32 on
the CPU, and is fed the examples of our batch plan, already tokenised, in the plan's order. What it really saw is hashed
on its way into the model, so that "same data" is checked and not assumed. A control that must *not* agree shows that
the tolerances are sharp enough: Trainer with the gradient of each micro-batch averaged by itself, as before
transformers#34191. Its loss is reported weighted by tokens like everyone's, so that only the weights that the wrong
gradient made can tell it apart.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "bench"))
sys.path.insert(0, str(REPOSITORY))

import common  # noqa: E402
from trainers import (  # noqa: E402
    CONTROL,
    DATA,
    GLOBAL_BATCH_SIZE,
    LEARNING_RATE,
    MAX_LENGTH,
    NUM_RECORDS,
    OURS,
    SEED,
    SFT,
    TITLES,
    TRAINER,
    VERSIONED,
    WARMUP_RATIO,
    WORKERS,
    Result,
)

NUM_STEPS = 20
SPLITS = ((1, 8), (2, 4))  # (micro-batch, accumulation) of the same global batch
TOLERANCE = 5e-4  # half a unit of the third decimal
NORM_TOLERANCE = 1e-4  # relative


# -- the conductor: starts the workers, compares what they wrote -------------------------------------------------------


def main() -> int:
    arguments = _arguments()
    if arguments.worker:
        from trainer.process import quiet_waiting

        quiet_waiting()  # for all contestants alike, before torch is imported
        WORKERS[arguments.worker](arguments)
        return 0
    if not DATA.is_file():
        print(f"same_loss: skipped, there is no {DATA.name}; GSM8K names one")
        return 0
    if importlib.util.find_spec("trl") is None:
        print("same_loss: trl is missing; install it with: pip install -c constraints.txt trl", file=sys.stderr)
        return 1
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="same-loss-") as name:
        folder = Path(name)
        _start("prepare", folder, arguments)
        cases = [_case(folder, micro, accumulation, arguments) for micro, accumulation in SPLITS]
    for case in cases:
        _print(case)
    agree = all(one["agrees"] for case in cases for one in case["against_ours"].values())
    sharp = not any(one["agrees"] for case in cases for one in case["control"].values())
    result = {
        "what": "loss and gradient norm per optimizer step, three trainers on identical batches",
        "date": date.today().isoformat(),
        "command": "python bench/same_loss.py",
        "verdict": "agree" if agree and sharp else "DISAGREE" if sharp else "the control agreed: the test is blunt",
        "tolerance": TOLERANCE,
        "relative_grad_norm_tolerance": NORM_TOLERANCE,
        "settings": _settings(arguments),
        "hardware": common.hardware("cpu", arguments.threads),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONED} | {"python": sys.version.split()[0]},
        "commit": common.commit(),
        "seconds": round(time.perf_counter() - begun, 1),
        "cases": cases,
    }
    path = common.RESULTS / f"same_loss-{result['date']}.json"
    common.write(path, result)
    print(f"verdict: {result['verdict']} ({result['seconds']} s); written to {path.relative_to(REPOSITORY)}")
    return 0 if agree and sharp else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Loss and gradient norm per step: ours, Transformers' Trainer, TRL's SFTTrainer."
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each worker")
    parser.add_argument("--pretrain-steps", type=int, default=60, help="steps on plain text that make the checkpoint")
    parser.add_argument("--worker", choices=sorted(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--micro", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--accumulation", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _start(worker: str, folder: Path, arguments: argparse.Namespace, micro: int = 1, accumulation: int = 1) -> None:
    """One worker in a process of its own, offline, with its caches in the temporary folder."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(arguments.threads),
        "PYTHONPATH": str(REPOSITORY),
        "PLAN_HOME": str(folder / "plan-home"),
        "HF_HOME": str(folder / "hf-home"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", worker, "--folder", str(folder)]
    command += ["--threads", str(arguments.threads), "--pretrain-steps", str(arguments.pretrain_steps)]
    command += ["--micro", str(micro), "--accumulation", str(accumulation)]
    begun = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"same_loss: the worker '{worker}' failed\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    print(f"{worker:8} micro {micro} x GA {accumulation}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)


def _case(folder: Path, micro: int, accumulation: int, arguments: argparse.Namespace) -> Result:
    case_folder = folder / f"micro-{micro}"
    case_folder.mkdir()
    results: dict[str, Result] = {}
    with_control = (micro, accumulation) == SPLITS[0]
    for worker in (OURS, TRAINER, SFT, CONTROL) if with_control else (OURS, TRAINER, SFT):
        _start(worker, folder, arguments, micro, accumulation)
        results[worker] = json.loads((case_folder / f"{worker}.json").read_text(encoding="utf-8"))
    ours = results[OURS]
    return {
        "micro_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "contestants": results,
        "against_ours": {name: _compare(ours, results[name]) for name in (TRAINER, SFT)},
        "control": {CONTROL: _compare(ours, results[CONTROL])} if with_control else {},
    }


def _compare(ours: Result, other: Result) -> Result:
    pairs = list(zip(ours["loss"], other["loss"], strict=True))
    differences = [abs(mine - theirs) for mine, theirs in pairs]
    rounded = [round(abs(round(mine, 3) - round(theirs, 3)), 3) for mine, theirs in pairs]
    norms = [abs(mine - theirs) / mine for mine, theirs in zip(ours["grad_norm"], other["grad_norm"], strict=True)]
    same_batches = ours["batches_sha256"] == other["batches_sha256"] and ours["num_targets"] == other["num_targets"]
    return {
        "num_steps": len(pairs),
        "same_batches": same_batches,
        "largest_loss_difference": max(differences),
        "at_step": differences.index(max(differences)) + 1,
        "steps_below_tolerance": sum(difference < TOLERANCE for difference in differences),
        "steps_equal_when_rounded_to_3_decimals": sum(difference == 0 for difference in rounded),
        "largest_difference_when_rounded": max(rounded),
        "largest_learning_rate_difference": _largest(ours["learning_rate"], other["learning_rate"]),
        "largest_relative_grad_norm_difference": max(norms),
        "steps_with_grad_norm_below_tolerance": sum(norm < NORM_TOLERANCE for norm in norms),
        "relative_final_adapter_difference": other["relative_final_adapter_difference"],
        "agrees": len(pairs) == NUM_STEPS
        and same_batches
        and max(differences) < TOLERANCE
        and max(norms) < NORM_TOLERANCE,
    }


def _largest(first: list[float], second: list[float]) -> float:
    return max(abs(mine - theirs) for mine, theirs in zip(first, second, strict=True))


def _print(case: Result) -> None:
    from tabulate import tabulate

    results = case["contestants"]
    others = [name for name in (TRAINER, SFT, CONTROL) if name in results]
    rows = []
    for step, mine in enumerate(results[OURS]["loss"]):
        row = [str(step + 1), str(results[OURS]["num_targets"][step]), f"{mine:.6f}"]
        for name in others:
            loss = results[name]["loss"][step]
            row += [f"{loss:.6f}", f"{abs(mine - loss):.1e}"]
        rows.append(row)
    short = {TRAINER: "Trainer", SFT: "SFTTrainer", CONTROL: "control"}
    headers = ["step", "targets", "ours", *(title for name in others for title in (short[name], "diff"))]
    print(f"\nmicro-batch {case['micro_batch_size']} x GA {case['gradient_accumulation_steps']}")
    print(tabulate(rows, headers, disable_numparse=True, stralign="right"))
    before, after = results[OURS]["held_out_loss_before"], results[OURS]["held_out_loss_after"]
    print(f"ours: held-out loss {before:.4f} before, {after:.4f} after")
    for name, one in (case["against_ours"] | case["control"]).items():
        print(
            f"{TITLES[name]}: largest difference {one['largest_loss_difference']:.2e} (step {one['at_step']}); "
            f"{one['steps_below_tolerance']}/{one['num_steps']} steps below {TOLERANCE}, "
            f"{one['steps_equal_when_rounded_to_3_decimals']} equal when rounded to 3 decimals "
            f"(largest then {one['largest_difference_when_rounded']:.3f}); same batches: {one['same_batches']}; "
            f"learning rate {one['largest_learning_rate_difference']:.0e}, "
            f"gradient norm {one['largest_relative_grad_norm_difference']:.1e} (relative; "
            f"{one['steps_with_grad_norm_below_tolerance']} steps below {NORM_TOLERANCE}), "
            f"final adapter {one['relative_final_adapter_difference']:.1e} (relative)"
        )


def _settings(arguments: argparse.Namespace) -> Result:
    return {
        "global_batch_size": GLOBAL_BATCH_SIZE,
        "num_steps": NUM_STEPS,
        "precision": "fp32",
        "device": "cpu",
        "adapter": "LoRA rank 8, alpha 16, all-linear, dropout 0, same initial weights",
        "optimizer": "AdamW, betas 0.9 and 0.999, eps 1e-8, weight decay 0, gradients clipped at norm 1",
        "learning_rate": LEARNING_RATE,
        "schedule": f"linear, warm-up over {WARMUP_RATIO} of the steps",
        "max_length": MAX_LENGTH,
        "data": f"the first {NUM_RECORDS} records of gsm8k_train.jsonl, loss on the answers",
        "checkpoint": f"Llama-shaped, made on the spot: {arguments.pretrain_steps} steps on later records, seed {SEED}",
        "seed": SEED,
    }


if __name__ == "__main__":
    sys.exit(main())
