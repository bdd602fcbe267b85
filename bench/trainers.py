"""The trainers set beside each other in same_loss.py and peers.py: ours, Transformers' Trainer, TRL's SFTTrainer.

Also the checkpoint that they share. Each runs in a process of its own, which `same_loss.py --worker` starts, and writes
what it saw into the folder that it is given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "bench"))
sys.path.insert(0, str(REPOSITORY))

import common  # noqa: E402

DATA = common.GSM8K

NUM_RECORDS = 168  # 160 to train on (20 steps of 8) and 8 held out
GLOBAL_BATCH_SIZE = 8
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
    load_model, batch_on = watched.load_model, feed.batch_on

    def watched_load(*args: Any, **kwargs: Any) -> Any:
        loaded = load_model(*args, **kwargs)
        first = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(loaded.model).items()}
        save_file(first, case / "first_adapter.safetensors")
        return loaded

    def watched_batch(device: str, rows: Any, data: Any, *more: Any) -> Any:
        batch = batch_on(device, rows, data, *more)
        labels = batch.input_ids.new_full((batch.input_ids.numel(),), -100)
        labels[batch.predicts + 1] = batch.targets
        labels = labels.view(batch.input_ids.shape)
        for index, row in enumerate(rows):
            length = int(data.lengths[row].sum())
            seen.add(batch.input_ids[index, :length].tolist(), labels[index, :length].tolist())
        return batch

    watched.load_model, feed.batch_on = watched_load, watched_batch
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
