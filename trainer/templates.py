"""Rendering a chat with a tokenizer's template, and finding in the text what the model itself must write. No torch.

Stock templates carry no marks for the assistant's part. It is found by rendering a *twin*: the same roles, with a
unique mark as each content. What stands between the marks is the template's scaffolding; matched piece by piece against
the true rendering it shows where each answer begins and ends, whatever the template trims, adds or leaves out, and
whatever the contents themselves look like.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from presets.errors import ModelError
from trainer.limits import Overrun, limited
from trainer.literal import Span
from trainer.records import Message

# For a tokenizer without a chat template. ChatML only where its tokens exist: spelled out in pieces they teach nothing.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + (eos_token or '') + '\\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_THOUGHT_END = "</think>"
# What one conversation may take: far above any honest template, far below what hurts.
RENDER_SECONDS = 10.0  # of processor time, and one more for each million characters
RENDER_ROOM = 1 << 30  # bytes, and 64 more for each character: four a character, in a dozen copies


_MEND = "Mend or replace it: it is in tokenizer_config.json or chat_template.jinja."


class TemplateRefusal(Exception):
    """The chat template raised an error for this conversation; the text is the template's."""


@dataclass(frozen=True, slots=True)
class _Scaffold:
    """A twin, taken apart: piece, mark, piece, mark, ..., piece. Ends are (index of the piece, characters into it)."""

    pieces: tuple[str, ...]
    marks: tuple[tuple[int, bool], ...]  # (message, it is the thought before the answer) between the pieces
    starts: dict[int, tuple[int, int]]  # assistant message -> where its generation prompt ends
    stops: dict[int, tuple[int, int]]  # assistant message -> behind its stop token


class ChatTemplate:
    """A tokenizer's chat template, or the default one, with what has been learned about it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.notes: list[str] = []
        place = getattr(tokenizer, "name_or_path", "")
        self.name = f"{place}: the chat template" if place else "the tokenizer's chat template"
        self.template = self._choose()
        named = set(tokenizer.all_special_tokens)
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(named | added, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._scaffolds: dict[tuple[tuple[str, bool], ...], _Scaffold | None] = {}
        self._takes_system: bool | None = None

    def _choose(self) -> str:
        if self.tokenizer.chat_template:
            try:
                return str(self.tokenizer.get_chat_template())
            except Exception as reason:  # several named ones, none of them the default; or no text at all
                raise ModelError(f"{self.name} cannot be chosen ({_one_line(reason)}). {_MEND}") from None
        vocabulary = self.tokenizer.get_vocab()
        if "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary:
            self.notes.append("the tokenizer has no chat template: chats are written as ChatML, whose tokens it has")
            return CHATML_TEMPLATE
        self.notes.append('the tokenizer has no chat template: chats are written as "User: ..." and "Assistant: ..."')
        return PLAIN_TEMPLATE

    # -- rendering ---------------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The conversation as text, special tokens included.

        Raises:
            TemplateRefusal: the template raised an error, e.g. because user and assistant do not alternate.
            ModelError: the template itself is not valid, wants to reach Python, or never comes to an end.
        """
        from jinja2 import TemplateSyntaxError
        from jinja2.exceptions import SecurityError

        size = sum(len(content) for _, content in messages)
        try:
            with limited(seconds=RENDER_SECONDS + size / 1e6, room=RENDER_ROOM + 64 * size):
                rendered = self.tokenizer.apply_chat_template(
                    [{"role": role, "content": content} for role, content in messages],
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                )
        except TemplateSyntaxError as reason:
            raise ModelError(f"{self.name} is not valid ({_one_line(reason)}). {_MEND}") from None
        except SecurityError as reason:
            raise ModelError(f"{self.name} does what no template needs ({_one_line(reason)}). {_MEND}") from None
        except (Overrun, MemoryError) as reason:
            spent = "10 seconds" if isinstance(reason, Overrun) else "1 GiB of memory"
            raise ModelError(f"{self.name} takes more than {spent} for one conversation. {_MEND}") from None
        except Exception as reason:  # a template is a program: it may divide by zero or call itself for ever
            raise TemplateRefusal(_one_line(reason)) from None
        return str(rendered)

    def adapt(self, messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], int]:
        """The messages as this template can take them, and how many were merged away at the front.

        Where it refuses or drops a system message (Gemma), the system text goes before the first user message.
        """
        if not messages or messages[0][0] != "system" or self._accepts_system():
            return messages, 0
        if len(messages) < 2 or messages[1][0] != "user":
            return messages, 0
        return (("user", f"{messages[0][1]}\n\n{messages[1][1]}"), *messages[2:]), 1

    def _accepts_system(self) -> bool:
        if self._takes_system is None:
            system, user = _mark(0, False), _mark(1, False)
            try:
                self._takes_system = system in self.render([("system", system), ("user", user)])
            except TemplateRefusal:
                self._takes_system = False
            if not self._takes_system:
                self.notes.append("the chat template has no system role: its text goes before the first user message")
        return self._takes_system

    def ends_with_special(self, rendered: str) -> bool:
        """Whether nothing but blanks follows the last special token."""
        ends = [found.end() for found in self._special.finditer(rendered)]
        return bool(ends) and not rendered[ends[-1] :].strip()

    # -- what the model must write -----------------------------------------------------------------------------------

    def assistant_spans(self, messages: Sequence[Message], rendered: str, first: int = 0) -> list[Span] | None:
        """Per assistant message from `first` on, the characters from its generation prompt through its stop token.

        None where they cannot be found, which is not the same as an empty list: no assistant has spoken.
        """
        wanted = [index for index, (role, _) in enumerate(messages) if role == "assistant" and index >= first]
        if not wanted:
            return []
        spans = self._spans_by_twin(messages, rendered, wanted)
        return spans if spans is not None else self._spans_by_prefix(messages, rendered, wanted)

    def _spans_by_twin(self, messages: Sequence[Message], rendered: str, wanted: list[int]) -> list[Span] | None:
        # A thought before the answer is kept in some places and dropped in others, so that it needs a mark of its own.
        signature = tuple((role, role == "assistant" and _THOUGHT_END in content) for role, content in messages)
        if signature not in self._scaffolds:
            self._scaffolds[signature] = self._take_apart(signature)
        scaffold = self._scaffolds[signature]
        if scaffold is None or any(index not in scaffold.starts for index in wanted):
            return None
        at = _match(scaffold, messages, rendered)
        if at is None:
            return None
        spans = []
        for index in wanted:
            (start_piece, start), (stop_piece, stop) = scaffold.starts[index], scaffold.stops[index]
            spans.append((at[start_piece] + start, at[stop_piece] + stop))
        return spans

    def _take_apart(self, signature: tuple[tuple[str, bool], ...]) -> _Scaffold | None:
        twin = [(role, _twin_content(index, thought)) for index, (role, thought) in enumerate(signature)]
        try:
            text = self.render(twin)
        except TemplateRefusal:
            return None
        found = list(_MARK.finditer(text))
        bounds = [0, *(end for mark in found for end in mark.span()), len(text)]
        pieces = tuple(text[bounds[i] : bounds[i + 1]] for i in range(0, len(bounds), 2))
        marks = tuple((int(mark[1]), mark[2] == "t") for mark in found)
        starts: dict[int, tuple[int, int]] = {}
        stops: dict[int, tuple[int, int]] = {}
        for index, (role, _) in enumerate(signature):
            own = [number for number, (message, _) in enumerate(marks) if message == index]
            if role != "assistant" or not own:
                continue
            piece, text_before = pieces[own[0]], text[: found[own[0]].start()]
            starts[index] = own[0], len(piece) - self._written_before(twin, index, text_before, piece)
            after, last = own[-1] + 1, own[-1] + 1 == len(pieces) - 1
            stops[index] = after, self._stop_end(pieces[after], last=last)
        return _Scaffold(pieces, marks, starts, stops)

    def _written_before(self, twin: list[Message], index: int, text_before: str, piece: str) -> int:
        """How many characters before the content the model writes itself, e.g. an empty thought; 0 for most."""
        try:
            prompt = self.render(twin[:index], generation_prompt=True)
            without = self.render(twin[:index])
        except TemplateRefusal:
            # Nothing stands before this message, or the template takes no such beginning: learn the prompt elsewhere.
            try:
                prompt = self.render([("user", _mark(0, False))], generation_prompt=True)
                without = self.render([("user", _mark(0, False))])
            except TemplateRefusal:
                return 0
            text_before = text_before if index else ""
        if text_before.startswith(prompt) and len(text_before) - len(prompt) <= len(piece):
            return len(text_before) - len(prompt)
        header = prompt[len(without) :] if prompt.startswith(without) else ""
        found = piece.rfind(header) if header else -1
        return len(piece) - found - len(header) if found >= 0 else 0

    def _stop_end(self, piece: str, *, last: bool) -> int:
        """Characters of the piece behind an answer that belong to it: through its stop token.

        Behind the last answer all text up to there counts. In the middle only blanks may stand between, because the
        special token could as well open the next turn.
        """
        stop = self._special.search(piece)
        if stop is not None and (last or not piece[: stop.start()].strip()):
            return stop.end()
        # Behind the last answer without a stop token the caller appends one; what leads there is written by the model.
        return len(piece) if last else 0

    def _spans_by_prefix(self, messages: Sequence[Message], rendered: str, wanted: list[int]) -> list[Span] | None:
        """The slower way: the messages before an answer, rendered with the generation prompt, are where it begins."""
        starts: list[int] = []
        for index in wanted:
            try:
                prompt = self.render(messages[:index], generation_prompt=True)
            except TemplateRefusal:
                return None
            if not rendered.startswith(prompt):
                return None
            starts.append(len(prompt))
        spans: list[Span] = []
        for index, start, limit in zip(wanted, starts, [*starts[1:], len(rendered)], strict=True):
            last = index == len(messages) - 1
            content = _variants(messages[index][1], thought=False)[-1]
            ends = [found.end() for found in re.finditer(re.escape(content), rendered[start:limit])] if content else [0]
            if not ends:
                return None
            # A short answer may also stand in the thought before it: the right place is the one with a stop behind it.
            stops = [(start + end, self._stop_end(rendered[start + end :], last=last)) for end in ends]
            end, stop = next((found for found in stops if found[1]), stops[0])
            spans.append((start, end + stop))
        return spans


_MARK = re.compile(r"Qz(\d+)([at])zQ")


def _mark(index: int, thought: bool) -> str:
    return f"Qz{index}{'t' if thought else 'a'}zQ"


def _one_line(reason: BaseException) -> str:
    return (" ".join(str(reason).split()) or type(reason).__name__)[:300]


def _twin_content(index: int, thought: bool) -> str:
    answer = _mark(index, False)
    return f"<think>\n{_mark(index, True)}\n{_THOUGHT_END}\n\n{answer}" if thought else answer


def _variants(content: str, *, thought: bool) -> list[str]:
    """The forms in which a template may write a content (or the thought in it), the least changed first."""
    if thought:
        content = content.split(_THOUGHT_END)[0].split("<think>")[-1]
    elif _THOUGHT_END in content:
        content = content.split(_THOUGHT_END)[-1]
    stripped = content.strip("\n")
    return list(dict.fromkeys([content, content.lstrip(), content.rstrip(), stripped, content.strip()]))


def _match(scaffold: _Scaffold, messages: Sequence[Message], rendered: str) -> list[int] | None:
    """Where each piece begins in the true rendering, or None where they do not fit.

    The contents are known, so that a content which looks like scaffolding cannot lead astray.
    """
    if not rendered.startswith(scaffold.pieces[0]):
        return None
    at, position = [0], len(scaffold.pieces[0])
    for (index, thought), piece in zip(scaffold.marks, scaffold.pieces[1:], strict=True):
        for content in _variants(messages[index][1], thought=thought):
            end = position + len(content)
            if rendered.startswith(content, position) and rendered.startswith(piece, end):
                break
        else:
            return None
        at.append(end)
        position = end + len(piece)
    return at if position == len(rendered) else None
