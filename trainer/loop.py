"""The loop over a BatchPlan, on Accelerate: windows of micro-steps, checkpoints on their boundaries, evaluation."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from presets.errors import ModelError, NonFiniteLossError, OutOfMemoryError, PlanError, RunError
from trainer import checkpoint as ckpt
from trainer import origin
from trainer import step as steps
from trainer.agreement import NO_COMPANY, settle_packing
from trainer.ahead import Ahead, earlier_evaluations
from trainer.alive import note_process
from trainer.batching import BatchPlan
from trainer.company import Company
from trainer.compiled import compile_layers
from trainer.data import load_tokenizer, prepare_data
from trainer.disk import bytes_to_write, require_room, told_in_one_line
from trainer.evaluate import EvaluationResult
from trainer.folder import is_main_process, refuse_links, sole_writer
from trainer.job import Job
from trainer.model import LoadedModel, load_model
from trainer.monitor import Monitor
from trainer.outputs import held_out_loss, save_result, write_record, write_samples
from trainer.planning import (
    checkpoint_steps,
    evaluation_steps,
    learning_rates,
    needs_loss,
    plan_job,
    split,
    with_evaluation_on_top,
)
from trainer.process import seconds_since_process_start, settle_garbage, stop_signals, suspended_seconds
from trainer.record import RunRecord, read_predicted
from trainer.run import Clock, Run, sizes_on_gpu
from trainer.scoring import example_losses
from trainer.tokens import FloatArray, TokenizedDataset
from trainer.trackers import check_tracker, start_trackers
from trainer.window import StopAsked, run_window

# A signal to a whole group (a service's stop, scancel, timeout) reaches the trainer twice: by itself, and passed on by
# what started it. Only what comes later than this is a second wish of the user's.
SAME_SIGNAL_SECONDS = 1.0


class Stopped(Exception):
    """A signal asked the run to stop; the checkpoint is written."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number


def train(folder: Path, *, resume: bool = False, owns_process: bool = False) -> RunRecord | None:
    """Run the job of a run folder to its end, or go on with it; the record on the main process, None on the others.

    Args:
        owns_process: nothing else will happen in this process.

    Raises:
        Stopped: SIGINT, SIGTERM or SIGHUP came; a checkpoint was written.
        PlanError: anything a user can mend. The record then says "failed" and the last good checkpoint is kept.
            Another process trains in the folder, or there is a link in it: nothing was changed.
    """
    refuse_links(folder)
    with sole_writer(folder) if is_main_process() else contextlib.nullcontext():
        return _train_in(folder, resume=resume, owns_process=owns_process)


def _train_in(folder: Path, *, resume: bool, owns_process: bool) -> RunRecord | None:
    with told_in_one_line(folder, folder):
        run = _prepare(folder, resume)
    if owns_process:
        with run.clock.part("load"):
            settle_garbage()
    with _signals(run):  # to the very end: a stop is not over before its record is written
        try:
            with told_in_one_line(folder, folder):
                return _train(run)
        except Stopped:
            _record_end(run, "stopped", error=None)
            _leave_together(run)
            raise
        except PlanError as reason:
            run.say(f"Stopped: {reason}")
            _record_end(run, "failed", error=str(reason))
            if isinstance(reason, (NonFiniteLossError, OutOfMemoryError)):
                _leave_together(run)
            raise
        finally:
            run.drop_batches()
            if run.monitor is not None:
                run.monitor.close()
            run.accelerator.end_training()


def _record_end(run: Run, status: str, *, error: str | None) -> None:
    """The record of an end that was not the planned one; where it cannot be written, the end itself still is told."""
    try:
        write_record(run, status, None, error=error)
    except OSError as reason:
        run.say(f"note: {run.folder / 'record.json'} cannot be written ({reason.strerror or reason})")


def _leave_together(run: Run) -> None:
    """Wait for the record, where an end is every process's: the launcher ends the others when the first one leaves."""
    if run.job.num_devices > 1:
        run.accelerator.wait_for_everyone()


def _prepare(folder: Path, resume: bool) -> Run:
    """Data, batch plan, model and display of a run; on every process.

    Raises:
        PlanError: anything a user can mend.
    """
    import torch
    from accelerate import Accelerator

    clock, slept = Clock(), suspended_seconds()
    clock.parts["start"] = seconds_since_process_start()
    job = Job.read(folder / "job.json")
    if job.num_threads:
        torch.set_num_threads(job.num_threads)
    if job.tracker:
        check_tracker(job.tracker)
    if is_main_process():
        note_process(folder)
    with clock.part("load"):  # on a GPU it opens the context that the model needs
        accelerator = Accelerator(
            cpu=job.device == "cpu", mixed_precision="no", log_with=job.tracker, project_dir=str(folder)
        )
    if accelerator.num_processes != job.num_devices:
        raise RunError(
            f"the job is planned for {job.num_devices} process(es), {accelerator.num_processes} were started. "
            "Start it with 'plan --run' or 'plan --resume', which start the right number."
        )
    if resume and accelerator.is_main_process:
        _clear_leftovers(folder)
    with clock.part("data"), accelerator.main_process_first():
        spec = with_evaluation_on_top(job.data, job.evaluation)
        data = prepare_data(
            spec,
            model=job.model,
            max_length=job.preset.max_length,
            seed=job.seed,
            trust_remote_code=job.trust_remote_code,
        )
    loaded: LoadedModel | None = None
    losses: FloatArray | None = None
    if needs_loss(job.preset) and not (folder / "batch_plan.npz").exists():
        with clock.part("load"):
            loaded = load_model(job, need_weights=True)
        with clock.part("data"):
            losses = _losses_for_sampling(job, data, loaded.model, accelerator)
    with clock.part("data"), accelerator.main_process_first():
        plan, notes = _plan(folder, job, data, losses, bool(accelerator.is_main_process))
        data = data.as_planned(shares_beginnings=plan.shares_beginnings)
    with clock.part("load"):
        loaded = loaded or load_model(job, need_weights=True)
        if job.num_devices > 1:  # the weights are the same on each process, what dropout leaves out is not
            torch.manual_seed(job.seed + accelerator.process_index)
        tokenizer = load_tokenizer(job.model, trust_remote_code=job.trust_remote_code)
        refused = settle_packing(loaded.model, data, job) if job.packing else None
        if refused == NO_COMPANY:
            notes += (f"packing changes nothing: {refused}",)
        elif refused is not None:
            less = "with --no-share-beginnings, or " if data.beginnings is not None else ""
            raise ModelError(f"packing is not for this model: {refused}. Run it {less}without --packing.")
        stepper = steps.make_stepper(
            loaded.model,
            str(accelerator.device),
            job.precision,
            weight_decay=job.preset.weight_decay,
            max_grad_norm=job.preset.max_grad_norm,
            loss=job.loss,
        )
        if job.num_devices > 1:
            steps.share_parameters(stepper.parameters)
    if accelerator.is_main_process:
        require_room(folder, bytes_to_write(loaded.num_trainable_parameters, job.keep_checkpoints))
    progress = _beginning(job, data, plan, clock) if accelerator.is_main_process else ckpt.Progress()
    if job.compile:
        with clock.part("compile"):
            compile_refused = compile_layers(stepper, job, data)
        if compile_refused is not None:
            notes += (f"the layers are not compiled: {compile_refused}",)
    if stepper.lean_refused is not None:
        notes += (f"the plain loss is used instead of the lean one: {stepper.lean_refused}",)
    largest, longest_row = sizes_on_gpu(job, plan, data.lengths)
    run = Run(
        job=job,
        folder=folder,
        data=data,
        plan=plan,
        rates=learning_rates(job.preset, plan),
        supervised=plan.per_window(data.num_supervised),
        accelerator=accelerator,
        stepper=stepper,
        tokenizer=tokenizer,
        clock=clock,
        progress=progress,
        slept_before=slept,
        predicted=read_predicted(folder),
        notes=[*data.report.notes, *notes],
        largest=largest,
        longest_row=longest_row,
        company=Company() if job.device == "cpu" and job.num_devices == 1 else None,
    )
    if resume:
        _restore(run)
    if run.is_main:
        planned = run.predicted.window_seconds(plan, data.lengths)
        trackers = start_trackers(accelerator, job.tracker, run.tell, must_start=not resume) if job.tracker else None
        run.monitor = Monitor(
            folder,
            job.name,
            planned,
            is_time=run.predicted.cost is not None,
            done=run.progress.windows_done,
            ahead=Ahead(job, plan, run.predicted.parts, earlier=earlier_evaluations(folder), each=run.clock.each),
            trackers=trackers,
            device=job.device,
        )
        for note in run.notes:
            run.monitor.log.info(note)
    return run


def _plan(
    folder: Path, job: Job, data: TokenizedDataset, losses: FloatArray | None, is_main: bool
) -> tuple[BatchPlan, tuple[str, ...]]:
    """The batch plan: the run folder's own where there is one, so that a resumed run executes what was promised."""
    path = folder / "batch_plan.npz"
    if path.exists():
        plan = BatchPlan.load(path)
        named = np.concatenate([plan.order, plan.evaluation])
        if len(named) and int(named.max()) >= len(data):
            raise RunError(f"{path}: the plan names examples that the data no longer has. Was the dataset changed?")
        _require_plan_of(job, plan, path)
        return plan, ()
    planned = plan_job(job, data, losses)
    if is_main:
        planned.plan.save(path)
    notes = planned.notes
    if losses is not None:
        notes += (f"sampling by the model's own loss: {int(np.isfinite(losses).sum()):,} examples were scored",)
    return planned.plan, notes


def _require_plan_of(job: Job, plan: BatchPlan, path: Path) -> None:
    """Raises: RunError where a batch plan was made for other devices or other batches than the job's."""
    rows = int(np.diff(plan.micro_offsets).max(initial=0))
    documents = int(np.diff(plan.window_documents).max(initial=0))
    for found, wanted, of in (
        (plan.num_devices, job.num_devices, "devices"),
        (max(rows, job.micro_batch_size), job.micro_batch_size, "rows in a micro-batch"),
        (max(documents, *job.global_batch_sizes), max(job.global_batch_sizes), "examples in a step"),
    ):
        if found != wanted:
            raise RunError(
                f"{path}: the plan is of another job: {found} {of}, where job.json has {wanted}. Put the run's own "
                "plan back, or remove the file: a resume makes it anew from the same data."
            )


def _losses_for_sampling(job: Job, data: TokenizedDataset, model: Any, accelerator: Any) -> FloatArray:
    """The model's own loss of each training example, its batches shared out over the processes."""

    def total(tensor: Any) -> Any:
        return accelerator.reduce(tensor.to(accelerator.device), "sum").cpu()

    training, _ = split(job.data, job.evaluation, len(data), job.seed)
    return example_losses(
        model,
        data,
        device=str(accelerator.device),
        precision=job.precision,
        examples=training,
        share=slice(accelerator.process_index, None, job.num_devices),
        reduce=total if job.num_devices > 1 else None,
    )


def _beginning(job: Job, data: TokenizedDataset, plan: BatchPlan, clock: Clock) -> ckpt.Progress:
    """No step done yet, and what the run goes over. Full fine-tuning leaves no weight of the base to a resume."""
    with clock.part("data"):
        examples = origin.data_digest(data, plan)
    with clock.part("load"):
        base = origin.base_digest(job.model) if job.preset.adapter == "lora" else None
        config = origin.config_digest(job.model)
    return ckpt.Progress(plan_digest=plan.digest(), data_digest=examples, base_digest=base, config_digest=config)


def _clear_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while writing left beside the run's files."""
    for leftover in (*folder.glob(".*.tmp"), folder / "batch_plan.tmp", folder / "metrics.tmp"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _restore(run: Run) -> None:
    progress, path, notes = ckpt.load_newest(
        run.folder / "checkpoints", run.stepper, run.accelerator.process_index, run.is_main
    )
    begun = run.progress
    if progress.windows_done > run.plan.num_steps or _differ(progress.plan_digest, begun.plan_digest):
        raise RunError(
            f"{path}: the checkpoint is of another batch plan than {run.folder / 'batch_plan.npz'}. Was the data, the "
            "job or the plan changed? Put back what the run was started with."
        )
    _require_same_origin(run, progress)
    run.num_resumes = progress.num_resumes + 1
    run.progress = replace(
        progress,
        num_resumes=run.num_resumes,
        plan_digest=begun.plan_digest,
        data_digest=begun.data_digest or progress.data_digest,
        base_digest=begun.base_digest or progress.base_digest,
        config_digest=begun.config_digest or progress.config_digest,
    )
    run.notes += notes
    run.wall_before = progress.wall_seconds
    if run.is_main:
        (run.folder / "record.json").unlink(missing_ok=True)  # of the stop: the run goes on
    where = f"step {progress.windows_done}" if path else "the beginning: there is no checkpoint yet"
    run.notes.append(f"resumed from {where}")


def _differ(kept: str | None, now: str | None) -> bool:
    return kept is not None and now is not None and kept != now


def _require_same_origin(run: Run, progress: ckpt.Progress) -> None:
    """Raises: RunError where the examples or the base are not those that the checkpoint was trained with."""
    begun, job = run.progress, run.job
    if _differ(progress.data_digest, begun.data_digest):
        raise RunError(
            f"{job.data.source}: the examples are not those that the run was started with: edited, in another order, "
            "or made into other tokens. Put the data and the tokenizer back as they were, or start a new run."
        )
    if progress.base_digest is not None and _differ(progress.base_digest, begun.base_digest):
        raise RunError(
            f"model '{job.model}': its weights are not those that the adapter was trained over until now. "
            + origin.way_back(job.model, origin.base_digest, progress.base_digest)
        )
    if progress.config_digest is not None and _differ(progress.config_digest, begun.config_digest):
        raise RunError(
            f"model '{job.model}': its config.json does not say what it said when the run was started: the model would "
            "compute otherwise. " + origin.way_back(job.model, origin.config_digest, progress.config_digest)
        )


@contextlib.contextmanager
def _signals(run: Run) -> Iterator[None]:
    """First SIGINT, SIGTERM or SIGHUP: finish what must be finished and save. Second, a while later: leave at once.

    A hang-up is never the second: a shell and the system send one each, when they come to it, and no user.
    """

    def stop(number: int, _frame: Any) -> None:
        is_later = run.stop_signal and time.monotonic() - run.stop_asked_at >= SAME_SIGNAL_SECONDS
        if is_later and number in (signal.SIGINT, signal.SIGTERM):
            os._exit(128 + number)
        run.ask_to_stop(number)

    before = {number: signal.signal(number, stop) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(run: Run) -> RunRecord | None:
    job, plan = run.job, run.plan
    for note in run.notes:
        run.say(f"note: {note}")
    if run.progress.windows_done == 0 and run.progress.eval_loss_before is None:
        before = held_out_loss(run)
        run.progress = replace(run.progress, eval_loss_before=before.loss if before else None)
        write_samples(run, "before")
    evaluate_at = evaluation_steps(job, plan.num_steps)
    checkpoint_at = checkpoint_steps(job, plan.num_steps)
    while run.progress.windows_done < plan.num_steps:
        random_state = ckpt.random_state(run.accelerator.process_index)
        try:
            run_window(run, random_state)
        except StopAsked as asked:
            _discard_and_stop(run, random_state, asked.signal_number)
        done = run.progress.windows_done
        if done in evaluate_at:
            _evaluate(run)
        if done in checkpoint_at:  # the last step is: whoever ends the run while it is evaluated loses no training
            _checkpoint(run, ckpt.random_state(run.accelerator.process_index))
    after = _evaluate(run)
    if run.is_main:  # it may be the best now
        ckpt.rotate(run.folder / "checkpoints", job.keep_checkpoints, run.progress.best_step)
    write_samples(run, "after")
    with run.clock.part("save"):
        save_result(run)
    return write_record(run, "finished", after, error=None)


def _discard_and_stop(run: Run, random_state: dict[str, Any], number: int) -> None:
    """Save the open window's start, and leave."""
    run.ask_to_stop(number)  # it may have come to another process
    steps.clear_gradients(run.stepper.parameters)
    _checkpoint(run, random_state)
    run.say(f"stopped at step {run.progress.windows_done}; go on with: plan --resume {shlex.quote(str(run.folder))}")
    raise Stopped(number)


def _checkpoint(run: Run, random_state: dict[str, Any]) -> None:
    begun = time.perf_counter()
    with run.clock.part("checkpoints"):
        ckpt.require_finite(run.stepper, run.progress.windows_done)
        run.progress = replace(run.progress, wall_seconds=run.wall_before + seconds_since_process_start())
        states = _gather_random(run, random_state)
        if run.is_main:
            folder = run.folder / "checkpoints"
            if run.monitor is not None:
                run.monitor.sync()
            ckpt.save_checkpoint(folder, run.stepper, run.progress, states)
            ckpt.rotate(folder, run.job.keep_checkpoints, run.progress.best_step)
        if run.job.num_devices > 1:
            run.accelerator.wait_for_everyone()
    if run.monitor is not None:
        done = run.progress.windows_done
        run.monitor.log.info(f"checkpoint of step {done} written in {time.perf_counter() - begun:.2f} s")


def _gather_random(run: Run, mine: dict[str, Any]) -> dict[str, Any]:
    if run.job.num_devices == 1:
        return mine
    from accelerate.utils import gather_object

    merged: dict[str, Any] = {}
    for states in gather_object([mine]):
        merged.update(states)
    return merged


def _evaluate(run: Run) -> EvaluationResult | None:
    """Evaluate at a window boundary where a checkpoint is written; that of the best is never rotated away."""
    result = held_out_loss(run)
    progress = run.progress
    if result is not None:
        run.progress = progress = replace(progress, last_eval_loss=result.loss)
        best = progress.best_eval_loss
        # Nothing is less than NaN: kept as the best, it would stay so, whatever came later.
        if math.isfinite(result.loss) and (best is None or not math.isfinite(best) or result.loss < best):
            run.progress = replace(progress, best_eval_loss=result.loss, best_step=progress.windows_done)
    return result
