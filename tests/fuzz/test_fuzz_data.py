"""Data files of any content: records, or one DataError with its place; on request what is bad is counted instead."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from budget import MUTANTS, SEEDS, any_value, fuzzed, mutants
from hypothesis import given

from presets.errors import DataError
from trainer.job import DataSpec
from trainer.literal import Marks, cut
from trainer.records import ROLES, Example, read_examples
from trainer.sources import open_source


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


WORDS = ["two?", "four", "", " ", "\u202eשלום", "\U0001f642", "</s>", "a\nb", "\x00", "\ud800", 'say "x"', "a\rb"]


def a_record(chance: random.Random) -> Any:
    def word() -> Any:
        return chance.choice(WORDS) if chance.random() < 0.9 else any_value(chance)

    def message() -> Any:
        role = chance.choice([*ROLES, *ROLES, "human", None, 3])
        return {"role": role, "content": word()} if chance.random() < 0.9 else any_value(chance)

    shapes: list[Any] = [
        {"messages": [message() for _ in range(chance.randint(0, 3))]},
        {"prompt": word(), "completion": word() if chance.random() < 0.7 else [message()]},
        {"question": word(), "answer": word()},
        {"instruction": word(), "output": word(), "input": any_value(chance)},
        {"text": word()},
        any_value(chance),
    ]
    record = chance.choice(shapes)
    if isinstance(record, dict) and chance.random() < 0.5:
        record |= {
            "likes": any_value(chance),
            "created_at": chance.choice([any_value(chance), "9999-12-31T23:59-23:59"]),
        }
    return record


def content_of(kind: str, chance: random.Random) -> bytes:
    if kind == "csv":
        out = io.StringIO()
        rows = [[chance.choice(WORDS) for _ in range(chance.choice((2, 3, 3, 4)))] for _ in range(chance.randint(0, 4))]
        csv.writer(out).writerows([["question", "answer", "likes"], *rows])
        return out.getvalue().encode("utf-8", "surrogatepass")
    shape = chance.random()
    records = [a_record(chance) if shape < 0.5 else {"text": chance.choice(WORDS)} for _ in range(chance.randint(0, 4))]
    if kind == "jsonl":
        return "\n".join(map(json.dumps, records)).encode()
    return json.dumps(records if chance.random() < 0.7 else {"data": records}).encode()


def read(path: Path, *, skip: bool) -> tuple[list[Example], int, list[str]] | str:
    try:
        found = read_examples(DataSpec(source=str(path), skip_bad_lines=skip), open_source(str(path)))
        examples = list(found)
    except DataError as reason:
        return str(reason)
    return examples, found.num_bad_lines, found.notes


def check_file(folder: Path, kind: str, content: bytes) -> None:
    path = folder / f"data.{kind}"
    path.write_bytes(content)
    strict, lenient = read(path, skip=False), read(path, skip=True)
    for told in (strict, lenient):
        if isinstance(told, str):
            assert told.startswith(str(path))
            assert len(told) < 3000
    if isinstance(strict, str):
        # What was bad is left out, or nothing is left, or the file as a whole cannot be read.
        assert isinstance(lenient, str) or lenient[1] > 0
        return
    assert not isinstance(lenient, str)
    assert lenient[:2] == (strict[0], 0) or repr(lenient[:2]) == repr((strict[0], 0))  # NaN is not itself
    for example in strict[0]:
        assert_sound(example)


def assert_sound(example: Example) -> None:
    texts = [example.text, example.prompt, example.completion, *(content for _, content in example.messages)]
    assert any(text.strip() for text in texts)
    for text in texts:
        text.encode("utf-8")
    assert all(role in ROLES for role, _ in example.messages)
    for score in (example.engagement, example.created_at):
        assert score != score or abs(score) < float("inf")
    assert example.number >= 1


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_file_gives_sound_examples_or_one_error_with_its_place(folder: Path, kind: str) -> None:
    @fuzzed(2 * MUTANTS)  # three kinds of file are one reader
    @given(SEEDS)
    def check(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(MUTANTS // 5):
            whole = content_of(kind, chance)
            for content in itertools.islice(mutants(whole, chance.getrandbits(48)), 5):
                check_file(folder, kind, content)

    check()


PARTS = ["ab", "</s>", "<s>", "</", "s>", " ", "\ue000", "\ue001", "0", ":"]


@fuzzed()
@given(SEEDS)
def test_a_marked_text_comes_back_with_its_special_tokens_in_place(seed: int) -> None:
    chance = random.Random(seed)
    marks = Marks(frozenset({"</s>", "<s>"}))
    for _ in range(MUTANTS):
        text = "".join(chance.choices(PARTS, k=chance.randint(0, 12)))
        marked = marks.put(text)
        back, spans, ranges = marks.take(f"<s>{marked}</s>", ((3, 3 + len(marked)),))
        assert back == f"<s>{text}</s>"
        assert back[slice(*spans[0])] == text
        assert [back[slice(*one)] for one in ranges] == marks.pattern.findall(text)
        pieces = cut(len(back), spans, ranges)
        assert "".join(back[begin:end] for begin, end, _, _ in pieces) == back
        assert [(begin, end) for begin, end, _, literal in pieces if literal] == list(ranges)
