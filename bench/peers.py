"""Real tokens per second beside TRL's SFTTrainer and Transformers' Trainer: same checkpoint, data, LoRA, precision.

    python bench/peers.py --rounds 3 --out bench/results/peers-DATE.json

Every round runs each contestant once, in a process of its own and in shuffled order, so that a change of the machine's
speed meets all alike; what counts is the ratio within a round. Seconds run from the end of the third optimizer step
(on a GPU of the sixth) to the end of the last one, loading and first shapes left out; tokens are those of the examples,
without padding.

Two questions: at equal settings (micro-batch x accumulation, padded, plain loss), and each trainer at the best of the
settings tried for it. TRL's packing puts the documents of a row under one causal mask unless FlashAttention is there:
without it its documents see each other. It stands in the table all the same, as the fastest that it offers.

On a GPU the peers, like ours, run without cuDNN's attention, which costs them most of their time where the rows' widths
differ; with it, as PyTorch chooses by itself, they stand in the table too.

`--device cuda` compares in bf16 on a model of the shape that --shape names (bench/accuracy.py), with random weights.

Written after each contestant, an unfinished round apart from the others and without a part in the verdict; a second
call with the same --out adds rounds.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "bench"))

import common  # noqa: E402
import trainers as base  # noqa: E402

SKIPPED_STEPS = {"cpu": 3, "cuda": 6}  # shapes met for the first time, allocator, caches
MOST_TOKENS = 1024
MODEL = "Llama-shaped, 4 layers, hidden 256, 8 heads (4 key-value), 4,096-word vocabulary, random weights"
ROWS = {"cpu": 136, "cuda": 520}
GLOBAL_BATCH_SIZES = {"cpu": base.GLOBAL_BATCH_SIZE, "cuda": 32}
PRECISIONS = {"cpu": "fp32", "cuda": "bf16"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One trainer under one setting. `packed`: tokens in a packed row; 0: padded."""

    who: str  # ours, trainer, sft
    micro: int = 1
    packed: int = 0
    is_grouped: bool = False  # the peers' grouping by length, over the whole data
    is_lean: bool = False
    is_equal: bool = False  # takes part in the comparison at equal settings
    has_plans: bool = False  # with cuDNN's attention, PyTorch's own choice on Hopper, which builds a plan a shape

    @property
    def name(self) -> str:
        parts = [base.TITLES[self.who], f"packed {self.packed}" if self.packed else f"micro {self.micro}"]
        parts += ["grouped"] * self.is_grouped + ["lean loss"] * self.is_lean
        parts += ["cuDNN"] * self.has_plans
        return ", ".join(parts)


EQUAL = {"cpu": (1, 4), "cuda": (4,)}  # micro-batches compared at equal settings


def _entries(device: str) -> tuple[Entry, ...]:
    equal = tuple(
        Entry(who, micro, is_equal=True) for micro in EQUAL[device] for who in (base.OURS, base.TRAINER, base.SFT)
    )
    if device == "cpu":
        return (
            *equal,
            *(Entry(base.OURS, packed=tokens, is_lean=True) for tokens in (512, 1024, 2048)),
            *(Entry(base.SFT, micro, is_grouped=True) for micro in (2, 4, 8)),
            *(Entry(base.SFT, packed=tokens) for tokens in (512, 1024)),
        )
    return (
        *equal,
        *(Entry(base.OURS, packed=tokens, is_lean=True) for tokens in (8192, 16384)),
        *(Entry(base.SFT, micro, is_grouped=True) for micro in (16, 32)),
        *(Entry(base.SFT, packed=tokens) for tokens in (8192, 16384)),
        *(Entry(base.OURS, micro, is_lean=True) for micro in (16, 32)),
        Entry(base.SFT, 4, has_plans=True),
        Entry(base.SFT, 32, is_grouped=True, has_plans=True),
        Entry(base.OURS, packed=20480, is_lean=True),  # a whole window
    )


def main() -> int:
    arguments = _arguments()
    if arguments.worker is not None:
        from trainer.process import quiet_waiting

        quiet_waiting()  # for all contestants alike, before torch is imported
        entry = _entries(arguments.device)[arguments.worker]
        (_ours if entry.who == base.OURS else _theirs)(entry, arguments)
        return 0
    if not base.DATA.is_file():
        print(f"peers: skipped, there is no {base.DATA.name}; GSM8K names one")
        return 0
    if importlib.util.find_spec("trl") is None:
        print("peers: trl is missing; install it with: pip install -c constraints.txt -e '.[bench]'", file=sys.stderr)
        return 1
    settings = {
        "device": arguments.device,
        "precision": PRECISIONS[arguments.device],
        "rows": arguments.rows,
        "global_batch_size": GLOBAL_BATCH_SIZES[arguments.device],
        "threads": arguments.threads,
        "skipped_steps": SKIPPED_STEPS[arguments.device],
    }
    result: dict[str, Any] = common.earlier(arguments.out, settings, {"rounds": []})
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        folder = Path(name)
        model = MODEL
        if arguments.device == "cpu":
            base.prepare(argparse.Namespace(threads=arguments.threads, folder=folder, pretrain_steps=0))
        elif arguments.model:
            (folder / "model").symlink_to(arguments.model.resolve())
            model = arguments.model.name
        else:
            import accuracy

            accuracy.make_model(accuracy.GPU_SHAPES[arguments.shape], folder / "model", weights_on=arguments.device)
            model = f"the shape of {arguments.shape}, random weights"
        for _ in range(arguments.rounds):
            result |= {
                "what": "real tokens per second of three trainers, interleaved; ratios within a round",
                "date": date.today().isoformat(),
                "model": model,
                "data": f"the first {arguments.rows} records of gsm8k_train.jsonl, loss on the answers",
                "settings": settings,
                "hardware": common.hardware(arguments.device, arguments.threads),
                "versions": {one: importlib.metadata.version(one) for one in base.VERSIONED},
                "commit": common.commit(),
            }
            result["rounds"].append(_round(folder, arguments, result))
            result["verdict"] = verdict(result["rounds"], arguments.device)
            result.pop("unfinished", None)
            common.write(arguments.out, result)
    _print(result, arguments.device)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Real tokens per second: ours, Transformers' Trainer, TRL's SFTTrainer."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", default="llama-1b", help="of the model on a GPU")
    parser.add_argument("--model", type=Path, help="a model of that shape that is there already")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="records, eight of them held out; 136 on a CPU, 520 on a GPU")
    parser.add_argument("--only", default="", help="numbers of contestants, comma-separated; all")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=common.RESULTS / f"peers-{date.today().isoformat()}.json")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    found = parser.parse_args()
    found.rows = found.rows or ROWS[found.device]
    return found


def _round(folder: Path, arguments: argparse.Namespace, so_far: dict[str, Any]) -> dict[str, Any]:
    """Each contestant once; its tokens, seconds and tokens per second by name. `so_far`: written with each."""
    entries = _entries(arguments.device)
    order = [int(number) for number in arguments.only.split(",")] if arguments.only else list(range(len(entries)))
    random.shuffle(order)
    found = {}
    for number in order:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            environment = os.environ | {
                "OMP_NUM_THREADS": str(arguments.threads),
                "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
                "PLAN_HOME": str(folder / "plan-home"),
                "HF_HOME": str(folder / "hf-home"),
                "HF_HUB_OFFLINE": "1",
                **({"CUDA_VISIBLE_DEVICES": ""} if arguments.device == "cpu" else {}),
                "TOKENIZERS_PARALLELISM": "false",
            }
            command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(number), "--folder", own]
            command += ["--threads", str(arguments.threads), "--rows", str(arguments.rows)]
            command += ["--device", arguments.device]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode and entries[number].is_equal:
                raise SystemExit(f"peers: '{entries[number].name}' failed\n{done.stderr[-4000:]}")
            if done.returncode:  # a setting that is not for this machine: out of memory, say
                print(f"{entries[number].name}: left out\n{done.stderr[-1500:]}", file=sys.stderr)
                continue
            one = json.loads((Path(own) / "result.json").read_text(encoding="utf-8"))
        found[entries[number].name] = one
        print(f"{entries[number].name}: {one['tokens_per_second']:,.0f} tokens/s", file=sys.stderr)
        common.write(arguments.out, so_far | {"unfinished": found})
    return {"order": [entries[number].name for number in order], "results": found}


def _seen(rounds: list[dict[str, Any]], device: str) -> list[Entry]:
    """The contestants of every round."""
    return [entry for entry in _entries(device) if all(entry.name in one["results"] for one in rounds)]


def verdict(rounds: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """Ratios ours / theirs, one a round: at equal settings against the faster peer, and best setting against best.

    Which is the best is told within rounds too: by the median of its rate over the round's geometric mean.
    """

    def rate(one: dict[str, Any], entry: Entry) -> float:
        return float(one["results"][entry.name]["tokens_per_second"])

    entries = _seen(rounds, device)
    pace = [statistics.geometric_mean(rate(one, entry) for entry in entries) for one in rounds] if entries else []

    def median(entry: Entry) -> float:
        return statistics.median(rate(one, entry) / typical for one, typical in zip(rounds, pace, strict=True))

    def summary(ours: Entry, theirs: Entry) -> dict[str, Any]:
        ratios = [rate(one, ours) / rate(one, theirs) for one in rounds]
        return {
            "ours": ours.name,
            "theirs": theirs.name,
            "ratios": ratios,
            "median": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }

    equal = []
    for micro in EQUAL[device]:
        at = [entry for entry in entries if entry.is_equal and entry.micro == micro]
        ours, theirs = ([entry for entry in at if (entry.who == base.OURS) == side] for side in (True, False))
        if ours and theirs:
            equal.append(summary(ours[0], max(theirs, key=median)))
    ours, theirs = ([entry for entry in entries if (entry.who == base.OURS) == side] for side in (True, False))
    best = summary(max(ours, key=median), max(theirs, key=median)) if ours and theirs else None
    return {"equal_settings": equal, "best_settings": best}


def _print(result: dict[str, Any], device: str) -> None:
    from tabulate import tabulate

    entries = _seen(result["rounds"], device)
    reference = next((entry for entry in entries if entry.who == base.SFT), entries[0])
    rows = []
    for entry in entries:
        ratios = [
            one["results"][entry.name]["tokens_per_second"] / one["results"][reference.name]["tokens_per_second"]
            for one in result["rounds"]
        ]
        rows.append([entry.name, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}"])
    print(tabulate(rows, ["contestant", f"over {reference.name}", "spread"], disable_numparse=True))
    found = result["verdict"]
    for one in (*found["equal_settings"], *filter(None, [found["best_settings"]])):
        print(f"{one['ours']} over {one['theirs']}: {one['median']:.2f} ({one['lowest']:.2f}-{one['highest']:.2f})")


# -- workers -----------------------------------------------------------------------------------------------------------


def _write(arguments: argparse.Namespace, marks: list[tuple[float, int]]) -> None:
    """`marks`: (clock, tokens so far) at the end of each optimizer step."""
    skipped = SKIPPED_STEPS[arguments.device]
    if len(marks) <= skipped:
        raise SystemExit(f"peers: {len(marks)} steps are too few, {skipped} are left out: give more --rows")
    (begin, before), (end, after) = marks[skipped - 1], marks[-1]
    result = {
        "tokens": after - before,
        "seconds": end - begin,
        "tokens_per_second": (after - before) / (end - begin),
        "steps": len(marks),
        "step_seconds": [round(after - before, 4) for (before, _), (after, _) in itertools.pairwise(marks)],
    }
    (arguments.folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _job(entry: Entry, arguments: argparse.Namespace) -> Any:
    from presets.schema import load_preset
    from trainer.job import DataSpec, EvaluationSpec, Job

    precision: Any = PRECISIONS[arguments.device]
    preset = replace(
        load_preset("recommended"),
        micro_batch_size=entry.micro,
        gradient_accumulation_steps=GLOBAL_BATCH_SIZES[arguments.device] // entry.micro,
        learning_rate=base.LEARNING_RATE,
        precision=precision,
        lora_rank=8,
        lora_alpha=16.0,
        max_length=MOST_TOKENS,
    )
    return Job(
        name="recommended",
        preset=preset,
        model=str(arguments.folder.parent / "model"),
        data=DataSpec(source=str(base.DATA), limit=arguments.rows),
        device=arguments.device,
        precision=precision,
        base_precision=precision,
        micro_batch_size=entry.micro,
        num_threads=arguments.threads,
        seed=base.SEED,
        packing=entry.packed > 0,
        packed_length=entry.packed or None,
        loss="lean" if entry.is_lean else "plain",
        checkpoint_every=10**6,  # none, as for the others
        evaluation=EvaluationSpec(times_during_training=0, num_samples=0),
    )


def _ours(entry: Entry, arguments: argparse.Namespace) -> None:
    from trainer import loop
    from trainer.monitor import Monitor

    run = arguments.folder / "run"
    run.mkdir()
    (run / "job.json").write_text(_job(entry, arguments).to_json(), encoding="utf-8")
    marks: list[tuple[float, int]] = []
    watched: Any = Monitor
    step = watched.step

    def watched_step(self: Any, done: int, seconds: float, values: dict[str, Any], **more: Any) -> None:
        step(self, done, seconds, values, **more)
        before = marks[-1][1] if marks else 0
        marks.append((time.perf_counter(), before + round(values["tokens_per_second"] * seconds)))

    watched.step = watched_step
    loop.train(run)
    _write(arguments, marks)


def _theirs(entry: Entry, arguments: argparse.Namespace) -> None:
    import torch

    from trainer.kernels import avoid_plans_for_each_shape

    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not entry.has_plans:
        avoid_plans_for_each_shape()
    import transformers
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    from trainer.data import prepare_data
    from trainer.planning import split

    job = _job(entry, arguments)
    data = prepare_data(job.data, model=job.model, max_length=MOST_TOKENS, seed=base.SEED)
    training, _ = split(job.data, job.evaluation, len(data), job.seed)
    examples = []
    for example in training.tolist():
        span = slice(int(data.offsets[example]), int(data.offsets[example + 1]))
        pairs = zip(data.token_ids[span].tolist(), data.supervised[span].tolist(), strict=True)
        labels = [token if counts else -100 for token, counts in pairs]
        examples.append({"input_ids": data.token_ids[span].tolist(), "labels": labels})
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        job.model,
        dtype=torch.float32 if arguments.device == "cpu" else torch.bfloat16,
        attn_implementation="sdpa",
        use_safetensors=True,
    )
    loaded.config.use_cache = False
    model: Any = get_peft_model(
        loaded, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    # A packed row holds several examples: fewer rows make the same global batch, on average.
    mean = sum(len(one["input_ids"]) for one in examples) / len(examples)
    rows = GLOBAL_BATCH_SIZES[arguments.device] // entry.micro
    if entry.packed:
        rows = max(1, round(GLOBAL_BATCH_SIZES[arguments.device] * mean / entry.packed))
    settings: dict[str, Any] = {
        "output_dir": str(arguments.folder / "out"),
        "per_device_train_batch_size": entry.micro,
        "gradient_accumulation_steps": rows,
        "num_train_epochs": 1,
        "learning_rate": base.LEARNING_RATE,
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "train_sampling_strategy": "group_by_length" if entry.is_grouped else "random",
        "logging_steps": 1,  # as ours does
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": arguments.device == "cpu",
        "bf16": arguments.device == "cuda",
        "fp16": False,
        "gradient_checkpointing": False,
        "seed": base.SEED,
    }
    dataset = Dataset.from_list(examples)
    trainer: Any
    if entry.who == base.SFT:
        from trl import SFTConfig, SFTTrainer

        packing = {"packing": True, "packing_strategy": "bfd"} if entry.packed else {"packing": False}
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(max_length=entry.packed or MOST_TOKENS, **packing, **settings),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
    else:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(**settings),
            train_dataset=dataset,
            processing_class=tokenizer,
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        )
    tokens = 0
    marks: list[tuple[float, int]] = []
    training_step, collate = trainer.training_step, trainer.data_collator
    collated: collections.deque[int] = collections.deque()  # counted on the host: a GPU would have to be waited for

    def watched_collate(*given: Any, **named: Any) -> Any:
        inputs = collate(*given, **named)
        mask = inputs.get("attention_mask")
        collated.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
        return inputs

    def watched_step(*given: Any, **named: Any) -> Any:
        nonlocal tokens
        tokens += collated.popleft()
        return training_step(*given, **named)

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if arguments.device == "cuda":
                torch.cuda.synchronize()  # as the log line of each step would a moment later
            marks.append((time.perf_counter(), tokens))

    trainer.training_step, trainer.data_collator = watched_step, watched_collate
    trainer.add_callback(Watch())
    trainer.train()
    _write(arguments, marks)


if __name__ == "__main__":
    sys.exit(main())
