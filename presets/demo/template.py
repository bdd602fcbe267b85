"""The demo's chat format as text and as a Jinja template, without a tokenizer. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable

PAD, BEGIN, START, END = "<|pad|>", "<|begin|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, BEGIN, START, END)  # their ids are 0, 1, 2, 3

# Byte for byte what `render` writes. `{% generation %}` marks what an assistant wrote, for those who read the mask.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}\n"
    "{%- if message['role'] == 'assistant' -%}\n"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}\n"
    "{%- else -%}\n"
    "{{- message['content'] + '<|im_end|>' -}}\n"
    "{%- endif -%}\n"
    "{{- '\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|im_start|>assistant\\n' -}}\n"
    "{%- endif -%}\n"
)


def render(messages: Iterable[tuple[str, str]]) -> str:
    """(role, content) pairs as one text, each message followed by a line break."""
    return "".join(f"{START}{role}\n{content}{END}\n" for role, content in messages)
