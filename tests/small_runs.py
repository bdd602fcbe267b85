"""A tiny real model, a small data file and jobs over them, for the tests' fixtures and for bench/faults.py."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
from pathlib import Path
from typing import Any


def save_tiny_model(folder: Path) -> None:
    """A Llama of about 150,000 parameters with random weights and a ChatML tokenizer, saved as users save theirs."""
    import torch
    from small_tokenizer import CHATML, make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>", pad="<|endoftext|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_chats(path: Path) -> None:
    """80 chats of unequal lengths, with engagement and dates."""
    random_words = random.Random(5)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "home", "by", "night"]

    def text(low: int, high: int) -> str:
        return " ".join(random_words.choice(words) for _ in range(random_words.randint(low, high)))

    with open(path, "w", encoding="utf-8") as file:
        for number in range(80):
            messages = [{"role": "user", "content": text(2, 12)}, {"role": "assistant", "content": text(1, 30)}]
            record = {"messages": messages, "engagement": number % 17, "created_at": 1.7e9 + number * 86_400}
            file.write(json.dumps(record) + "\n")


def small_job(tiny: Path, chats: Path, base: str = "recommended", **changes: Any) -> Any:
    """A job over a tiny model; fields of the preset and of the job by name."""
    from presets.schema import Preset, load_preset
    from trainer.job import DataSpec, EvaluationSpec, Job

    preset_fields = {field.name for field in dataclasses.fields(Preset)} - {"name"}
    in_preset = {name: changes.pop(name) for name in list(changes) if name in preset_fields}
    micro = changes.pop("micro", 1)
    defaults: dict[str, Any] = {
        "gradient_accumulation_steps": 8,
        "learning_rate": 2e-3,
        "precision": "fp32",
        "lora_rank": 4,
        "max_length": 128,
    }
    preset = dataclasses.replace(load_preset(base), **{**defaults, **in_preset})
    return Job(
        **{
            "name": base,
            "preset": preset,
            "model": str(tiny),
            "data": DataSpec(source=str(chats)),
            "device": "cpu",
            "precision": preset.precision,
            "base_precision": "fp32" if preset.base_precision == "auto" else preset.base_precision,
            "micro_batch_size": micro,
            "num_threads": 1,
            "evaluation": EvaluationSpec(num_samples=1, max_new_tokens=4),
            **changes,
        }
    )


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class StopAfter:
    """Sends this process a signal at the n-th micro-step, as a user or a scheduler would."""

    def __init__(self, monkeypatch: Any, count: int, number: int = signal.SIGTERM) -> None:
        from trainer import loop

        self.left = count
        real = loop.steps.micro_step

        def step(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), number)
            return real(*args, **kwargs)

        monkeypatch.setattr(loop.steps, "micro_step", step)
