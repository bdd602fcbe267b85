"""Settings from `.env` and the environment: what beats what, what is refused, and what makes the row "yours"."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from presets import env
from presets.env import Settings, read_settings, yours_preset
from presets.errors import SettingsError

EVERY_SETTING = """\
GRADIENT_ACCUMULATION_STEPS=32
USE_FP16=true
LEARNING_RATE=2.5e-4
EPOCHS=2
SAMPLE_RATIO=0.5
SAMPLING_STRATEGY=prioritized
MICRO_BATCH_SIZE=2
MAX_LENGTH=512
MODEL=~/models/llama
DATASET=data/chat messages.jsonl
OUTPUT="runs/mine"
SEED=7
"""


def write_dotenv(folder: Path, text: str) -> None:
    (folder / ".env").write_text(text, encoding="utf-8")


def test_every_setting_is_read_from_dotenv(tmp_path: Path) -> None:
    write_dotenv(tmp_path, EVERY_SETTING)
    settings = read_settings(tmp_path, {})
    assert (settings.gradient_accumulation_steps, settings.use_fp16, settings.learning_rate) == (32, True, 2.5e-4)
    assert (settings.epochs, settings.sample_size, settings.sample_ratio) == (2, None, 0.5)
    assert (settings.sampling_strategy, settings.micro_batch_size, settings.max_length) == ("prioritized", 2, 512)
    assert (settings.model, settings.dataset) == ("~/models/llama", "data/chat messages.jsonl")
    assert (settings.output, settings.seed) == ("runs/mine", 7)
    assert set(settings.origin.values()) == {".env"}
    assert settings.warnings == ()


def test_every_setting_can_come_from_the_environment(tmp_path: Path) -> None:
    environ = dict(line.split("=", 1) for line in EVERY_SETTING.replace('"', "").splitlines())
    settings = read_settings(tmp_path, environ)
    write_dotenv(tmp_path, EVERY_SETTING)
    same = read_settings(tmp_path, {})
    names = env._fields()
    assert [getattr(settings, name) for name in names] == [getattr(same, name) for name in names]
    assert set(settings.origin.values()) == {"the environment"}


def test_the_environment_beats_dotenv_key_by_key(tmp_path: Path) -> None:
    write_dotenv(tmp_path, "EPOCHS=2\nLEARNING_RATE=1e-4\n")
    settings = read_settings(tmp_path, {"EPOCHS": "3"})
    assert (settings.epochs, settings.learning_rate) == (3, 1e-4)
    assert settings.origin == {"EPOCHS": "the environment", "LEARNING_RATE": ".env"}


def test_nothing_given_is_nothing_and_makes_no_row(tmp_path: Path) -> None:
    settings = read_settings(tmp_path, {"PATH": "/bin"})
    assert settings == Settings()
    assert yours_preset(settings) is None


def test_an_empty_value_counts_as_not_given(tmp_path: Path) -> None:
    write_dotenv(tmp_path, "EPOCHS=\nSAMPLE_SIZE=''\nUSE_FP16\nSEED=  \n")
    assert read_settings(tmp_path, {"EPOCHS": " "}) == Settings()


def test_an_empty_variable_does_not_hide_dotenv(tmp_path: Path) -> None:
    write_dotenv(tmp_path, "EPOCHS=2\n")
    assert read_settings(tmp_path, {"EPOCHS": ""}).epochs == 2


def test_the_process_environment_is_neither_read_nor_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPOCHS", "9")
    monkeypatch.delenv("SEED", raising=False)
    write_dotenv(tmp_path, "SEED=7\n")
    before = dict(os.environ)
    settings = read_settings(tmp_path, {})
    assert (settings.epochs, settings.seed) == (None, 7)
    assert dict(os.environ) == before


@pytest.mark.parametrize("key", ["MODEL", "DATASET", "OUTPUT", "SEED"])
def test_a_setting_that_presets_leave_open_makes_no_row(tmp_path: Path, key: str) -> None:
    assert yours_preset(read_settings(tmp_path, {key: "1"})) is None


def test_one_training_setting_makes_the_row_with_published_defaults(tmp_path: Path) -> None:
    preset = yours_preset(read_settings(tmp_path, {"USE_FP16": "false"}))
    assert preset is not None
    assert (preset.name, preset.gradient_accumulation_steps, preset.precision) == ("yours", 16, "fp32")
    assert (preset.learning_rate, preset.num_epochs, preset.micro_batch_size) == (2e-4, 1, 1)
    assert preset.sampling.takes_all
    assert preset.published.quality is None


def test_every_training_setting_reaches_the_preset(tmp_path: Path) -> None:
    write_dotenv(tmp_path, EVERY_SETTING)
    preset = yours_preset(read_settings(tmp_path, {}))
    assert preset is not None
    assert (preset.gradient_accumulation_steps, preset.precision, preset.learning_rate) == (32, "fp16", 2.5e-4)
    assert (preset.num_epochs, preset.sample_ratio, preset.sampling_strategy) == (2, 0.5, "prioritized")
    assert (preset.micro_batch_size, preset.max_length, preset.global_batch_size) == (2, 512, 64)


def test_a_sample_size_means_the_top_messages_unless_a_strategy_says_otherwise(tmp_path: Path) -> None:
    top = yours_preset(read_settings(tmp_path, {"SAMPLE_SIZE": "500"}))
    random = yours_preset(read_settings(tmp_path, {"SAMPLE_SIZE": "500", "SAMPLING_STRATEGY": "Random"}))
    share = yours_preset(read_settings(tmp_path, {"SAMPLE_RATIO": "0.5"}))
    assert top is not None
    assert random is not None
    assert share is not None
    assert (top.sampling_strategy, top.sample_size) == ("top", 500)
    assert (random.sampling_strategy, share.sampling_strategy) == ("random", "random")


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("1", True), ("YES", True), ("on", True), ("false", False), ("0", False), ("No", False)],
)
def test_truth_is_read_in_the_usual_spellings(tmp_path: Path, text: str, value: bool) -> None:
    assert read_settings(tmp_path, {"USE_FP16": text}).use_fp16 is value


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "0", "a whole number from 1 to 65536"),
        ("GRADIENT_ACCUMULATION_STEPS", "-16", "a whole number"),
        ("GRADIENT_ACCUMULATION_STEPS", "16.0", "a whole number"),
        ("GRADIENT_ACCUMULATION_STEPS", "1_6", "a whole number"),
        ("GRADIENT_ACCUMULATION_STEPS", "٣٢", "a whole number"),
        ("GRADIENT_ACCUMULATION_STEPS", "9" * 5000, "a whole number"),
        ("USE_FP16", "maybe", "true or false"),
        ("LEARNING_RATE", "nan", "a number above 0 and below 1"),
        ("LEARNING_RATE", "inf", "a number above 0"),
        ("LEARNING_RATE", "-2e-4", "a number above 0"),
        ("LEARNING_RATE", "2", "below 1"),
        ("LEARNING_RATE", "2e-4x", "a number"),
        ("EPOCHS", "0", "a whole number from 1 to 1000"),
        ("EPOCHS", "1000000", "a whole number"),
        ("SAMPLE_SIZE", "-5", "a whole number"),
        ("SAMPLE_RATIO", "1.5", "at most 1"),
        ("SAMPLE_RATIO", "0", "above 0"),
        ("SAMPLING_STRATEGY", "best", "one of 'random', 'top', 'prioritized'"),
        ("MICRO_BATCH_SIZE", "zero", "a whole number"),
        ("MAX_LENGTH", "1", "a whole number from 2"),
        ("SEED", "-1", "a whole number from 0"),
        ("MODEL", "a\x1b[31mb", "without control characters"),
    ],
)
def test_a_bad_value_is_refused_with_name_value_rule_and_remedy(
    tmp_path: Path, key: str, value: str, rule: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings(tmp_path, {key: value})
    message = str(caught.value)
    assert message.startswith(f"{key} is '{value[:3]}" if value.isprintable() else f"{key} is 'a\\x1b")
    assert rule in message
    assert "in the environment" in message
    assert message.endswith("Correct it or take it out.")
    assert len(message) < 250


def test_all_problems_are_reported_at_once_with_their_origin(tmp_path: Path) -> None:
    write_dotenv(tmp_path, "EPOCHS=none\nSAMPLE_RATIO=0.5\n")
    with pytest.raises(SettingsError) as caught:
        read_settings(tmp_path, {"LEARNING_RATE": "fast", "SAMPLE_SIZE": "10"})
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "LEARNING_RATE is 'fast' in the environment" in lines[0]
    assert "EPOCHS is 'none' in .env" in lines[1]
    assert "SAMPLE_SIZE (the environment) and SAMPLE_RATIO (.env) are both set" in lines[2]


def test_other_programs_keys_are_left_alone_and_slips_of_the_pen_are_named(tmp_path: Path) -> None:
    write_dotenv(
        tmp_path,
        "GRADIENT_ACUMULATION_STEPS=32\nepochs=2\nAPI_KEY=secret\nMODE=production\nDATABASE_URL=x\nOUTPUT_DIR=y\n",
    )
    settings = read_settings(tmp_path, {"LEARNING_RATES": "1"})
    assert settings.warnings == (
        ".env: GRADIENT_ACUMULATION_STEPS: did you mean GRADIENT_ACCUMULATION_STEPS? It is left out.",
        ".env: epochs: did you mean EPOCHS? It is left out.",
    )
    assert yours_preset(settings) is None


def test_a_line_that_is_no_setting_is_named_and_the_others_still_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_dotenv(tmp_path, "EPOCHS=2\nLEARNING_RATE 1e-4\nSEED=3\n")
    settings = read_settings(tmp_path, {})
    assert (settings.epochs, settings.learning_rate, settings.seed) == (2, None, 3)
    assert settings.warnings == (".env, line 2: not NAME=value; the line is left out.",)
    assert not caplog.records


def test_comments_quotes_export_and_a_byte_order_mark_are_understood(tmp_path: Path) -> None:
    text = "\ufeffEPOCHS=2  # twice\n# SEED=1\nexport MODEL='my model'\r\n"
    (tmp_path / ".env").write_bytes(text.encode("utf-8"))
    settings = read_settings(tmp_path, {})
    assert (settings.epochs, settings.seed, settings.model) == (2, None, "my model")


@pytest.mark.parametrize("data", [b"EPOCHS=2\nMODEL=\xff\xfe\n", "EPOCHS=2\n".encode("utf-16")])
def test_a_dotenv_in_another_encoding_is_one_clear_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / ".env").write_bytes(data)
    with pytest.raises(SettingsError, match=r"\.env: not UTF-8 \(byte \d+\)\. Save it as UTF-8\."):
        read_settings(tmp_path, {})


def test_a_folder_called_dotenv_is_not_read(tmp_path: Path) -> None:
    (tmp_path / ".env").mkdir()
    assert read_settings(tmp_path, {}) == Settings()
