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
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
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

import common  # noqa: E402

DATA, RESULTS = common.GSM8K, common.RESULTS

NUM_RECORDS = 168  # 160 to train on (20 steps of 8) and 8 held out
NUM_STEPS = 20
GLOBAL_BATCH_SIZE = 8
SPLITS = ((1, 8), (2, 4))  # (micro-batch, accumulation) of the same global batch
TOLERANCE = 5e-4  # half a unit of the third decimal
NORM_TOLERANCE = 1e-4  # relative
MAX_LENGTH = 512
LEARNING_RATE = 2e-3
WARMUP_RATIO = 0.1
SEED = 42
VERSIONED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "numpy")

OURS, TRAINER, SFT, CONTROL = "ours", "trainer", "sft", "control"
TITLES = {
    OURS: "ours",
    TRAINER: "transformers Trainer",
    SFT: "TRL SFTTrainer",
    CONTROL: "control, wrong gradient",
}

CHATML = """{%- for turn in messages %}
    {{- '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

Result = dict[str, Any]


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
    path = RESULTS / f"same_loss-{result['date']}.json"
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


# -- workers -----------------------------------------------------------------------------------------------------------


class BatchHash:
    """What really goes into the model, example by example: token ids and labels, padding taken off."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()
        self.rows: list[int] = []  # targets of each row, in the order trained

    def add(self, ids: list[int], labels: list[int]) -> None:
        self.sha.update(json.dumps([ids, labels]).encode())
        self.rows.append(sum(label != -100 for label in labels))

    def summary(self) -> Result:
        windows = range(0, len(self.rows), GLOBAL_BATCH_SIZE)
        targets = [sum(self.rows[start : start + GLOBAL_BATCH_SIZE]) for start in windows]
        return {"batches_sha256": self.sha.hexdigest(), "num_targets": targets}


def prepare(arguments: argparse.Namespace) -> None:
    """The checkpoint: a tokenizer trained on the text, and a model trained a little, so that its losses mean something.

    The records that the contestants train on are not used.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(arguments.threads)
    records = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    texts = [f"{record['question']}\n{record['answer']}" for record in records[NUM_RECORDS:]]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=4096, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    untyped: Any = PreTrainedTokenizerFast
    tokenizer = untyped(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    chats = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": record["question"]},
                {"role": "assistant", "content": record["answer"]},
            ],
            tokenize=False,
        )
        for record in records[NUM_RECORDS : NUM_RECORDS + 4000]
    ]
    stream = torch.tensor([token for text in chats for token in tokenizer(text)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rows, width = 12, 128
    for step in range(arguments.pretrain_steps):
        begin = step * rows * width % (len(stream) - rows * width)
        batch = stream[begin : begin + rows * width].view(rows, width)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(arguments.folder / "model")
    tokenizer.save_pretrained(arguments.folder / "model")


def ours(arguments: argparse.Namespace) -> None:
    """Our own `trainer.loop.train` on a run folder; also writes what the others need: examples and first adapter."""
    from dataclasses import replace

    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    from presets.schema import load_preset
    from trainer import feed, loop
    from trainer.batching import BatchPlan
    from trainer.data import prepare_data
    from trainer.job import DataSpec, EvaluationSpec, Job

    case = _case_folder(arguments)
    preset = replace(
        load_preset("recommended"),
        micro_batch_size=arguments.micro,
        gradient_accumulation_steps=arguments.accumulation,
        learning_rate=LEARNING_RATE,
        warmup_ratio=WARMUP_RATIO,
        weight_decay=0.0,
        max_grad_norm=1.0,
        precision="fp32",
        lora_rank=8,
        lora_alpha=16.0,
        lora_dropout=0.0,
        num_epochs=1,
        max_length=MAX_LENGTH,
    )
    job = Job(
        name="recommended",
        preset=preset,
        model=str(arguments.folder / "model"),
        data=DataSpec(source=str(DATA), limit=NUM_RECORDS),
        device="cpu",
        precision="fp32",
        base_precision="fp32",
        micro_batch_size=arguments.micro,
        num_threads=arguments.threads,
        seed=SEED,
        evaluation=EvaluationSpec(times_during_training=0, num_samples=0),
    )
    run = case / "run"
    run.mkdir()
    (run / "job.json").write_text(job.to_json(), encoding="utf-8")

    # The trainer's own functions, watched: the adapter it starts from, the batches it makes.
    seen = BatchHash()
    watched: Any = loop
    load_model, collate = watched.load_model, feed.collate

    def watched_load(*args: Any, **kwargs: Any) -> Any:
        loaded = load_model(*args, **kwargs)
        first = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(loaded.model).items()}
        save_file(first, case / "first_adapter.safetensors")
        return loaded

    def watched_collate(rows: Any, data: Any, **kwargs: Any) -> Any:
        batch = collate(rows, data, **kwargs)
        labels = batch.input_ids.new_full((batch.input_ids.numel(),), -100)
        labels[batch.predicts + 1] = batch.targets
        labels = labels.view(batch.input_ids.shape)
        for index, row in enumerate(rows):
            length = int(data.lengths[row].sum())
            seen.add(batch.input_ids[index, :length].tolist(), labels[index, :length].tolist())
        return batch

    watched.load_model, feed.collate = watched_load, watched_collate  # type: ignore[assignment]
    begun = time.perf_counter()
    record = loop.train(run)
    assert record is not None
    seconds = time.perf_counter() - begun

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    data = prepare_data(job.data, model=job.model, max_length=MAX_LENGTH, seed=SEED)
    plan = BatchPlan.load(run / "batch_plan.npz")
    examples = []
    for example in plan.order.tolist():
        span = slice(int(data.offsets[example]), int(data.offsets[example + 1]))
        pairs = zip(data.token_ids[span].tolist(), data.supervised[span].tolist(), strict=True)
        labels = [token if counts else -100 for token, counts in pairs]
        examples.append({"input_ids": data.token_ids[span].tolist(), "labels": labels})
    (case / "examples.json").write_text(json.dumps(examples), encoding="utf-8")
    _write(
        case,
        OURS,
        {
            "loss": [line["loss"] for line in lines],
            "learning_rate": [line["learning_rate"] for line in lines],
            "grad_norm": [line["grad_norm"] for line in lines],
            **seen.summary(),
            "held_out_loss_before": record.actual.eval_loss_before,
            "held_out_loss_after": record.actual.eval_loss_after,
            "seconds": round(seconds, 1),
        },
    )


def theirs(arguments: argparse.Namespace) -> None:
    """Transformers' Trainer, TRL's SFTTrainer, or the control."""
    import torch

    torch.set_num_threads(arguments.threads)
    import transformers
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    case = _case_folder(arguments)
    folder = str(arguments.folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True
    )
    base.config.use_cache = False
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora)
    first = load_file(case / "first_adapter.safetensors")
    set_peft_model_state_dict(model, first)
    loaded = get_peft_model_state_dict(model)
    assert loaded.keys() == first.keys()
    assert all(torch.equal(loaded[name], first[name]) for name in first)
    dataset = Dataset.from_list(json.loads((case / "examples.json").read_text(encoding="utf-8")))
    settings: dict[str, Any] = {
        "output_dir": str(case / arguments.worker),
        "per_device_train_batch_size": arguments.micro,
        "gradient_accumulation_steps": arguments.accumulation,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "linear",
        "warmup_steps": WARMUP_RATIO,  # below 1 it is a ratio of the steps
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "seed": SEED,
    }
    trainer: Any
    if arguments.worker == SFT:
        from trl import SFTConfig, SFTTrainer

        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(max_length=MAX_LENGTH, packing=False, shuffle_dataset=False, **settings),
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
    if arguments.worker == CONTROL:
        trainer.model_accepts_loss_kwargs = False  # each micro-batch by its own mean, then divided by GA
    seen = BatchHash()
    collate = trainer.data_collator

    def watched_collate(features: Any) -> Any:
        batch = collate(features)
        for index, mask in enumerate(batch["attention_mask"].bool()):
            seen.add(batch["input_ids"][index][mask].tolist(), batch["labels"][index][mask].tolist())
        return batch

    trainer.data_collator = watched_collate
    counts: list[int | None] = []
    parts: list[tuple[float, int]] = []  # of each micro-batch: what training_step returned, targets
    training_step = trainer.training_step

    def watched_step(model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        counts.append(None if num_items_in_batch is None else int(num_items_in_batch))
        targets = int(inputs["labels"].ne(-100).sum())
        loss = training_step(model, inputs, num_items_in_batch)
        parts.append((float(loss), targets))
        return loss

    trainer.training_step = watched_step
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in logs]
    if arguments.worker == CONTROL:  # from means of micro-batches over GA back to the mean over the window's tokens
        size = arguments.accumulation
        windows = [parts[start : start + size] for start in range(0, len(parts), size)]
        losses = [size * sum(loss * n for loss, n in window) / sum(n for _, n in window) for window in windows]
    finals = get_peft_model_state_dict(model)
    reference = load_file(case / "run" / "adapter" / "adapter_model.safetensors")
    assert finals.keys() == reference.keys()
    difference = sum(float((finals[name] - reference[name]).double().square().sum()) for name in finals) ** 0.5
    moved = sum(float((first[name] - reference[name]).double().square().sum()) for name in finals) ** 0.5
    _write(
        case,
        arguments.worker,
        {
            "loss": losses,
            "logged_loss": [entry["loss"] for entry in logs],
            "learning_rate": [entry["learning_rate"] for entry in logs],
            "grad_norm": [entry["grad_norm"] for entry in logs],
            **seen.summary(),
            "num_items_in_batch": counts[:: arguments.accumulation],
            "model_accepts_loss_kwargs": bool(trainer.model_accepts_loss_kwargs),
            "relative_final_adapter_difference": difference / moved,  # of how far training moved ours
            "seconds": round(seconds, 1),
        },
    )


def _case_folder(arguments: argparse.Namespace) -> Path:
    folder: Path = arguments.folder
    return folder / f"micro-{arguments.micro}"


def _write(case: Path, name: str, result: Result) -> None:
    (case / f"{name}.json").write_text(json.dumps(result, allow_nan=False), encoding="utf-8")


WORKERS: dict[str, Callable[[argparse.Namespace], None]] = {
    "prepare": prepare,
    OURS: ours,
    TRAINER: theirs,
    SFT: theirs,
    CONTROL: theirs,
}

if __name__ == "__main__":
    sys.exit(main())
