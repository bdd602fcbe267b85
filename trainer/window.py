"""One window of a run: micro-steps over this process's share, the optimizer step, and what stops it.

Memory running out halves what is executed at once; a loss or gradient that is not a number ends the run before it
reaches the weights; with several processes all of them do the same, whichever it happened to.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from presets.errors import NonFiniteLossError, OutOfMemoryError
from trainer import checkpoint as ckpt
from trainer import step as steps
from trainer.collate import MicroBatch
from trainer.feed import feed
from trainer.model import is_out_of_memory
from trainer.run import Run
from trainer.tokens import FloatArray, IntArray

# With several processes: longest wait, about, until each knows that one was told to stop or ran out of memory. The
# launcher kills processes that are still there 30 s after a signal, and the checkpoint has to be written by then.
ASK_SECONDS = 5.0


class StopAsked(Exception):
    """A signal asked this process or another one to stop, in the middle of a window."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number


def run_window(run: Run, random_state: dict[str, Any]) -> None:
    """One optimizer step: micro-steps over this process's share, then the update; in parts if memory runs out.

    Raises:
        StopAsked: the window is open and its gradients are to be discarded; a resume repeats it.
    """
    begun = time.perf_counter()
    while (losses := _micro_steps(run)) is None:
        _split_further(run, random_state)
    progress = run.progress
    window = progress.windows_done
    targets = int(run.supervised[window])
    gathered = run.accelerator.gather(losses) if run.job.num_devices > 1 else losses
    values = gathered.double().cpu().numpy()  # waits for the device
    _require_finite(run, values)
    if run.job.num_devices > 1:
        steps.add_up_gradients(run.stepper.parameters)
    result = steps.optimizer_step(run.stepper, float(run.rates[min(progress.applied_steps, len(run.rates) - 1)]))
    steps.synchronize(run.stepper.device)
    grad_norm = float(result.grad_norm)
    _require_finite_gradient(run, grad_norm)
    seconds = time.perf_counter() - begun
    paused = run.monitor.paused(window + 1, seconds) if run.monitor is not None else 0.0
    run.paused_seconds += paused
    tokens = int(run.data.lengths[run.plan.documents_of_window(window)].sum())
    loss = float(values.sum())
    rate = float(run.rates[min(progress.applied_steps, len(run.rates) - 1)])
    run.progress = replace(
        progress,
        windows_done=window + 1,
        applied_steps=progress.applied_steps + int(result.applied),
        skipped_steps=progress.skipped_steps + int(not result.applied),
        tokens=progress.tokens + tokens,
        train_seconds=progress.train_seconds + seconds - paused,
        loss_sum=progress.loss_sum + loss,
        loss_tokens=progress.loss_tokens + targets,
    )
    if run.monitor is not None:
        run.monitor.step(
            window + 1,
            seconds,
            {
                "loss": loss / targets if targets else None,
                "learning_rate": rate,
                "grad_norm": grad_norm,
                "applied": result.applied,
                "tokens_per_second": tokens / seconds,
                "memory_bytes": _memory_now(run.stepper.device),
            },
            paused=paused,
        )
    if paused:
        run.tell(f"step {window + 1}: stood still for {paused:,.0f} s; they are left out of the pace")


def _micro_steps(run: Run) -> Any:
    """Forward and backward over this process's micro-batches of the open window; their token losses, (num_micro,).

    None where memory ran out, on this process or on another.

    Raises:
        StopAsked: see `run_window`.
    """
    import torch

    alone = run.job.num_devices == 1
    window = run.progress.windows_done
    targets = int(run.supervised[window])
    scale = 1 / targets if targets else 0.0
    sizes = [len(parts) for parts in _parts_of_window(run, window, run.progress.split)]
    if run.batches is None:
        run.batches = _batches_from_here(run)
    losses: list[Any] = []
    failed, unasked, asked_at = False, 0, time.perf_counter()
    for number, size in enumerate(sizes, start=1):
        if alone and run.stop_signal:
            raise StopAsked(run.stop_signal)
        if not failed:
            loss = _micro_batch(run, itertools.islice(run.batches, size), scale)
            failed = loss is None
            losses.append(loss)
        if alone and failed:
            return None
        unasked += 1
        # A process that failed comes here as often as the others: a different number of exchanges would hang the run.
        if not alone and (unasked >= run.ask_every or number == len(sizes)):
            steps.synchronize(run.stepper.device)
            news = _exchange_news(run, failed=failed, seconds=time.perf_counter() - asked_at)
            if news.stop_signal:
                raise StopAsked(news.stop_signal)
            if news.out_of_memory:
                return None
            run.ask_every = next_interval(run.ask_every, news.seconds / unasked)
            unasked, asked_at = 0, time.perf_counter()
    return torch.stack(losses)


def _batches_from_here(run: Run) -> Generator[MicroBatch]:
    """This process's micro-batches from the open window to the end of the run, as they are executed now.

    Over all windows and not one by one: on a GPU the first micro-batch of a window is then made while the last one of
    the window before computes. Where a window is a single packed row, there is no other time for it.
    """
    first, split = run.progress.windows_done, run.progress.split
    windows = (_parts_of_window(run, window, split) for window in range(first, run.plan.num_steps))
    rows = (rows for window in windows for parts in window for rows in parts)
    return feed(rows, run.data, run.stepper.device, itertools.repeat(run.longest_row))


def _parts_of_window(run: Run, window: int, split: int) -> Iterator[list[list[IntArray]]]:
    """This process's micro-batches of a window, each in the parts in which it is executed."""
    plan = run.plan
    first, last = int(plan.window_offsets[window]), int(plan.window_offsets[window + 1])
    for micro in range(first + run.accelerator.process_index, last, plan.num_devices):
        yield _parts(plan.rows_of_micro_batch(micro), split)


def _micro_batch(run: Run, parts: Iterable[MicroBatch], scale: float) -> Any:
    """Forward and backward of one planned micro-batch, in as many parts as it takes; None where memory ran out."""
    total: Any = None
    try:
        for batch in parts:
            loss = steps.micro_step(run.stepper, batch, scale=scale)
            total = loss if total is None else total + loss
    except (RuntimeError, MemoryError) as reason:
        if not is_out_of_memory(reason):
            raise
        return None
    return total


@dataclass(frozen=True, slots=True)
class _News:
    """What at least one of the processes has to say in the middle of a window."""

    out_of_memory: bool
    stop_signal: int  # 0: none
    seconds: float  # that the slowest took since the last exchange


def _exchange_news(run: Run, *, failed: bool, seconds: float) -> _News:
    """The same answer on every process, so that all of them do the same next."""
    import torch
    import torch.distributed as dist

    news = torch.tensor([float(failed), float(run.stop_signal), seconds], device=run.accelerator.device)
    dist.all_reduce(news, op=dist.ReduceOp.MAX)
    any_failed, stop_signal, slowest = news.tolist()
    return _News(bool(any_failed), int(stop_signal), slowest)


def next_interval(every: int, seconds_per_micro_step: float) -> int:
    """Micro-steps to the next exchange of news: about ASK_SECONDS of them, and at most twice as many as before.

    It is computed from exchanged numbers only, so that every process waits at the same micro-steps.
    """
    fitting = ASK_SECONDS / seconds_per_micro_step if seconds_per_micro_step > 0 else float("inf")
    return max(1, int(min(fitting, 2 * every)))


def _parts(rows: list[IntArray], split: int) -> list[list[IntArray]]:
    """A planned micro-batch in at most `split` parts of whole rows."""
    size = max(1, -(-len(rows) // split))
    return [rows[start : start + size] for start in range(0, max(1, len(rows)), size)]


def _split_further(run: Run, random_state: dict[str, Any]) -> None:
    """After running out of memory: halve what is executed at once; the plan and the global batch stay."""
    import torch

    job, progress = run.job, run.progress
    steps.clear_gradients(run.stepper.parameters)
    run.drop_batches()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    rows = -(-job.micro_batch_size // progress.split)
    if rows <= 1:
        raise OutOfMemoryError(
            f"step {progress.windows_done + 1}: out of memory at micro-batch {rows}. What helps: a shorter max_length, "
            "gradient_checkpointing = true, base_precision 4bit, or closing other programs on this device. "
            "The last checkpoint is kept: 'plan --resume' goes on from it."
        )
    ckpt.restore_random_state(random_state)
    split = progress.split * 2
    run.progress = replace(progress, split=split)
    note = (
        f"step {progress.windows_done + 1}: out of memory; micro-batches of {rows} are now executed as "
        f"{-(-job.micro_batch_size // split)}, with twice the accumulation. The global batch stays the same."
    )
    run.tell(note)


def _require_finite(run: Run, values: FloatArray) -> None:
    """Stop at a NaN or infinite loss, before it reaches the weights, and name the examples."""
    bad = np.flatnonzero(~np.isfinite(values))
    if not len(bad):
        return
    plan, window = run.plan, run.progress.windows_done
    first = int(plan.window_offsets[window])
    per_process = len(values) // run.job.num_devices
    examples: list[int] = []
    for index in bad.tolist():
        micro = first + (index % per_process) * run.job.num_devices + index // per_process
        examples += [int(example) for row in plan.rows_of_micro_batch(micro) for example in row]
    named = ", ".join(str(example) for example in examples[:10]) + (" ..." if len(examples) > 10 else "")
    raise NonFiniteLossError(
        f"step {window + 1}: the loss is not a number (example(s) {named} of the data, counted from 0). No weight was "
        "changed by it and the last checkpoint is kept. Look at these examples, or lower the learning rate"
        + (", or use bf16 or fp32 instead of fp16." if run.job.precision == "fp16" else ".")
    )


def _require_finite_gradient(run: Run, grad_norm: float) -> None:
    """Stop where the gradient overflowed although the loss did not.

    With fp16 that is the loss scaler's to mend, as long as there is a scale left to take away.
    """
    scaler = run.stepper.scaler
    if np.isfinite(grad_norm) or (scaler is not None and scaler.get_scale() >= 1.0):
        return
    raise NonFiniteLossError(
        f"step {run.progress.windows_done + 1}: the norm of the gradient is {grad_norm}, although the loss is finite. "
        "No weight was changed by it and the last checkpoint is kept. Lower the learning rate, or use fp32."
    )


def _memory_now(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_reserved())
    import psutil

    return int(psutil.Process().memory_info().rss)
