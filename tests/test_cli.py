"""The command line as a user meets it: in a process of its own, on real files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from presets.errors import MeasurementError

PYTHON = sys.executable  # itself, where a test is about how a process starts
pytestmark = pytest.mark.usefixtures("preloaded")


def plan(
    *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 300, **more: Any
):
    clean = {key: value for key, value in os.environ.items() if key not in ("MODEL", "DATASET", "OUTPUT", "COLUMNS")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "planner.cli", *arguments],
        cwd=cwd,
        env={**clean, **(env or {})},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
        **more,
    )


def refused(result: Any, message: str, code: int = 1) -> None:
    assert result.returncode == code, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_the_published_table_gives_the_published_figures(tmp_path: Path) -> None:
    result = plan("--dataset", "63000", "--step-time", "30", "--json", cwd=tmp_path)
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    names = ("baseline", "recommended", "aggressive")
    assert [rows[name]["num_steps"] for name in names] == [3938, 1969, 984]
    assert [rows[name]["seconds"] for name in names] == [118140, 45438, 22708]
    assert {row["basis"] for row in rows.values()} == {"published"}
    assert len(rows) == 8


def test_the_published_table_and_the_help_import_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.argv = ['plan', *sys.argv[1:]]\n"
        "from planner.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'rich', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for arguments in (["--help"], ["--version"], ["presets", "list"], ["--dataset", "63000", "--step-time", "30"]):
        result = subprocess.run(
            [PYTHON, "-P", "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr


def test_bad_input_gives_one_clear_line_and_starts_nothing(tmp_path: Path, tiny_model: Path, chat_file: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": "two",}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "odd.jsonl").write_text('{"foo": "one"}\n')
    (tmp_path / "noconfig").mkdir()
    model = ["--model", str(tiny_model)]
    cases = [
        (["--run", "agressive"], r"no preset 'agressive'\. Did you mean 'aggressive'\?"),
        (["--dataset", "nowhere.jsonl", *model], r"nowhere\.jsonl"),
        (
            ["--dataset", "bad.jsonl", *model],
            r"bad\.jsonl, line 2: not JSON \(.*column \d+\)\. Fix the line, or pass --skip-bad-lines",
        ),
        (["--dataset", "empty.jsonl", *model], r"empty\.jsonl"),
        (["--dataset", "odd.jsonl", *model], r"foo"),
        (["--dataset", str(chat_file), *model, "--columns", "prompt=nope"], r"nope"),
        (["--dataset", "5", "--model", "noconfig"], r"no config\.json"),
        (["--dataset", "5", "--model", "./missing"], r"no such folder"),
        (["--run", "yours"], r"'yours' is made from \.env"),
        (["--run", "baseline", "--output", "bad.jsonl"], r"output 'bad\.jsonl' is a file\. Choose another --output"),
        (["--resume", "noconfig"], r"is not a run folder"),
        (["--dataset", "63000", "--micro-batch-size", "7"], r"cannot be split into micro-batches of 7"),
        (["check", "noconfig"], r"is not a run folder"),
    ]
    wrong_by_themselves = [
        (["--dataset", str(chat_file), *model, "--columns", "promt=x"], r"Did you mean 'prompt'"),
        (["--dataset=-5"], r"a count must be at least 1"),
        (["--dataset", "1e12"], r"a count must be at most 1,000,000,000"),
        (["--dataset", "63000", "--run", "baseline"], r"a count: enough for planning, but a run needs messages"),
        (["--dataset", "63000", "--step-time", "30", "--precision-target", "nan"], r"no share above 0 and below 1"),
        (["--dataset", str(chat_file), "--step-time", "30"], r"must be a count"),
        (["advise", "--within", "x"], r"--within is 'x'"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, message in cases:
        refused(plan(*arguments, cwd=tmp_path), message)
    for arguments, message in wrong_by_themselves:
        refused(plan(*arguments, cwd=tmp_path), message, code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_tracker_that_cannot_log_is_refused_before_anything_is_measured(tmp_path: Path, tiny_model: Path) -> None:
    missing = "clearml"  # in no extra of this project
    run = ["--run", "baseline", "--model", str(tiny_model), "--tracker"]
    refused(plan(*run, missing, cwd=tmp_path), f"tracker '{missing}' needs the package {missing}, which is not", code=2)
    refused(plan(*run, "wand", cwd=tmp_path), r"no tracker 'wand'\. Did you mean 'wandb'\?", code=2)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_option_exits_with_2(tmp_path: Path) -> None:
    wrong = (["--budget", "0"], ["--learning-rate", "nan"], ["--precision", "fp13"], ["--nonsense"], ["agressive"])
    for arguments in wrong:
        refused(plan(*arguments, cwd=tmp_path), "Error|No such option", code=2)


@pytest.mark.parametrize("option", ["--dataset", "--model"])
def test_an_empty_name_is_refused_and_stands_for_nothing_bundled(tmp_path: Path, option: str) -> None:
    done = plan(option, "", "--run", "recommended", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert f"Invalid value for '{option}': it is empty" in done.stderr


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_output_folder_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    refused(plan("--run", "baseline", "--output", str(closed / "run"), cwd=tmp_path), "cannot be written")


def test_an_output_below_a_file_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(plan("--run", "baseline", "--output", "file/run", cwd=tmp_path), "cannot be written")


def test_env_makes_a_row_of_its_own_and_does_not_rewrite_the_presets(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("GRADIENT_ACCUMULATION_STEPS=48\nUSE_FP16=true\nLEARNING_RATE=1e-4\n")
    result = plan("--dataset", "63000", "--step-time", "30", "--json", cwd=tmp_path, env={"EPOCHS": "2"})
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    yours = rows["yours"]
    assert (yours["gradient_accumulation_steps"], yours["learning_rate"], yours["num_epochs"]) == (48, 1e-4, 2)
    assert (rows["baseline"]["gradient_accumulation_steps"], rows["baseline"]["num_epochs"]) == (16, 1)


def test_wrong_settings_in_env_are_all_named_at_once(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("GRADIENT_ACCUMULATION_STEPS=-3\nUSE_FP16=perhaps\nLEARNING_RATE=nan\n")
    result = plan("--dataset", "63000", cwd=tmp_path)
    for name in ("GRADIENT_ACCUMULATION_STEPS", "USE_FP16", "LEARNING_RATE"):
        refused(result, name)


ROW_KEYS = {
    "name", "micro_batch_size", "gradient_accumulation_steps", "global_batch_size", "num_epochs", "learning_rate",
    "precision", "num_steps", "seconds_per_step", "seconds_per_sample", "tokens_per_second", "speed_factor", "seconds",
    "seconds_low", "seconds_high", "peak_memory_bytes", "fits", "quality", "risk", "basis", "finish_at",
}  # fmt: skip


def test_plan_measures_a_users_own_checkpoint_and_file(tmp_path: Path, tiny_model: Path, chat_file: Path) -> None:
    result = plan("--model", str(tiny_model), "--dataset", str(chat_file), "--budget", "3", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["schema"] == 1
    assert found["model"]["weights"] == "loaded"
    assert found["dataset"]["num_examples"] == 72
    assert found["dataset"]["num_evaluation_examples"] == 8
    assert found["dataset"]["lengths"] == "measured"
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == 8
    for row in rows.values():
        assert set(row) >= ROW_KEYS
        assert row["fits"] is True
        assert row["basis"] == "measured"
        assert row["seconds_low"] < row["seconds"] < row["seconds_high"]
        assert row["seconds_per_step"] * row["num_steps"] < row["seconds"]
        assert row["precision"] == "fp32"
    # The same work a message at any accumulation: this is what the published formula overlooks.
    slow, fast = rows["baseline"]["seconds_per_step"], rows["aggressive"]["seconds_per_step"]
    assert fast > 1.5 * slow


def test_data_without_scores_fails_only_the_rows_that_need_them(tmp_path: Path, tiny_model: Path) -> None:
    lines = [json.dumps({"question": f"what is {n}", "answer": f"it is {n}"}) for n in range(40)]
    (tmp_path / "qa.jsonl").write_text("\n".join(lines))
    result = plan("--model", str(tiny_model), "--dataset", "qa.jsonl", "--budget", "1", "--json", cwd=tmp_path)
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    assert "needs the field" in rows["prioritized"]["error"]
    assert rows["prioritized"]["seconds"] is None
    assert rows["recommended"]["seconds"] > 0


def test_a_run_from_plan_to_adapter_then_check_chat_and_merge(
    tmp_path: Path, tiny_model: Path, chat_file: Path
) -> None:
    """`plan --run` predicts, trains, shows predicted beside actual; the result can be checked, talked to, merged."""
    arguments = ["--run", "recommended", "--model", str(tiny_model), "--dataset", str(chat_file)]
    options = [
        "--gradient-accumulation-steps",
        "8",
        "--learning-rate",
        "2e-3",
        "--force",
        "--budget",
        "2",
        "--output",
        "run",
    ]
    result = plan(*arguments, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "predicted" in result.stdout
    assert "actual" in result.stdout
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "finished"
    assert all(record["predicted"][key] > 0 for key in ("seconds", "seconds_low", "seconds_high", "train_seconds"))
    wanted = ("seconds", "train_seconds", "peak_memory_bytes", "num_steps", "num_examples", "num_tokens", "train_loss")
    assert all(record["actual"][key] > 0 for key in wanted)
    assert record["actual"]["eval_loss_after"] < record["actual"]["eval_loss_before"]
    assert (tmp_path / "run" / "samples.md").is_file()

    refused(plan(*arguments, "--output", "run", cwd=tmp_path), "exists and is not empty.*plan report run")
    again = plan("--resume", "run", cwd=tmp_path)
    assert again.returncode == 0
    assert "nothing to resume" in again.stderr

    checked = plan("check", "run", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert f"{record['actual']['eval_loss_after']:.4f}" in checked.stdout
    assert f"{record['actual']['eval_loss_before']:.4f}" in checked.stdout

    talked = plan("chat", "run", "--max-new-tokens", "5", cwd=tmp_path, input="the cat sat\n\n")
    assert talked.returncode == 0, talked.stderr
    assert talked.stdout.startswith("you> model> ")

    merged = plan("merge", "run", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20)[None]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")(input_ids=ids).logits
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    parts = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")(input_ids=ids).logits
    assert torch.allclose(whole, parts, atol=1e-5)
    refused(plan("merge", "run", cwd=tmp_path), "exists")


def test_folders_called_as_ours_in_the_working_directory_are_not_run(
    tmp_path: Path, make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of process of ours, started from nothing, gets far enough to say what is wrong with its input."""
    from planner.launch import command
    from planner.prober import ProcessProber

    monkeypatch.setattr(sys, "executable", PYTHON)
    monkeypatch.chdir(tmp_path)
    for name in ("trainer", "planner", "presets"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "job.json").write_text("{}")
    listed = plan("presets", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert "recommended" in listed.stdout
    trained = subprocess.run(
        command(tmp_path / "run", make_job()), capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert trained.returncode != 0
    assert "job.json" in trained.stderr
    assert "the wrong one" not in trained.stderr
    worker = ProcessProber(make_job(), tmp_path / "nothing")
    with pytest.raises(MeasurementError, match="cannot be read"):
        worker.load()
    worker.stop()
    # The same without -P: the defect that this guards against would show.
    naked = subprocess.run([PYTHON, "-m", "planner.cli", "presets"], capture_output=True, text=True, check=False)
    assert "the wrong one" in naked.stderr
