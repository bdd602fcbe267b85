"""Choosing on real input: advice from this machine's measurements, safety rules, dry runs, and the library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from planned import forget_company

import planner
from planner import cli as cli_module
from presets.errors import PlanError, SettingsError

pytestmark = pytest.mark.usefixtures("preloaded")
COMMON = ("--dataset", "bundled", "--limit", "120", "--device", "cpu", "--max-length", "64", "--budget", "3")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("choice")


def plan(home: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PLAN_HOME": str(home / "plan-home")}
    done = subprocess.run(
        [sys.executable, "-m", "planner.cli", *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def measured(home: Path, preloaded: None) -> dict[str, Any]:
    """The table of three presets, measured once; what follows in this module is answered from it."""
    names = ("--preset", "baseline", "--preset", "recommended", "--preset", "aggressive")
    plan(home, *COMMON, *names)
    forget_company(home / "plan-home")
    return dict(json.loads(plan(home, *COMMON, *names, "--json").stdout))


ROWS = ("--preset", "baseline", "--preset", "recommended", "--preset", "aggressive")


def test_advice_for_a_goal_is_the_guides_row_with_its_command(home: Path, measured: dict[str, Any]) -> None:
    done = plan(home, "advise", "--goal", "first", *COMMON, *ROWS)
    assert done.stdout.startswith("recommended\n")
    assert "for a first training the guide takes 'recommended'" in done.stdout
    (row,) = (row for row in measured["rows"] if row["name"] == "recommended")
    latest = "at the latest" if row.get("calibrated", True) else "probably by"  # as steady as this machine is
    assert latest in done.stdout
    assert "plan --run recommended --dataset bundled --limit 120 --max-length 64 --device cpu" in done.stdout
    found = json.loads(plan(home, "advise", "--goal", "best", *COMMON, *ROWS, "--json").stdout)
    assert found["row"]["name"] == "baseline"
    assert found["row"]["seconds"] == pytest.approx(measured["rows"][0]["seconds"], rel=0.2)


def test_advice_for_a_deadline_keeps_to_the_upper_end(home: Path, measured: dict[str, Any]) -> None:
    latest = max(row["seconds_high"] for row in measured["rows"])
    found = json.loads(plan(home, "advise", "--within", f"{3 * latest:.0f}s", *COMMON, *ROWS, "--json").stdout)
    assert found["row"]["name"] == "baseline"
    assert "By " in plan(home, "advise", "--within", f"{3 * latest:.0f}s", *COMMON, *ROWS).stdout
    nothing = json.loads(plan(home, "advise", "--within", "1s", *COMMON, *ROWS, "--json", code=1).stdout)
    assert nothing["row"] is None
    assert "the nearest is" in nothing["why"][0]
    assert len(nothing["passed_over"]) == 3
    assert nothing["command"] is None


def test_without_a_terminal_advice_has_to_be_asked_for(home: Path) -> None:
    assert "--goal" in plan(home, "advise", *COMMON, code=2).stderr
    assert "do not go together" in plan(home, "advise", "--goal", "first", "--within", "8h", code=2).stderr
    assert "--deadline is 'soon'" in plan(home, "advise", "--deadline", "soon", code=2).stderr


def test_what_the_guide_rules_out_does_not_run_without_force(home: Path) -> None:
    out = home / "forced"
    words = ("--run", "baseline", *COMMON, "--gradient-accumulation-steps", "200", "--learning-rate", "1e-3")
    done = plan(home, *words, "--output", str(out), code=1)
    assert "a global batch of 200 is over 128" in done.stderr
    assert "a learning rate of 0.001 is over 0.0005" in done.stderr
    assert "--force" in done.stderr
    assert not out.exists()
    assert "trainer" in plan(home, *words, "--force", "--dry-run").stdout


def test_under_one_epoch_is_refused_and_with_force_planned(home: Path) -> None:
    words = ("--run", "baseline", *COMMON, "--epochs", "0.5", "--dry-run")
    assert "0.5 epochs are under one" in plan(home, *words, code=1).stderr
    assert "56 examples seen" in plan(home, *words, "--force").stderr  # of 112: eight are held out
    assert "neither a whole number" in plan(home, "--epochs", "1.5", code=2).stderr


def test_a_dry_run_prints_the_command_and_writes_nothing(home: Path) -> None:
    before = sorted(home.iterdir())
    done = plan(home, "--run", "recommended", *COMMON, "--dry-run")
    (line,) = done.stdout.splitlines()
    assert line.startswith(sys.executable)
    assert "-m trainer" in line
    assert line.endswith("job.json")
    assert "nothing was measured or written" in done.stderr
    job = json.loads(plan(home, "--run", "recommended", *COMMON, "--dry-run", "--json").stdout)
    assert job["preset"]["gradient_accumulation_steps"] == 32
    assert sorted(home.iterdir()) == before


def test_from_python_the_same_rows_come_back(
    home: Path, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAN_HOME", str(home / "plan-home"))
    monkeypatch.chdir(home)
    said: list[str] = []
    report = planner.plan(
        dataset="bundled",
        presets=("baseline", "recommended", "aggressive"),
        budget_seconds=3,
        progress=said.append,
        limit=120,
        device="cpu",
        max_length=64,
    )
    assert isinstance(report, planner.PlanReport)
    assert isinstance(report.rows[0], planner.Row)
    assert [row.name for row in report.rows] == [row["name"] for row in measured["rows"]]
    assert [row.num_steps for row in report.rows] == [row["num_steps"] for row in measured["rows"]]
    assert report.rows[0].basis == "cached"
    assert json.loads(report.to_json())["schema"] == 1
    assert any("measured" in text for text in said)


def test_from_python_errors_are_the_planners_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLAN_HOME", str(tmp_path))
    with pytest.raises(PlanError, match="device is 'tpu'"):
        planner.plan(dataset=10, device="tpu")
    with pytest.raises(SettingsError):
        planner.plan(dataset=-5)
    with pytest.raises(TypeError, match="no option 'colour'"):
        planner.plan(dataset=10, colour="red")
    with pytest.raises(TypeError, match="Did you mean 'budget_seconds'"):
        planner.plan(dataset=10, budget_second=3)
    with pytest.raises(AttributeError):
        planner.nothing  # noqa: B018


def test_an_option_before_a_command_and_one_that_does_not_go_with_it_are_refused(home: Path) -> None:
    assert "--limit stands before 'advise'" in plan(home, "--limit", "5", "advise", "--goal", "first", code=2).stderr
    assert "--json does not go with --format csv" in plan(home, *COMMON, "--json", "--format", "csv", code=2).stderr
    assert "--dry-run goes with --run" in plan(home, *COMMON, "--dry-run", code=2).stderr
    assert "--dry-run does not go with 'plan tune'" in plan(home, "tune", *COMMON, "--dry-run", code=2).stderr
    assert "--format" in plan(home, "--run", "baseline", *COMMON, "--format", "html", code=2).stderr
    both = ("--run", "baseline", "--step-time", "30")  # it printed the table, trained nothing and ended with 0
    assert "leave it out to train" in plan(home, *both, code=2).stderr
    assert "--preset is for the table" in plan(home, "--run", "baseline", "--preset", "today", code=2).stderr
    said = plan(home, "--resume", "runs/x", "--learning-rate", "1e-4", code=2).stderr
    assert "--learning-rate does not go with --resume" in said
    assert "Did you mean '--resume'?" in plan(home, "resume", "runs/x", code=2).stderr
    assert "Did you mean '--run'?" in plan(home, "run", "baseline", code=2).stderr


def test_the_printed_command_keeps_zeros_and_refusals() -> None:
    from click.testing import CliRunner

    from planner import cli as command_line
    from planner.options import same_options

    seen: dict[str, Any] = {}
    words = ["--samples", "0", "--seed", "0", "--eval-fraction", "0", "--no-gradient-checkpointing", "--packing"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "_table", lambda options, settings, given: seen.update(given))
        assert CliRunner().invoke(command_line.cli, [*words, "--dataset", "63000", "--force"]).exit_code == 0
    assert same_options(seen) == (
        " --dataset YOUR_FILE --eval-fraction 0.0 --samples 0 --no-gradient-checkpointing --packing --seed 0"
    )


def test_two_presets_of_one_name_are_refused(home: Path) -> None:
    for folder in ("a", "b"):
        (home / folder).mkdir(exist_ok=True)
        accumulation = {"a": 16, "b": 8}[folder]
        text = (
            f'summary = "x"\ngradient_accumulation_steps = {accumulation}\nlearning_rate = 1e-4\nprecision = "fp32"\n'
        )
        (home / folder / "mine.toml").write_text(text, encoding="utf-8")
    words = ("--dataset", "63000", "--step-time", "30", "--preset", "a/mine.toml", "--preset")
    assert "two different presets are called 'mine'" in plan(home, *words, "b/mine.toml", code=1).stderr
    assert plan(home, *words, "a/mine.toml").stdout.count("mine") == 1
    (home / "a" / "baseline.toml").write_text("", encoding="utf-8")
    assert "bundled preset" in plan(home, *words, "a/baseline.toml", code=1).stderr


def test_published_quality_stands_only_beside_published_settings(home: Path, measured: dict[str, Any]) -> None:
    assert measured["rows"][0]["quality"]["text"] == "100 %"
    words = ("--preset", "baseline", "--learning-rate", "1e-3", "--json")
    (row,) = json.loads(plan(home, *COMMON, *words).stdout)["rows"]
    assert row["quality"]["text"] is None
    assert row["risk"] is None
    assert row["blocked_by"]
    assert "Start" not in plan(home, *COMMON, *words[:-1]).stdout


def test_a_count_can_be_written_short_and_its_command_asks_for_a_file(home: Path) -> None:
    done = json.loads(plan(home, "--dataset", "63k", "--step-time", "30", "--json").stdout)
    assert done["rows"][0]["num_steps"] == 3938


def test_tune_searches_for_what_is_named_and_only_shows_the_baseline_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[str, ...], frozenset[str]]] = []

    def table(_options: Any, _settings: Any, given: dict[str, Any], *, unsearched: frozenset[str]) -> None:
        asked.append((given["preset_names"], unsearched))

    monkeypatch.setattr(cli_module, "_table", table)
    for names in (("recommended",), ("baseline", "recommended"), ()):
        assert CliRunner().invoke(cli_module.cli, ["tune", *names, "--dataset", "100"]).exit_code == 0
    assert asked == [
        (("baseline", "recommended"), frozenset({"baseline"})),
        (("baseline", "recommended"), frozenset()),
        ((), frozenset()),
    ]
