"""prepare_data: counts, the cache, the bundled messages and assumed examples."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_tokenizer import CHATML, GEMMA, make_tokenizer

from presets.errors import DataError, ModelError
from trainer import assumed, data, tokens
from trainer.data import prepare_data
from trainer.evaluate import answerable
from trainer.job import DataSpec
from trainer.model import inspect_model
from trainer.sources import open_source
from trainer.tokens import DataReport, TokenizedDataset


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", CHATML, eos="<|im_end|>")


def make_model(folder: Path, template: str, **options: Any) -> Path:
    make_tokenizer(template, **options).save_pretrained(str(folder))
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 400}', encoding="utf-8")
    return folder


def write(path: Path, *records: dict[str, Any]) -> DataSpec:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return DataSpec(source=str(path))


def chat(question: str, answer: str | None = "four", **scores: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"messages": messages + ([{"role": "assistant", "content": answer}] if answer else []), **scores}


def prepare(spec: DataSpec, model: Path, max_length: int = 64, **more: Any) -> TokenizedDataset:
    return prepare_data(spec, model=str(model), max_length=max_length, cache=model.parent / "cache", **more)


def same(one: TokenizedDataset, other: TokenizedDataset) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("token_ids", "supervised", "offsets")
    )


# -- what is kept and what is counted --------------------------------------------------------------------------------


def test_examples_lie_end_to_end_with_their_masks(tmp_path: Path, model: Path) -> None:
    found = prepare(write(tmp_path / "a.jsonl", chat("two?"), chat("two and two?", "four it is")), model)
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    for i, (question, answer) in enumerate((("two?", "four"), ("two and two?", "four it is"))):
        ids = found.token_ids[found.offsets[i] : found.offsets[i + 1]]
        mask = found.supervised[found.offsets[i] : found.offsets[i + 1]]
        assert question in tokenizer.decode(ids)
        assert tokenizer.decode(ids[mask]) == f"{answer}<|im_end|>"
    assert found.token_ids.dtype == np.int32
    assert found.engagement is None
    assert (found.report.num_records, found.report.lengths) == (2, "measured")


def test_examples_with_nothing_to_learn_are_left_out_with_their_scores(tmp_path: Path, model: Path) -> None:
    records = [chat("one?", engagement=1), chat("none", None, engagement=2), chat("x" * 90, engagement=3), chat("two?")]
    found = prepare(write(tmp_path / "a.jsonl", *records), model)
    assert len(found) == 2
    assert found.engagement is not None
    assert found.engagement[0] == 1
    assert math.isnan(found.engagement[1])
    assert (found.report.num_unsupervised, found.report.num_truncated, found.report.num_records) == (2, 1, 4)
    assert any("2 example(s) left out" in note and "1 of them because" in note for note in found.report.notes)
    assert (found.num_supervised > 0).all()


@pytest.mark.parametrize(
    ("record", "max_length", "said"),
    [
        (chat("two?", None), 64, "no token of 1 example(s) is an assistant's"),
        (chat("x" * 90), 64, "begins beyond the maximum length of 64 tokens. Raise --max-length."),
        (chat("two?"), 1, "the maximum length is 1"),
    ],
)
def test_nothing_left_says_why(tmp_path: Path, model: Path, record: dict[str, Any], max_length: int, said: str) -> None:
    with pytest.raises(DataError) as caught:
        prepare(write(tmp_path / "a.jsonl", record), model, max_length)
    assert said in str(caught.value)


def test_a_refused_conversation_is_an_error_or_skipped_on_request(tmp_path: Path) -> None:
    model = make_model(tmp_path / "gemma", GEMMA, bos="<bos>", eos="<eos>", adds_bos=True)
    twice = {"messages": [{"role": "user", "content": "two?"}] * 2}
    spec = write(tmp_path / "a.jsonl", chat("two?"), twice)
    with pytest.raises(DataError, match=r"line 2: .*must alternate.*--skip-bad-lines"):
        prepare(spec, model)
    found = prepare(DataSpec(source=spec.source, skip_bad_lines=True), model)
    assert (len(found), found.report.num_bad_lines) == (1, 1)


def test_a_model_without_a_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "llama", "vocab_size": 400}', encoding="utf-8")
    spec = write(tmp_path / "a.jsonl", chat("two?"))
    with pytest.raises(ModelError, match=r"holds no tokenizer. Planning from a file needs its tokenizer"):
        prepare(spec, bare)
    (bare / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        prepare(spec, bare)


def test_a_model_folder_that_is_not_there_is_said_without_asking_the_hub(tmp_path: Path) -> None:
    for spec in (write(tmp_path / "a.jsonl", chat("two?")), DataSpec(source="count", num_examples=5)):
        with pytest.raises(ModelError, match="there is no such folder"):
            prepare(spec, tmp_path / "missing")


# -- the cache -------------------------------------------------------------------------------------------------------


def test_the_second_time_no_tokenizer_is_loaded(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write(tmp_path / "a.jsonl", chat("two?", likes=3))
    first = prepare(spec, model)
    monkeypatch.setattr(data, "load_tokenizer", lambda *a, **k: pytest.fail("tokenised again"))
    second = prepare(spec, model)
    assert same(first, second)
    assert second.report == first.report
    assert second.engagement is not None
    assert second.engagement.tolist() == [3.0]


def test_whatever_changes_the_tokens_changes_the_entry(tmp_path: Path, model: Path) -> None:
    spec = write(tmp_path / "a.jsonl", chat("two?"), chat("three?"))
    entries = model.parent / "cache" / "tokens"

    def count(spec: DataSpec, max_length: int = 64) -> int:
        prepare(spec, model, max_length)
        return len(list(entries.iterdir()))

    assert count(spec) == 1
    assert count(spec) == 1
    assert count(spec, max_length=63) == 2
    assert count(DataSpec(source=spec.source, train_on="all")) == 3
    assert count(DataSpec(source=spec.source, limit=1)) == 4
    (model / "chat_template.jinja").write_text(CHATML.replace("You help.", "You shine."), encoding="utf-8")
    assert count(spec) == 5
    write(tmp_path / "a.jsonl", chat("two?"), chat("four?"))
    assert count(spec) == 6
    assert not [path for path in entries.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("damage", ["cut", "gone", "zeros", "report", "other length"])
def test_a_damaged_entry_is_rebuilt(tmp_path: Path, model: Path, damage: str) -> None:
    spec = write(tmp_path / "a.jsonl", chat("two?"), chat("three?"))
    opened = prepare(spec, model)
    copied = {name: np.array(getattr(opened, name)) for name in ("token_ids", "supervised", "offsets")}
    whole = TokenizedDataset(**copied, report=opened.report)  # the files under the opened one are damaged below
    (entry,) = (model.parent / "cache" / "tokens").iterdir()
    if damage == "cut":
        content = (entry / "token_ids.npy").read_bytes()
        (entry / "token_ids.npy").write_bytes(content[:-7])
    elif damage == "gone":
        (entry / "offsets.npy").unlink()
    elif damage == "zeros":
        np.save(entry / "supervised.npy", np.zeros(len(whole.token_ids), dtype=bool))
    elif damage == "report":
        (entry / "report.json").write_text("{", encoding="utf-8")
    else:
        np.save(entry / "token_ids.npy", np.zeros(3, dtype=np.int32))
    assert same(prepare(spec, model), whole)
    assert same(TokenizedDataset.load(entry), whole)
    assert [path.name for path in entry.parent.iterdir()] == [entry.name]


def test_a_cache_that_cannot_be_written_is_said_and_no_obstacle(tmp_path: Path, model: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be", encoding="utf-8")
    found = prepare(write(tmp_path / "a.jsonl", chat("two?")), model)
    assert len(found) == 1
    assert any("could not be kept" in note for note in found.report.notes)


def test_the_same_content_under_another_name_is_shown_under_that_name(tmp_path: Path, model: Path) -> None:
    prepare(write(tmp_path / "a.jsonl", chat("two?")), model)
    assert prepare(write(tmp_path / "b.jsonl", chat("two?")), model).report.source.endswith("b.jsonl")


# -- bundled and counted ---------------------------------------------------------------------------------------------


def test_bundled_messages_go_the_same_way_and_carry_scores(model: Path) -> None:
    found = prepare(DataSpec(source="bundled", limit=20), model, 256)
    assert len(found) == 20
    assert found.engagement is not None
    assert found.created_at is not None
    assert not np.isnan(found.created_at).any()


def test_a_count_draws_assumed_lengths_by_the_seed(model: Path) -> None:
    spec = DataSpec(source="count", num_examples=500)
    one, again, other = (prepare(spec, model, 256, seed=seed) for seed in (1, 1, 2))
    assert same(one, again)
    assert not same(one, other)
    assert (len(one), one.report.lengths) == (500, "assumed")
    assert one.lengths.max() <= 256
    assert (one.num_supervised >= 1).all()
    assert not one.supervised[one.offsets[:-1]].any()  # never the first token
    assert one.supervised[one.offsets[1:] - 1].all()  # always the last
    assert one.token_ids.min() >= 5
    assert one.token_ids.max() < 400
    bundled = json.loads((Path(assumed.__file__).parents[1] / "presets/demo/lengths.json").read_text())["lengths"]
    assert one.lengths.mean() == pytest.approx(np.minimum(np.array(bundled)[:, 0], 256).mean(), rel=0.2)


def test_a_count_with_a_given_length_has_that_length(model: Path) -> None:
    found = prepare(DataSpec(source="count", num_examples=10, tokens_per_example=100), model, 64)
    assert found.lengths.tolist() == [64] * 10
    assert found.report.num_truncated == 10
    assert "100 tokens per example" in found.report.notes[0]


def test_a_huge_count_takes_no_memory_for_its_tokens(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assumed, "LARGEST_WRITTEN", 1000)
    found = prepare(DataSpec(source="count", num_examples=100, tokens_per_example=50), model)
    assert found.token_ids.strides == (0,)
    assert found.token_ids[found.offsets[99] : found.offsets[100]].shape == (50,)


@pytest.mark.parametrize("into_memory", [False, True])
def test_a_huge_count_learns_from_as_much_as_a_small_one_and_is_written_in_few_bytes(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, into_memory: bool
) -> None:
    spec = DataSpec(source="count", num_examples=200)
    small = prepare(spec, model)
    monkeypatch.setattr(assumed, "LARGEST_WRITTEN", 1000)
    huge = prepare(spec, model)
    assert np.array_equal(huge.lengths, small.lengths)
    assert np.array_equal(huge.num_supervised, small.num_supervised)
    assert huge.num_supervised.sum() < huge.lengths.sum()
    huge.save(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < small.token_ids.nbytes
    for one in (huge, TokenizedDataset.load(tmp_path, into_memory=into_memory)):
        assert len(one.supervised) == len(one.token_ids) == len(small.token_ids)
        assert np.array_equal(one.num_supervised, small.num_supervised)
        for start, end in zip(small.offsets[:-1].tolist(), small.offsets[1:].tolist(), strict=True):
            assert np.array_equal(one.supervised[start:end], small.supervised[start:end])
        assert one.token_ids[small.offsets[7] : small.offsets[8]].shape == (small.lengths[7],)
        assert one.beginnings is None
        assert np.array_equal(answerable(one, np.arange(20), 5), answerable(small, np.arange(20), 5))


def test_a_count_needs_a_vocabulary_but_no_tokenizer(tmp_path: Path) -> None:
    spec = DataSpec(source="count", num_examples=5)
    with pytest.raises(ModelError, match=r"holds no config.json"):
        prepare(spec, tmp_path)
    for config, said in (("{}", "names no vocab_size"), ("{", "not a readable config"), ("[]", "names no vocab_size")):
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
        with pytest.raises(ModelError, match=said):
            prepare(spec, tmp_path)
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 9}}', encoding="utf-8")
    assert prepare(spec, tmp_path).token_ids.max() < 9


@pytest.mark.parametrize(("count", "tokens"), [(0, None), (-3, None), (5, 1)])
def test_a_count_below_what_can_be_trained_on_is_an_error(model: Path, count: int, tokens: int | None) -> None:
    with pytest.raises(DataError, match="must be at least"):
        prepare(DataSpec(source="count", num_examples=count, tokens_per_example=tokens), model)


@pytest.mark.parametrize(("asked", "there"), [("qa.jsn", "qa.jsonl"), ("messagess", "messages")])
def test_a_slip_of_the_pen_is_told_before_the_hub_is_asked(
    asked: str, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / there).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trainer.sources._open_hub", lambda name: pytest.fail("the hub was asked"))
    with pytest.raises(DataError, match=f"Did you mean '{there}'"):
        open_source(asked)


def test_a_models_name_like_a_folder_here_is_a_slip_and_another_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="Did you mean 'my-model'"):
        inspect_model("mymodel")
    assert not inspect_model("gpt2").is_local


def test_a_run_or_its_adapter_in_place_of_a_model_is_told_how_to_make_one(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    adapter = run / "adapter"
    adapter.mkdir(parents=True)
    with pytest.raises(ModelError, match=r"no config\.json in it"):
        inspect_model(str(adapter))
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"an adapter, not a model\. Merge it"):
        inspect_model(str(adapter))
    (run / "job.json").write_text("{}", encoding="utf-8")
    for folder, what in ((run, "a run folder"), (adapter, "the adapter of a run")):
        with pytest.raises(ModelError, match=what) as refused:
            inspect_model(str(folder))
        assert f"Make one, and give that: plan merge {shlex.quote(str(run))}" in str(refused.value)


def test_lengths_and_targets_are_counted_once_and_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [0, 3, 0, 5, 1, 40, 0, 2, 0]  # an example without a token borders on others, and on both ends
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    supervised = np.random.default_rng(0).random(offsets[-1]) < 0.5
    ids = np.zeros(len(supervised), dtype=np.int32)
    report = DataReport(source="fake", num_records=len(lengths))

    def made() -> TokenizedDataset:
        return TokenizedDataset(token_ids=ids, supervised=supervised, offsets=offsets, report=report)

    expected = [int(supervised[a:b].sum()) for a, b in itertools.pairwise(offsets)]
    found = made()
    assert found.lengths.tolist() == lengths
    assert found.num_supervised.tolist() == expected
    assert found.lengths is found.lengths
    assert found.num_supervised is found.num_supervised
    assert not found.lengths.flags.writeable
    assert not found.num_supervised.flags.writeable
    monkeypatch.setattr(tokens, "_AT_ONCE", 6)
    assert made().num_supervised.tolist() == expected
