"""A million chats: how much memory it takes to tokenise a file of them, and for how long.

    python bench/memory.py --lines 1000000 --out bench/results/memory-DATE.json

The file is generated first; then a process of its own prepares it with the bundled model's tokenizer, without a cache
from before. Its peak is the child's own; what the imports take is told apart. The tokens go to files as they come, so
that the peak grows by a few numbers an example, not by its text.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "home", "by", "night", "rain")


def write_chats(path: Path, lines: int) -> None:
    """Short chats, each another one, 200 bytes or so a line."""
    chance = random.Random(7)

    def text(low: int, high: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(low, high)))

    with open(path, "w", encoding="utf-8") as file:
        for number in range(lines):
            asked = {"role": "user", "content": f"{number}: {text(3, 12)}?"}
            told = {"role": "assistant", "content": text(3, 25)}
            file.write(json.dumps({"messages": [asked, told]}) + "\n")


def prepare(path: Path, home: Path) -> dict[str, Any]:
    """Prepare the file in this process: seconds, and the highest resident memory before and after."""
    from transformers import AutoTokenizer  # noqa: F401  # what an empty file would import too

    from presets.demo import demo_folder
    from trainer.data import load_tokenizer, prepare_data
    from trainer.job import DataSpec
    from trainer.process import peak_resident_bytes

    load_tokenizer(str(demo_folder()))("x")
    before, begun = peak_resident_bytes(), time.perf_counter()
    data = prepare_data(DataSpec(source=str(path)), model=str(demo_folder()), max_length=1024, cache=home)
    return {
        "lines": len(data),
        "tokens": int(data.offsets[-1]),
        "file_bytes": path.stat().st_size,
        "seconds": time.perf_counter() - begun,
        "peak_before_bytes": before,
        "peak_bytes": peak_resident_bytes(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--prepare", type=Path, help="prepare this file in this process, and print what it took")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.prepare:
            print(json.dumps(prepare(options.prepare, Path(folder))))
            return 0
        path = Path(folder) / "chats.jsonl"
        write_chats(path, options.lines)
        command = [sys.executable, __file__, "--prepare", str(path)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    grown = found["peak_bytes"] - found["peak_before_bytes"]
    print(
        f"{found['lines']:,} chats of {found['file_bytes'] / 2**20:,.0f} MiB, {found['tokens']:,} tokens: "
        f"{found['seconds']:,.0f} s, peak {found['peak_bytes'] / 2**20:,.0f} MiB, "
        f"{grown / 2**20:,.0f} MiB of it for the data ({grown / found['lines']:,.0f} bytes a chat)"
    )
    if options.out:
        content = {
            "date": str(datetime.now(UTC).date()),
            "command": f"python bench/memory.py --lines {options.lines}",
            "hardware": {"cores": os.cpu_count(), "platform": platform.platform(), "load": os.getloadavg()},
            "python": sys.version.split()[0],
            **found,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
