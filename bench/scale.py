"""Ten million examples: how long the batch plan, the estimate over it and the whole table take, and their memory.

    python bench/scale.py --examples 10000000 --out bench/results/scale-DATE.json

Each case is a process of its own, so that its peak is its own. Seconds are of this machine as it was just then, and
processor seconds beside them, which other work moves less; the promise is under 20 s and 2 GB for the plan, packed or
not, and under a second more for the estimate. The table is that of the eight presets, answered from a measurement of
63,000 examples that the history holds.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))
sys.path.insert(0, str(REPOSITORY))

CASES = {"one by one": {}, "micro-batches of 8": {"micro_batch_size": 8}, "packed": {"packing": True}}
TABLE = "table"  # of all presets


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
    device = FakeDevice(small.lengths, noise=0.05, memory=64 << 30)  # what does not fit has no estimate to time
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
    begun, begun_cpu = time.perf_counter(), time.process_time()
    row = make_row(job, data, small_row.name)
    planned, planned_cpu = time.perf_counter(), time.process_time()
    one = estimate(row, data, found)
    ended, ended_cpu = time.perf_counter(), time.process_time()
    if one.train_seconds is None:
        raise SystemExit(f"{name}: nothing was estimated ({one.error})")
    return {
        "case": name,
        "examples": examples,
        "steps": row.plan.num_steps,
        "plan_seconds": planned - begun,
        "plan_processor_seconds": planned_cpu - begun_cpu,
        "estimate_seconds": ended - planned,
        "estimate_processor_seconds": ended_cpu - planned_cpu,
        "peak_bytes": peak_resident_bytes(),
        "peak_before_bytes": before,
        "train_seconds": one.train_seconds,
    }


def run_table(examples: int) -> dict[str, Any]:
    """The table of all presets from the history, in this process: seconds, and the peak of it."""
    from planned import Bench

    from presets.demo import demo_folder
    from trainer.process import peak_resident_bytes

    with tempfile.TemporaryDirectory() as home:
        bench = Bench(home=Path(home), model=demo_folder())
        bench.plan("63000", names=())
        before = peak_resident_bytes()
        begun, begun_cpu = time.perf_counter(), time.process_time()
        found = bench.plan(str(examples), names=())
        ended, ended_cpu = time.perf_counter(), time.process_time()
    if bench.starts:
        raise SystemExit(f"the table was measured again, not answered from the history: {bench.said}")
    plans = {id(one.planned.plan): one.planned.plan for one in found.candidates if one.planned is not None}
    return {
        "case": TABLE,
        "examples": examples,
        "rows": len(found.report.rows),
        "plans": len(plans),
        "steps": sum(plan.num_steps for plan in plans.values()),
        "table_seconds": ended - begun,
        "table_processor_seconds": ended_cpu - begun_cpu,
        "peak_bytes": peak_resident_bytes(),
        "peak_before_bytes": before,
    }


def as_line(one: dict[str, Any]) -> str:
    memory = f"peak {one['peak_bytes'] / 2**30:.2f} GiB ({one['peak_before_bytes'] / 2**30:.2f} before)"
    parts = (
        f"{part} {one[f'{part}_seconds']:6.2f} s ({one[f'{part}_processor_seconds']:.2f} s of the processor)"
        for part in ("plan", "estimate", "table")
        if f"{part}_seconds" in one
    )
    return f"{one['case']:<20} {', '.join(parts)}, {memory}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000_000)
    parser.add_argument("--case", choices=(*CASES, TABLE))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.case:
        one = run_table(options.examples) if options.case == TABLE else run_case(options.case, options.examples)
        print(json.dumps(one))
        return 0
    from common import commit, hardware

    measured_commit = commit()
    rows = []
    for name in (*CASES, TABLE):
        command = [sys.executable, __file__, "--case", name, "--examples", str(options.examples)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(as_line(rows[-1]), flush=True)
    if options.out:
        content = {
            "date": str(datetime.now(UTC).date()),
            "commit": measured_commit,
            "command": "python bench/scale.py",
            "hardware": hardware("cpu"),
            "platform": platform.platform(),
            "numpy": metadata.version("numpy"),
            "cases": rows,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
