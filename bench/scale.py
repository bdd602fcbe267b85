"""Ten million examples: how long the batch plan and the estimate over it take, and the memory of it all.

    python bench/scale.py --examples 10000000 --out bench/results/scale-DATE.json

Each case is a process of its own, so that its peak is its own. Seconds are of this machine as it was just then; the
promise is under 20 s and 2 GB for the plan, packed or not, and under a second more for the estimate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))
sys.path.insert(0, str(REPOSITORY))

CASES = {"one by one": {}, "micro-batches of 8": {"micro_batch_size": 8}, "packed": {"packing": True}}


def run_case(name: str, examples: int) -> dict[str, Any]:
    """One case in this process: seconds of the plan, of the estimate, and the peak of both."""
    import numpy as np
    from fakes import FakeDevice, chat_lengths, make_data, make_job, make_row

    from planner.estimate import estimate
    from planner.measure import measure
    from trainer.process import peak_resident_bytes
    from trainer.tokens import DataReport, TokenizedDataset

    small = make_data(chat_lengths(3000))
    job = make_job("recommended", **CASES[name])  # type: ignore[arg-type]
    small_row = make_row(job, small)
    device = FakeDevice(small.lengths, noise=0.05)
    found = measure([small_row], small, device.factory, clock=device.clock)

    lengths = chat_lengths(examples, seed=6)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    # The plan looks at lengths and targets only; the tokens of ten million examples would be 4 GB of nothing.
    empty = np.broadcast_to(np.int32(0), (int(offsets[-1]),))
    report = DataReport(source="fake", num_records=examples)
    data = TokenizedDataset(
        token_ids=empty, supervised=np.broadcast_to(np.True_, empty.shape), offsets=offsets, report=report
    )
    before = peak_resident_bytes()
    begun = time.perf_counter()
    row = make_row(job, data, small_row.name)
    planned = time.perf_counter()
    one = estimate(row, data, found)
    ended = time.perf_counter()
    return {
        "case": name,
        "examples": examples,
        "steps": row.plan.num_steps,
        "plan_seconds": planned - begun,
        "estimate_seconds": ended - planned,
        "peak_bytes": peak_resident_bytes(),
        "peak_before_bytes": before,
        "train_seconds": one.train_seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000_000)
    parser.add_argument("--case", choices=tuple(CASES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options.case, options.examples)))
        return 0
    rows = []
    for name in CASES:
        command = [sys.executable, __file__, "--case", name, "--examples", str(options.examples)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
        one = rows[-1]
        print(
            f"{name:<20} plan {one['plan_seconds']:6.2f} s, estimate {one['estimate_seconds']:5.2f} s, "
            f"peak {one['peak_bytes'] / 2**30:.2f} GiB ({one['peak_before_bytes'] / 2**30:.2f} before)"
        )
    if options.out:
        content = {
            "date": str(datetime.now(UTC).date()),
            "command": "python bench/scale.py",
            "hardware": {"cores": os.cpu_count(), "platform": platform.platform(), "load": os.getloadavg()},
            "python": sys.version.split()[0],
            "cases": rows,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
