"""The preset files: every one loads, holds what the guide says, and a broken one names all its problems at once."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

import presets
from presets.errors import PresetError
from presets.schema import DEFAULT_PRESET, PRESET_ORDER, Preset, load_preset, parse_preset, preset_names

FOLDER = Path(presets.__file__).parent
FILES = sorted(FOLDER.glob("*.toml"))

SMALLEST = """\
summary = "a test"
gradient_accumulation_steps = 16
learning_rate = 2e-4
precision = "fp32"
"""

# REFERENCE: preset -> GA, FP16, learning rate, published hours
TABLE = {
    "baseline": (16, False, 2.0e-4, (35, 35)),
    "recommended": (32, True, 2.5e-4, (13, 18)),
    "aggressive": (64, True, 3.0e-4, (8, 10)),
    "today": (64, True, 3.0e-4, (4, 5)),
    "iterate": (64, True, 3.0e-4, (1, 2)),
    "two-stage": (64, True, 3.0e-4, (12, 12)),
    "progressive": (64, True, 3.0e-4, (20, 20)),
    "prioritized": (32, True, 2.5e-4, (18, 18)),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_preset_loads_and_its_name_matches_its_content(path: Path) -> None:
    preset = load_preset(path.stem)
    accumulation, fp16, learning_rate, hours = TABLE[path.stem]
    assert preset.name == path.stem
    assert preset.gradient_accumulation_steps == accumulation
    assert preset.precision == ("fp16" if fp16 else "fp32")
    assert preset.learning_rate == learning_rate
    assert (preset.published.hours_low, preset.published.hours_high) == hours
    if preset.phases:
        assert preset.phases[0].gradient_accumulation_steps == accumulation
        assert preset.phases[0].learning_rate == learning_rate


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_preset_file_is_complete_and_starts_with_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    table = tomllib.loads(text)
    optional = {"sample_size", "sample_ratio", "sampling_strategy", "sample_score"}
    # Derived from elsewhere: the stem, the [[phase]] tables and the published_ keys.
    elsewhere = {"name", "phases", "published"}
    assert {field.name for field in dataclasses.fields(Preset)} - optional - elsewhere <= set(table)
    assert text.startswith("# ")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_preset_takes_what_the_guide_leaves_open_from_the_same_list(path: Path) -> None:
    preset = load_preset(path.stem)
    assert (preset.lora_rank, preset.lora_alpha, preset.lora_dropout) == (16, 32.0, 0.0)
    assert (preset.lora_targets, preset.max_length, preset.warmup_ratio) == ("all-linear", 1024, 0.03)
    assert (preset.adapter, preset.base_precision, preset.micro_batch_size) == ("lora", "auto", 1)


def test_the_eight_presets_come_in_the_published_order() -> None:
    assert preset_names() == list(PRESET_ORDER) == list(TABLE)
    assert {path.stem for path in FILES} == set(TABLE)
    assert DEFAULT_PRESET in TABLE


def test_the_samples_are_the_published_ones() -> None:
    assert (load_preset("today").sample_ratio, load_preset("today").sampling_strategy) == (0.5, "random")
    assert load_preset("iterate").sample_size == 2_000
    prioritized = load_preset("prioritized")
    assert (prioritized.sample_ratio, prioritized.sampling_strategy) == (0.5, "prioritized")
    assert prioritized.num_epochs == 2
    for name in ("baseline", "recommended", "aggressive", "progressive"):
        assert load_preset(name).sampling.takes_all


def test_two_stage_trains_on_everything_and_then_on_the_best_ten_thousand() -> None:
    first, second = load_preset("two-stage").phases
    assert (first.gradient_accumulation_steps, first.learning_rate, first.num_epochs) == (64, 3.0e-4, 1)
    assert first.sampling.takes_all
    assert (second.gradient_accumulation_steps, second.learning_rate, second.num_epochs) == (32, 2.5e-4, 1)
    assert (second.sample_size, second.sampling_strategy) == (10_000, "top")


def test_progressive_shrinks_its_batch_after_500_and_1500_steps() -> None:
    phases = load_preset("progressive").phases
    assert [phase.gradient_accumulation_steps for phase in phases] == [64, 32, 16]
    assert [phase.learning_rate for phase in phases] == [3.0e-4, 2.5e-4, 2.0e-4]
    assert [phase.num_steps for phase in phases] == [500, 1000, None]
    assert not any(phase.is_stage for phase in phases)


@pytest.mark.parametrize(
    ("name", "quality", "vram", "risk"),
    [
        ("baseline", "100 %", "9 GB", "None"),
        ("recommended", "100 %", "8 GB", "None"),
        ("aggressive", "95-98 %", "8 GB", "Low"),
    ],
)
def test_the_published_comparison_table_is_in_the_files(name: str, quality: str, vram: str, risk: str) -> None:
    published = load_preset(name).published
    assert (published.quality, published.vram, published.risk) == (quality, vram, risk)


def test_the_smallest_preset_is_sound_and_takes_its_name_from_the_file() -> None:
    preset = parse_preset("mine", SMALLEST)
    assert (preset.name, preset.num_epochs, preset.global_batch_size) == ("mine", 1, 16)
    assert parse_preset("mine", SMALLEST + "micro_batch_size = 4\n").global_batch_size == 64


def test_a_folder_of_ones_own_is_read_like_the_bundled_one(tmp_path: Path) -> None:
    for name in ("zeta", "alpha", "aggressive"):
        (tmp_path / f"{name}.toml").write_text(SMALLEST, encoding="utf-8")
    assert preset_names(tmp_path) == ["aggressive", "alpha", "zeta"]
    assert load_preset("zeta", tmp_path).name == "zeta"


@pytest.mark.parametrize(("wrong", "right"), [("agressive", "aggressive"), ("recomended", "recommended")])
def test_a_misspelt_preset_is_named_with_the_closest_one(wrong: str, right: str) -> None:
    with pytest.raises(PresetError) as caught:
        load_preset(wrong)
    expected = f"no preset '{wrong}'. Did you mean '{right}'? Run 'plan presets' to list them."
    assert str(caught.value) == expected


@pytest.mark.parametrize("name", ["", "../setup", "nothing-like-it", "schema.py"])
def test_a_name_that_is_no_preset_is_refused_without_a_guess(name: str) -> None:
    with pytest.raises(PresetError, match="no preset"):
        load_preset(name)


def test_a_misspelt_key_is_an_error_with_the_closest_one() -> None:
    with pytest.raises(PresetError, match=r"unknown key 'lora_rnak'\. Did you mean 'lora_rank'\?"):
        parse_preset("mine", SMALLEST + "lora_rnak = 8\n")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('num_epochs = "two"', "num_epochs is 'two'; it must be a whole number"),
        ("num_epochs = 1.5", "num_epochs is 1.5; it must be a whole number"),
        ("num_epochs = true", "num_epochs is True; it must be a whole number"),
        ("gradient_checkpointing = 1", "gradient_checkpointing is 1; it must be true or false"),
        ('adapter = "qlora"', "adapter is 'qlora'; it must be one of 'lora', 'full'"),
        ("published_hours_low = 'many'", "published_hours_low is 'many'; it must be a number"),
        ("published_speed = 'many'", "unknown key 'published_speed'"),
        ("phase = 3", "phase must be written as [[phase]] tables"),
        ("name = 'other'", "unknown key 'name'"),
    ],
)
def test_a_wrong_type_is_an_error_that_names_key_value_and_rule(line: str, problem: str) -> None:
    with pytest.raises(PresetError) as caught:
        parse_preset("mine", SMALLEST + line + "\n")
    assert str(caught.value).startswith("preset 'mine': ")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("micro_batch_size = 0", "micro_batch_size is 0; it must be at least 1"),
        ("max_length = 1", "a sequence needs at least 2 tokens"),
        ("lora_dropout = 1.0", "lora_dropout is 1.0"),
        ("weight_decay = nan", "weight_decay is nan"),
        ("max_grad_norm = inf", "max_grad_norm is inf"),
        ("lora_rank = 0", "lora_rank is 0"),
        ("sample_ratio = 1.5", "sample_ratio is 1.5"),
        ("sample_size = 10\nsample_ratio = 0.5", "both set"),
        ('adapter = "full"\nbase_precision = "4bit"', "quantized weights cannot be trained"),
        (
            "[[phase]]\ngradient_accumulation_steps = 8\nlearning_rate = 1e-4\n"
            "[[phase]]\ngradient_accumulation_steps = 4\nlearning_rate = 1e-4\n",
            "only the last phase may leave num_steps open",
        ),
        (
            "[[phase]]\ngradient_accumulation_steps = 8\nlearning_rate = 1e-4\nnum_epochs = 1\n"
            "[[phase]]\ngradient_accumulation_steps = 4\nlearning_rate = 1e-4\n",
            "either all are stages or none is",
        ),
    ],
)
def test_a_value_that_breaks_its_rule_is_refused(lines: str, problem: str) -> None:
    with pytest.raises(PresetError) as caught:
        parse_preset("mine", SMALLEST + lines + "\n")
    assert problem in str(caught.value)


def test_all_problems_of_a_file_are_reported_at_once() -> None:
    text = (
        'summary = 3\nlearning_rate = "fast"\nlora_rnak = 8\n'
        '[[phase]]\nlearning_rate = 1e-4\nsteps = 5\ngradient_accumulation_steps = "x"\n'
    )
    with pytest.raises(PresetError) as caught:
        parse_preset("mine", text)
    message = str(caught.value)
    for problem in (
        "summary is 3",
        "learning_rate is 'fast'",
        "unknown key 'lora_rnak'",
        "gradient_accumulation_steps is missing",
        "precision is missing",
        "phase 1: steps",
        "phase 1: gradient_accumulation_steps is 'x'",
    ):
        assert problem in message


def test_values_that_break_several_rules_are_reported_at_once() -> None:
    with pytest.raises(PresetError) as caught:
        parse_preset("mine", SMALLEST + "num_epochs = 0\nmax_length = 0\nwarmup_ratio = 2.0\n")
    assert all(name in str(caught.value) for name in ("num_epochs is 0", "max_length is 0", "warmup_ratio is 2.0"))


def test_a_file_that_is_not_toml_is_one_clear_error() -> None:
    with pytest.raises(PresetError, match=r"preset 'mine': not TOML"):
        parse_preset("mine", "summary = \n")


def test_values_out_of_range_are_told_beside_unknown_and_missing_keys() -> None:
    text = 'summary = "x"\ngradient_accumulation_steps = 2\nprecision = "fp32"\nmax_len = 3\nlora_rank = -1\n'
    with pytest.raises(PresetError) as caught:
        parse_preset("mine", text)
    for part in ("unknown key 'max_len'", "learning_rate is missing", "lora_rank is -1"):
        assert part in str(caught.value)
