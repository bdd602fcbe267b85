"""A system prompt computed once in a packed row, beside once for each document: time of the same windows, same loss.

    python bench/beginning.py --out bench/results/beginning-DATE.json

GSM8K rows as chats with a system prompt in front of each, real text cut to several lengths, packed to the same rows.
Both layouts of the same windows (16 examples) are run in turns in one process, each window as the loop runs it; quoted
are ratios of seconds, turn by turn. The loss of each window is compared as well. `--device cuda --model FOLDER` takes a
model that lies there; without, a Llama of 4 layers
and a tokenizer of that text are made.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "bench"))
sys.path.insert(0, str(REPOSITORY))

import accuracy  # noqa: E402
import common  # noqa: E402
import trainers  # noqa: E402

PROMPTS = (0, 20, 60, 200)  # words of the system prompt
WORDS_FROM = 5000  # record of the data whose text, and that of the next ones, makes the prompt


def chats(records: list[dict[str, str]], words: int, rows: int, path: Path) -> None:
    """The first rows as chats, with a system prompt of so many words; none where it is 0."""
    text = " ".join(record["question"] for record in records[WORDS_FROM:])
    prompt = " ".join(text.split()[:words])
    lines = []
    for record in records[:rows]:
        messages = [{"role": "system", "content": prompt}] if prompt else []
        messages += [
            {"role": "user", "content": record["question"]},
            {"role": "assistant", "content": record["answer"]},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def compare(options: argparse.Namespace, model: Path, source: Path) -> dict[str, Any]:
    """Both layouts over the same windows."""
    import torch

    from planner.group import rows_of
    from planner.workload import Worker
    from presets.schema import load_preset
    from trainer.batching import Pass, Stretch, make_batch_plan
    from trainer.data import prepare_data
    from trainer.job import DataSpec, EvaluationSpec, Job
    from trainer.step import clear_gradients

    on_gpu = options.device == "cuda"
    job = Job(
        name="beginning",
        preset=replace(load_preset("baseline"), max_length=options.length),
        model=str(model),
        data=DataSpec(source=str(source)),
        device=options.device,
        precision="bf16" if on_gpu else "fp32",
        base_precision="bf16" if on_gpu else "fp32",
        micro_batch_size=1,
        packing=True,
        packed_length=options.length,
        evaluation=EvaluationSpec(num_samples=0),
    )
    data = prepare_data(job.data, model=job.model, max_length=options.length, seed=0)
    passes = (
        Pass(
            examples=np.arange(min(options.rows, len(data))),
            num_epochs=1,
            stretches=(Stretch(phase=0, global_batch_size=16),),
        ),
    )
    plans = {
        name: make_batch_plan(
            data.lengths, passes, micro_batch_size=1, packed_length=options.length, beginnings=beginnings
        )
        for name, beginnings in (("whole", None), ("shared", data.beginnings))
    }
    worker = Worker(job, data, None)
    worker.load()
    held = {name: data.as_planned(shares_beginnings=plan.shares_beginnings) for name, plan in plans.items()}
    longest = {name: plan.micro_shapes(data.lengths).longest_row(True) for name, plan in plans.items()}

    def window(name: str, number: int) -> float:
        worker.data = held[name]
        first, last = plans[name].window_offsets[number : number + 2].tolist()
        return worker.window([rows_of(plans[name], micro) for micro in range(first, last)], longest[name])

    def loss(name: str, number: int) -> tuple[float, float]:
        """Of a window, with the norm of its gradient."""
        worker.data = held[name]
        first, last = plans[name].window_offsets[number : number + 2].tolist()
        rows = [rows_of(plans[name], micro) for micro in range(first, last)]
        worker._settle(rows)
        scale = 1.0 / worker._supervised(rows)
        total = sum(float(worker._micro_step(batch, scale)) for batch in worker._feed(rows)) * scale
        norm = torch.stack(
            [one.grad.float().norm() for one in worker.stepper.parameters if one.grad is not None]
        ).norm()
        clear_gradients(worker.stepper.parameters)
        return total, float(norm)

    numbers = range(min(options.windows, plans["whole"].num_steps))
    apart = [(loss("whole", number), loss("shared", number)) for number in numbers]
    seconds: dict[str, list[float]] = {"whole": [], "shared": []}
    for turn in range(options.turns + 1):
        for name in ("whole", "shared") if turn % 2 else ("shared", "whole"):
            taken = sum(window(name, number) for number in numbers)
            if turn:  # the first is a warm-up
                seconds[name].append(taken)
    tokens = {name: int(plan.micro_shapes(data.lengths).tokens.sum()) for name, plan in plans.items()}
    return {
        "common_tokens": 0 if data.beginnings is None else int(data.beginnings.sizes.max()),
        "mean_length": float(data.lengths.mean()),
        "tokens": tokens,
        "seconds": seconds,
        "whole_over_shared": [one / other for one, other in zip(seconds["whole"], seconds["shared"], strict=True)],
        "largest_loss_difference": max(abs(one[0] - other[0]) / one[0] for one, other in apart),
        "largest_norm_difference": max(abs(one[1] - other[1]) / one[1] for one, other in apart),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", type=Path, help="a model folder with a tokenizer")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--length", type=int, default=2048, help="of packed rows, and of the longest example")
    parser.add_argument("--windows", type=int, default=2, help="timed in turns")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not common.GSM8K.is_file():
        print(f"beginning: skipped, there is no {common.GSM8K.name}; name one in the variable GSM8K")
        return 0
    records = [json.loads(line) for line in common.GSM8K.read_text(encoding="utf-8").splitlines()]
    result: dict[str, Any] = {
        "what": "seconds of packed windows whose documents hold their system prompt, over those that share it in a row",
        "date": str(date.today()),
        "hardware": common.hardware(options.device),
        "versions": {name: importlib.metadata.version(name) for name in accuracy.VERSIONED},
        "commit": common.commit(),
        "settings": {name: getattr(options, name) for name in ("rows", "length", "windows", "turns")},
        "cases": [],
    }
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        model = options.model or Path(folder) / "model"
        if options.model is None:
            fresh = argparse.Namespace(folder=Path(folder), threads=os.cpu_count() or 1, pretrain_steps=0)
            trainers.prepare(fresh)
        for words in PROMPTS:
            source = Path(folder) / f"chats-{words}.jsonl"
            chats(records, words, options.rows, source)
            case = {"words": words, **compare(options, model, source)}
            result["cases"].append(case)
            ratios = case["whole_over_shared"]
            print(
                f"{words:4} words, {case['common_tokens']:4} tokens of {case['mean_length']:.0f}: "
                f"{statistics.median(ratios):.2f} times as long ({min(ratios):.2f}-{max(ratios):.2f}); tokens "
                f"{case['tokens']['whole'] / case['tokens']['shared']:.2f}; "
                f"loss {case['largest_loss_difference']:.0e}, gradient {case['largest_norm_difference']:.0e} apart",
                flush=True,
            )
            if options.out is not None:
                common.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
