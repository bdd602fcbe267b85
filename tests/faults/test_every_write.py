"""A run that fails at the n-th change of its folder is not lost. A sample of what bench/faults.py does for every n."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from harness import Server, survives, why_lost
from wounds import damaged_run, survives_damage, wounds

pytestmark = pytest.mark.slow

Whole = tuple[Path, list[tuple[str, bool, str]]]
POINTS = {"kill": 5, "torn": 4, "full": 5, "broken": 3}  # drawn anew from other parts of the run by other seeds
SEED = 7


def test_a_run_that_fails_at_any_change_of_its_folder_resumes_to_the_same_bytes(
    server: Server, make_short: Any, whole: Whole
) -> None:
    expected, calls = whole
    assert len(calls) >= 200
    drawn = random.Random(SEED)
    for mode, count in POINTS.items():
        fitting = [n for n, (_, takes_room, _) in enumerate(calls, 1) if takes_room or mode not in ("torn", "full")]
        # One from each of as many equal parts of the run, so that planning, checkpoints and the result all are met.
        parts = [fitting[len(fitting) * k // count : len(fitting) * (k + 1) // count] for k in range(count)]
        for part in parts:
            at = drawn.choice(part)
            lost = survives(server, make_short(f"{mode}-{at}"), expected, at, mode)
            assert lost is None, f"{mode} at {at}, {calls[at - 1]}: {lost}"


def test_the_library_that_is_put_in_between_sees_what_safetensors_and_tokenizers_write(
    whole: Whole,
) -> None:
    """Both write from Rust, which no hook of Python's sees."""
    written = [path for call, _, path in whole[1] if call == "write"]
    assert sum("/checkpoints/.step-000001." in path and "/.tmp" in path for path in written) == 3
    assert any(path.endswith("/.adapter.tmp/tokenizer.json") for path in written)


def test_a_newest_checkpoint_that_is_spoiled_is_set_aside_and_named_and_the_one_before_is_used(
    server: Server, make_short: Any, tmp_path: Path, whole: Whole
) -> None:
    stopped = damaged_run(server, make_short("stopped"))
    chosen = (
        "optimizer.safetensors: a page of zeros",
        "state.json: half of it",
        "model.safetensors: gone",
        "state.json: gone",
    )
    every = {wound.name: wound for wound in wounds(stopped)}
    for name in chosen:
        lost = survives_damage(server, stopped, tmp_path / "copy", whole[0], every[name])
        assert lost is None, f"{name}: {lost}"


def test_a_clock_that_runs_backwards_changes_nothing(server: Server, make_short: Any, whole: Whole) -> None:
    run = make_short("run")
    ended = server.train(run, clock=3600.0, below=str(run), at=90, mode="kill")
    assert ended.code == -signal.SIGKILL
    ended = server.train(run, resume=True, clock=86_400.0)
    assert ended.code == 0, ended.said
    assert why_lost(run, whole[0]) is None
