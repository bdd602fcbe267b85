"""What a run was started from, as digests that its checkpoints keep: a resume over anything else is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from presets.home import expanded
from trainer.batching import BatchPlan
from trainer.tokens import TokenizedDataset

_TOKENS_AT_ONCE = 1 << 22
_SAMPLE = 4096  # bytes read at the begin, in the middle and at the end of each tensor
_LONGEST_HEADER = 100 << 20  # as safetensors has it
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
# Of a config, at any depth: who wrote it and from where, what a job decides itself whatever stands there, and which
# tokens begin and end a text: those of the data are digested, and a base's repair of them changes no step.
_NOISE = frozenset((
    "transformers_version", "_name_or_path", "_commit_hash", "dtype", "torch_dtype", "use_cache", "attn_implementation",
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "bos_token_id",
    "eos_token_id", "transformers.js_config",
))  # fmt: skip


def data_digest(data: TokenizedDataset, plan: BatchPlan) -> str:
    """SHA-256 over lengths, tokens and targets of the examples that a plan names, in hexadecimal.

    What it does not name may change: records can be added to a file under a run.
    """
    named = np.zeros(len(data), dtype=bool)
    named[plan.order] = True
    named[plan.evaluation] = True
    sha = hashlib.sha256(data.lengths[named].astype("<i8").tobytes())
    first = 0
    while first < len(data):
        reached = int(np.searchsorted(data.offsets, data.offsets[first] + _TOKENS_AT_ONCE, side="right")) - 1
        last = min(len(data), max(first + 1, reached))
        tokens = slice(int(data.offsets[first]), int(data.offsets[last]))
        ids, supervised = data.token_ids[tokens], data.supervised[tokens]
        if not named[first:last].all():
            wanted = np.repeat(named[first:last], np.diff(data.offsets[first : last + 1]))
            ids, supervised = ids[wanted], supervised[wanted]
        sha.update(np.ascontiguousarray(ids, dtype="<i4").data)
        sha.update(np.packbits(supervised).data)
        first = last
    return sha.hexdigest()


def base_digest(model: str) -> str | None:
    """SHA-256 over names, sizes, headers and samples of each tensor of a base's weights, in hexadecimal.

    Other weights differ in nearly every number, so a few thousand of each tensor tell them apart, and 16 GB need not be
    read. None where the files cannot be found or read: what is unknown is not compared.

    Args:
        model: folder or hub name; of the latter the files in the cache, from which it was loaded.
    """
    try:
        files = _weight_files(model)
        sha = hashlib.sha256()
        for path in files:
            sha.update(f"{path.name} {path.stat().st_size}\n".encode())
            with open(path, "rb") as file:
                for part in _samples(file):
                    sha.update(part)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return sha.hexdigest() if files else None


def config_digest(model: str) -> str | None:
    """SHA-256 over what a base's config.json says of the computation, in hexadecimal: without noise, keys in any order.

    The same weights compute otherwise with another base frequency, activation or dropout. As the file has it, not as
    transformers fills it in: its defaults change between versions. None where it cannot be found or read.

    Args:
        model: folder or hub name; of the latter the file in the cache.
    """
    path = expanded(model) / CONFIG
    if not path.is_file():
        found = _cached(model, CONFIG)
        if found is None:
            return None
        path = found
    try:
        content = _significant(json.loads(path.read_text(encoding="utf-8")))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    except (OSError, ValueError, RecursionError):
        return None


def _significant(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _significant(item) for key, item in value.items() if key not in _NOISE}
    if isinstance(value, list):
        return [_significant(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 1e4 and 10000 are the same


def way_back(model: str, digest: Callable[[str], str | None], kept: str) -> str:
    """What a user can do where a base is not what a run was started with, as sentences.

    Args:
        digest: of a base, one of those above.
        kept: the digest of what the run was started with.
    """
    cached = None if expanded(model).is_dir() else _cached(model, CONFIG)
    if cached is None:
        return "Put it back as it was, or start a new run."
    revision, snapshots = cached.parent.name, cached.parent.parent
    try:
        names = sorted(one.name for one in snapshots.iterdir() if digest(str(one)) == kept)
    except OSError:
        names = []
    if not names:
        return (
            f"The cache holds revision {revision} of it, and no longer the one that the run was started with. Start a "
            "new run."
        )
    return (
        f"The hub has another revision of it since. The one that the run was started with is still in the cache: write "
        f"{names[0]} into '{snapshots.parent / 'refs' / 'main'}' in place of {revision} and resume with "
        "HF_HUB_OFFLINE=1. Or start a new run."
    )


def _cached(model: str, name: str) -> Path | None:
    """A file of a hub name in the cache, in its latest revision there; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, name)
    except ValueError:  # neither a folder nor a name that the hub could have
        return None
    return Path(found) if isinstance(found, str) else None


def _weight_files(model: str) -> list[Path]:
    """The safetensors files that transformers loads, in the order of their names."""
    folder = expanded(model)
    if not folder.is_dir():
        known = [path for path in (_cached(model, name) for name in (WEIGHTS, INDEX)) if path is not None]
        if not known:
            return []
        folder = known[0].parent
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def _samples(file: IO[bytes]) -> Iterator[bytes]:
    size = int.from_bytes(file.read(8), "little")
    if size > _LONGEST_HEADER:
        raise ValueError("no header of safetensors")
    header = file.read(size)
    yield header
    tensors: dict[str, Any] = json.loads(header)
    for name in sorted(tensors.keys() - {"__metadata__"}):
        begin, end = tensors[name]["data_offsets"]
        for start in (begin, (begin + end) // 2, max(begin, end - _SAMPLE)):
            file.seek(8 + size + start)
            yield file.read(min(_SAMPLE, end - start))
