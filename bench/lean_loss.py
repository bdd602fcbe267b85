"""Plain against lean loss: peak memory and time of a micro-step, on a model whose vocabulary is large for its size.

    python bench/lean_loss.py

Each loss runs in a process of its own, since a peak of resident memory is a process's; both processes are loaded at the
same time and step in turns, so that a busy machine slows both. Reported are ratios, lean over plain: the median of the
pairs and their quartiles. Memory is what is added to the peak of the process once the model is loaded, the check of the
lean loss included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "bench" / "results"
TOKENS = 512
SUPERVISED = 0.5  # of the tokens, every second one
CASES = (("lora", 50_000), ("lora", 150_000), ("full", 50_000))  # what trains, vocabulary
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}


def serve(adapter: str, vocabulary: int, loss: Any) -> None:
    """Load, say so, then one micro-step a line read: its seconds, and the memory it added so far."""
    import time

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from trainer.collate import MicroBatch
    from trainer.process import peak_resident_bytes
    from trainer.step import clear_gradients, make_stepper, micro_step

    torch.manual_seed(0)
    model: Any = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **SHAPE))
    if adapter == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = peak_resident_bytes()  # before the lean loss is checked: what the check needs counts against it
    stepper = make_stepper(model, "cpu", "fp32", loss=loss)
    assert stepper.lean_refused is None, stepper.lean_refused
    ids = torch.randint(0, vocabulary, (1, TOKENS))
    targets = torch.arange(1, TOKENS, round(1 / SUPERVISED))
    batch = MicroBatch(
        input_ids=ids, position_ids=None, predicts=targets - 1, targets=ids[0, targets], num_tokens=TOKENS
    )
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        value = float(micro_step(stepper, batch, scale=1 / len(targets)))
        seconds = time.perf_counter() - begin
        clear_gradients(stepper.parameters)
        print(json.dumps({"seconds": seconds, "bytes": peak_resident_bytes() - before, "loss": value}), flush=True)


def compare(adapter: str, vocabulary: int, pairs: int) -> dict[str, Any]:
    """Both losses in turns; the first step of each is warm-up."""
    children = {
        loss: subprocess.Popen(
            [sys.executable, __file__, "--serve", adapter, str(vocabulary), loss],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        for loss in ("plain", "lean")
    }

    def step(loss: str) -> dict[str, Any]:
        child = children[loss]
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("step\n")
        child.stdin.flush()
        return dict(json.loads(child.stdout.readline()))

    try:
        for child in children.values():
            assert child.stdout is not None
            assert child.stdout.readline().strip() == "ready"
        found: list[dict[str, Any]] = []
        for pair in range(pairs + 1):
            order = ("plain", "lean") if pair % 2 else ("lean", "plain")
            found.append({loss: step(loss) for loss in order})
    finally:
        for child in children.values():
            assert child.stdin is not None
            child.stdin.close()
            child.wait()
    times = [one["lean"]["seconds"] / one["plain"]["seconds"] for one in found[1:]]
    low, middle, high = statistics.quantiles(times, n=4)
    last = found[-1]
    assert abs(last["lean"]["loss"] - last["plain"]["loss"]) < 1e-4 * last["plain"]["loss"]
    return {
        "adapter": adapter,
        "vocabulary": vocabulary,
        "time_ratio": round(middle, 3),
        "time_ratio_quartiles": [round(low, 3), round(high, 3)],
        "added_peak_memory_ratio": round(last["lean"]["bytes"] / last["plain"]["bytes"], 3),
        "pairs": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--serve", nargs=3, metavar=("ADAPTER", "VOCABULARY", "LOSS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], int(options.serve[1]), options.serve[2])
        return
    rows = []
    for adapter, vocabulary in CASES:
        rows.append(compare(adapter, vocabulary, options.pairs))
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "what": "lean loss over plain loss: seconds and added peak memory of one micro-step, fp32 on the CPU",
        "date": date.today().isoformat(),
        "command": "python bench/lean_loss.py",
        "model": {"type": "qwen3", **SHAPE},
        "tokens": TOKENS,
        "supervised_share": SUPERVISED,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "python": platform.python_version(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"lean_loss-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
