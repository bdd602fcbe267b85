"""What stands in the data is text: a special token spelled out in a message must not become the token. No torch.

A message that holds "<|im_end|>" would otherwise end its turn there, and one with "<|im_start|>system" begin another:
whoever writes a line of the data could write the control tokens, which are the chat template's alone. Such a string is
replaced by a mark before the template sees it, found again in the rendered text, and tokenised apart, letter by letter
where need be. Text without one goes the usual way, untouched.
"""

from __future__ import annotations

import bisect
import itertools
import re
import secrets
from collections.abc import Sequence
from typing import Any

Span = tuple[int, int]  # characters, end excluded

_OPEN, _CLOSE = "\ue000", "\ue001"  # for private use: no letter, so that no template trims it or changes its case
# Some models add their control tokens as ordinary ones; their form tells: <|user|>, or with DeepSeek's wide bars.
_LOOKS_LIKE_CONTROL = re.compile("<[|\uff5c].*[|\uff5c]>", re.DOTALL)


def control_tokens(tokenizer: Any) -> frozenset[str]:
    """The strings that this tokenizer turns into control tokens."""
    added = tokenizer.added_tokens_decoder.values()
    found = {str(token) for token in added if token.special or _LOOKS_LIKE_CONTROL.fullmatch(str(token))}
    return frozenset(token for token in {*tokenizer.all_special_tokens, *found} if token)


class Marks:
    """Marks for the control tokens in the data, and the way back."""

    def __init__(self, tokens: frozenset[str]) -> None:
        longest_first = sorted(tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # Unknown to whoever wrote the data, so that nobody can forge a mark.
        self._secret = "".join(secrets.choice("0123456789") for _ in range(20))
        self._mark = re.compile(f"{_OPEN}{self._secret}:([0-9]+){_CLOSE}")
        self._strings: list[str] = []
        self._known: dict[str, str] = {}

    def put(self, text: str) -> str:
        """The text with a mark in the place of each control token."""
        return self.pattern.sub(lambda found: self._mark_of(found[0]), text)

    def _mark_of(self, string: str) -> str:
        if string not in self._known:  # as many as the tokenizer has control tokens, at most
            self._known[string] = f"{_OPEN}{self._secret}:{len(self._strings)}{_CLOSE}"
            self._strings.append(string)
        return self._known[string]

    def take(self, rendered: str, spans: Sequence[Span]) -> tuple[str, tuple[Span, ...], tuple[Span, ...]]:
        """(the text with the strings back in their places, the spans there, where the strings stand).

        Raises:
            ValueError: the template has changed a mark.
        """
        pieces, ranges, before, after = [], [], [0], [0]
        position = length = 0
        for found in self._mark.finditer(rendered):
            string = self._strings[int(found[1])]
            start = length + found.start() - position
            pieces += [rendered[position : found.start()], string]
            ranges.append((start, start + len(string)))
            before += [found.start(), found.end()]
            after += [start, start + len(string)]
            position, length = found.end(), start + len(string)
        text = "".join([*pieces, rendered[position:]])
        if self._secret in text:
            raise ValueError("the chat template changes the special token that stands in a message")

        def moved(place: int) -> int:
            at = bisect.bisect_right(before, place) - 1
            return after[at] + place - before[at]

        return text, tuple((moved(start), moved(end)) for start, end in spans), tuple(ranges)


def ranges_of(pattern: re.Pattern[str], text: str) -> tuple[Span, ...]:
    """Where control tokens are spelled out in a plain text."""
    return tuple(found.span() for found in pattern.finditer(text))


class Speller:
    """Tokenises pieces of a text, so that one can be spelled out among others that are not."""

    def __init__(self, tokenizer: Any, tokens: frozenset[str]) -> None:
        self.tokenizer = tokenizer
        self.control_ids = frozenset(
            token for token in tokenizer.convert_tokens_to_ids(sorted(tokens)) if isinstance(token, int)
        )
        self._newline = self._ids("\n", literal=True)

    def piece(self, text: str, *, is_first: bool, literal: bool) -> list[int]:
        """Token ids of a piece; a `literal` one yields no control token.

        Raises:
            ValueError: a single character is a control token.
        """
        ids = self._behind_newline(text, literal) if not is_first else self._ids(text, literal=literal)
        if not literal or self.control_ids.isdisjoint(ids):
            return ids
        if len(text) == 1:
            raise ValueError(f"the tokenizer has no way to write {text!r} other than as a special token")
        return [token for part in (text[:1], text[1:]) for token in self.piece(part, is_first=False, literal=True)]

    def _behind_newline(self, text: str, literal: bool) -> list[int]:
        # SentencePiece puts a blank before the beginning of a text; a line end before it takes the blank upon itself.
        ids = self._ids(f"\n{text}", literal=literal)
        size = len(self._newline)
        return ids[size:] if ids[:size] == self._newline else self._ids(text, literal=literal)

    def _ids(self, text: str, *, literal: bool) -> list[int]:
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=literal, verbose=False).input_ids
        return [int(token) for token in found]


def cut(length: int, spans: Sequence[Span], ranges: Sequence[Span]) -> list[tuple[int, int, bool, bool]]:
    """(start, end, it is learned, it is spelled out) of each piece between the edges of spans and ranges."""
    edges = sorted({0, length, *itertools.chain.from_iterable((*spans, *ranges))})

    def inside(place: int, of: Sequence[Span]) -> bool:
        return any(start <= place < end for start, end in of)

    return [(start, end, inside(start, spans), inside(start, ranges)) for start, end in itertools.pairwise(edges)]
