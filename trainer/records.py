"""Records -> examples: recognises the shape, checks every message, reads the scores. No torch, no tokenizer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from presets import jsonio
from presets.errors import DataError, did_you_mean
from presets.text import listed, printable, shown
from trainer.job import DataSpec
from trainer.sources import RawRecord, Source

Message = tuple[str, str]  # role, content

ROLES = ("system", "user", "assistant", "tool")
# A shape is the columns that it needs; the first one that a record has wins. An optional column is not listed.
SHAPES: tuple[tuple[str, ...], ...] = (
    ("messages",), ("conversations",), ("prompt", "completion"), ("question", "answer"), ("instruction", "output"),
    ("text",),
)  # fmt: skip
SCORE_ALIASES = {
    "engagement": ("engagement", "score", "likes", "upvotes", "engagement_count"),
    "created_at": ("created_at", "timestamp", "date", "created", "time"),
}
COLUMN_ROLES = (
    "messages", "prompt", "completion", "question", "answer", "instruction", "input", "output", "text", "engagement",
    "created_at",
)  # fmt: skip
_SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function": "tool", "observation": "tool",
}  # fmt: skip
_MOST_PROBLEMS = 5  # bad records that are told of
_LONGEST_PROBLEM = 200  # characters, where there are several
_MOST_COLUMNS = 10_000  # remembered; where every record has its own, they are no columns
_KNOWN_SHAPES = "messages, prompt + completion, question + answer, instruction (+ input) + output, text"


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One training example: `messages`, or a plain `completion` after its `prompt`, or plain `text`."""

    location: str  # for error messages
    number: int = 0  # of its line or record, from 1
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    text: str = ""
    first_trained: int = 0  # messages before this index are context, also where an assistant wrote them
    engagement: float = math.nan
    created_at: float = math.nan  # seconds since 1970, UTC


class BadRecord(Exception):
    """One record cannot be used; the text says why."""


class Examples:
    """The examples of an opened source, in order, at most `spec.limit`; read from the start each time.

    Nothing of them is kept, so that a file of any size takes no memory. What is counted is known after one whole pass.

    Iterating raises DataError: records that cannot be used (unless `spec.skip_bad_lines`), unknown columns, no record.
    From the first bad record on nothing more is given; the rest is read to say at once how many are bad.
    """

    def __init__(
        self, spec: DataSpec, records: Callable[[], Iterable[RawRecord]], *, name: str, notes: Sequence[str] = ()
    ) -> None:
        self.spec = spec
        self.name = name
        self._records = records
        self._source_notes = notes
        self._columns = _check_columns(spec.columns)
        self._begin()

    def _begin(self) -> None:
        self.num_examples = 0
        self.num_bad_lines = 0
        self._shape: tuple[str, ...] | None = None
        self._is_plain_pair = False  # prompt and completion as text
        self._seen: dict[str, None] = {}  # columns, in order of appearance
        self._found = dict.fromkeys(SCORE_ALIASES, 0)
        self._unreadable = dict.fromkeys(SCORE_ALIASES, 0)
        self._problems: list[str] = []  # of the first bad records
        self._remedies: set[str] = set()  # of all of them

    def has(self, score: str) -> bool:
        """Whether any example carries this score ("engagement" or "created_at")."""
        return self._found[score] > 0

    def __iter__(self) -> Iterator[Example]:
        self._begin()
        for raw in self._records():
            if self.spec.limit is not None and self.num_examples >= self.spec.limit:
                break
            try:
                example, failed = self._read(raw)
            except BadRecord as problem:
                if len(self._problems) < _MOST_PROBLEMS:
                    self._problems.append(f"{raw.location}: {problem}. {raw.remedy}")
                self._remedies.add(raw.remedy)
                self.num_bad_lines += 1
                continue
            if not self.num_examples:
                self._is_plain_pair = bool(example.completion)
            self.num_examples += 1
            for score in SCORE_ALIASES:
                self._found[score] += not math.isnan(getattr(example, score))
                self._unreadable[score] += score in failed
            if self.spec.skip_bad_lines or not self.num_bad_lines:
                yield example
        if self.num_bad_lines and not self.spec.skip_bad_lines:
            raise DataError(self._bad_lines())
        self._check_whole()

    def _bad_lines(self) -> str:
        """One bad record in a line; of several their number and the first ones, a line each."""
        if self.num_bad_lines == 1:
            return self._problems[0]
        told = [printable(_without_remedy(text).removeprefix(f"{self.name}, ")) for text in self._problems]
        told = [text if len(text) <= _LONGEST_PROBLEM else f"{text[:_LONGEST_PROBLEM]}..." for text in told]
        total = self.num_examples + self.num_bad_lines
        title = f"{self.name}: {self.num_bad_lines:,} of {total:,} records cannot be used."
        [remedy, *others] = self._remedies
        if others or remedy.startswith("Fix the "):
            remedy = "Fix them, or pass --skip-bad-lines."
        first = f"The first {len(told)}:" if self.num_bad_lines > len(told) else "They are:"
        return "\n".join((f"{title} {remedy} {first}", *(f"  {text}" for text in told)))

    def _read(self, raw: RawRecord) -> tuple[Example, list[str]]:
        if raw.problem:
            raise BadRecord(raw.problem)
        if not self._is_crowded:
            self._seen.update(dict.fromkeys(raw.fields))
        recognised = self._shape or _recognise(raw.fields, self._columns)
        if recognised is None:
            if self.spec.skip_bad_lines:
                raise BadRecord("none of the known shapes")
            raise _unrecognised(raw.location, self._seen, self._columns)
        example, failed = _parse(raw, recognised, self._columns)
        self._shape = recognised
        return example, failed

    def _check_whole(self) -> None:
        if not self.num_examples:
            nothing_known = self._shape is None and _recognise(self._seen, self._columns) is None
            if self.num_bad_lines and self._seen and nothing_known:
                raise _unrecognised(self.name, self._seen, self._columns)
            reason = "there is no record in it. Give a file with records."
            if self.num_bad_lines:
                reason = f"all {self.num_bad_lines:,} records are bad, the first: {self._problems[0]}"
            raise DataError(f"{self.name}: nothing to train on; {reason}")
        for score in SCORE_ALIASES:
            is_unknown = score in self._columns and self._columns[score] not in self._seen
            if is_unknown and not self._is_crowded:
                raise _unknown_column(self.name, score, self._columns[score], self._seen)

    @property
    def _is_crowded(self) -> bool:
        return len(self._seen) >= _MOST_COLUMNS

    @property
    def notes(self) -> list[str]:
        """What was noticed in a whole pass, one line each."""
        notes = list(self._source_notes)
        if self._is_plain_pair:
            notes.append("prompt and completion are joined as plain text, without the chat template")
        if self.num_bad_lines:
            first = _without_remedy(self._problems[0])
            notes.append(f"{self.num_bad_lines:,} bad line(s) skipped, the first: {first}")
        total = self.num_examples
        for score, failed in self._unreadable.items():
            if failed:
                notes.append(f"{score} could not be read in {failed:,} of {total:,} records")
            missing = total - self._found[score] - failed
            if missing and missing + failed < total:
                notes.append(f"{score} is missing in {missing:,} of {total:,} records")
        return notes


def _without_remedy(problem: str) -> str:
    return re.split(r"\. (Fix|Save) ", problem)[0]


def read_examples(spec: DataSpec, source: Source) -> Examples:
    """The examples of an opened source. Raises DataError where `spec.columns` make no sense."""
    return Examples(spec, source.records, name=source.name, notes=source.notes)


# -- columns and shapes ----------------------------------------------------------------------------------------------


def _check_columns(pairs: tuple[tuple[str, str], ...]) -> dict[str, str]:
    for role, _ in pairs:
        if role not in COLUMN_ROLES:
            raise DataError(
                f"--columns: no role '{role}'.{did_you_mean(role, COLUMN_ROLES)} "
                f"The roles are {', '.join(COLUMN_ROLES)}."
            )
    columns = dict(pairs)
    shape_roles = set(columns) - set(SCORE_ALIASES)
    if shape_roles and not any(shape_roles <= {*shape, *_optional(shape)} for shape in SHAPES):
        raise DataError(
            f"--columns: {', '.join(sorted(shape_roles))} do not go together. Known shapes: {_KNOWN_SHAPES}."
        )
    return columns


def _optional(shape: tuple[str, ...]) -> tuple[str, ...]:
    return ("input",) if shape == ("instruction", "output") else ()


def _recognise(record: Mapping[str, Any], columns: dict[str, str]) -> tuple[str, ...] | None:
    shape_roles = set(columns) - set(SCORE_ALIASES)
    for shape in SHAPES:
        if shape_roles <= {*shape, *_optional(shape)} and all(columns.get(role, role) in record for role in shape):
            return shape
    return None


def _unrecognised(name: str, found: Iterable[str], columns: dict[str, str]) -> DataError:
    found = list(found)
    for role, column in columns.items():
        if role not in SCORE_ALIASES and column not in found:
            return _unknown_column(name, role, column, found)
    return DataError(
        f"{name}: the records are of no known shape; their columns are {listed(found) or 'none'}. "
        f"Known shapes: {_KNOWN_SHAPES}. Say which column is which, e.g. --columns prompt=...,completion=..."
    )


def _unknown_column(name: str, role: str, column: str, found: Iterable[str]) -> DataError:
    found = list(found)
    return DataError(
        f"{name}: no column '{column}' for {role}.{did_you_mean(column, found)} The columns are {listed(found)}."
    )


# -- one record ------------------------------------------------------------------------------------------------------


def _parse(raw: RawRecord, shape: tuple[str, ...], columns: dict[str, str]) -> tuple[Example, list[str]]:
    """The example, and the scores that were there but could not be read."""
    record = raw.fields

    def value(role: str) -> Any:
        column = columns.get(role, role)
        if column not in record:
            raise BadRecord(f"has no '{column}' (it has {listed(record) or 'nothing'})")
        return record[column]

    scores, failed = _scores(record, columns)
    place: dict[str, Any] = {"location": raw.location, "number": raw.number, **scores}
    if shape == ("text",):
        return Example(text=_text(value("text"), columns.get("text", "text")), **place), failed
    if shape in (("messages",), ("conversations",)):
        role = shape[0]
        return Example(messages=_messages(value(role), columns.get(role, role)), **place), failed
    if shape == ("prompt", "completion"):
        prompt, completion = _from_json_text(value("prompt")), _from_json_text(value("completion"))
        if isinstance(prompt, list) or isinstance(completion, list):
            before = _messages(prompt, "prompt")
            joined = (*before, *_messages(completion, "completion"))
            return Example(messages=joined, first_trained=len(before), **place), failed
        if not isinstance(prompt, str):
            raise BadRecord("prompt is not text")
        return Example(
            prompt=_whole_characters(prompt, "prompt"), completion=_text(completion, "completion"), **place
        ), failed
    asked, answered = shape
    question = _text(value(asked), columns.get(asked, asked))
    if shape == ("instruction", "output"):
        column = columns.get("input", "input")
        extra = record.get(column)
        if extra is not None and not isinstance(extra, str):
            raise BadRecord(f"{column} is not text")
        if extra and extra.strip():
            question = f"{question}\n\n{_whole_characters(extra, column)}"
    answer = _text(value(answered), columns.get(answered, answered))
    return Example(messages=(("user", question), ("assistant", answer)), **place), failed


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{what} is not text" if value is not None else f"{what} is missing")
    if not value.strip():
        raise BadRecord(f"{what} is empty")
    return _whole_characters(value, what)


def _whole_characters(value: str, what: str) -> str:
    """JSON can spell half a character (a lone surrogate such as \\ud83d), as cutting a text in two leaves it."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as reason:
        half = f"\\u{ord(value[reason.start]):04x}"
        raise BadRecord(f"{what} has half a character ({half}, at character {reason.start + 1})") from None
    return value


def _from_json_text(value: Any) -> Any:
    """A list of messages that a CSV holds as JSON text; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith('[{"'):
        try:
            return jsonio.loads(value, strict=False)
        except ValueError:
            return value
    return value


def _messages(value: Any, what: str) -> tuple[Message, ...]:
    value = _from_json_text(value)
    if not isinstance(value, list):
        raise BadRecord(f"{what} is not a list of messages")
    if not value:
        raise BadRecord(f"{what} is empty")
    return tuple(_message(item, f"message {number}") for number, item in enumerate(value, start=1))


def _message(item: Any, what: str) -> Message:
    if not isinstance(item, dict):
        raise BadRecord(f"{what} is not an object with role and content")
    named = item.get("role") if item.get("role") is not None else item.get("from")
    role = _SHAREGPT_ROLES.get(named, named) if isinstance(named, str) else named
    if role not in ROLES:
        raise BadRecord(f"{what} has the role {shown(named)}; it must be one of {', '.join(ROLES)}")
    content = item.get("content") if item.get("content") is not None else item.get("value")
    if isinstance(content, list):
        content = _joined_parts(content, what)
    if content is None and item.get("tool_calls"):
        raise BadRecord(f"{what} has tool calls and no content; tool calls cannot be trained on yet")
    return str(role), _text(content, f"the content of {what}")


def _joined_parts(parts: list[Any], what: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRecord(f"the content of {what} has a part that is not text")
        texts.append(part["text"])
    return "".join(texts)


# -- scores ----------------------------------------------------------------------------------------------------------


def _scores(record: dict[str, Any], columns: dict[str, str]) -> tuple[dict[str, float], list[str]]:
    scores: dict[str, float] = {}
    failed = []
    for score, aliases in SCORE_ALIASES.items():
        names = (columns[score],) if score in columns else aliases
        found = next((record[name] for name in names if record.get(name) not in (None, "")), None)
        if found is None:
            continue
        scores[score] = number(found) if score == "engagement" else seconds_since_1970(found)
        if math.isnan(scores[score]):
            failed.append(score)
    return scores, failed


def number(value: Any) -> float:
    """A finite number, also from text; NaN where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        parsed = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return parsed if math.isfinite(parsed) else math.nan


def seconds_since_1970(value: Any) -> float:
    """Seconds since 1970 from ISO 8601 (UTC where it names no zone), Unix seconds or milliseconds; NaN if neither."""
    if isinstance(value, str) and math.isnan(number(value)):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError:
            return math.nan
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    seconds = number(value)
    # 1e11 seconds is the year 5138, 1e11 milliseconds is 1973: what is larger is milliseconds.
    return seconds / 1000 if abs(seconds) >= 1e11 else seconds
