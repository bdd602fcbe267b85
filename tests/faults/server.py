"""A fork server for faults: imports what a run needs once, then forks a process for each request.

One JSON line a request on standard input:

    {"action": "train", "run": FOLDER, "resume": bool}      the trainer's command line, as a user starts it
    {"action": "folder", "run": FOLDER, "job": JOB}         plan --run's making of the folder
    {"action": "history", "home": FOLDER, "number": n}      one more run in the history

with, for each of them, "log": FILE (what it says), and where it is to fail "below": FOLDER, "at": n, "mode": MODE (see
shim.c) and "calls": FILE or null; "set": {"module.NAME": value} changes constants; "clock": seconds that each look at
the clock goes back. Answered are the child's process id, then its wait status. No torch operation runs here, so that no
thread is lost in a fork.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

MODES = ("count", "kill", "torn", "full", "broken")
A_DEFECT = 70  # exit code where something other than a message to the user came out


def act(asked: dict[str, Any]) -> int:
    """Do what is asked, in the child; its exit code."""
    from presets.errors import PlanError

    for name, value in asked.get("set", {}).items():
        module, constant = name.rsplit(".", 1)
        setattr(importlib.import_module(module), constant, value)
    if asked.get("clock"):
        ticks, begun = itertools.count(), time.time()
        time.time = lambda: begun - asked["clock"] * next(ticks)
    if asked.get("mode"):
        shim: Any = ctypes.CDLL(None)
        calls = asked.get("calls")
        shim.fault_arm(
            os.fsencode(asked["below"]),
            ctypes.c_long(asked["at"]),
            MODES.index(asked["mode"]),
            None if calls is None else os.fsencode(calls),
        )
    try:
        if asked["action"] == "train":
            from trainer import __main__ as entry

            sys.argv = ["trainer", str(Path(asked["run"]) / "job.json"), *(["--resume"] if asked["resume"] else [])]
            return entry.main()
        if asked["action"] == "folder":
            return make_folder(asked)
        return add_to_history(asked)
    except PlanError as reason:
        print(f"Error: {reason}", file=sys.stderr)
        return 1


def make_folder(asked: dict[str, Any]) -> int:
    """As plan --run does once it has measured."""
    from datetime import datetime

    import numpy as np

    from planner.launch import make_run_folder
    from trainer.batching import Pass, Stretch, make_batch_plan
    from trainer.job import Job
    from trainer.record import Predicted

    passes = (Pass(examples=np.arange(16), num_epochs=2, stretches=(Stretch(phase=0, global_batch_size=8),)),)
    plan = make_batch_plan(np.full(24, 9), passes, micro_batch_size=4, evaluation=np.arange(16, 24))
    job = Job.from_json(asked["job"])
    make_run_folder(Path(asked["run"]), job, plan, Predicted(), datetime.now())
    return 0


def add_to_history(asked: dict[str, Any]) -> int:
    """One more run, as plan does when a run has ended."""
    from planner.history import History, PastRun

    history = History(home=Path(asked["home"]), say=lambda text: print(text, file=sys.stderr))
    number = asked["number"]
    history.add_run(
        PastRun(folder=f"run-{number}", ended_at=f"2026-01-01T00:00:{number:02d}+00:00", status="finished", name="x",
                model="m")
    )  # fmt: skip
    return 0


def main() -> None:
    """Serve until standard input ends."""
    from trainer.process import quiet_waiting

    quiet_waiting()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import accelerate  # noqa: F401
    import filelock  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    from planner import history, launch  # noqa: F401
    from trainer import loop  # noqa: F401

    print("ready", flush=True)
    for request in sys.stdin:
        asked = json.loads(request)
        child = os.fork()
        if child == 0:
            code = A_DEFECT
            try:
                log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                os.dup2(log, 1)
                os.dup2(log, 2)
                code = act(asked)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
