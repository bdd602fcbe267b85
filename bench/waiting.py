"""What the host waits for in a micro-step: transformers' question whether rows are packed, and shapes it has not met.

    python bench/waiting.py --device cuda --model FOLDER --out bench/results/waiting-DATE.json

Two comparisons over windows of a batch plan (packed rows, and padded micro-batches of four), in one process:

- question   the same windows, of shapes that are known, in turns with transformers asking the device and with the
             answer given: ratios of seconds, turn by turn
- widths     windows that were never run before, one after another in turns with their own widths and with shared ones:
             seconds per real token, block by block. A shape is new only once, so the two go over different windows

Beside them what PyTorch's detector names as waiting for a GPU, with the question and without. Without --model, a small
model; without a GPU the script is only tried.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "bench"))
sys.path.insert(0, str(REPOSITORY))

import accuracy  # noqa: E402
import common  # noqa: E402

SMALL = accuracy.Shape("llama", 64, 128, 4, 4, 2)
BLOCK = 10  # windows of each kind of widths


@contextlib.contextmanager
def question(asked: bool) -> Iterator[None]:
    """With transformers asking the device, or with the answer given as in a run."""
    from trainer import packed

    known = packed.known
    if asked:
        packed.known = lambda *, packed: contextlib.nullcontext()
    try:
        yield
    finally:
        packed.known = known


@contextlib.contextmanager
def widths(shared: bool) -> Iterator[None]:
    """Micro-batches as wide as their longest row, or of shared widths as on a GPU."""
    from trainer import feed
    from trainer.collate import collate

    made = feed.batch_on
    feed.batch_on = lambda device, rows, data, longest_row=0: collate(
        rows, data, shared=shared, longest_row=longest_row
    ).to(device)
    try:
        yield
    finally:
        feed.batch_on = made


def worker_of(options: argparse.Namespace, model: Path, changes: dict[str, Any]) -> tuple[Any, list[Any], list[int]]:
    """A worker with the model loaded, the windows of its plan and their real tokens."""
    from planner.group import rows_of
    from planner.workload import Worker
    from presets.schema import load_preset
    from trainer.data import prepare_data
    from trainer.job import DataSpec, EvaluationSpec, Job
    from trainer.planning import plan_job

    micro, length = changes["micro"], changes["length"]
    preset = replace(
        load_preset("baseline"),
        micro_batch_size=micro,
        gradient_accumulation_steps=16 // micro,
        max_length=length,
    )
    on_gpu = options.device == "cuda"
    job = Job(
        name="waiting",
        preset=preset,
        model=str(model),
        data=DataSpec(
            source=str(options.data), limit=options.rows, columns=(("prompt", "question"), ("completion", "answer"))
        ),
        device=options.device,
        precision="bf16" if on_gpu else "fp32",
        base_precision="bf16" if on_gpu else "fp32",
        micro_batch_size=micro,
        packing=changes["packing"],
        evaluation=EvaluationSpec(num_samples=0),
    )
    data = prepare_data(job.data, model=job.model, max_length=length, seed=0)
    plan = plan_job(job, data).plan
    worker = Worker(job, data, None)
    worker.load()
    offsets = plan.window_offsets.tolist()
    windows = [[rows_of(plan, micro) for micro in range(first, last)] for first, last in itertools.pairwise(offsets)]
    tokens = [sum(int(data.lengths[row].sum()) for rows in window for row in rows) for window in windows]
    return worker, windows, tokens


def waits(worker: Any, window: list[Any], asked: bool) -> list[str]:
    """Where a window's micro-steps wait for a GPU, as PyTorch's detector names it."""
    import torch

    scale = 1 / worker._supervised(window)
    batches = list(worker._feed(window))
    torch.cuda.synchronize()
    with question(asked), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for batch in batches:
                worker._micro_step(batch, scale)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    worker.recover()
    named = [
        f"{Path(one.filename).name}:{one.lineno}" for one in caught if "called a synchronizing" in str(one.message)
    ]
    return sorted(set(named))


def compare(options: argparse.Namespace, model: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Both comparisons over one kind of micro-batches."""
    worker, windows, tokens = worker_of(options, model, changes)
    several = [number for number, window in enumerate(windows) if len(window) > 1] or list(range(len(windows)))
    chosen = several[: options.windows]
    longest = 0  # tokens in the longest packed row
    if changes["packing"]:
        longest = max(
            sum(int(worker.data.lengths[i]) for i in row) for window in windows for rows in window for row in rows
        )
    for number in chosen:
        worker.window(windows[number], longest)  # now their shapes are known, and kernels are loaded
    asked: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(options.turns):
        for is_asked in (True, False) if turn % 2 else (False, True):
            with question(is_asked):
                begun = time.perf_counter()
                for number in chosen:
                    worker.window(windows[number], longest)
                asked[is_asked].append(time.perf_counter() - begun)
    rest = [number for number in range(len(windows)) if number not in set(chosen)]
    blocks: list[dict[str, float]] = []
    for first in range(0, len(rest) - 2 * BLOCK + 1, 2 * BLOCK):
        seconds, real = {True: 0.0, False: 0.0}, {True: 0, False: 0}
        for place, number in enumerate(rest[first : first + 2 * BLOCK]):
            is_shared = place % 4 in (0, 3)  # neither always comes first
            with widths(is_shared):
                seconds[is_shared] += worker.window(windows[number], longest)
            real[is_shared] += tokens[number]
        blocks.append({"shared": seconds[True] / real[True], "own": seconds[False] / real[False]})
    found = {
        **changes,
        "question": {"asked_seconds": asked[True], "known_seconds": asked[False]},
        "asked_over_known": [one / other for one, other in zip(asked[True], asked[False], strict=True)],
        "widths_seconds_per_token": blocks,
        "own_over_shared": [one["own"] / one["shared"] for one in blocks],
    }
    if options.device == "cuda":
        found["waits"] = {name: waits(worker, windows[chosen[0]], name == "asked") for name in ("asked", "known")}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", type=Path, help="a model folder with a tokenizer")
    parser.add_argument("--data", type=Path, default=common.GSM8K, help="JSONL with question and answer")
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--length", type=int, default=8192, help="of packed rows")
    parser.add_argument("--windows", type=int, default=5, help="of known shapes, in turns")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.data.is_file():
        print(f"waiting: skipped, there is no {options.data.name}; name one with --data")
        return 0
    kinds = {
        "packed": {"packing": True, "micro": 1, "length": options.length},
        "micro-batches of four": {"packing": False, "micro": 4, "length": min(1024, options.length)},
    }
    result: dict[str, Any] = {
        "what": "seconds with the question whether rows are packed over seconds without; own widths over shared ones",
        "date": str(date.today()),
        "hardware": common.hardware(options.device),
        "versions": {name: importlib.metadata.version(name) for name in accuracy.VERSIONED},
        "commit": common.commit(),
        "kinds": {},
    }
    with tempfile.TemporaryDirectory(prefix="waiting-") as name:
        model = options.model or Path(name) / "model"
        if options.model is None:
            accuracy.make_model(SMALL, model, weights_on=options.device)
        for kind, changes in kinds.items():
            found = result["kinds"][kind] = compare(options, model, changes)
            for ratio in ("asked_over_known", "own_over_shared"):
                print(f"{kind:<22} {ratio:<17} " + " ".join(f"{one:.3f}" for one in found[ratio]))
            print(f"{kind:<22} waits             {found.get('waits', 'told on a GPU only')}", flush=True)
            if options.out:
                common.write(options.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
