"""How far estimates are from runs on a simulated GPU behind a host that launches its work; see tests/fake_host.py.

    python bench/hosted.py --out bench/results/hosted-DATE.json

The host's seconds a micro-step and a new shape, and the GPU's a token, are those seen of models of 1 to 8 B on an H200
(2026-11-27). Each kind of micro-batches is profiled and run as often as --trials says, each time with noise of its own.
It says whether the arithmetic can foresee such a machine, not whether a machine is such a one.
"""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "bench")]

import common  # noqa: E402
from fake_host import HostedDevice  # noqa: E402
from fakes import make_data, make_job, make_row  # noqa: E402

from planner.estimate import BETWEEN_RUNS, estimate  # noqa: E402
from planner.measure import measure  # noqa: E402

NOISE = 0.04
MODELS = {
    "1 B": {"launch": 0.055, "launch_new": 0.04, "per_token": 14.5e-6},
    "1.7 B": {"launch": 0.10, "launch_new": 0.065, "per_token": 22e-6},
    "3 B": {"launch": 0.10, "launch_new": 0.09, "per_token": 33e-6},
    "8 B": {"launch": 0.15, "launch_new": 0.09, "per_token": 90e-6},
}
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("1 B", {"micro_batch_size": 4}),
    ("1 B", {"micro_batch_size": 8}),
    ("1 B", {"packing": True, "packed_length": 8192}),
    ("1 B", {"packing": True, "packed_length": 16384}),
    ("1.7 B", {"micro_batch_size": 1}),
    ("1.7 B", {"micro_batch_size": 16}),
    ("1.7 B", {"packing": True, "packed_length": 8192}),
    ("3 B", {"micro_batch_size": 8}),
    ("3 B", {"packing": True, "packed_length": 4096}),
    ("3 B", {"packing": True, "packed_length": 8192}),
    ("8 B", {"micro_batch_size": 4}),
)


def trial(model: str, changes: dict[str, Any], examples: int, budget: float, seed: int) -> tuple[float, bool, float]:
    """Relative error of the loop, whether its range held, and the seconds of the run."""
    lengths = np.clip(np.round(np.exp(np.random.default_rng(3).normal(6.1, 0.4, examples))), 60, 1024).astype(np.int64)
    data = make_data(lengths)
    device = HostedDevice(lengths, noise=NOISE, seed=seed, **MODELS[model])
    row = make_row(make_job(device="cuda", precision="bf16", **changes), data)
    found = measure([row], data, device.factory, budget_seconds=budget, clock=device.clock, seed=seed)
    one = estimate(row, data, found, between=BETWEEN_RUNS["cuda"])
    assert one.train_seconds is not None
    assert one.train_seconds_low is not None
    assert one.train_seconds_high is not None
    run = HostedDevice(lengths, noise=NOISE, **MODELS[model])
    seconds = run.run_seconds(row.plan, seed + 100, packed=row.job.packing)
    return one.train_seconds / seconds - 1, one.train_seconds_low <= seconds <= one.train_seconds_high, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--budget", type=float, default=18.0)
    parser.add_argument("--examples", default="1000,4000", help="comma-separated")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cells = []
    for model, changes in KINDS:
        for examples in map(int, options.examples.split(",")):
            found = [trial(model, changes, examples, options.budget, seed) for seed in range(options.trials)]
            errors = np.array([error for error, _, _ in found])
            cells.append(
                {
                    "model": model,
                    **changes,
                    "examples": examples,
                    "seconds": found[0][2],
                    "median_error": float(np.median(errors)),
                    "lowest": float(errors.min()),
                    "highest": float(errors.max()),
                    "held": float(np.mean([held for _, held, _ in found])),
                }
            )
            told = cells[-1].items()
            print(*(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in told))
    if options.out:
        settings = {"trials": options.trials, "budget": options.budget, "noise": NOISE, "models": MODELS}
        what = "error of the estimated loop on a simulated GPU behind a host (tests/fake_host.py); above 0: too long"
        common.write(
            options.out,
            {"what": what, "date": str(date.today()), "commit": common.commit(), "settings": settings, "cells": cells},
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
