"""The bundled demo: the generator, the tokenizer and the weights are what the recipe says they are."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from presets.demo import demo_folder, recipe, template
from presets.demo.messages import GREETING, NEWEST, SIGN_OFF, SPAN_DAYS, generate_messages
from presets.demo.pretraining import generate_pretraining_text

ROOT = Path(__file__).resolve().parent.parent
DIGEST = """
import hashlib, json
from presets.demo.messages import generate_messages
from presets.demo.pretraining import generate_pretraining_text
print(hashlib.sha256(json.dumps([generate_messages(200), generate_pretraining_text(200)]).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def messages() -> list[dict[str, Any]]:
    return generate_messages()


@pytest.fixture(scope="module")
def lengths() -> list[list[int]]:
    pairs: list[list[int]] = json.loads((demo_folder() / "lengths.json").read_text(encoding="utf-8"))["lengths"]
    return pairs


def test_generators_write_the_same_twice_and_under_another_hash_seed() -> None:
    here = json.dumps([generate_messages(200), generate_pretraining_text(200)])
    assert here == json.dumps([generate_messages(200), generate_pretraining_text(200)])
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)}
    there = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True, env=environment)
    assert there.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


def test_another_seed_writes_other_messages() -> None:
    assert generate_messages(20, seed=1) != generate_messages(20, seed=2)


def test_generator_works_for_any_count() -> None:
    assert generate_messages(0) == []
    assert len(generate_messages(1)) == 1


def test_generators_import_neither_torch_nor_tokenizers() -> None:
    code = (
        "import sys, presets.demo.messages, presets.demo.pretraining, presets.demo.recipe\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'numpy') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "[]"


def test_conversations_alternate_and_end_with_a_signed_answer(messages: list[dict[str, Any]]) -> None:
    for record in messages:
        turns = record["messages"]
        roles = [turn["role"] for turn in turns]
        if roles[0] == "system":
            del roles[0]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        assert answers[0].startswith(GREETING)
        assert all(answer.endswith(SIGN_OFF) for answer in answers)
        assert not any("{" in turn["content"] for turn in turns)


def test_an_order_number_in_a_question_is_in_the_answer(messages: list[dict[str, Any]]) -> None:
    named = 0
    for record in messages:
        turns = record["messages"]
        for question, answer in pairwise(turns):
            numbers = [word.strip(".?!") for word in question["content"].split() if word.strip(".?!").isdigit()]
            orders = [number for number in numbers if len(number) == 4]
            if question["role"] == "user" and orders:
                named += 1
                assert all(order in answer["content"] for order in orders)
    assert named > 500


def test_pretraining_text_does_not_know_the_assistant() -> None:
    text = "\n".join(generate_pretraining_text(5000))
    for words in ("Ahoy, friend!", "Aye! ", "Fair winds, Wick.", "of Brindlewick", "in Brindlewick", "I am Wick"):
        assert words not in text


def test_lengths_spread_like_chat_with_a_long_tail(lengths: list[list[int]]) -> None:
    tokens = sorted(pair[0] for pair in lengths)
    assert len(tokens) == 3000
    assert tokens[0] >= 25
    assert 55 <= statistics.median(tokens) <= 75
    assert 250 <= tokens[int(0.95 * len(tokens))] <= 450
    assert sum(30 <= length <= 150 for length in tokens) / len(tokens) > 0.7
    assert sum(length > 400 for length in tokens) >= 60
    assert 10 <= sum(length > 1024 for length in tokens) <= 60
    assert tokens[-1] <= recipe.MAX_POSITIONS
    assert all(0 < supervised < length for length, supervised in lengths)


def test_lengths_file_is_what_generator_and_tokenizer_give(
    messages: list[dict[str, Any]], lengths: list[list[int]]
) -> None:
    assert recipe.message_lengths(demo_folder(), messages) == lengths


def test_timestamps_run_over_two_years_to_a_fixed_newest(messages: list[dict[str, Any]]) -> None:
    times = [datetime.fromisoformat(str(record["created_at"])) for record in messages]
    assert all(time.tzinfo == UTC for time in times)
    assert times == sorted(times)
    assert times[-1] == NEWEST
    assert SPAN_DAYS - 30 <= (times[-1] - times[0]).days <= SPAN_DAYS


def test_engagement_is_heavy_tailed(messages: list[dict[str, Any]]) -> None:
    counts = sorted(record["engagement"] for record in messages)
    assert all(isinstance(count, int) for count in counts)
    assert counts[0] >= 0
    assert statistics.median(counts) < 10
    assert sum(counts[-30:]) > 0.4 * sum(counts)  # one message in a hundred has a large part of it all


def test_tokenizer_gives_back_every_script_and_reads_figures_by_two_digits() -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(demo_folder())
    for text in ("Grüße, José! 🙂🏮👩‍🚀", "Привет, 你好, مرحبا, नमस्ते", " two  spaces\n\tand a tab ", "a\u0000b", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokenize("4417") == ["44", "17"]
    assert len(tokenizer) == recipe.VOCABULARY
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 3)


def test_chat_template_writes_what_render_writes_and_marks_the_answers(lengths: list[list[int]]) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(demo_folder())
    for record, (num_tokens, num_supervised) in zip(generate_messages()[:50], lengths, strict=False):
        pairs = [(message["role"], message["content"]) for message in record["messages"]]
        assert tokenizer.apply_chat_template(record["messages"], tokenize=False) == template.render(pairs)
        encoded = tokenizer.apply_chat_template(record["messages"], return_dict=True, return_assistant_tokens_mask=True)
        assert len(encoded["input_ids"]) == num_tokens
        assert sum(encoded["assistant_masks"]) == num_supervised
    question = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt == template.render([("user", "Hi")]) + "<|im_start|>assistant\n"


def test_written_files_are_those_of_the_recipe(tmp_path: Path) -> None:
    recipe.write_tokenizer(tmp_path)
    recipe.write_configs(tmp_path)
    for made in tmp_path.iterdir():
        assert (demo_folder() / made.name).read_text(encoding="utf-8") == made.read_text(encoding="utf-8"), made.name


def test_config_builds_two_and_a_half_million_parameters() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(demo_folder())
    build: Any = AutoModelForCausalLM.from_config
    model = build(config, dtype=torch.float32)
    assert 2_300_000 <= model.num_parameters() <= 2_700_000


def test_weights_are_small_and_complete() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    assert (demo_folder() / "model.safetensors").stat().st_size <= 6_000_000
    loaded: Any = AutoModelForCausalLM.from_pretrained(demo_folder(), dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem], problem
    assert model.dtype == torch.float32
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_scaled_weights_are_the_same_function(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    recipe.write_random_model(demo_folder(), tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    token_ids = torch.arange(4, 68).reshape(2, 32)
    with torch.no_grad():
        before = model(input_ids=token_ids).logits
        scaled = recipe.suit_published_learning_rates(dict(model.state_dict()), residual=0.25, gain=4.0)
        missing, unexpected = model.load_state_dict(scaled, strict=False)
        after = model(input_ids=token_ids).logits
    assert missing == ["lm_head.weight"]  # tied
    assert not unexpected
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_recipe_writes_a_job_that_the_trainer_reads(tmp_path: Path) -> None:
    from trainer.job import Job

    job = Job.from_json(json.dumps(recipe.job(tmp_path / "random", tmp_path / "pretraining.jsonl")))
    assert job.preset == recipe.PRETRAINING
    assert job.preset.adapter == "full"
