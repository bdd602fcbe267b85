"""A user's own presets: a folder of theirs, a file anywhere, a copy to start from; and the commands for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner.cli import cli
from presets.errors import PresetError
from presets.schema import load_preset
from presets.user import all_names, find_preset, new_preset, text_of, user_folder

MINE = """\
summary = "mine"
gradient_accumulation_steps = 8
learning_rate = 1e-4
precision = "fp32"
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLAN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_copy_is_the_original_with_its_comments_and_without_its_published_figures() -> None:
    path = new_preset("mine", "recommended")
    assert path == user_folder() / "mine.toml"
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# A preset of your own, copied from 'recommended'")
    assert "\npublished_" not in text
    original, copy = load_preset("recommended"), find_preset("mine")
    assert copy.gradient_accumulation_steps == original.gradient_accumulation_steps
    assert copy.published.hours_low is None
    assert all_names()[-1] == "mine"
    for line in text_of("recommended").splitlines():
        assert line.startswith(("published_", "summary =")) or line in text
    assert copy.summary == "a copy of recommended"


@pytest.mark.parametrize("source", ["two-stage", "progressive", "prioritized", "iterate"])
def test_every_kind_of_preset_can_be_copied(source: str) -> None:
    new_preset("mine", source)
    assert find_preset("mine").phases == load_preset(source).phases


@pytest.mark.parametrize("name", ["recommended", "yours", "Mine", "../mine", "", "a b", "x" * 60, "-x"])
def test_a_name_that_is_taken_or_none_is_refused(name: str, home: Path) -> None:
    with pytest.raises(PresetError):
        new_preset(name, "recommended")
    assert not list(home.rglob("*.toml"))


def test_a_preset_that_is_there_is_not_written_over() -> None:
    path = new_preset("mine", "recommended")
    path.write_text(MINE, encoding="utf-8")
    with pytest.raises(PresetError, match="already"):
        new_preset("mine", "aggressive")
    assert path.read_text(encoding="utf-8") == MINE


def test_a_preset_can_be_named_by_its_file(tmp_path: Path) -> None:
    path = tmp_path / "quick.toml"
    path.write_text(MINE, encoding="utf-8")
    assert find_preset(str(path)).name == "quick"
    with pytest.raises(PresetError, match="no such file"):
        find_preset(str(tmp_path / "other.toml"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"summary = ", "not TOML"),
        (MINE.encode() + b"colour = 3\n", "unknown key"),
        (b"\xff\xfe", "not UTF-8"),
        (b"#" * 200_000, "bytes is no preset"),
    ],
)
def test_a_file_that_is_no_preset_gives_one_clear_line(content: bytes, words: str) -> None:
    user_folder().mkdir(parents=True)
    (user_folder() / "mine.toml").write_bytes(content)
    with pytest.raises(PresetError, match=words):
        find_preset("mine")
    listed = CliRunner().invoke(cli, ["presets"])
    assert listed.exit_code == 0
    assert "cannot be used" in listed.stdout


def test_the_commands_list_show_and_make() -> None:
    run = CliRunner().invoke
    assert "recommended" in run(cli, ["presets"]).stdout
    assert run(cli, ["presets"]).stdout == run(cli, ["presets", "list"]).stdout
    made = run(cli, ["presets", "new", "mine", "--from", "aggressive"])
    assert made.exit_code == 0
    assert Path(made.stdout.strip()).is_file()
    assert "gradient_accumulation_steps = 64" in run(cli, ["presets", "show", "mine"]).stdout
    assert "mine" in run(cli, ["presets"]).stdout


def test_a_preset_of_ones_own_stands_in_the_published_table(home: Path) -> None:
    user_folder().mkdir(parents=True)
    (user_folder() / "mine.toml").write_text(MINE, encoding="utf-8")
    done = CliRunner().invoke(cli, ["--dataset", "63000", "--step-time", "30", "--format", "csv"])
    lines = {line.split(",")[0]: line for line in done.stdout.splitlines()}
    assert lines["mine"].split(",")[8] == "7875"  # 63,000 / 8


def test_choosing_imports_no_torch() -> None:
    script = """
import sys
from click.testing import CliRunner
from planner.cli import cli
for words in (["presets"], ["presets", "show", "today"], ["doctor"], ["--help"], ["advise", "--help"]):
    assert CliRunner().invoke(cli, words).exit_code in (0, 1), words
import planner
planner.PlanReport, planner.plan
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_broken_preset_of_ones_own_leaves_the_table_standing() -> None:
    user_folder().mkdir(parents=True)
    (user_folder() / "broken.toml").write_text("x = ", encoding="utf-8")
    (user_folder() / "yours.toml").write_text(MINE, encoding="utf-8")
    (user_folder() / "folder.toml").mkdir()
    done = CliRunner().invoke(cli, ["--dataset", "63000", "--step-time", "30", "--format", "csv"])
    assert done.exit_code == 0
    assert "broken" in done.stderr
    assert "baseline" in done.stdout


@pytest.mark.parametrize("epochs", ["inf", "nan", "1.5", "0", "-1"])
def test_epochs_that_are_none_are_refused(epochs: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(MINE + f"num_epochs = {epochs}\n", encoding="utf-8")
    with pytest.raises(PresetError, match="num_epochs"):
        find_preset(str(path))
