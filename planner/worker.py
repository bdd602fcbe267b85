"""Child process: runs trainer.step on real micro-batches and answers in JSON lines. Start: python -P -m planner.worker

First line in: {"job": ..., "data_dir": ..., "scratch": ... or null}. Then one command a line, one reply a line:

    {"command": "load"}                                    -> LoadReply
    {"command": "run", "micro_batches": [...], "begins": [...], "longest_rows": [...]}   -> {"seconds": [...]}   of each
    {"command": "optimizer", "repeat": n}                  -> {"seconds": [...]}
    {"command": "window", "micro_batches": [...], "longest_row": n}   -> {"seconds": x}   with the optimizer step
    {"command": "memory", "windows": [[...], ...], "more": [[...], ...], "seconds": x}   -> MemoryReply
    {"command": "peak"}                                    -> PeakReply
    {"command": "packing", "packed_length": n}             -> {"refused": null or why packing is not for this model}
    {"command": "free"}                                    -> {"bytes": n}
    {"command": "evaluate", "batches": [[example, ...]]}   -> {"seconds": [...]}
    {"command": "save"}                                    -> SaveReply
    {"command": "answer", "examples": [...], "max_new_tokens": n}   -> {"seconds": x}
    {"command": "quit"}

A micro-batch is a list of rows, a row a list of example indices. Out of memory is a reply, {"oom": true, "message":
...}, and so is any other failure, {"error": one line, "traceback": ...}. It is a process of its own so that running out
of memory kills nothing else, peaks are clean, and profiling touches no weight or random state of a training.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any

from planner.workload import Worker
from presets import jsonio
from presets.errors import MeasurementError
from trainer.job import Job
from trainer.process import growing_segments, quiet_waiting, settle_garbage
from trainer.tokens import TokenizedDataset


def answer_command(worker: Worker, request: dict[str, Any]) -> Any:
    """The reply to one command, as plain JSON values."""
    command = request.get("command")
    if command == "load":
        return jsonio.to_plain(worker.load())
    if command == "run":
        return {"seconds": worker.run(request["micro_batches"], request["begins"], request["longest_rows"])}
    if command == "optimizer":
        return {"seconds": worker.optimizer(int(request["repeat"]))}
    if command == "window":
        return {"seconds": worker.window(request["micro_batches"], int(request["longest_row"]))}
    if command == "memory":
        return jsonio.to_plain(worker.memory(request["windows"], request["more"], float(request["seconds"])))
    if command == "peak":
        return jsonio.to_plain(worker.peak())
    if command == "packing":
        return {"refused": worker.packing_refused(int(request["packed_length"]))}
    if command == "free":
        return {"bytes": worker.free()}
    if command == "evaluate":
        return {"seconds": worker.evaluate(request["batches"])}
    if command == "save":
        return jsonio.to_plain(worker.save())
    if command == "answer":
        return {"seconds": worker.answer(request["examples"], int(request["max_new_tokens"]))}
    raise MeasurementError(f"the worker does not know the command {command!r}.")


def guarded(worker: Worker, request: dict[str, Any]) -> Any:
    """`answer_command`, with every failure turned into a reply."""
    try:
        return answer_command(worker, request)
    except Exception as reason:
        # The traceback holds the frames, and the frames hold the tensors: turn it into text and let go of it.
        text = "".join(traceback.format_exception(reason))
        from trainer.model import is_out_of_memory

        line = (str(reason).strip().splitlines() or [type(reason).__name__])[0][:300]
        failed = {"oom": True, "message": line} if is_out_of_memory(reason) else {"error": line, "traceback": text}
        reason.__traceback__ = None
    worker.recover()
    return failed


def loaded(worker: Worker, request: dict[str, Any]) -> Any:
    """The reply to "load", what a run does once it has loaded counted in."""
    answer = guarded(worker, request)
    begun = time.perf_counter()
    settle_garbage()
    if "load_seconds" in answer:
        answer["load_seconds"] += time.perf_counter() - begun
    return answer


def _private_streams() -> tuple[IO[str], IO[str]]:
    """The protocol's own streams. Afterwards fd 0 is empty and fd 1 is stderr: no library can read or write between."""
    incoming = os.fdopen(os.dup(0), "r", encoding="utf-8")
    outgoing = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return incoming, outgoing


def _read_lines(incoming: IO[str], lines: queue.Queue[str]) -> None:
    for line in incoming:
        lines.put(line)
    # End of input: the parent has quit or died. A thread watches for it so that a long command does not outlive it.
    os._exit(0)


def main() -> None:
    """Serve one parent until it says "quit" or is gone."""
    quiet_waiting()
    growing_segments()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    incoming, outgoing = _private_streams()
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read_lines, args=(incoming, lines), daemon=True).start()

    def reply(value: Any) -> None:
        outgoing.write(json.dumps(value) + "\n")
        outgoing.flush()

    request = json.loads(lines.get())
    try:
        job = jsonio.from_plain(Job, request["job"], what="job", error=MeasurementError)
        scratch = request.get("scratch")
        worker = Worker(job, TokenizedDataset.load(Path(request["data_dir"])), Path(scratch) if scratch else None)
    except Exception as reason:
        reply({"error": str(reason), "traceback": traceback.format_exc()})
        return
    while True:
        request = json.loads(lines.get())
        if request.get("command") == "quit":
            return
        reply(loaded(worker, request) if request.get("command") == "load" else guarded(worker, request))


if __name__ == "__main__":
    main()
