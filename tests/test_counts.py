"""A number given for the data is a count or an error; nobody's data set is asked for by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from planner.counts import parse_count
from planner.options import OPTIONS, same_options
from planner.resolve import Options, resolve_count, resolve_data
from presets.env import Settings
from presets.errors import OptionError, SettingsError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("63000", 63_000), ("63,000", 63_000), ("63_000", 63_000), ("63 000", 63_000), ("63'000", 63_000),
        ("1,234,567", 1_234_567), ("63k", 63_000), ("63K", 63_000), ("1.5M", 1_500_000), ("0.5k", 500),
        ("1e5", 100_000), ("6.3e4", 63_000), ("1E+5", 100_000), ("+5", 5), ("1e9", 10**9),
    ],
)  # fmt: skip
def test_a_count_is_understood_as_people_write_it(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "-5", "0", "1e12", "1e400", "1e99999", "9" * 5000, "1" * 5000 + "k", "1.5", "1,5", "63.000", "1.2345k", "1e-3",
        "1e", "0x10", "5%", "7b", "nan", "-inf", "Infinity", "6_30", "12,34,567", "3.14.15", ".5", "0.0001k", "-1k",
        "63x",
    ],
)  # fmt: skip
def test_a_number_that_is_no_count_is_one_line_and_no_name_on_the_hub(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_count(text)
    told = str(caught.value)
    assert told.startswith("--dataset is ")
    assert "count" in told
    assert told.isprintable()
    assert len(told) < 300


@pytest.mark.parametrize(
    "name", ["squad", "owner/name", "12abc", "1e5.jsonl", "k", "-", "7b/chats", "²", "./63k", "e5"]
)
def test_what_is_no_number_is_a_name(name: str) -> None:
    assert parse_count(name) is None


def test_a_file_that_is_called_like_a_number_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("63k", "1e5", "63.000", "63000"):
        (tmp_path / name).write_text("")
    assert [parse_count(name) for name in ("63k", "1e5", "63.000")] == [None] * 3
    assert parse_count("63000") == 63_000  # as ever; the file is ./63000


def test_a_setting_s_number_is_told_as_the_setting_s() -> None:
    settings = Settings(dataset="1e12", origin={"DATASET": ".env"})
    for ask in (lambda: resolve_data(Options(), settings, running=False), lambda: resolve_count(Options(), settings)):
        with pytest.raises(SettingsError, match=r"^DATASET in \.env is 1e12; a count must be at most 1,000,000,000\.$"):
            ask()


@pytest.mark.parametrize("place", [None, ".env", "the environment"])
def test_what_stands_in_env_is_no_option_s_error_and_is_mended_there(place: str | None) -> None:
    """Exit code 2 and "leave --dataset out" would send the user to a command line that has no --dataset."""
    remedies = {None: "leave --dataset out", ".env": "take DATASET out of .env"}
    remedy = remedies.get(place, "take DATASET out of the environment")

    def refused(dataset: str, *, count: bool = False, **more: Any) -> str:
        options = Options(dataset=dataset if place is None else None, **more)
        settings = Settings() if place is None else Settings(dataset=dataset, origin={"DATASET": place})
        with pytest.raises(SettingsError) as caught:
            resolve_count(options, settings) if count else resolve_data(options, settings, running=True)
        assert isinstance(caught.value, OptionError) is (place is None)
        return str(caught.value)

    assert f"or {remedy} to train on the bundled messages." in refused("63000")
    assert "--tokens-per-example goes with a count" in refused("chats.jsonl", tokens_per_example=9)
    assert "must be a count, not 'chats.jsonl'" in refused("chats.jsonl", count=True)
    assert "--step-time needs a count" in refused("bundled", count=True)


def test_the_command_for_a_run_holds_a_file_s_place_for_every_way_to_write_a_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [names[1] if len(names) > 1 else names[0].split("/")[0][2:].replace("-", "_") for _, names, _ in OPTIONS]
    given = dict.fromkeys(names) | {"tuned": False}
    for text in ("63000", "63k", "1e5", "63 000"):
        assert same_options(given | {"dataset": text}) == " --dataset YOUR_FILE"
    assert same_options(given | {"dataset": "12abc"}) == " --dataset 12abc"
