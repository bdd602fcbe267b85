"""One loaded model in a worker process, and what is timed of it, with the code that trains. See `planner.worker`."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.prober import LoadReply, MemoryReply, MicroRows, PeakReply, SaveReply
from planner.stopwatch import ClockMeter, EventMeter
from presets.errors import MeasurementError
from trainer.job import Job
from trainer.process import (
    peak_resident_bytes,
    resident_bytes,
    seconds_since_process_start,
    threads_of_a_process,
)
from trainer.tokens import IntArray, TokenizedDataset

if TYPE_CHECKING:
    import torch

    from trainer.collate import MicroBatch
    from trainer.model import LoadedModel
    from trainer.step import Stepper

OPTIMIZER_ATTEMPTS = 20  # fp16 starts with a loss scale of 65,536, halved at each overflow
CHECKPOINTS = 4  # timed, at most
CHECKPOINT_SECONDS = 1.0  # after which no further one is begun


class Worker:
    """One loaded model and the commands it serves."""

    def __init__(self, job: Job, data: TokenizedDataset, scratch: Path | None) -> None:
        self.job = job
        self.data = data.as_planned(shares_beginnings=job.shares_beginnings)
        self.scratch = scratch
        self._loaded: LoadedModel | None = None
        self._stepper: Stepper | None = None
        self._tokenizer: Any = None
        self._targets = data.num_supervised  # per example
        self._is_settled = False  # how packed documents are kept apart
        self._packing_refused: str | None = None
        self._is_warm = job.device == "cpu"  # whether the first micro-step, which loads kernels, is over

    @property
    def stepper(self) -> Stepper:
        if self._stepper is None:
            raise MeasurementError("the worker got a command before 'load'.")
        return self._stepper

    def load(self) -> LoadReply:
        start_seconds = seconds_since_process_start()
        begin = time.perf_counter()
        # What the trainer imports, neither less nor more: its seconds count as import and its memory as the process's.
        import accelerate  # noqa: F401
        import torch
        import transformers  # noqa: F401

        if self.job.preset.adapter == "lora":
            import peft  # noqa: F401

        from trainer.data import load_tokenizer
        from trainer.model import inspect_model, load_model
        from trainer.step import make_stepper

        imported = time.perf_counter()
        threads = threads_of_a_process(self.job.num_threads, self.job.num_devices)
        if threads is not None:
            torch.set_num_threads(threads)
        self._loaded = load_model(self.job, need_weights=False)
        if inspect_model(self.job.model).has_tokenizer:
            self._tokenizer = load_tokenizer(self.job.model, trust_remote_code=self.job.trust_remote_code)
        preset = self.job.preset
        self._stepper = make_stepper(
            self._loaded.model,
            self.job.device,
            self.job.precision,
            weight_decay=preset.weight_decay,
            max_grad_norm=preset.max_grad_norm,
            loss=self.job.loss,
        )
        if self.job.packing:
            self._settle_packing(self.job)  # the first passes of a process, in a run's loading too
        self._synchronize()
        loaded = time.perf_counter()
        compile_refused = None
        if self.job.compile:
            from trainer.compiled import compile_layers

            compile_refused = compile_layers(self._stepper, self.job, self.data)
            self._synchronize()
        return LoadReply(
            start_seconds=start_seconds,
            import_seconds=imported - begin,
            load_seconds=loaded - imported,
            num_parameters=self._loaded.num_parameters,
            num_trainable_parameters=self._loaded.num_trainable_parameters,
            weights=self._loaded.weights,
            has_tokenizer=self._tokenizer is not None,
            num_threads=torch.get_num_threads(),
            lean_refused=self._stepper.lean_refused,
            compile_seconds=time.perf_counter() - loaded if self.job.compile else 0.0,
            compile_refused=compile_refused,
        )

    def run(self, micro_batches: list[MicroRows], begins: list[int], longest_rows: list[int]) -> list[float]:
        """Seconds of each micro-step. Gradients pile up, as in a window, and are dropped at its end.

        Args:
            begins: places where a window begins: the device has done all that came before, and nothing is hidden
                behind it.
            longest_rows: of the batch plan of each, see `trainer.feed`.
        """
        from trainer.step import clear_gradients

        self._settle(micro_batches)
        scales = [1.0 / self._supervised([rows]) for rows in micro_batches]
        meter = EventMeter() if self.job.device == "cuda" else ClockMeter(self._synchronize)
        try:
            batches = self._feed(micro_batches, longest_rows)
            for place, scale in enumerate(scales):
                if place == 0 or place in begins:
                    clear_gradients(self.stepper.parameters)
                    meter.begin()
                self._micro_step(next(batches), scale)
                meter.mark()
        finally:
            clear_gradients(self.stepper.parameters)
        return meter.seconds()

    def optimizer(self, repeat: int) -> list[float]:
        """Seconds of optimizer steps that were applied: one skipped for an fp16 overflow does less work."""
        from trainer.step import optimizer_step

        seconds: list[float] = []
        for _ in range(OPTIMIZER_ATTEMPTS + repeat):
            if len(seconds) == repeat:
                break
            self._small_micro_step()
            self._synchronize()
            begin = time.perf_counter()
            result = optimizer_step(self.stepper, 0.0)
            self._synchronize()
            if result.applied:
                seconds.append(time.perf_counter() - begin)
        return seconds

    def window(self, micro_batches: list[MicroRows], longest_row: int) -> float:
        """Seconds of one window as the loop runs it: micro-steps, their losses read once, optimizer step."""
        import torch

        from trainer.step import optimizer_step

        self._settle(micro_batches)
        scale = 1.0 / self._supervised(micro_batches)
        batches = self._feed(micro_batches, itertools.repeat(longest_row))
        self._synchronize()
        begin = time.perf_counter()
        torch.stack([self._micro_step(batch, scale) for batch in batches]).double().cpu()
        optimizer_step(self.stepper, 0.0)
        self._synchronize()
        return time.perf_counter() - begin

    def memory(self, windows: list[list[MicroRows]], more: list[list[MicroRows]], seconds: float) -> MemoryReply:
        """Peak bytes over these windows or parts of them: since the process started, on a GPU since the last `memory`.

        `more` windows follow while they take no longer than `seconds`.

        Adam's moments appear at the first update, so a small one comes first. Then the micro-batches follow each other
        as in the run: where a window's longest stands at its head, no gradients lie beside its activations.
        """
        from trainer.step import clear_gradients

        cuda = self.job.device == "cuda"
        self._settle([rows for window in (*windows, *more) for rows in window])
        if cuda:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        first_seconds = self._first_seconds()
        self.optimizer(1)
        taken: list[float] = []
        per_token: list[float] = []
        until = float("inf")
        try:
            for number, window in enumerate([*windows, *more]):
                if number == len(windows):
                    until = time.perf_counter() + seconds
                if time.perf_counter() >= until:
                    break
                found = self._one_by_one(window)
                taken += [one for one, _ in found]
                per_token += [one / tokens for one, tokens in found]
        finally:
            clear_gradients(self.stepper.parameters)
        if cuda:
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        else:
            allocated = reserved = peak_resident_bytes()
        # The first one met its shape for the first time; of the others the longest takes the longest.
        slowest = max(taken[1:] or taken)
        return MemoryReply(
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            micro_step_seconds=slowest,
            token_seconds=min(per_token),
            first_seconds=first_seconds,
            taken=tuple(taken),
        )

    def _one_by_one(self, window: list[MicroRows]) -> list[tuple[float, int]]:
        """(seconds, padded tokens) of each micro-step of a window, waiting for the device at each; then its update."""
        from trainer.step import optimizer_step

        scale = 1.0 / self._supervised(window)
        batches = self._feed(window)
        found = []
        for _ in window:
            self._synchronize()
            begin = time.perf_counter()
            batch = next(batches)
            self._micro_step(batch, scale)
            self._synchronize()
            found.append((time.perf_counter() - begin, batch.input_ids.numel()))
        optimizer_step(self.stepper, 0.0)
        return found

    def peak(self) -> PeakReply:
        """Peak bytes since the last `memory`, with all that ran since: other shapes, evaluation, saving.

        Micro-batches of many shapes in random order leave holes in the allocator's blocks that one shape never makes.
        """
        if self.job.device == "cuda":
            import torch

            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            headroom = self.free() + torch.cuda.memory_reserved() - reserved
        else:
            allocated = reserved = peak_resident_bytes()
            headroom = self.free() + resident_bytes() - reserved
        return PeakReply(allocated_bytes=allocated, reserved_bytes=reserved, headroom_bytes=max(0, headroom))

    def packing_refused(self, packed_length: int) -> str | None:
        """Why packed rows are not for this model; None where its packed and separate logits agree."""
        from trainer.agreement import settle_packing

        self._is_settled = True
        job = replace(self.job, packed_length=packed_length)
        refused = settle_packing(self.stepper.model, self.data, job, tell_leaks=True)
        self._packing_refused = None  # whoever asks knows, and may time it all the same
        return refused

    def _settle(self, micro_batches: list[MicroRows]) -> None:
        """Before the first packed row is timed, choose how its documents are kept apart, as a run does at its start."""
        if not any(len(row) > 1 for rows in micro_batches for row in rows):
            return
        if not self._is_settled:
            longest = max(self.data.row_tokens(row) for rows in micro_batches for row in rows)
            self._settle_packing(replace(self.job, packed_length=longest))
        if self._packing_refused is not None:
            raise MeasurementError(f"packing: {self._packing_refused}")

    def _settle_packing(self, job: Job) -> None:
        from trainer.agreement import NO_COMPANY, settle_packing

        self._is_settled = True
        refused = settle_packing(self.stepper.model, self.data, job)
        self._packing_refused = None if refused == NO_COMPANY else refused

    def free(self) -> int:
        """Bytes free on the device now."""
        if self.job.device == "cuda":
            import torch

            return int(torch.cuda.mem_get_info()[0])
        from planner.hardware import system_memory

        return system_memory()[1] or 0

    # --- measure fixed parts: what a run does beside its steps ----------------------------------------------------

    def evaluate(self, batches: list[list[int]]) -> list[float]:
        """Seconds of each of some batches of held-out examples, in one evaluation.

        An evaluation of its own for each would count what one costs beside its batches as often as there are batches:
        on an H200, 32 ms beside 30 ms a batch (a 1 B model in bf16, whose adapters are cast once an evaluation).
        """
        from trainer.evaluate import evaluate_batches

        meter = ClockMeter(self._synchronize)
        meter.begin()
        evaluate_batches(
            self.stepper.model,
            self.data,
            [np.array(examples, dtype=np.int64) for examples in batches],
            lambda _loss, _count: meter.mark(),
            device=self.job.device,
            precision=self.job.precision,
            head=self.stepper.head,
        )
        return meter.seconds()

    def save(self) -> SaveReply:
        """Seconds of one checkpoint and of saving what was trained, on the disk that the run will use.

        Taking an old checkpoint away is a part of its own: on some disks it takes a quarter of the time of writing one.
        """
        from trainer.checkpoint import Progress, random_state, remove, require_finite, save_checkpoint
        from trainer.disk import sync_tree

        with tempfile.TemporaryDirectory(dir=self.scratch, prefix=".plan-probe-") as name:
            folder = Path(name) / "checkpoints"
            # A run writes many. The first of a process also opens libraries and folders; the others differ by a third
            # on a GPU machine's disk, so that several are written where that takes no time to speak of.
            kept = save_checkpoint(folder, self.stepper, Progress(), random_state(0))
            written: list[float] = []
            removed: list[float] = []
            while not written or (len(written) < CHECKPOINTS and sum(written) + sum(removed) < CHECKPOINT_SECONDS):
                begin = time.perf_counter()
                require_finite(self.stepper, 1)
                new = save_checkpoint(folder, self.stepper, Progress(windows_done=len(written) + 1), random_state(0))
                middle = time.perf_counter()
                remove(kept)
                kept = new
                written.append(middle - begin)
                removed.append(time.perf_counter() - middle)
            saved = time.perf_counter()
            more = {"save_embedding_layers": False} if self.job.preset.adapter == "lora" else {}
            self.stepper.model.save_pretrained(Path(name) / "adapter", **more)
            if self._tokenizer is not None:
                self._tokenizer.save_pretrained(Path(name) / "adapter")
            sync_tree(Path(name) / "adapter")
            return SaveReply(
                checkpoint_seconds=statistics.fmean(written),
                adapter_seconds=time.perf_counter() - saved,
                removal_seconds=statistics.fmean(removed),
            )

    def answer(self, examples: list[int], max_new_tokens: int) -> float:
        """Seconds of writing sample answers."""
        from trainer.evaluate import sample_answers

        self._synchronize()
        begin = time.perf_counter()
        sample_answers(
            self.stepper.model,
            self._tokenizer,
            self.data,
            np.array(examples, dtype=np.int64),
            device=self.job.device,
            precision=self.job.precision,
            max_new_tokens=max_new_tokens,
        )
        self._synchronize()
        return time.perf_counter() - begin

    # ---------------------------------------------------------------------------------------------------------------

    def _feed(self, micro_batches: list[MicroRows], longest_rows: Iterable[int] | None = None) -> Iterator[MicroBatch]:
        """The micro-batches one after another, made ready as in a run."""
        from trainer.feed import feed

        def indices(rows: MicroRows) -> list[IntArray]:
            return [np.array(row, dtype=np.int64) for row in rows]

        rows = (indices(rows) for rows in micro_batches)
        batches = feed(rows, self.data, self.stepper.device, longest_rows)
        if not self.job.device.startswith("cuda"):
            return batches
        return itertools.chain(list(itertools.islice(batches, 1)), batches)  # a run, too, has made the first one before

    def _micro_step(self, batch: MicroBatch, scale: float) -> torch.Tensor:
        from trainer.step import micro_step

        return micro_step(self.stepper, batch, scale=scale)

    def _small_micro_step(self) -> None:
        """Gradients for an optimizer step, at the least cost: the shortest example that has a target."""
        lengths = np.where(self._targets > 0, self.data.lengths, np.iinfo(np.int64).max)
        rows = [[int(lengths.argmin())]]
        self._micro_step(next(self._feed([rows])), 1.0 / self._supervised([rows]))

    def _first_seconds(self) -> float:
        """Seconds by which this process's first micro-step and optimizer step take longer than the second; 0 later."""
        if self._is_warm:
            return 0.0
        self._is_warm = True
        taken = []
        for _ in range(2):
            self._synchronize()
            begin = time.perf_counter()
            self._small_micro_step()
            self._synchronize()
            taken.append(time.perf_counter() - begin)
        steps = self.optimizer(2)  # the first one makes the moments; fp16 may skip more than are tried
        return max(0.0, taken[0] - taken[1]) + (max(0.0, steps[0] - steps[1]) if len(steps) == 2 else 0.0)

    def _supervised(self, micro_batches: list[MicroRows]) -> int:
        return max(1, sum(int(self._targets[row].sum()) for rows in micro_batches for row in rows if row))

    def _synchronize(self) -> None:
        from trainer.step import synchronize

        synchronize(self.job.device)

    def recover(self) -> None:
        """Let go of what a failed command left on the device."""
        if self._stepper is not None:
            from trainer.step import clear_gradients

            clear_gradients(self._stepper.parameters)
        if self.job.device == "cuda":
            import torch

            torch.cuda.empty_cache()
