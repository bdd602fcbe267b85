"""Makes every file of the bundled model again: `python -m presets.demo.recipe` (`--no-weights`: all but the weights).

The weights come from this project's own trainer by full fine-tuning of random ones, on what `pretraining.py` writes.
Two CPU threads need about ten minutes. Everything is seeded; other processors round differently, so that weights made
elsewhere serve as well but are not the same byte for byte.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from presets import jsonio
from presets.demo import demo_folder, template
from presets.demo.messages import generate_messages
from presets.demo.pretraining import generate_pretraining_text
from presets.schema import Preset

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY = 1792  # the generated text has words for no more than about 1,860 tokens
MAX_POSITIONS = 4096
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_POSITIONS,
    "rms_norm_eps": 1e-8,  # far below the square of the smallest activations: the embeddings start small
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.05,  # of a narrow model: the usual 0.02 lets it learn slowly in the first hundred steps
    "tie_word_embeddings": True,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "dtype": "float16",  # as stored: half the download; fp32 on request
}
TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": MAX_POSITIONS,
    "pad_token": template.PAD,
    "bos_token": template.BEGIN,
    "eos_token": template.END,
    "additional_special_tokens": [template.START],
    "clean_up_tokenization_spaces": False,
    "add_bos_token": False,
    "padding_side": "right",
}
GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
    "do_sample": False,
    "max_new_tokens": 128,
}
RESIDUAL_SCALE = 0.03  # see suit_published_learning_rates
NORM_GAIN = 2.0
PRETRAINING = Preset(
    name="demo-pretraining",
    summary="the bundled model from random weights, on the text of presets/demo/pretraining.py",
    micro_batch_size=8,
    gradient_accumulation_steps=2,
    learning_rate=2e-3,
    precision="fp32",
    adapter="full",
    base_precision="fp32",
    max_length=512,
    warmup_ratio=0.05,
    weight_decay=0.0,
    max_grad_norm=1.0,
)


def main(arguments: list[str] | None = None) -> None:
    """Write the files; progress goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m presets.demo.recipe", description=__doc__)
    parser.add_argument("--no-weights", action="store_true", help="make all but model.safetensors")
    parser.add_argument("--work", type=Path, help="folder for the run (default: a temporary one)")
    chosen = parser.parse_args(arguments)
    folder = demo_folder()
    write_tokenizer(folder)
    write_configs(folder)
    write_lengths(folder)
    if chosen.no_weights:
        return
    if chosen.work is not None:
        chosen.work.mkdir(parents=True, exist_ok=True)
        pretrain(folder, chosen.work)
    else:
        with tempfile.TemporaryDirectory() as work:
            pretrain(folder, Path(work))


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE over both texts: no character is unknown to it, and a figure is read two digits at a time."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # At most two digits per token: a number that was never seen can be said back, and a price is one token.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,2}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(template.SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_all_text(), trainer=trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    (folder / "chat_template.jinja").write_text(template.CHAT_TEMPLATE, encoding="utf-8")


def _all_text() -> Iterable[str]:
    for record in generate_messages():
        for message in record["messages"]:
            yield message["content"]
    yield from generate_pretraining_text(1500, seed=2)


def write_configs(folder: Path) -> None:
    """config.json and generation_config.json."""
    _write_json(folder / "config.json", CONFIG)
    _write_json(folder / "generation_config.json", GENERATION_CONFIG)


def write_lengths(folder: Path) -> None:
    """lengths.json: tokens and supervised tokens of every bundled message, not truncated."""
    pairs = json.dumps(message_lengths(folder, generate_messages()), separators=(",", ":"))
    (folder / "lengths.json").write_text(f'{{"lengths":{pairs}}}\n', encoding="utf-8")


def message_lengths(folder: Path, records: Iterable[dict[str, Any]]) -> list[list[int]]:
    """[tokens, supervised tokens] per record: an assistant's contents and the <|im_end|> after each are supervised."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    lengths = []
    for record in records:
        pairs = [(message["role"], message["content"]) for message in record["messages"]]
        supervised = sum(count(content) + 1 for role, content in pairs if role == "assistant")
        lengths.append([count(template.render(pairs)), supervised])
    return lengths


def pretrain(folder: Path, work: Path) -> None:
    """Train random weights in a run of the project's trainer under `work`, and put the result into `folder`."""
    data, start, run = work / "pretraining.jsonl", work / "random", work / "run"
    with open(data, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in generate_pretraining_text())
    write_random_model(folder, start)
    run.mkdir(exist_ok=True)
    (run / "job.json").write_text(json.dumps(job(start, data), indent=2) + "\n", encoding="utf-8")
    # A process of its own: presets must not import the trainer, which stands above them.
    subprocess.run([sys.executable, "-P", "-m", "trainer", str(run / "job.json")], check=True)
    convert(run / "model" / "model.safetensors", folder / "model.safetensors")


def job(model: Path, data: Path) -> dict[str, Any]:
    """What job.json says: see `trainer.job.Job`."""
    return {
        "name": PRETRAINING.name,
        "preset": jsonio.to_plain(PRETRAINING),
        "model": str(model),
        "data": {"source": str(data), "train_on": "all"},
        "device": "cpu",
        "precision": PRETRAINING.precision,
        "base_precision": PRETRAINING.base_precision,
        "micro_batch_size": PRETRAINING.micro_batch_size,
        "num_threads": 2,
        "seed": 1,
        "evaluation": {"maximum": 64},
    }


def write_random_model(folder: Path, target: Path) -> None:
    """The bundled config and tokenizer with random weights, seeded: the trainer starts from a folder with weights."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    target.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, target / name)
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.save_pretrained(target)


def convert(source: Path, target: Path) -> None:
    """Store weights in fp16, the tied head left out, scaled by `suit_published_learning_rates`."""
    from safetensors.torch import load_file, save_file

    tensors = suit_published_learning_rates(load_file(source))
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, target, metadata={"format": "pt"})
    target.chmod(0o644)  # safetensors writes for the owner alone, and an installed file is for everyone


def suit_published_learning_rates(
    tensors: dict[str, Tensor], *, residual: float = RESIDUAL_SCALE, gain: float = NORM_GAIN
) -> dict[str, Tensor]:
    """The same function of the input in other weights, of which a LoRA step of the published size moves more.

    The published rates are made for dozens of layers, whose small steps add up; this model has four. So what the layers
    write into the residual stream is made smaller by `residual`, and what they read from it is larger by `gain`: a step
    of a given size is then a larger part of both. RMSNorm takes the first back out and the linear layers the second.
    """

    def factor(name: str) -> float:
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            return residual
        if name == "model.norm.weight":
            return 1 / residual  # the head is tied to the embedding
        return gain if name.endswith("layernorm.weight") else 1 / gain

    return {name: tensor * factor(name) for name, tensor in tensors.items() if name != "lm_head.weight"}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
