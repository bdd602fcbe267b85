"""The bundled demo: a small Llama-shaped model, its tokenizer and a generator of chat messages."""

from __future__ import annotations

from pathlib import Path


def demo_folder() -> Path:
    """The folder of the bundled model: config, tokenizer, chat template, weights and the lengths of the messages."""
    return Path(__file__).resolve().parent
