"""Files and records: what is read, and what is said about what cannot be read."""

from __future__ import annotations

import csv
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from presets.errors import DataError
from trainer import sources
from trainer.job import DataSpec
from trainer.records import Examples, number, read_examples, seconds_since_1970
from trainer.sources import open_source

CHAT = {"messages": [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "four"}]}
AS_CHAT = (("user", "two?"), ("assistant", "four"))


def write(path: Path, *records: Any, end: str = "\n") -> Path:
    path.write_bytes("".join(json.dumps(record, ensure_ascii=False) + end for record in records).encode())
    return path


class Read:
    """All the examples of a file, and what was said of them."""

    def __init__(self, found: Examples) -> None:
        self.examples = list(found)
        self.num_bad_lines = found.num_bad_lines
        self.notes = tuple(found.notes)
        self.has = found.has


def read(path: Path | str, **spec: Any) -> Read:
    return Read(read_examples(DataSpec(source=str(path), **spec), open_source(str(path))))


def error(path: Path | str, **spec: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **spec)
    return str(caught.value)


# -- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        CHAT,
        {"conversations": [{"from": "human", "value": "two?"}, {"from": "gpt", "value": "four"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "tw"}, {"type": "text", "text": "o?"}]},
                      {"role": "assistant", "content": "four"}]},
        {"question": "two?", "answer": "four"},
        {"instruction": "two?", "output": "four"},
        {"instruction": "two?", "input": "", "output": "four", "text": "the same in one"},
        {"prompt": [{"role": "user", "content": "two?"}], "completion": [{"role": "assistant", "content": "four"}]},
        {"messages": json.dumps(CHAT["messages"])},
    ],
)  # fmt: skip
def test_every_conversational_shape_becomes_the_same_messages(tmp_path: Path, record: dict[str, Any]) -> None:
    (example,) = read(write(tmp_path / "a.jsonl", record)).examples
    assert example.messages == AS_CHAT


def test_plain_shapes_stay_plain(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.jsonl", {"prompt": "two is", "completion": " four"}))
    assert (found.examples[0].prompt, found.examples[0].completion) == ("two is", " four")
    assert any("without the chat template" in note for note in found.notes)
    assert read(write(tmp_path / "b.jsonl", {"text": "four"})).examples[0].text == "four"


def test_the_input_of_an_instruction_follows_it(tmp_path: Path) -> None:
    (example,) = read(write(tmp_path / "a.jsonl", {"instruction": "Add.", "input": "2 2", "output": "4"})).examples
    assert example.messages == (("user", "Add.\n\n2 2"), ("assistant", "4"))


def test_messages_of_the_prompt_are_context(tmp_path: Path) -> None:
    record = {"prompt": CHAT["messages"] + [{"role": "user", "content": "sure?"}],
              "completion": [{"role": "assistant", "content": "yes"}]}  # fmt: skip
    (example,) = read(write(tmp_path / "a.jsonl", record)).examples
    assert (len(example.messages), example.first_trained) == (4, 3)


def test_columns_name_what_is_called_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"q": "two?", "a": "four", "text": "not this"})
    assert read(path, columns=(("question", "q"), ("answer", "a"))).examples[0].messages == AS_CHAT


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ((("question", "questoin"), ("answer", "a")), "no column 'questoin' for question. Did you mean 'question'?"),
        ((("prompt", "question"), ("answer", "a")), "answer, prompt do not go together"),
        ((("anwser", "a"),), "no role 'anwser'. Did you mean 'answer'?"),
        ((("engagement", "lieks"),), "no column 'lieks' for engagement. Did you mean 'likes'?"),
    ],
)
def test_a_wrong_columns_option_says_what_there_is(
    tmp_path: Path, columns: tuple[tuple[str, str], ...], said: str
) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "two?", "answer": "b", "a": "four", "likes": 3})
    assert said in error(path, columns=columns)


def test_an_unknown_shape_lists_the_columns_and_the_way_out(tmp_path: Path) -> None:
    text = error(write(tmp_path / "a.jsonl", {"frage": "two?", "antwort": "four"}))
    assert "columns are frage, antwort" in text
    assert "question + answer" in text
    assert "--columns prompt=...,completion=..." in text
    assert "columns are frage, antwort" in error(tmp_path / "a.jsonl", skip_bad_lines=True)


# -- bad records -----------------------------------------------------------------------------------------------------


def message(role: Any = "user", content: Any = "two?") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}, {"role": "assistant", "content": "four"}]}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (message(role="admin"), "message 1 has the role 'admin'; it must be one of system, user, assistant, tool"),
        (message(role=None), "message 1 has the role None"),
        (message(role=["user"]), "has the role ['user']"),
        (message(content=None), "the content of message 1 is missing"),
        (message(content=" \n"), "the content of message 1 is empty"),
        (message(content=4), "the content of message 1 is not text"),
        (message(content=[{"type": "image", "url": "x"}]), "has a part that is not text"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hello"}, "messages is not a list of messages"),
        ({"messages": ["hello"]}, "message 1 is not an object"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "tool calls"),
        ({"question": "two?"}, "has no 'messages' (it has question)"),
        ([1], "not an object but a list"),
        ("text", "not an object but text"),
    ],
)
def test_a_bad_record_is_named_with_its_line_and_a_remedy(tmp_path: Path, record: Any, said: str) -> None:
    path = write(tmp_path / "a.jsonl", CHAT, record, CHAT)
    text = error(path)
    assert text.startswith(f"{path}, line 2: ")
    assert said in text
    assert text.endswith("Fix the line, or pass --skip-bad-lines.")
    skipped = read(path, skip_bad_lines=True)
    assert (len(skipped.examples), skipped.num_bad_lines) == (2, 1)


def test_of_several_bad_lines_the_number_and_the_first_ones_are_told_at_once(tmp_path: Path) -> None:
    bad = [{"messages": []}, [1], {"question": "x\ny"}, message(role="boss" * 200), {"a\nb": 1}, "text"]
    records = [one for each in bad for one in (CHAT, each)]
    path = write(tmp_path / "a.jsonl", *records)
    title, *told = error(path).split("\n")
    assert title == f"{path}: 6 of 12 records cannot be used. Fix them, or pass --skip-bad-lines. The first 5:"
    assert [line.split(":")[0] for line in told] == [f"  line {number}" for number in (2, 4, 6, 8, 10)]
    assert told[0] == "  line 2: messages is empty"
    assert told[4] == r"  line 10: has no 'messages' (it has a\nb)"
    assert all(len(line) < 250 for line in told)
    of_four = error(path, limit=2)
    assert of_four.startswith(f"{path}, line 2: messages is empty. Fix"), "what lies beyond the limit is not read"
    title, *told = error(write(tmp_path / "b.jsonl", CHAT, {"messages": []}, [1])).split("\n")
    assert title.endswith("2 of 3 records cannot be used. Fix them, or pass --skip-bad-lines. They are:")
    assert len(told) == 2


def test_the_remedy_that_several_bad_lines_share_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    header, good, latin = b"question,answer\n", b"two?,four\n", "wieviel?,fünf\n".encode("latin-1")
    path.write_bytes(header + good + latin * 7)
    title, *told = error(path).split("\n")
    assert title == (
        f"{path}: 7 of 8 records cannot be used. Save the file as UTF-8, or pass --skip-bad-lines. The first 5:"
    )
    assert told[0] == "  line 3: not UTF-8"
    path.write_bytes(header + good + latin * 7 + b"two?,\n")
    assert "9 records cannot be used. Fix them, or pass --skip-bad-lines. The first 5:" in error(path)


def test_bad_lines_are_counted_in_the_one_pass_in_which_they_are_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", CHAT, {"messages": []}, CHAT, [1], CHAT)
    opened = open_source(str(path))
    begun, given = [], []
    spec = DataSpec(source=str(path))
    examples = Examples(spec, lambda: begun.append(1) or opened.records(), name=str(path))  # type: ignore[func-returns-value]
    with pytest.raises(DataError, match="2 of 5 records"):
        given.extend(examples)
    assert (len(begun), len(given)) == (1, 1)


def test_a_line_that_is_not_json_is_named_with_its_column(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(CHAT) + '\n\n{"messages": [] "x": 1}\n', encoding="utf-8")
    assert error(path) == (
        f"{path}, line 3: not JSON (Expecting ',' delimiter, column 17). Fix the line, or pass --skip-bad-lines."
    )
    assert "line 3" in read(path, skip_bad_lines=True).notes[0]


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_a_line_that_was_cut_off_is_said_to_be_so(tmp_path: Path, end: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "cut o' + end.encode())
    assert "line 1: not JSON (Unterminated string, column 10)." in error(path)
    path.write_bytes(b'{"text": "a\ttab"}' + end.encode())
    assert "line 1: not JSON (Invalid control character, column 12)." in error(path)


def test_bytes_that_are_not_utf_8_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(CHAT).encode() + b'\n{"text": "caf\xe9"}\n')
    assert "a.jsonl, line 2: not UTF-8" in error(path)
    table = tmp_path / "a.csv"
    table.write_bytes(b"text\nplain\ncaf\xe9\n")
    assert "a.csv, line 3: not UTF-8" in error(table)


def test_byte_order_mark_carriage_returns_blank_lines_and_line_separators_are_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "one\u2028two"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n  \n{line}".encode())
    assert [example.location[-6:] for example in read(path).examples] == ["line 1", "line 4"]


def test_nesting_beyond_reason_is_a_bad_line_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000 + "\n", encoding="utf-8")
    assert "line 1: not JSON" in error(path)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_empty_data_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert "there is no record in it" in error(path)


def test_only_bad_lines_is_an_error_that_shows_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": []}, {"messages": 3})
    assert "all 2 records are bad, the first: " in error(path, skip_bad_lines=True)


# -- kinds of files --------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_examples(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f"line\n{i}, or?", "answer": 'a "quoted" one'} for i in range(3)]
    write(tmp_path / "a.jsonl", *rows)
    write(tmp_path / "lines.json", *rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "data.json").write_text(json.dumps({"data": rows, "version": 1}), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
    for path in list(tmp_path.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    found = {path.name: [e.messages for e in read(path).examples] for path in tmp_path.iterdir()}
    assert len(found) == 14
    expected = [(("user", row["question"]), ("assistant", row["answer"])) for row in rows]
    assert all(messages == expected for messages in found.values()), found


def test_a_broken_json_document_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "one"},\n {"text": }]', encoding="utf-8")
    assert "a.json, line 2: not JSON (Expecting value, column 11)" in error(path)


def test_a_csv_row_of_another_width_is_a_bad_line_also_after_a_value_of_two_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"two\nlines","four"\nalone\n', encoding="utf-8")
    assert "a.csv, line 4: has 1 values where the header has 2" in error(path)
    assert read(path, skip_bad_lines=True).num_bad_lines == 1


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet", "a.parquet.gz"])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    whole = gzip.compress(b"PAR1 is no parquet" * 50)
    path.write_bytes(whole[:-9] if name.startswith("a.jsonl") else whole if name.endswith("gz") else b"PAR1 no")
    assert str(path) in error(path)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", CHAT)
    assert "Did you mean 'train.jsonl'?" in error(tmp_path / "trian.jsonl")


def test_an_unknown_kind_of_file_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"")
    assert ".jsonl" in error(tmp_path / "a.xlsx")


def test_a_limit_stops_early(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps(CHAT) + "\n") * 3 + "not json\n", encoding="utf-8")
    assert len(read(path, limit=3).examples) == 3


def test_a_saved_folder_is_read_and_its_split_is_said(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": table.select([0]), "train": table}).save_to_disk(str(tmp_path / "both"))
    assert [e.text for e in read(tmp_path / "one").examples] == ["one", "two"]
    both = read(tmp_path / "both")
    assert len(both.examples) == 2
    assert both.notes == ("the split 'train' is used, of test, train",)


def test_any_other_folder_names_its_files(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", CHAT)
    assert "Name one of its files: a.jsonl" in error(tmp_path)


def test_a_hub_name_that_cannot_be_loaded_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*arguments: object) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    text = error("someone/chats")
    assert "someone/chats: no such file, and it cannot be loaded" in text
    assert "ConnectionError: no network at all" in text


def test_a_hub_name_may_carry_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(*arguments: Any) -> Any:
        asked.append(arguments)
        return datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "one"}])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(read("openai/gsm8k:main").examples) == 1
    assert asked == [("openai/gsm8k", "main")]


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    one, same, other = (write(tmp_path / f"{n}.jsonl", {"text": t}) for n, t in (("a", "x"), ("b", "x"), ("c", "y")))
    digests = [sources.open_source(str(path)).digest() for path in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


# -- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2025-01-02T03:04:05Z", 1735787045.0),
        ("2025-01-02T04:04:05+01:00", 1735787045.0),
        ("2025-01-02 03:04:05", 1735787045.0),
        (1735787045, 1735787045.0),
        (1735787045000, 1735787045.0),
        ("1735787045", 1735787045.0),
        ("2025-01-02", 1735776000.0),
    ],
)
def test_dates_are_read_in_every_usual_form(value: Any, seconds: float) -> None:
    assert seconds_since_1970(value) == seconds


@pytest.mark.parametrize("value", ["yesterday", "", True, [1], math.inf, "nan"])
def test_what_is_no_date_and_no_number_is_nan(value: Any) -> None:
    assert math.isnan(seconds_since_1970(value))
    assert math.isnan(number(value))


def test_scores_are_found_under_their_usual_names_and_what_fails_is_counted(tmp_path: Path) -> None:
    dated = {"text": "a", "likes": 3, "timestamp": 1735787045}
    rows = [dated, {"text": "b", "likes": "many"}, {"text": "c", "likes": "7"}]
    found = read(write(tmp_path / "a.jsonl", *rows))
    assert [e.engagement for e in found.examples] == [3.0, pytest.approx(math.nan, nan_ok=True), 7.0]
    assert found.has("created_at")
    assert "engagement could not be read in 1 of 3 records" in found.notes
    assert "created_at is missing in 2 of 3 records" in found.notes


def test_a_mapped_score_may_be_missing_in_the_first_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b", "claps": 2})
    assert read(path, columns=(("engagement", "claps"),)).examples[1].engagement == 2.0
