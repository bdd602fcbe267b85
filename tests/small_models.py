"""Small models of many families, whose output layers and attention differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trainer.arrangement import arrange
from trainer.collate import MicroBatch
from trainer.tokens import DataReport, TokenizedDataset

VOCABULARY = 97

FAMILIES = ("llama", "llama-tied", "qwen3", "mistral", "gemma2", "gemma3", "cohere", "granite", "gpt2", "opt")


def small_model(family: str, *, attention: str = "sdpa", sliding_window: int = 8) -> Any:
    """A model of about 30,000 parameters, double precision, whose logits are large enough for soft caps to show."""
    import torch
    import transformers as hf

    torch.manual_seed(3)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    small_gpt = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    tied = {"tie_word_embeddings": True}
    configs: dict[str, Any] = {
        "llama": lambda: hf.LlamaConfig(**shape),
        "llama-tied": lambda: hf.LlamaConfig(**shape, **tied),
        "qwen3": lambda: hf.Qwen3Config(**shape, **tied),
        "mistral": lambda: hf.MistralConfig(**shape, sliding_window=sliding_window),
        "gemma2": lambda: hf.Gemma2Config(**shape, sliding_window=sliding_window, final_logit_softcapping=3.0),
        "gemma3": lambda: hf.Gemma3TextConfig(**shape, sliding_window=sliding_window, final_logit_softcapping=3.0),
        "cohere": lambda: hf.CohereConfig(**shape, logit_scale=0.3),
        "granite": lambda: hf.GraniteConfig(**shape, logits_scaling=7.0),
        "gpt2": lambda: hf.GPT2Config(**small_gpt, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        "opt": lambda: hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=16,  # with a projection before the output layer
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            dropout=0.0,
        ),
    }
    if family == "gemma2":
        attention = "eager"  # its attention scores are capped, which SDPA cannot do
    model = hf.AutoModelForCausalLM.from_config(configs[family](), attn_implementation=attention).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(20.0 if "embed" in name or "wte" in name or "lm_head" in name else 3.0)
    return model.train()


def with_lora(model: Any, targets: Any = "all-linear") -> Any:
    """The model with LoRA whose B is not zero any more, so that all its gradients are something."""
    import torch
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return wrapped.double()


def random_data(
    lengths: list[int], *, seed: int = 0, supervised: float = 0.6, beginning: int = 0, without: Sequence[int] = ()
) -> TokenizedDataset:
    """Random tokens of these lengths, a random part of them targets.

    Args:
        beginning: the first so many are the same in each example, and they and the next one are no targets.
        without: examples that begin otherwise.
    """
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    counted = random.random(offsets[-1]) < supervised
    counted[offsets[:-1]] = False
    ids = random.integers(0, VOCABULARY, offsets[-1]).astype(np.int32)
    for start in offsets[:-1] if beginning else ():
        counted[start : start + beginning + 1] = False
        ids[start : start + beginning] = np.arange(beginning) * 5 % VOCABULARY
    ids[offsets[:-1][list(without)]] = 1 + np.arange(len(without))
    return TokenizedDataset(
        token_ids=ids,
        supervised=counted,
        offsets=offsets,
        report=DataReport(source="random", num_records=len(lengths)),
    )


def with_beginning(data: TokenizedDataset, size: int) -> TokenizedDataset:
    """The same examples, each behind the same tokens, none of them a target."""
    starts = data.offsets[:-1]
    common = np.tile(np.arange(size, dtype=np.int32) + 5, len(data))
    return replace(
        data,
        token_ids=np.insert(data.token_ids, np.repeat(starts, size), common),
        supervised=np.insert(data.supervised, np.repeat(starts, size), False),
        offsets=data.offsets + size * np.arange(len(data) + 1),
        families=None,
        sizes=None,
    )


def grouped(batch: MicroBatch, device: str = "cpu") -> MicroBatch:
    """The batch with its documents side by side, as `MicroBatch.to` makes it for a GPU."""
    documents = batch.documents
    return batch if documents is None else replace(batch, arrangement=arrange(documents, batch.input_ids.shape[1]))
