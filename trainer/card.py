"""The model card beside a run's result: what it was trained from, how, and what came of it. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from presets import jsonio
from trainer.record import RunRecord


def write_card(folder: Path, record: RunRecord) -> None:
    """README.md in a result's folder, in the place of the libraries' own with its blanks to fill in.

    Raises:
        OSError: it cannot be written.
    """
    jsonio.write_atomically(folder / "README.md", card(record))


def card(record: RunRecord) -> str:
    """The card's text: metadata as the hub reads them, then figures of this run and nothing that nobody knows."""
    import yaml  # type: ignore[import-untyped]  # comes with huggingface_hub

    job, preset, actual = record.job, record.job.preset, record.actual
    is_lora = preset.adapter == "lora"
    base = _shown(job.model)
    metadata: dict[str, Any] = {
        "base_model": base,
        "library_name": "peft" if is_lora else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lora"] if is_lora else [],
    }
    rates = [phase.learning_rate for phase in preset.phases] or [preset.learning_rate]
    rows = [
        ("preset", job.name),
        ("global batch", "/".join(map(str, job.global_batch_sizes))),
        ("micro-batch x accumulation", f"{job.micro_batch_size} x {_joined(job.gradient_accumulation_steps)}"),
        ("learning rate", "/".join(f"{rate:g}" for rate in rates)),
        ("epochs", f"{preset.num_epochs:g}"),
        ("optimizer steps", _count(actual.num_steps)),
        ("examples", _count(actual.num_examples)),
        ("tokens", _count(actual.num_tokens)),
        ("maximum length", f"{preset.max_length:,} tokens"),
        ("adapter", f"LoRA, rank {preset.lora_rank}, alpha {preset.lora_alpha:g}" if is_lora else "none: all weights"),
        ("precision", f"{job.precision}, base in {job.base_precision}"),
        ("seed", str(job.seed)),
    ]
    results = [
        ("held-out loss before", _number(actual.eval_loss_before)),
        ("held-out loss after", _number(actual.eval_loss_after)),
        ("training loss, mean", _number(actual.train_loss)),
        ("seconds, whole run", _number(actual.seconds, 1)),
        ("seconds, as predicted", _number(record.predicted.seconds, 1)),
    ]
    lines = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=True)}---",
        f"# {_text(Path(base).name)}, fine-tuned ({_text(job.name)})",
        f"Trained from `{_text(base)}` on `{_text(_shown(job.data.source))}` by training-planner.",
        "## Training",
        _table(rows),
        "## Results",
        _table(results),
        "The held-out loss is the mean cross-entropy of the answers' tokens in examples that were not trained on.",
        "## Versions",
        _table(sorted(record.versions.items())),
    ]
    return "\n\n".join(lines) + "\n"


def _shown(name: str) -> str:
    """A hub name as it is; of a local path only its last part, which is all that others can make use of."""
    path = Path(name)
    return path.name if path.is_absolute() or path.exists() else name


def _table(rows: list[tuple[str, str]]) -> str:
    known = [(name, value) for name, value in rows if value]
    return "\n".join(["| | |", "|---|---|", *(f"| {_text(name)} | {_text(value)} |" for name, value in known)])


def _joined(values: tuple[int, ...]) -> str:
    return "/".join(map(str, values))


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _text(text: str) -> str:
    """One line that no table and no tag breaks out of."""
    plain = " ".join(text.split()).replace("\\", "&#92;").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
    # A bracket would begin a link or an image, which a page that shows the card might fetch.
    return "".join(char for char in plain.replace("[", "&#91;") if char.isprintable())
