"""Examples -> token ids and the loss mask, with the model's own tokenizer and chat template. No torch.

The loss is on what the model must write itself: in every assistant turn from the end of the generation prompt through
the stop token. Everywhere: exactly one beginning token, the end of every example is taught, and an example's first
token is never a target, because nothing stands before it to predict it from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from presets.errors import DataError
from trainer.job import TrainOn
from trainer.literal import Marks, Span, Speller, control_tokens, cut, ranges_of
from trainer.records import Example, Message
from trainer.templates import ChatTemplate, TemplateRefusal

_BATCH = 512  # examples per call of the tokenizer: bounds the memory for offsets
_MARGIN = 64  # tokens beyond the maximum length: those at a cut are others than in the whole text


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One example as tokens; or, where the chat template refuses it, the reason and no tokens."""

    ids: npt.NDArray[np.int32]  # (tokens,)
    supervised: npt.NDArray[np.bool_]  # (tokens,) never the first
    truncated: bool = False
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class _Text:
    """What is to be tokenised, and which characters are learned."""

    text: str
    spans: tuple[Span, ...]
    is_rendered: bool  # by a chat template, which has written the special tokens itself
    ends: bool  # a stop token belongs at the end, if none stands there yet
    refusal: str = ""
    literal: tuple[Span, ...] = ()  # where the data spells out a special token, which must stay text


class ChatEncoder:
    """Turns examples into token ids and a loss mask, at most `max_length` tokens long: the head is kept."""

    def __init__(self, tokenizer: Any, train_on: TrainOn = "assistant", max_length: int = 1024) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.max_length = max_length
        self.num_masks_not_found = 0  # chats with an answer whose place in the rendered text could not be found
        self._bos: int | None = _as_id(tokenizer.bos_token_id)
        self._eos: int | None = _as_id(tokenizer.eos_token_id)
        probe = list(tokenizer("x").input_ids)
        self._adds_bos = self._bos is not None and probe[:1] == [self._bos]
        self._chat: ChatTemplate | None = None
        self._first_not_found = ""
        self._control = control_tokens(tokenizer)
        self._marks = Marks(self._control)
        self._speller: Speller | None = None
        self._longest = 0
        self.num_spelled_out = 0  # examples with a special token in their text
        self._first_spelled_out = ""

    @property
    def chat(self) -> ChatTemplate:
        """The chat template, looked at when the first chat comes: plain text needs none."""
        if self._chat is None:
            self._chat = ChatTemplate(self.tokenizer)
        return self._chat

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about the examples encoded so far, one line each."""
        notes = list(self._chat.notes) if self._chat is not None else []
        if self.num_masks_not_found:
            notes.append(
                f"the answer was not found in {self.num_masks_not_found:,} rendered chat(s), which are left out, "
                f"the first: {self._first_not_found}. If there are many, use --train-on all"
            )
        if self.num_spelled_out:
            notes.append(
                f"{self.num_spelled_out:,} example(s) have special tokens of the model in their text, the first: "
                f"{self._first_spelled_out}; they are read as plain text, only the chat template sets "
                "special tokens (chats that were rendered by hand: give them as messages)"
            )
        if self._eos is None:
            notes.append("the tokenizer names no end token: nothing teaches the model where to stop")
        return tuple(notes)

    def encode(self, example: Example) -> Encoded:
        """Token ids and loss mask of one example.

        Raises:
            DataError: the chat template refuses the conversation.
        """
        encoded = next(self.encode_many([example]))
        if encoded.refusal:
            raise DataError(f"{example.location}: {encoded.refusal}.")
        return encoded

    def encode_many(self, examples: Iterable[Example]) -> Iterator[Encoded]:
        """The same for many, in order and much faster; a refused conversation comes back with its reason."""
        return (encoded for _, encoded in self.encode_each(examples))

    def encode_each(self, examples: Iterable[Example]) -> Iterator[tuple[Example, Encoded]]:
        """As `encode_many`, each with its example; both are let go of after a batch."""
        iterator = iter(examples)
        while batch := list(islice(iterator, _BATCH)):
            yield from zip(batch, self._encode_batch([self._prepare(example) for example in batch]), strict=True)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation with the generation prompt at its end, ready to be continued by the model.

        Raises:
            DataError: the chat template refuses the conversation.
        """
        marked = tuple((role, self._marks.put(content)) for role, content in messages)
        adapted, _ = self.chat.adapt(marked)
        try:
            rendered, _, literal = self._marks.take(self.chat.render(adapted, generation_prompt=True), ())
            if literal:
                ids, _ = self._tokenise_in_pieces(_Text(rendered, (), is_rendered=True, ends=False, literal=literal))
                return self._with_bos(ids)
        except (TemplateRefusal, ValueError) as reason:
            raise DataError(_refusal(reason)) from None
        return self._with_bos([int(token) for token in self.tokenizer(rendered, add_special_tokens=False).input_ids])

    # -- text and spans ----------------------------------------------------------------------------------------------

    def _prepare(self, example: Example) -> _Text:
        if example.messages:
            found = self._prepare_chat(example)
        elif example.completion:
            text = example.prompt + example.completion
            start = 0 if self.train_on == "all" else len(example.prompt)
            found = self._plain(text, ((start, len(text)),))
        else:
            found = self._plain(example.text, ((0, len(example.text)),))
        if found.literal:
            self.num_spelled_out += 1
            start, end = found.literal[0]
            self._first_spelled_out = self._first_spelled_out or f"'{found.text[start:end]}' in {example.location}"
        return found

    def _plain(self, text: str, spans: tuple[Span, ...]) -> _Text:
        literal = ranges_of(self._marks.pattern, text)
        if literal and text[slice(*literal[-1])] == self.tokenizer.eos_token and literal[-1][1] == len(text):
            literal = literal[:-1]  # the end token at the very end is what would be written there anyway
        return _Text(text, spans, is_rendered=False, ends=True, literal=literal)

    def _prepare_chat(self, example: Example) -> _Text:
        marked = tuple((role, self._marks.put(content)) for role, content in example.messages)
        messages, merged = self.chat.adapt(marked)
        try:
            rendered = self.chat.render(messages)
        except TemplateRefusal as reason:
            return _Text("", (), is_rendered=True, ends=False, refusal=_refusal(reason))
        answered = messages[-1][0] == "assistant"
        if self.train_on == "all":
            spans: list[Span] | None = [(0, len(rendered))]
        else:
            spans = self.chat.assistant_spans(messages, rendered, max(0, example.first_trained - merged))
        if spans is None:
            self.num_masks_not_found += 1
            self._first_not_found = self._first_not_found or example.location
            spans = []
        ends = answered and not self.chat.ends_with_special(rendered)
        try:
            text, moved, literal = self._marks.take(rendered, spans)
        except ValueError as reason:
            return _Text("", (), is_rendered=True, ends=False, refusal=_refusal(reason))
        return _Text(text, moved, is_rendered=True, ends=ends, literal=literal)

    # -- tokens ------------------------------------------------------------------------------------------------------

    def _encode_batch(self, texts: list[_Text]) -> Iterator[Encoded]:
        tokens: dict[int, tuple[list[int], npt.NDArray[np.bool_]]] = {}
        for is_rendered in (True, False):
            chosen = [
                i
                for i, text in enumerate(texts)
                if text.is_rendered is is_rendered and not text.refusal and not self._goes_in_pieces(text)
            ]
            if chosen:
                tokens.update(zip(chosen, self._tokenise([texts[i] for i in chosen], is_rendered), strict=True))
        for i, text in enumerate(texts):
            refusal = text.refusal
            if not refusal and i not in tokens:
                try:
                    tokens[i] = self._tokenise_in_pieces(text)
                except ValueError as reason:
                    refusal = str(reason)
            if refusal:
                yield Encoded(np.zeros(0, np.int32), np.zeros(0, np.bool_), refusal=refusal)
            else:
                yield self._finish(text, *tokens[i])

    def _goes_in_pieces(self, text: _Text) -> bool:
        return bool(text.literal) or not self.tokenizer.is_fast

    def _tokenise(self, texts: list[_Text], is_rendered: bool) -> Iterator[tuple[list[int], npt.NDArray[np.bool_]]]:
        heads = [self._head(text.text) for text in texts]
        encoded = self._call(heads, is_rendered)
        for number, (text, head, ids) in enumerate(zip(texts, heads, encoded["input_ids"], strict=True)):
            offsets = encoded["offset_mapping"][number]
            if len(head) < len(text.text) and len(ids) <= self.max_length:  # a tokenizer that leaves much out
                whole = self._call([text.text], is_rendered)
                ids, offsets = whole["input_ids"][0], whole["offset_mapping"][0]
            yield list(ids), _in_spans(offsets, text.spans)

    def _call(self, texts: list[str], is_rendered: bool) -> Any:
        return self.tokenizer(
            texts,
            add_special_tokens=not is_rendered,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # longer than the model takes: it is cut below
        )

    def _head(self, text: str) -> str:
        """As much of a text as could become `max_length` tokens: of a line of 50 MB the rest is only a burden."""
        if not self._longest:
            self._longest = max(map(len, self.tokenizer.get_vocab()), default=1)
        return text[: (self.max_length + _MARGIN) * self._longest]

    def _tokenise_in_pieces(self, text: _Text) -> tuple[list[int], npt.NDArray[np.bool_]]:
        """Each side of an edge on its own: no token straddles the edge of a span, none is made of a spelled-out one.

        For a tokenizer without offsets, and for texts with special tokens in them that must stay text.

        Raises:
            ValueError: a special token cannot be spelled out.
        """
        if self._speller is None:
            self._speller = Speller(self.tokenizer, self._control)
        ids: list[int] = [] if text.is_rendered or not self._adds_bos else [self._bos or 0]
        supervised = [False] * len(ids)
        for start, end, learned, literal in cut(len(text.text), text.spans, text.literal):
            piece = self._speller.piece(text.text[start:end], is_first=start == 0, literal=literal)
            ids += piece
            supervised += [learned] * len(piece)
            if len(ids) > self.max_length:  # the rest is cut off anyway
                break
        return ids, np.asarray(supervised, dtype=np.bool_)

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Exactly one beginning token, where the tokenizer would itself write one."""
        return [self._bos, *ids] if self._adds_bos and self._bos is not None and ids[:1] != [self._bos] else ids

    def _finish(self, text: _Text, ids: list[int], supervised: npt.NDArray[np.bool_]) -> Encoded:
        longer = self._with_bos(ids) if text.is_rendered else ids
        if len(longer) > len(ids):
            supervised = np.concatenate([[False], supervised])
        if text.ends and self._eos is not None:
            if not longer or longer[-1] != self._eos:
                longer = [*longer, self._eos]
                supervised = np.append(supervised, False)
            # What has no learned text, e.g. a chat whose answer was not found, learns no ending either.
            supervised[-1] = bool(text.spans)
        supervised[:1] = False
        truncated = len(longer) > self.max_length
        return Encoded(
            np.asarray(longer[: self.max_length], dtype=np.int32), supervised[: self.max_length], truncated=truncated
        )


def _in_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> npt.NDArray[np.bool_]:
    """Which tokens hold a character of a span, (tokens,).

    A token across the edge counts: " answer" begins with the blank before the answer and is the answer's first token.
    """
    mask = np.zeros(len(offsets), dtype=np.bool_)
    if not len(offsets) or not spans:
        return mask
    edges = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets)).reshape(-1, 2)
    # Tokenizers that trim offsets give a lone blank the empty range behind it: begin it where the token before ended.
    begins = np.minimum(edges[:, 0], np.concatenate([[0], edges[:-1, 1]]))
    for start, end in spans:
        mask |= (edges[:, 1] > start) & (begins < end)
    return mask


def _refusal(reason: Exception) -> str:
    return f"the model's chat template refuses this conversation ({str(reason).rstrip('.')})"


def _as_id(token: Any) -> int | None:
    return int(token) if isinstance(token, int) else None
