"""prepare_data: where the examples come from -> token ids and loss masks, cached by content. No torch.

file, folder, hub name, bundled messages   ->  records -> examples -> ChatEncoder  ->  TokenizedDataset
a bare count                               ->  lengths drawn, seeded               ->  TokenizedDataset
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np

from presets import jsonio
from presets.errors import DataError, ModelError
from presets.home import plan_home
from trainer.assumed import assumed_data
from trainer.chat import ChatEncoder
from trainer.growing import TokenFiles
from trainer.job import DataSpec
from trainer.model import UNTRUSTED
from trainer.records import Examples, read_examples
from trainer.sources import RawRecord, is_hub_name, open_source
from trainer.tokens import DataReport, TokenizedDataset

FORMAT_VERSION = 3  # raise it when the same data would be tokenised or masked otherwise than before
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json",
)  # fmt: skip


def prepare_data(
    spec: DataSpec,
    *,
    model: str,
    max_length: int,
    seed: int = 42,
    trust_remote_code: bool = False,
    cache: Path | None = None,
) -> TokenizedDataset:
    """All examples as token ids and loss masks, in the order of the source; the planner and the trainer both call this.

    Args:
        model: folder or hub name; its tokenizer and chat template are used, for a bare count only its vocabulary size.
        max_length: tokens; longer examples keep their head.
        seed: of the lengths and scores drawn for a bare count; files are the same for every seed.
        cache: folder instead of `plan_home()`.

    Raises:
        DataError: the data cannot be read, or nothing in it can be trained on.
        ModelError: the model has no usable tokenizer (for a count: no usable config).
    """
    if max_length < 2:
        raise DataError(f"the maximum length is {max_length}; it must be at least 2 tokens, one to predict another.")
    if spec.is_count:
        return assumed_data(spec, model=model, max_length=max_length, seed=seed)
    source = None if spec.source == "bundled" else open_source(spec.source)
    digest = _digest_of_bundled() if source is None else source.digest()
    tokenizer = None if Path(model).is_dir() else load_tokenizer(model, trust_remote_code=trust_remote_code)
    key = _key(spec, digest, _digest_of_tokenizer(model, tokenizer), max_length)
    entry = (cache or plan_home()) / "tokens" / key
    stored = _open_entry(entry)
    if stored is not None:
        # The same content may lie under another name than when it was stored.
        return replace(stored, report=replace(stored.report, source=spec.source))
    examples = _bundled_examples(spec) if source is None else read_examples(spec, source)
    for _ in examples:  # a bad line near the end is found in seconds, before minutes of tokenising
        pass
    encoder = _encoder(tokenizer or load_tokenizer(model, trust_remote_code=trust_remote_code), spec, model, max_length)
    return _made(spec, examples, encoder, entry)


def _encoder(tokenizer: Any, spec: DataSpec, model: str, max_length: int) -> ChatEncoder:
    try:
        return ChatEncoder(tokenizer, spec.train_on, max_length)
    except Exception as reason:  # a tokenizer that loads need not work
        text = " ".join(str(reason).split())
        raise ModelError(f"{model}: its tokenizer does not work ({text[:200]}). Save it again.") from None


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub name.

    Raises:
        ModelError: there is none, or it cannot be loaded.
    """
    folder = Path(model)
    remedy = "Planning from a file needs its tokenizer: save it beside the model, or pass a count (--dataset 63000)."
    if folder.is_dir() and not _tokenizer_files(folder):
        raise ModelError(f"{model}: the folder holds no tokenizer. {remedy}")
    if not folder.exists() and not is_hub_name(model):
        raise ModelError(f"{model}: there is no such folder. Check --model.")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as reason:  # transformers and tokenizers raise anything, a bare Exception included
        if "trust_remote_code" in str(reason):
            raise ModelError(UNTRUSTED.format(model=f"{model}: its tokenizer")) from None
        text = " ".join(str(reason).split())
        raise ModelError(f"{model}: its tokenizer cannot be loaded ({text[:200]}). {remedy}") from None


def encode_examples(spec: DataSpec, examples: Examples, encoder: ChatEncoder, files: TokenFiles) -> DataReport:
    """Examples into files, one after the other; what has nothing to learn from is counted and left out.

    Raises:
        DataError: the chat template refuses a conversation (unless `spec.skip_bad_lines`), or no example is left.
    """
    num_refused = num_unsupervised = num_truncated = num_beyond = 0
    first_refused = first_unsupervised = ""
    for example, encoded in encoder.encode_each(examples):
        if encoded.refusal:
            text = f"{example.location}: {encoded.refusal}"
            if not spec.skip_bad_lines:
                raise DataError(f"{text}. Fix the record, or pass --skip-bad-lines.")
            num_refused += 1
            first_refused = first_refused or text
            continue
        num_truncated += encoded.truncated
        if not encoded.supervised.any():
            num_unsupervised += 1
            num_beyond += encoded.truncated
            first_unsupervised = first_unsupervised or example.location
            continue
        files.add(
            encoded.ids,
            encoded.supervised,
            engagement=example.engagement,
            created_at=example.created_at,
            fingerprint=hash((example.messages, example.prompt, example.completion, example.text)),
            number=example.number,
        )
    if not len(files):
        raise DataError(_nothing_left(spec, examples, encoder, num_refused, num_beyond, first_refused))
    notes = [*examples.notes, *encoder.notes]
    if num_refused:
        notes.append(f"{num_refused:,} conversation(s) skipped, the first: {first_refused}")
    if num_unsupervised:
        beyond = f", {num_beyond:,} of them because the answer begins beyond {encoder.max_length:,} tokens"
        cut = beyond if num_beyond else ""
        notes.append(
            f"{num_unsupervised:,} example(s) left out: no token to learn from{cut}, the first: {first_unsupervised}"
        )
    if num_truncated:
        notes.append(f"{num_truncated:,} example(s) longer than {encoder.max_length:,} tokens: only the head is used")
    num_copies, copy, original = files.copies()
    if num_copies and spec.source != "bundled":
        notes.append(
            f"{num_copies:,} of {len(files):,} examples are copies of others, the first: record {copy} of record "
            f"{original}; a copy in the held-out part makes its loss look better. Take them out if they are not meant"
        )
    return DataReport(
        source=spec.source,
        num_records=examples.num_examples + examples.num_bad_lines,
        num_bad_lines=examples.num_bad_lines + num_refused,
        num_unsupervised=num_unsupervised,
        num_truncated=num_truncated,
        notes=tuple(notes),
    )


def _nothing_left(
    spec: DataSpec, examples: Examples, encoder: ChatEncoder, num_refused: int, num_beyond: int, first_refused: str
) -> str:
    total = examples.num_examples
    if num_refused == total:
        return f"{spec.source}: nothing to train on; every conversation was refused, the first: {first_refused}."
    if num_beyond:
        return (
            f"{spec.source}: nothing to train on; in {num_beyond:,} of {total:,} examples the answer begins beyond the "
            f"maximum length of {encoder.max_length:,} tokens. Raise --max-length."
        )
    if encoder.num_masks_not_found:
        return (
            f"{spec.source}: nothing to train on; the answer was not found in {encoder.num_masks_not_found:,} of "
            f"{total:,} rendered chats. Use --train-on all, or another chat template."
        )
    return (
        f"{spec.source}: nothing to train on; no token of {total:,} example(s) is an assistant's. "
        f"Use --train-on all, or data with answers."
    )


# -- the bundled messages --------------------------------------------------------------------------------------------


def _bundled_records() -> list[dict[str, Any]]:
    from presets.demo.messages import generate_messages

    return list(generate_messages())


def _bundled_examples(spec: DataSpec) -> Examples:
    messages = _bundled_records()

    def records() -> Iterator[RawRecord]:
        for number, record in enumerate(messages, start=1):
            yield RawRecord(f"bundled message {number}", record, number=number)

    return Examples(spec, records, name="bundled messages")


def _digest_of_bundled() -> str:
    """Of what makes the messages, which is seeded: making them takes longer than all the rest of a cached plan."""
    source = resources.files("presets.demo").joinpath("messages.py").read_bytes()
    return hashlib.sha256(source + repr(sys.version_info[:2]).encode()).hexdigest()


# -- the cache -------------------------------------------------------------------------------------------------------


def _key(spec: DataSpec, data_digest: str, tokenizer_digest: str, max_length: int) -> str:
    parts = {
        "format": FORMAT_VERSION,
        "transformers": metadata.version("transformers"),
        "data": data_digest,
        "tokenizer": tokenizer_digest,
        "max_length": max_length,
        "train_on": spec.train_on,
        "columns": sorted(spec.columns),
        "skip_bad_lines": spec.skip_bad_lines,
        "limit": spec.limit,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_files(folder: Path) -> list[Path]:
    named = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return [*named, *sorted(folder.glob("*.tiktoken")), *sorted(folder.glob("chat_templates/*.jinja"))]


def _digest_of_tokenizer(model: str, tokenizer: Any) -> str:
    """Of a folder its files, so that a hit loads no tokenizer; of a hub name what the loaded tokenizer says."""
    sha = hashlib.sha256()
    if tokenizer is None:
        # config.json too: it decides the class where tokenizer_config.json does not.
        folder = Path(model)
        for path in [*_tokenizer_files(folder), folder / "config.json", *sorted(folder.glob("*.py"))]:
            if path.is_file():
                content = path.read_bytes()
                sha.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
        return sha.hexdigest()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    described = [text, str(tokenizer.chat_template), repr(sorted(tokenizer.special_tokens_map.items())), model]
    sha.update("\0".join(described).encode())
    return sha.hexdigest()


def _open_entry(entry: Path) -> TokenizedDataset | None:
    """The stored data set, or None where there is none or it is damaged."""
    if not os.path.isdir(entry):  # pathlib's raises where the folder above may not be searched
        return None
    try:
        data = TokenizedDataset.load(entry)
    except DataError:
        return None
    ends_fit = len(data.offsets) > 1 and data.offsets[0] == 0 and data.offsets[-1] == len(data.token_ids)
    if not ends_fit or len(data.supervised) != len(data.token_ids) or bool((np.diff(data.offsets) < 1).any()):
        return None
    families, sizes = data.families, data.sizes
    if families is None or sizes is None or len(families) not in (0, len(data)) or len(sizes) < 1:
        return None
    if len(families) and not (0 <= int(families.min()) <= int(families.max()) < len(sizes) and sizes[0] == 0):
        return None
    if any(scores is not None and len(scores) != len(data) for scores in (data.engagement, data.created_at)):
        return None
    # Zeros where the data was: what a power cut leaves of files that were written but had not reached the disk.
    return data if bool((data.num_supervised > 0).all()) else None


def _made(spec: DataSpec, examples: Examples, encoder: ChatEncoder, entry: Path) -> TokenizedDataset:
    """Tokenise into files aside and move them into place, so that a reader finds all of it or nothing; open them.

    Raises:
        DataError: as `encode_examples`, or there is no room for it anywhere.
    """
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".new-", dir=entry.parent))
    except OSError as reason:
        return _made_elsewhere(spec, examples, encoder, str(reason.strerror or reason))
    try:
        _write(spec, examples, encoder, aside)
        if entry.exists():  # damaged, or another process was faster: either way this one is whole
            os.replace(entry, _unused_name(entry))
        os.replace(aside, entry)
    except OSError as reason:
        # Another process may have stored the same meanwhile.
        stored = _open_entry(entry)
        return stored or _made_elsewhere(spec, examples, encoder, str(reason.strerror or reason))
    finally:
        for leftover in (aside, *entry.parent.glob(f".old-{entry.name}-*")):
            shutil.rmtree(leftover, ignore_errors=True)
    return TokenizedDataset.load(entry)


def _made_elsewhere(spec: DataSpec, examples: Examples, encoder: ChatEncoder, problem: str) -> TokenizedDataset:
    """The same by way of a temporary folder, into memory."""
    try:
        with tempfile.TemporaryDirectory(prefix="plan-tokens-") as folder:
            _write(spec, examples, encoder, Path(folder))
            data = TokenizedDataset.load(Path(folder), into_memory=True)
    except OSError as reason:
        raise DataError(
            f"{spec.source}: there is no room for the tokenised data ({problem}; {reason.strerror or reason}). "
            "Make room, or name another folder in PLAN_HOME."
        ) from None
    note = f"the tokenised data could not be kept for the next time ({problem})"
    return replace(data, report=replace(data.report, notes=(*data.report.notes, note)))


def _write(spec: DataSpec, examples: Examples, encoder: ChatEncoder, folder: Path) -> None:
    with TokenFiles(folder) as files:
        report = encode_examples(spec, examples, encoder, files)
        files.finish(with_scores={name: examples.has(name) for name in ("engagement", "created_at")})
    (folder / "report.json").write_text(jsonio.to_json(report), encoding="utf-8")
    TokenizedDataset.load(folder).save_beginnings(folder)


def _unused_name(entry: Path) -> Path:
    candidates = (entry.parent / f".old-{entry.name}-{os.getpid()}-{number}" for number in itertools.count())
    return next(path for path in candidates if not path.exists())
