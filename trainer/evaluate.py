"""Loss on held-out examples, and sample answers: "check the quality after training"."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.collate import batch_on
from trainer.job import Job
from trainer.planning import needs_loss
from trainer.tokens import IntArray, TokenizedDataset

if TYPE_CHECKING:
    import torch

    from trainer.lean import LeanHead

# Padded tokens in one evaluation batch, unless a single example is longer. On a CPU 512 fill the cores: batches of
# 2,048 took no less time, but their logits made the peak of runs that train one example at a time (621 MB, not 537,
# with 4,096 words, 2026-11-27), each in another hole of the heap, so that no probe of one batch foresaw it.
CPU_TOKENS, CPU_ROWS = 512, 16
# A GPU would wait for its calls: on an H200 a batch of 2,048 tokens took 22 to 28 ms in a model of 1 B, whatever its
# shape, and 87 to 90 ms in one of 3 B (2026-11-27): by what a token takes in training, a third and a quarter of that
# would do. So there are as many tokens as in the run's largest micro-batch: with gradients that fits, without it needs
# less.
LEAST_TOKENS, MOST_TOKENS, MOST_ROWS = 2048, 16384, 128


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """Mean token loss over the supervised tokens of the held-out examples."""

    loss: float
    num_examples: int
    num_tokens: int  # supervised ones
    at_once: int = 0  # padded tokens of a batch for which the memory sufficed; see `evaluation_batches`

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleAnswer:
    """One held-out prompt and what was answered."""

    example: int
    prompt: str
    expected: str
    answer: str


def evaluation_batches(data: TokenizedDataset, examples: IntArray, device: str, at_once: int = 0) -> list[IntArray]:
    """Examples of like length together.

    Args:
        at_once: padded tokens of a batch, about, see `tokens_at_once`; on a CPU as few as fill it in any case.
    """
    on_cpu = device == "cpu"
    most = CPU_TOKENS if on_cpu else max(LEAST_TOKENS, min(at_once, MOST_TOKENS))
    most_rows = CPU_ROWS if on_cpu else MOST_ROWS
    lengths = data.lengths
    ordered = examples[np.argsort(lengths[examples], kind="stable")]
    batches: list[IntArray] = []
    start = 0
    while start < len(ordered):
        end = start + 1
        while end < len(ordered) and end - start < most_rows and (end - start + 1) * lengths[ordered[end]] <= most:
            end += 1
        batches.append(ordered[start:end])
        start = end
    return batches


def tokens_at_once(job: Job, largest: int) -> int:
    """What a run's `evaluation_batches` are made with.

    Args:
        largest: padded tokens of its plan's largest micro-batch, or of the parts in which that is executed.
    """
    # What is scored before there is a plan comes in small batches: one size of batch, one rate for both. Of several
    # processes one alone could run out of memory, and the others would wait for it.
    return 0 if job.device == "cpu" or job.num_devices > 1 or needs_loss(job.preset) else largest


def evaluate(
    model: Any,
    data: TokenizedDataset,
    examples: IntArray,
    *,
    device: str,
    precision: str,
    at_once: int = 0,
    share: slice = slice(None),
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    head: LeanHead | None = None,
) -> EvaluationResult | None:
    """Mean token loss of `examples`; None where there are none. Weights, gradients and random state are left alone.

    Args:
        at_once: see `evaluation_batches`. Where memory runs out, batches are halved, down to the smallest.
        share: which of the batches this process takes.
        reduce: sums a tensor over the processes.
        head: where the model is cut for the lean loss; None: the plain loss.
    """
    import torch

    from trainer.model import is_out_of_memory

    if len(examples) == 0:
        return None
    total = torch.zeros(2, dtype=torch.float64)

    def add(loss: torch.Tensor, count: int) -> None:
        total[0] += loss
        total[1] += count

    while True:
        batches = evaluation_batches(data, examples, device, at_once)[share]
        try:
            evaluate_batches(model, data, batches, add, device=device, precision=precision, head=head)
            break
        except (RuntimeError, MemoryError) as reason:
            # Few of a micro-batch's tokens may be learnt from and nearly all of a batch of short ones, whose logits are
            # then the larger. Several processes would have to agree on what they take.
            if reduce is not None or at_once <= LEAST_TOKENS or not is_out_of_memory(reason):
                raise
        at_once = min(at_once, MOST_TOKENS) // 2
        total.zero_()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if reduce is not None:
        total = reduce(total)
    count = int(total[1].item())
    loss = float(total[0].item()) / count if count else math.nan
    return EvaluationResult(loss=loss, num_examples=len(examples), num_tokens=count, at_once=at_once)


def evaluate_batches(
    model: Any,
    data: TokenizedDataset,
    batches: Iterable[IntArray],
    each: Callable[[torch.Tensor, int], None],
    *,
    device: str,
    precision: str,
    head: LeanHead | None = None,
) -> None:
    """Tell `each` the summed token loss of each batch, float64 on the host, and its number of supervised tokens."""
    import torch

    from trainer.step import autocast, token_losses

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device, precision):
            for members in batches:
                batch = batch_on(device, [members[i : i + 1] for i in range(len(members))], data)
                each(token_losses(model, batch, head=head).double().cpu(), len(batch.targets))
    finally:
        model.train(was_training)


def sample_answers(
    model: Any,
    tokenizer: Any,
    data: TokenizedDataset,
    examples: IntArray,
    *,
    device: str,
    precision: str,
    max_new_tokens: int,
) -> list[SampleAnswer]:
    """Greedy answers to the prompts of some held-out examples. The prompt is what stands before the first target."""
    import torch

    from trainer.step import autocast

    was_training = model.training
    model.eval()
    answers = []
    try:
        with torch.no_grad(), autocast(device, precision):
            for example in examples.tolist():
                start, end = int(data.offsets[example]), int(data.offsets[example + 1])
                ids = np.asarray(data.token_ids[start:end])
                targets = np.flatnonzero(data.supervised[start:end])
                first, last = int(targets[0]), int(targets[-1])
                gap = np.flatnonzero(np.diff(targets) > 1)
                answer_end = int(targets[gap[0]]) if len(gap) else last  # of the first answer of several
                prompt = torch.from_numpy(ids[:first].astype(np.int64))[None].to(device)
                written = model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=stop_tokens(model, tokenizer, int(ids[answer_end])),
                    pad_token_id=tokenizer.pad_token_id
                    if tokenizer.pad_token_id is not None
                    else tokenizer.eos_token_id,
                )
                answers.append(
                    SampleAnswer(
                        example=example,
                        prompt=tokenizer.decode(ids[:first], skip_special_tokens=True),
                        expected=tokenizer.decode(ids[first : answer_end + 1], skip_special_tokens=True),
                        answer=tokenizer.decode(written[0, first:], skip_special_tokens=True),
                    )
                )
    finally:
        model.train(was_training)
    return answers


def stop_tokens(model: Any, tokenizer: Any, trained: int | None = None) -> list[int]:
    """Token ids that end an answer: the tokenizer's, the model's own, and the one that training ended answers with."""
    found = {tokenizer.eos_token_id, trained}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found.update(configured if isinstance(configured, list) else [configured])
    return sorted(token for token in found if token is not None)


def answerable(data: TokenizedDataset, examples: IntArray, count: int) -> IntArray:
    """The first `count` examples that have a prompt before their first target and are short enough to read."""
    chosen: list[int] = []
    for example in examples.tolist():
        start, end = int(data.offsets[example]), int(data.offsets[example + 1])
        targets = np.flatnonzero(data.supervised[start:end])
        if len(chosen) >= count:
            break
        if len(targets) and targets[0] > 1 and targets[0] <= 512:
            chosen.append(example)
    return np.array(chosen, dtype=np.int64)
