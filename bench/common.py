"""What the benchmarks share: where text and results lie, what the machine is, going on where a run was cut off."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "bench" / "results"
# A JSONL file with question and answer; the variable names another place for it.
GSM8K = Path(os.environ.get("GSM8K") or REPOSITORY.parent / "shared" / "data" / "gsm8k_train.jsonl")


def hardware(device: str, threads: int | None = None) -> dict[str, Any]:
    """The device as the planner sees it, and the machine around it."""
    from planner.hardware import cpu_name, detect_device

    facts = detect_device(device)
    return {
        "device": facts.name,
        "memory_gib": round((facts.memory_bytes or 0) / 1024**3, 1),
        "driver": facts.driver,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.system(),
        "python": sys.version.split()[0],
        "load_at_start": os.getloadavg(),
    }


def commit() -> str:
    """The commit that was measured; COMMIT names it where the copy at hand has no history, or another's."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def earlier(out: Path, settings: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """The result file of an earlier call to go on with, or `fresh`.

    Raises:
        SystemExit: the file was made with other settings.
    """
    if not out.is_file():
        return fresh
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if found["settings"] != settings:
        raise SystemExit(f"{out} has other settings: {found['settings']}, asked for {settings}")
    return found


def write(out: Path, result: dict[str, Any]) -> None:
    """The result so far, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(out)
