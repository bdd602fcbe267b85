"""A BPE tokenizer trained on the spot, and small templates with the structure of the stock ones. Nothing is fetched."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

SPECIAL = (
    "<s>", "</s>", "<pad>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "[INST]",
    "[/INST]",
)  # fmt: skip

# Llama 3.1: a system header with dates in every chat, contents trimmed.
LLAMA = """{{- bos_token }}
{%- set system = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' }}
{{- system + '<|eot_id|>' }}
{%- for turn in messages %}
    {{- '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\\n\\n' + turn['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# Qwen3: thoughts before the last question are dropped, the last answer gets a thought even where it has none.
QWEN = """{%- set place = namespace(last_question=-1) %}
{%- for turn in messages %}
    {%- if turn.role == 'user' and not turn.content.startswith('<tool_response>') %}
        {%- set place.last_question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for turn in messages %}
    {%- if turn.role == 'assistant' %}
        {%- set thought = '' %}
        {%- set answer = turn.content %}
        {%- if '</think>' in answer %}
            {%- set thought = answer.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > place.last_question and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' }}
            {{- thought.strip('\\n') + '\\n</think>\\n\\n' + answer.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + answer }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# Gemma: the role is "model", there is no system role, turns must alternate.
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for turn in messages %}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\\n' }}
    {{- turn['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

# Mistral: no generation prompt at all, and the system text goes into the last question.
MISTRAL = """{{- bos_token }}
{%- set system = none %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for turn in messages %}
    {%- if turn['role'] == 'user' %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.index0 >= messages | length - 2 and system else '') }}
        {{- turn['content'] + '[/INST]' }}
    {%- else %}
        {{- ' ' + turn['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

# ChatML with a default system message, as in Qwen2.5.
CHATML = """{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
{%- for turn in messages %}
    {{- '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

# Zephyr: the headers are plain text, no special tokens.
ZEPHYR = """{%- for turn in messages %}
    {{- '<|' + turn['role'] + '|>\\n' + turn['content'] + eos_token + '\\n' }}
    {%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}
{%- endfor %}"""

# With generation marks that leave the stop token out.
MARKED = """{%- for turn in messages %}
    {{- '<|im_start|>' + turn['role'] + '\\n' }}
    {%- if turn['role'] == 'assistant' %}{% generation %}{{- turn['content'] }}{% endgeneration %}
    {%- else %}{{- turn['content'] }}{% endif %}{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

# No stop token anywhere.
HEADINGS = """{%- for turn in messages %}{{- '### ' + turn['role'] + ':\\n' + turn['content'] + '\\n\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '### assistant:\\n' }}{% endif %}"""


@lru_cache
def _trained(special: tuple[str, ...], trim_offsets: bool) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the answer is four, two and two is four; assistant user system model\n\n"
    tokenizer.train_from_iterator([text] * 4, trainer)
    return str(tokenizer.to_str())


def make_tokenizer(
    template: str | None = None,
    *,
    bos: str | None = None,
    eos: str | None = "</s>",
    adds_bos: bool = False,
    pad: str | None = "<pad>",
    special: tuple[str, ...] = SPECIAL,
    trim_offsets: bool = False,
) -> Any:
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(_trained(special, trim_offsets))
    if adds_bos:
        assert bos is not None
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    untyped: Any = PreTrainedTokenizerFast
    tokenizer = untyped(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer
