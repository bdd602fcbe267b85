"""Faults in real processes: at every change that a short run makes to its folder, and in every file of a checkpoint.

    python bench/faults.py --out bench/results/faults-DATE.json

Each try is a run of its own that fails once and is resumed once. It survives where it ends with the adapter's bytes,
the losses and the examples (each as often) of a run that nothing happened to, and leaves nothing behind. Linux with a C
compiler; half an hour on two quiet cores. A file of an earlier call is gone on
with; Ctrl-C ends it with the table so far.

    kill     killed (-9) before the n-th change          full    from the n-th change on the disk is full
    torn     half of the n-th write, then killed         broken  the n-th change fails once (EIO)
    damage   the newest checkpoint: each file cut off, zeroed in part, or gone
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "faults")]

MEANING = {
    "kill": "kill -9 before the n-th change",
    "torn": "half of the n-th write, then kill -9",
    "full": "disk full from the n-th change on",
    "broken": "the n-th change fails once (EIO)",
    "damage": "newest checkpoint cut off, zeroed or gone",
}


def points(calls: list[tuple[str, bool, str]], thin: int) -> Iterator[tuple[str, int]]:
    """(mode, n): every change for kill; where nothing is written, torn is as a later kill and full as a later full."""
    numbered = list(enumerate((takes_room for _, takes_room, _ in calls), start=1))
    yield from (("kill", number) for number, _ in numbered)
    for mode in ("full", "torn"):
        yield from ((mode, number) for number, takes_room in numbered if takes_room)
    yield from (("broken", number) for number, _ in numbered if number % thin == 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--thin", type=int, default=3, help="for EIO: every N-th change [3]")
    options = parser.parse_args()

    from common import commit, earlier, hardware, write
    from harness import SHORT, Server, build_shim, calls_of, short_data, survives, why_no_shim
    from small_runs import save_tiny_model, small_job, write_chats
    from tabulate import tabulate
    from wounds import damaged_run, survives_damage, wounds

    refused = why_no_shim()
    if refused:
        raise SystemExit(f"Error: {refused}.")
    settings: dict[str, Any] = {"broken_every": options.thin}
    result: dict[str, Any] = {
        "date": str(datetime.now(UTC).date()),
        "command": "python bench/faults.py",
        "settings": settings,
        "commit": commit(),
        "hardware": hardware("cpu", 1),
        "changes_of_a_run": 0,
        "tries": [],
    }
    if options.out:
        result = earlier(options.out, settings, result)
    done = {(one["fault"], one["at"]) for one in result["tries"]}
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        work = Path(name).resolve()
        os.environ["PLAN_HOME"] = str(work / "home")
        (work / "model").mkdir()
        save_tiny_model(work / "model")
        write_chats(work / "chats.jsonl")
        job = small_job(work / "model", work / "chats.jsonl", data=short_data(work / "chats.jsonl"), **SHORT).to_json()

        def make_run(name: str) -> Path:
            run = work / name
            shutil.rmtree(run, ignore_errors=True)
            run.mkdir()
            (run / "job.json").write_text(job, encoding="utf-8")
            return run

        server = Server(work, build_shim(work))

        def note(fault: str, at: int | str, lost: str | None) -> None:
            said = None if lost is None else lost.replace(str(work), "WORK")
            result["tries"].append({"fault": fault, "at": at, "lost": said})
            if lost is not None:
                print(f"LOST: {fault} at {at}: {said}", flush=True)
            if options.out:
                write(options.out, result)

        whole = make_run("whole")
        calls = calls_of(server, whole, work / "calls")
        result["changes_of_a_run"] = len(calls)
        with contextlib.suppress(KeyboardInterrupt):  # the table of what was tried comes all the same
            stopped = damaged_run(server, make_run("stopped"))
            for wound in wounds(stopped):
                if ("damage", wound.name) not in done:
                    note("damage", wound.name, survives_damage(server, stopped, work / "run", whole, wound))
            for mode, at in points(calls, options.thin):
                if (mode, at) not in done:
                    note(mode, at, survives(server, make_run("run"), whole, at, mode))
        server.close()
    rows = []
    for fault, meaning in MEANING.items():
        tries = [one for one in result["tries"] if one["fault"] == fault]
        lost = sum(one["lost"] is not None for one in tries)
        rows.append((meaning, len(tries), len(tries) - lost, lost))
    rows.append(("all", *(sum(row[column] for row in rows) for column in (1, 2, 3))))
    print(tabulate(rows, headers=("fault", "tries", "survived", "lost"), tablefmt="simple"))
    return int(rows[-1][3] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
