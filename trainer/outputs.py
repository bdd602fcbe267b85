"""What a run writes about itself: held-out loss, sample answers, the result, the record."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import time
from pathlib import Path
from typing import Any

from presets import jsonio
from presets.errors import RunError
from presets.text import printable
from trainer.card import write_card
from trainer.disk import sync, sync_tree, told_in_one_line
from trainer.evaluate import (
    EvaluationResult,
    answerable,
    evaluate,
    sample_answers,
    tokens_at_once,
)
from trainer.process import peak_memory_bytes, seconds_since_process_start, suspended_seconds
from trainer.record import Actual, Breakdown, RunRecord
from trainer.run import Run

VERSIONED = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "numpy")


def held_out_loss(run: Run) -> EvaluationResult | None:
    if len(run.plan.evaluation) == 0:
        return None
    many = run.job.num_devices > 1

    def total(tensor: Any) -> Any:
        return run.accelerator.reduce(tensor.to(run.accelerator.device), "sum").cpu()

    begun = time.perf_counter()
    with run.clock.part("evaluation"):
        at_once = tokens_at_once(run.job, run.largest // run.progress.split)
        result = evaluate(
            run.stepper.model,
            run.data,
            run.plan.evaluation,
            device=run.stepper.device,
            precision=run.job.precision,
            at_once=at_once,
            share=slice(run.accelerator.process_index, None, run.job.num_devices),
            reduce=total if many else None,
            head=run.stepper.head,
        )
    if result is not None:
        if result.at_once < at_once:  # memory ran out: the next one does not try again
            run.largest = result.at_once * run.progress.split
        step = run.progress.windows_done
        if run.monitor is not None:
            run.monitor.evaluation(step, result.loss, result.perplexity, time.perf_counter() - begun)
        run.say(f"step {step}: held-out loss {result.loss:.4f}, perplexity {result.perplexity:.2f}")
    return result


def write_samples(run: Run, when: str) -> None:
    """samples-before.json and samples-after.json; with both there, samples.md side by side."""
    path = run.folder / f"samples-{when}.json"
    if not run.is_main or path.exists() or not run.job.evaluation.num_samples:
        return
    examples = answerable(run.data, run.plan.evaluation, run.job.evaluation.num_samples)
    with run.clock.part("samples"):
        answers = sample_answers(
            run.stepper.model,
            run.tokenizer,
            run.data,
            examples,
            device=run.stepper.device,
            precision=run.job.precision,
            max_new_tokens=run.job.evaluation.max_new_tokens,
        )
    jsonio.write_atomically(path, jsonio.to_json(answers))
    if when == "after":
        try:
            _write_side_by_side(run.folder)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as reason:
            # No reason to lose the result: only a table of what stands in the two files.
            run.say(f"note: no samples.md: samples-before.json cannot be read ({type(reason).__name__})")


def _write_side_by_side(folder: Path) -> None:
    pairs = zip(
        jsonio.loads((folder / "samples-before.json").read_text(encoding="utf-8")),
        jsonio.loads((folder / "samples-after.json").read_text(encoding="utf-8")),
        strict=True,
    )
    lines = ["# Sample answers on held-out examples", ""]
    for before, after in pairs:
        lines += [f"## Example {before['example']}", ""]
        for title, text in (
            ("Prompt", before["prompt"]),
            ("Before", before["answer"]),
            ("After", after["answer"]),
            ("Expected", before["expected"]),
        ):
            lines += [f"**{title}**", "", *("    " + printable(line) for line in text.strip().splitlines() or [""]), ""]
    jsonio.write_atomically(folder / "samples.md", "\n".join(lines))


def save_result(run: Run) -> None:
    """The adapter in PEFT's format, or the whole model after full fine-tuning; written aside, then renamed."""
    if not run.is_main:
        return
    model = run.stepper.model
    name = "adapter" if run.job.preset.adapter == "lora" else "model"
    aside, target = run.folder / f".{name}.tmp", run.folder / name
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with told_in_one_line(target, run.folder):
            if run.job.preset.adapter == "lora":
                model.save_pretrained(aside, save_embedding_layers=False)
            else:
                model.save_pretrained(aside)
            run.tokenizer.save_pretrained(aside)
            sync_tree(aside)  # before the record says that it is finished: after that no resume would write it again
            if target.exists():
                shutil.rmtree(target)
            os.replace(aside, target)
            sync(run.folder)
    except RunError:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write_record(run: Run, status: str, after: EvaluationResult | None, *, error: str | None) -> RunRecord | None:
    if not run.is_main:
        return None
    progress = run.progress
    record = RunRecord(
        status=status,
        job=run.job,
        predicted=run.predicted,
        actual=Actual(
            seconds=run.wall_before + seconds_since_process_start(),
            train_seconds=progress.train_seconds,
            paused_seconds=_standing_still(run),
            peak_memory_bytes=peak_memory_bytes(run.stepper.device),
            num_steps=progress.windows_done,
            num_examples=int(run.plan.window_documents[progress.windows_done]),
            num_tokens=progress.tokens,
            train_loss=progress.loss_sum / progress.loss_tokens if progress.loss_tokens else None,
            eval_loss_before=progress.eval_loss_before,
            eval_loss_after=after.loss if after else None,
            best_eval_loss=progress.best_eval_loss,
            best_step=progress.best_step,
            applied_steps=progress.applied_steps,
            skipped_steps=progress.skipped_steps,
            micro_batch_split=progress.split,
            num_resumes=run.num_resumes,
            breakdown=Breakdown(train=progress.train_seconds, **run.clock.parts),
            others_share=None if run.company is None else run.company.share(),
        ),
        versions=_versions(),
        notes=tuple(run.notes),
        error=error,
    )
    result = run.folder / ("adapter" if run.job.preset.adapter == "lora" else "model")
    if status == "finished" and result.is_dir():
        try:
            write_card(result, record)
        except OSError as reason:  # the result is whole without it
            for leftover in result.glob(".*.tmp"):
                leftover.unlink()
            run.say(f"note: {result / 'README.md'} cannot be written ({reason.strerror or reason})")
    record.write(run.folder / "record.json")  # last: with it the run is finished, and nothing is made anew
    return record


def _standing_still(run: Run) -> float | None:
    """Seconds in which the process or the machine stood still; None where there were none worth telling."""
    slept = suspended_seconds() - run.slept_before
    total = run.paused_seconds + (slept if slept >= 1.0 else 0.0)
    return total or None


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
