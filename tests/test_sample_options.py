"""A sample whose strategy nobody has named: the preset's own, or the published rule, and the output says which."""

from __future__ import annotations

from typing import Any

import fakes
import pytest
from planned import FACTS, Bench

from planner.resolve import Options, resolve_job
from presets.env import Settings, yours_preset
from presets.errors import DataError
from presets.schema import load_preset
from trainer.job import DataSpec


def resolved(name: str, settings: Settings = Settings(), **options: Any) -> tuple[str, str]:  # noqa: B008
    """(the strategy, what is said of it)."""
    preset = yours_preset(settings) if name == "yours" else load_preset(name)
    assert preset is not None
    found = resolve_job(preset, Options(**options), settings, FACTS, DataSpec(source="count", num_examples=5000))
    assert found.job is not None
    return found.job.preset.sampling_strategy, found.sampled


@pytest.mark.parametrize(
    ("name", "options", "strategy", "said"),
    [
        ("recommended", {"sample_size": 2500}, "top", "takes the top 2,500 by engagement, as no --sampling-strategy"),
        ("recommended", {"sample_size": 9, "sample_score": "recency"}, "top", "takes the top 9 by recency, as no"),
        ("recommended", {"sample_ratio": 0.5}, "random", "draws its sample at random, as no --sampling-strategy"),
        ("progressive", {"sample_size": 9}, "top", "takes the top 9 by engagement"),
        ("today", {"sample_size": 9}, "random", "keeps its own sampling strategy, 'random', as no --sampling-strategy"),
        ("iterate", {"sample_size": 9}, "random", "keeps its own sampling strategy, 'random'"),
        ("prioritized", {"sample_size": 9}, "prioritized", "keeps its own sampling strategy, 'prioritized'"),
        ("prioritized", {"sample_ratio": 0.2}, "prioritized", "keeps its own sampling strategy, 'prioritized'"),
        ("recommended", {"sample_size": 9, "sampling_strategy": "random"}, "random", ""),
        ("recommended", {"sample_size": 9, "sampling_strategy": "top"}, "top", ""),
        ("iterate", {}, "random", ""),
        ("recommended", {}, "random", ""),
        ("recommended", {"sample_ratio": 1.0}, "random", ""),
        ("today", {"sample_ratio": 1.0}, "random", ""),
        ("two-stage", {"sample_size": 9}, "random", ""),
    ],
)  # fmt: skip
def test_a_strategy_that_nobody_named_is_told(name: str, options: dict[str, Any], strategy: str, said: str) -> None:
    found = resolved(name, **options)
    assert found[0] == strategy
    assert found[1].startswith(said)
    assert bool(found[1]) == bool(said)


def test_so_is_that_of_a_size_in_env() -> None:
    assert resolved("yours", Settings(sample_size=9)) == (
        "top",
        "takes the top 9 by engagement, as SAMPLING_STRATEGY is not set; 'random' draws them from all",
    )
    assert resolved("yours", Settings(sample_size=9, sampling_strategy="top")) == ("top", "")
    assert resolved("yours", Settings(epochs=2)) == ("random", "")


def test_of_a_share_the_share_is_told() -> None:
    """Where the strategy is the preset's or that of .env, and the option says how much."""
    settings = Settings(sampling_strategy="top")
    said = "takes the top 12.5% by engagement, as no --sampling-strategy was named; 'random' draws them from all"
    assert resolved("yours", settings, sample_ratio=0.125) == ("top", said)
    assert resolved("yours", settings, sample_ratio=1.0) == ("top", "")


def test_it_stands_in_the_row_and_in_the_error_of_data_without_the_field(bench: Bench) -> None:
    (row,) = bench.plan("400", names=("baseline",), sample_size=100).report.rows
    assert "takes the top 100 by engagement, as no --sampling-strategy was named" in (row.note or "")
    plain = fakes.make_data([5] * 40)
    assert plain.engagement is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planner.candidates.prepare_data", lambda *given, **more: plain)
        with pytest.raises(
            DataError, match=r"needs the field.* It takes the top 9 by engagement, as no --sampling-str"
        ):
            bench.plan("400", names=("baseline",), sample_size=9)


def test_the_note_on_steps_speaks_of_the_data_at_hand(bench: Bench) -> None:
    rows = bench.plan("1000", names=("recommended", "aggressive")).report
    (note,) = [note for note in rows.notes if note.startswith("Steps: ")]
    assert note.endswith("(recommended: 32 here, by the formula 31).")
    assert next(row for row in rows.rows if row.name == "recommended").num_steps == 32
    assert not any(note.startswith("Steps: ") for note in bench.plan("1024", names=("recommended",)).report.notes)
