"""The benches start, and those that are short enough here run: a bench that nobody runs breaks unseen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
NO_SCRIPTS = ("common.py", "preloaded.py", "trainers.py")


def run(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | more
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


EACH_HELP = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        print("ended", script.rpartition("/")[2], ended.code)
"""


def test_every_bench_says_what_it_takes() -> None:
    scripts = sorted(path for path in BENCH.glob("*.py") if path.name not in NO_SCRIPTS)
    done = run("-c", EACH_HELP, *map(str, scripts))  # in one process: importing the libraries is what takes its time
    assert done.returncode == 0, done.stderr
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended ")]
    assert ended == [f"ended {script.name} 0" for script in scripts]
    assert done.stdout.count("usage: ") >= len(scripts)


def test_a_micro_step_is_compared_with_the_trainer_s_way(tmp_path: Path) -> None:
    done = run(str(BENCH / "launch.py"), "--turns", "2", "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert len(found["contestants"]) == 11
    assert all(len(one["seconds"]) == 2 and min(one["seconds"]) > 0 for one in found["contestants"].values())
    assert found["contestants"]["the Trainer's way"]["over_trainers_way"] == 1.0


def test_windows_are_run_with_and_without_what_the_host_waits_for(tmp_path: Path) -> None:
    rows = [{"question": f"What is {number} and {number}? " * (number % 9 + 1), "answer": "x"} for number in range(500)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "out.json"
    few = ("--rows", "500", "--length", "512", "--windows", "1", "--turns", "2")
    done = run(str(BENCH / "waiting.py"), "--data", str(data), "--out", str(out), *few)
    assert done.returncode == 0, done.stderr
    kinds = json.loads(out.read_text(encoding="utf-8"))["kinds"]
    assert len(kinds) == 2
    for one in kinds.values():
        assert len(one["asked_over_known"]) == 2
        assert one["own_over_shared"]
        assert min(*one["asked_over_known"], *one["own_over_shared"]) > 0


def test_our_trainer_is_timed_as_the_peers_are(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the extra 'bench' is not installed")
    rows = [{"question": f"What is {number} and {number}?", "answer": f"It is {2 * number}."} for number in range(96)]
    data = tmp_path / "gsm8k_train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "out.json"
    done = run(
        str(BENCH / "peers.py"), "--rounds", "1", "--rows", "96", "--only", "0", "--out", str(out), GSM8K=str(data)
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["rounds"][0]["results"]["ours, micro 1"]["tokens_per_second"] > 0
    assert "unfinished" not in found
    assert found["verdict"] == {"equal_settings": [], "best_settings": None}
