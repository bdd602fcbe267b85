"""What can be done with a finished run: merge its adapter, check its quality again, talk to it."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from presets.errors import RunError
from trainer.batching import BatchPlan
from trainer.data import load_tokenizer, prepare_data
from trainer.evaluate import EvaluationResult, SampleAnswer, answerable, evaluate, sample_answers, stop_tokens
from trainer.job import Job
from trainer.planning import with_evaluation_on_top


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """A run's model, ready to answer."""

    job: Job
    model: Any
    tokenizer: Any


@dataclass(frozen=True, slots=True)
class Check:
    """The quality of a finished run beside its base model, on the held-out examples."""

    before: EvaluationResult
    after: EvaluationResult
    answers: tuple[tuple[SampleAnswer, SampleAnswer], ...]  # (before, after)


def open_finished(run: Path) -> Finished:
    """Load a run's result: base and adapter, or the fully trained model.

    Raises:
        RunError: the run has no result yet.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from trainer.model import quiet_libraries

    quiet_libraries()
    job = Job.read(run / "job.json")
    kind = "adapter" if job.preset.adapter == "lora" else "model"
    if not (run / kind).is_dir():
        raise RunError(_unfinished(run, kind))
    if job.num_threads:
        torch.set_num_threads(job.num_threads)
    if kind == "model":
        model = AutoModelForCausalLM.from_pretrained(
            run / "model", dtype=torch.float32, use_safetensors=True, trust_remote_code=job.trust_remote_code
        )
        return Finished(job, model.to(job.device).eval(), _tokenizer_of(run / "model", job))
    weights = _adapter_weights(run)
    from trainer.model import load_model

    # The same base as in training, quantized where it was, with the trained adapter in place of the fresh one.
    loaded = load_model(job, need_weights=True)
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(loaded.model, weights)
    return Finished(job, loaded.model.eval(), _tokenizer_of(run / "adapter", job))


def _unfinished(run: Path, kind: str) -> str:
    go_on = f"plan --resume {shlex.quote(str(run))}"
    return f"'{run}' has no {kind} yet: it is not finished. Go on with it: {go_on}"


def _tokenizer_of(folder: Path, job: Job) -> Any:
    return load_tokenizer(str(folder), trust_remote_code=job.trust_remote_code)


def _adapter_weights(run: Path) -> dict[str, Any]:
    """Only ever from safetensors: where peft finds none, it would unpickle an adapter_model.bin.

    Raises:
        RunError: there are none, or they are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = run / "adapter" / "adapter_model.safetensors"
    if not path.is_file():
        raise RunError(f"'{run}' has no adapter_model.safetensors in its adapter. Train it again, or restore the file.")
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as reason:
        raise RunError(f"{path} cannot be read ({reason}). Train it again, or restore the file.") from None


def check(run: Path) -> Check:
    """Held-out loss and sample answers of a finished LoRA run, with the adapter off and on.

    Raises:
        RunError: not finished, without held-out examples, or fully trained (there is no adapter to switch off).
    """
    finished = open_finished(run)
    job = finished.job
    if job.preset.adapter != "lora":
        raise RunError("plan check compares with the adapter off and on; a fully trained model has none.")
    data = prepare_data(
        with_evaluation_on_top(job.data, job.evaluation),
        model=job.model,
        max_length=job.preset.max_length,
        seed=job.seed,
        trust_remote_code=job.trust_remote_code,
    )
    held_out = BatchPlan.load(run / "batch_plan.npz").evaluation
    examples = answerable(data, held_out, job.evaluation.num_samples)

    def measured() -> tuple[EvaluationResult, list[SampleAnswer]]:
        result = evaluate(finished.model, data, held_out, device=job.device, precision=job.precision)
        if result is None:
            raise RunError(f"'{run}' held no example out (--eval-fraction 0): there is nothing to check it with.")
        answers = sample_answers(
            finished.model,
            finished.tokenizer,
            data,
            examples,
            device=job.device,
            precision=job.precision,
            max_new_tokens=job.evaluation.max_new_tokens,
        )
        return result, answers

    with finished.model.disable_adapter():
        before, answers_before = measured()
    after, answers_after = measured()
    return Check(before, after, tuple(zip(answers_before, answers_after, strict=True)))


def merge(run: Path, output: Path) -> Path:
    """Write base and adapter as one plain model in safetensors, with its tokenizer; returns the folder.

    A quantized base is loaded anew in 16 or 32 bits: merging into 4-bit weights would round the adapter away.

    Raises:
        RunError: not finished, nothing to merge, or the output exists or cannot be written.
    """
    if output.exists():
        raise RunError(f"output '{output}' exists. Choose another --output.")
    job = Job.read(run / "job.json")
    if job.preset.adapter != "lora":
        raise RunError(f"'{run}' trained the whole model: it lies in {run / 'model'} and needs no merging.")
    if not (run / "adapter").is_dir():
        raise RunError(_unfinished(run, "adapter"))
    _adapter_weights(run)
    from peft import PeftModel

    from trainer.model import load_base, quiet_libraries

    quiet_libraries()
    plain = replace(
        job,
        device="cpu",
        base_precision="fp16" if job.precision == "fp16" else "bf16" if job.precision == "bf16" else "fp32",
    )
    base = load_base(plain)
    merged = PeftModel.from_pretrained(base, run / "adapter").merge_and_unload(safe_merge=True)
    merged.config.use_cache = True
    aside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        merged.save_pretrained(aside)
        _tokenizer_of(run / "adapter", job).save_pretrained(aside)
        os.replace(aside, output)
    except OSError as reason:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(
            f"output '{output}' cannot be written ({reason.strerror or reason}). Choose another --output."
        ) from None
    return output


def reply(
    finished: Finished, messages: list[tuple[str, str]], *, max_new_tokens: int = 256, temperature: float = 0.0
) -> Iterator[str]:
    """The answer to a conversation, piece by piece as it is written.

    Args:
        messages: (role, content), the user's last.
        temperature: 0 takes the likeliest token.
    """
    import threading

    import torch
    from transformers import TextIteratorStreamer

    from trainer.chat import ChatEncoder
    from trainer.step import autocast

    job = finished.job
    ids = ChatEncoder(finished.tokenizer).prompt_ids(messages)
    prompt = torch.tensor([ids], device=job.device)
    streamer = TextIteratorStreamer(finished.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def generate() -> None:
        try:
            with torch.no_grad(), autocast(job.device, job.precision):
                finished.model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=max_new_tokens,
                    do_sample=temperature > 0,
                    temperature=temperature if temperature > 0 else None,
                    top_p=None,
                    top_k=None,
                    use_cache=True,
                    eos_token_id=stop_tokens(finished.model, finished.tokenizer),
                    pad_token_id=finished.tokenizer.pad_token_id or 0,
                    streamer=streamer,
                )
        except BaseException as reason:  # carried over to the thread that reads
            failure.append(reason)
            streamer.end()

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]
