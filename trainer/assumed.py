"""Examples for a bare count: lengths drawn from the bundled distribution, contents and scores invented. No torch."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from presets import jsonio
from presets.errors import DataError, ModelError
from trainer.job import DataSpec
from trainer.sources import is_hub_name
from trainer.tokens import DataReport, FloatArray, IntArray, Tails, TokenizedDataset

MOST_ASSUMED = 200_000_000  # examples
LARGEST_WRITTEN = 50_000_000  # tokens; beyond it every token is the same one, held once: no memory
_FIRST_PLAIN_ID = 5  # below it tokenizers keep their special tokens
_NEWEST = 1_767_225_600.0  # 2026-01-01 UTC: fixed, so that the same seed gives the same plan on every day
_TWO_YEARS = 2 * 365 * 86_400.0


def assumed_data(spec: DataSpec, *, model: str, max_length: int, seed: int) -> TokenizedDataset:
    """`spec.num_examples` invented examples, the same for the same seed.

    Lengths are drawn with replacement from `presets/demo/lengths.json`, or are all `spec.tokens_per_example`; clipped
    to `max_length`. Token ids are random, the last ones supervised; engagement is log-normal, dates lie in two years.

    Raises:
        DataError: the count or the length is below what can be trained on.
        ModelError: the model has no config with a vocabulary size.
    """
    count = spec.num_examples
    if count is None or count < 1:
        raise DataError(f"the number of examples is {count}; it must be at least 1.")
    if count > MOST_ASSUMED:
        raise DataError(
            f"the number of examples is {count:,}; planning keeps each in memory, {MOST_ASSUMED:,} at most."
        )
    if spec.tokens_per_example is not None and spec.tokens_per_example < 2:
        raise DataError(f"--tokens-per-example is {spec.tokens_per_example}; it must be at least 2.")
    vocabulary = _vocabulary_size(model)
    random = np.random.default_rng([seed, 0xC047])
    lengths, supervised, note = _draw_lengths(spec, count, random)
    num_truncated = int((lengths > max_length).sum())
    lengths = np.minimum(lengths, max_length)
    supervised = np.clip(supervised, 1, lengths - 1)  # at least one, never the first token
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    engagement, created_at = _draw_scores(count, random)
    total = int(offsets[-1])
    token_ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    if total > LARGEST_WRITTEN:
        token_ids = np.broadcast_to(np.int32(min(7, vocabulary - 1)), (total,))
        mask = cast("npt.NDArray[np.bool_]", Tails(offsets, supervised))  # read as such an array is
        note += "; so many that all tokens are one and the same"
    else:
        token_ids = random.integers(min(_FIRST_PLAIN_ID, vocabulary - 1), vocabulary, size=total, dtype=np.int32)
        # The last `supervised` tokens of each example. Arrays of positions would take a cached plan 0.2 s to fill.
        parts = np.stack([lengths - supervised, supervised], axis=1).ravel()
        mask = np.repeat(np.tile([False, True], count), parts)
    report = DataReport(
        source=f"{count:,} examples",
        num_records=count,
        lengths="assumed",
        num_truncated=num_truncated,
        notes=(note, "engagement and dates are assumed too"),
    )
    return TokenizedDataset(
        token_ids=token_ids,
        supervised=mask,
        offsets=offsets,
        report=report,
        engagement=engagement,
        created_at=created_at,
    )


def _draw_lengths(spec: DataSpec, count: int, random: np.random.Generator) -> tuple[IntArray, IntArray, str]:
    """(lengths, supervised tokens, note), each number array (count,)."""
    pairs = _bundled_lengths()
    if spec.tokens_per_example is not None:
        share = pairs[:, 1].sum() / pairs[:, 0].sum()
        tokens = spec.tokens_per_example
        lengths = np.full(count, tokens, dtype=np.int64)
        supervised = np.full(count, max(1, round(tokens * share)), dtype=np.int64)
        return lengths, supervised, f"lengths are assumed: {tokens:,} tokens per example, as asked"
    drawn = pairs[random.integers(0, len(pairs), size=count)]
    mean = float(drawn[:, 0].mean())
    note = f"lengths are assumed: drawn from the bundled messages, mean {mean:.0f} tokens (--tokens-per-example N)"
    return drawn[:, 0], drawn[:, 1], note


def _bundled_lengths() -> IntArray:
    """(tokens, supervised tokens) of every bundled message, (messages, 2)."""
    text = resources.files("presets.demo").joinpath("lengths.json").read_text(encoding="utf-8")
    return np.array(json.loads(text)["lengths"], dtype=np.int64).reshape(-1, 2)


def _draw_scores(count: int, random: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    engagement = np.floor(random.lognormal(mean=1.0, sigma=1.2, size=count))
    created_at = _NEWEST - np.floor(random.uniform(0, _TWO_YEARS, size=count))
    return engagement, created_at


def _vocabulary_size(model: str) -> int:
    path = Path(model) / "config.json"
    if not Path(model).is_dir():
        path = _config_from_hub(model)
    try:
        config: Any = jsonio.loads(path.read_text(encoding="utf-8"), strict=False)
    except FileNotFoundError:
        raise ModelError(f"{model}: the folder holds no config.json. Pass a model folder or a hub name.") from None
    except (OSError, ValueError) as reason:
        raise ModelError(f"{path}: not a readable config ({reason}).") from None
    inner = config.get("text_config") if isinstance(config, dict) else None
    for part in (config, inner):
        size = part.get("vocab_size") if isinstance(part, dict) else None
        if isinstance(size, int) and size > 1:
            return size
    raise ModelError(f"{path}: names no vocab_size. Plan from a file, or pass another model.")


def _config_from_hub(model: str) -> Path:
    if not is_hub_name(model):  # else the hub would be asked again and again for what is plainly a path
        raise ModelError(f"{model}: there is no such folder. Check --model.")
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(model, "config.json"))
    except Exception as reason:  # network, rights, a name that is none: the list is open
        text = " ".join(str(reason).split())
        raise ModelError(
            f"{model}: no such folder, and its config cannot be fetched ({text[:200]}). Check --model and the network."
        ) from None
