"""What an option takes for its value."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from planner.cli import cli
from planner.options import OPTIONS
from presets.schema import preset_names


def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    """What the command line says; nothing of it may get as far as planning."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLAN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("planner.cli.settings_of", lambda *given, **more: pytest.fail(f"{words} was planned"))
    monkeypatch.setattr("planner.commands_choice.settings_of", lambda *given, **more: pytest.fail(f"{words}"))
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    return done


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--run",), "Option '--run' requires an argument. Presets: "),
        (("--run", "--dataset", "x.jsonl"), "'--run': it needs a value, and '--dataset' is an option. Presets: "),
        (("--run", ""), "'--run': it is empty. Was a variable not set? Presets: "),
        (("--run=--json",), "'--run': it needs a value, and '--json' is an option. Presets: "),
        (("--preset",), "Option '--preset' requires an argument. Presets: "),
    ],
)
def test_a_run_without_a_preset_names_the_presets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    told = asked(tmp_path, monkeypatch, *words).stderr
    assert said + ", ".join(preset_names()) in told.replace("\n", " ")


VALUED = [names[0] for _, names, settings in OPTIONS if not settings.get("is_flag") and "/" not in names[0]]


@pytest.mark.parametrize("option", VALUED)
def test_no_option_takes_nothing_or_another_option_for_its_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    for value in ("", "  "):
        told = asked(tmp_path, monkeypatch, option, value).stderr
        assert f"Invalid value for '{option}'" in told
        assert "it is empty. Was a variable not set?" in told
    for value in ("--json", "--no-gradient-checkpointing", "--dataset=x"):
        told = asked(tmp_path, monkeypatch, option, value).stderr
        assert f"Invalid value for '{option}'" in told
        assert f"it needs a value, and '{value}' is an option." in told


def test_a_value_may_start_with_a_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLAN_HOME", str(tmp_path / "home"))
    done = CliRunner().invoke(cli, ["--dataset", "-5", "--step-time", "30"])
    assert "a count must be at least 1" in str(done.exception)


@pytest.mark.parametrize("option", ["--goal", "--deadline", "--within", "--start"])
def test_advice_too_takes_no_option_for_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    told = asked(tmp_path, monkeypatch, "advise", option, "--json").stderr
    assert f"'{option}': it needs a value, and '--json' is an option" in told
