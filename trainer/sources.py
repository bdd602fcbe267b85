"""Where records come from: a file, a folder saved by `datasets` or a hub name -> dicts with their place. No torch."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from presets import jsonio
from presets.errors import SLIP, DataError, did_you_mean
from presets.home import expanded

FILE_KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_DAMAGED_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)


_MEND_LINE = "Fix the line, or pass --skip-bad-lines."
_MEND_RECORD = "Fix the record, or pass --skip-bad-lines."
_SAVE_AS_UTF8 = "Save the file as UTF-8, or pass --skip-bad-lines."


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record and its place, e.g. "data.jsonl, line 12"; or, where it cannot be read, what is wrong with it."""

    location: str
    fields: dict[str, Any]
    problem: str = ""  # "" where the record could be read
    remedy: str = _MEND_LINE
    number: int = 0  # of the line or record, from 1


@dataclass(slots=True)
class Source:
    """An opened source: `records()` reads it from the start, `digest()` names its content."""

    name: str  # as the user wrote it
    path: Path | None = None  # a data file or a saved folder
    table: Any = None  # a datasets.Dataset, for folders and hub names
    notes: list[str] = field(default_factory=list)

    def records(self) -> Iterator[RawRecord]:
        """Every record in order; one that cannot be read is given with its problem.

        Raises:
            DataError: the source as a whole cannot be read.
        """
        if self.table is not None:
            return _table_records(self.name, self.table)
        assert self.path is not None
        return _read_file(self.name, self.path)

    def digest(self) -> str:
        """SHA-256 over the bytes of the file or folder; for a hub data set, over its fingerprint."""
        sha = hashlib.sha256()
        if self.path is None:
            sha.update(f"hub {self.name} {self.table._fingerprint}".encode())
            return sha.hexdigest()
        is_folder = self.path.is_dir()
        files = sorted(path for path in self.path.rglob("*") if path.is_file()) if is_folder else [self.path]
        for path in files:
            sha.update(path.relative_to(self.path).as_posix().encode() if is_folder else path.suffix.encode())
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    sha.update(chunk)
        return sha.hexdigest()


def open_source(name: str) -> Source:
    """The source behind a path or a hub name ("owner/name", or "owner/name:config").

    Raises:
        DataError: there is no such file, it is not of a known kind, or the data set cannot be loaded.
    """
    path = expanded(name)
    if path.is_dir():
        return _open_saved_folder(name, path)
    if path.exists():
        file_kind(path)
        return Source(name, path=path)
    if _looks_like_file(name) or not is_hub_name(name):
        raise DataError(f"{name}: there is no such file or folder.{_suggest_neighbour(path)} Check --dataset.")
    if "/" not in name and (
        meant := _suggest_neighbour(path, SLIP)
    ):  # asking the hub for a slip of the pen takes a minute
        raise DataError(f"{name}: there is no such file or folder here.{meant} For one of the hub write OWNER/{name}.")
    return _open_hub(name)


def is_hub_name(name: str) -> bool:
    """Whether this could be a name on the Hugging Face hub rather than a path."""
    return _HUB_NAME.fullmatch(name) is not None


def file_kind(path: Path) -> str:
    """One of "jsonl", "json", "csv", "tsv", "parquet", by extension, `.gz` aside. Raises DataError for any other."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    kind = FILE_KINDS.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise DataError(
            f"{path}: not a known kind of data file. Known are {', '.join(FILE_KINDS)}, each also with .gz."
        )
    return kind


def _looks_like_file(name: str) -> bool:
    stem = name.lower().removesuffix(".gz")
    return name.lower().endswith(".gz") or stem.endswith((*FILE_KINDS, ".txt"))


def _suggest_neighbour(path: Path, likeness: float = 0.6) -> str:
    try:
        return did_you_mean(path.name, [neighbour.name for neighbour in path.parent.iterdir()], likeness)
    except OSError:
        return ""


# -- folders and the hub ---------------------------------------------------------------------------------------------


def _open_saved_folder(name: str, path: Path) -> Source:
    if not any((path / marker).exists() for marker in ("dataset_info.json", "dataset_dict.json", "state.json")):
        files = sorted(file.name for file in path.iterdir() if _looks_like_file(file.name))
        hint = f" Name one of its files: {', '.join(files[:5])}." if files else ""
        raise DataError(f"{name}: a folder, but not one written by datasets' save_to_disk.{hint}")
    try:
        import datasets

        loaded: Any = datasets.load_from_disk(str(path))
    except Exception as reason:  # datasets raises anything from OSError to ArrowInvalid
        raise DataError(f"{name}: the saved data set cannot be read ({_one_line(reason)}). Save it again.") from None
    return _with_table(Source(name, path=path), loaded)


def _open_hub(name: str) -> Source:
    repository, _, config = name.partition(":")
    try:
        import datasets

        loaded: Any = datasets.load_dataset(repository, config or None)
    except Exception as reason:  # network, rights, missing repository: the list is open
        raise DataError(
            f"{name}: no such file, and it cannot be loaded as a Hugging Face data set ({_one_line(reason)}). "
            f"Check the name and the network, write NAME:CONFIG where it has several configurations, or pass a file."
        ) from None
    return _with_table(Source(name), loaded)


def _with_table(source: Source, loaded: Any) -> Source:
    if hasattr(loaded, "keys"):  # a DatasetDict
        splits = list(loaded.keys())
        if not splits:
            raise DataError(f"{source.name}: the data set has no split. Save one with records in it.")
        chosen = "train" if "train" in splits else splits[0]
        if len(splits) > 1 or chosen != "train":
            source.notes.append(f"the split '{chosen}' is used, of {', '.join(splits)}")
        loaded = loaded[chosen]
    source.table = loaded
    return source


def _table_records(name: str, table: Any) -> Iterator[RawRecord]:
    number = 0
    try:
        for number, row in enumerate(table, start=1):
            yield RawRecord(f"{name}, record {number}", dict(row), remedy=_MEND_RECORD, number=number)
    except (OSError, ValueError) as reason:  # pyarrow's own errors are among them
        raise DataError(f"{name}: cannot be read after record {number} ({_one_line(reason)}). Save it again.") from None


def _one_line(reason: BaseException) -> str:
    text = " ".join(f"{type(reason).__name__}: {reason}".split())
    return text if len(text) <= 200 else text[:197] + "..."


# -- files -----------------------------------------------------------------------------------------------------------


def _read_file(name: str, path: Path) -> Iterator[RawRecord]:
    kind = file_kind(path)
    try:
        with _open_bytes(path) as file:
            if kind == "parquet":
                yield from _parquet(name, file)
            elif kind in ("csv", "tsv"):
                yield from _table_lines(name, file, delimiter="\t" if kind == "tsv" else ",")
            elif kind == "json" and not _is_json_lines(file):
                yield from _json_document(name, file)
            else:
                yield from _json_lines(name, file)
    except _DAMAGED_GZIP as reason:
        raise DataError(f"{name}: the gzip file is damaged ({reason}). Compress it again.") from None
    except OSError as reason:
        raise DataError(f"{name}: cannot be read ({reason.strerror or reason}). Check its rights.") from None


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _is_json_lines(file: IO[bytes]) -> bool:
    """Whether the first line is a whole object, and so a `.json` file in fact holds one object per line."""
    first = b""
    for line in file:
        first = line.removeprefix(b"\xef\xbb\xbf").strip()
        if first:
            break
    more = any(line.strip() for line in file)
    file.seek(0)
    if not first.startswith(b"{") or not more:
        return False
    try:
        jsonio.loads(first, strict=False)
    except ValueError:
        return False
    return True


def _told(reason: json.JSONDecodeError) -> str:
    """Python's words without the "at" that some of them end in: a column follows."""
    return reason.msg.removesuffix(" at").removesuffix(" starting")


def _json_lines(name: str, file: IO[bytes]) -> Iterator[RawRecord]:
    # Binary iteration splits at \n only, so that U+2028 inside a string does not shift the line numbers.
    for number, line in enumerate(file, start=1):
        location = f"{name}, line {number}"
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            # Without its end: a string that was cut off would be told as one with a line break in it.
            record = jsonio.loads(line.rstrip(b"\r\n").decode("utf-8"), strict=False)
        except UnicodeDecodeError as reason:
            yield RawRecord(location, {}, f"not UTF-8 (byte {reason.start + 1} of the line)", number=number)
        except json.JSONDecodeError as reason:
            yield RawRecord(location, {}, f"not JSON ({_told(reason)}, column {reason.colno})", number=number)
        except ValueError as reason:
            yield RawRecord(location, {}, f"not JSON that can be read ({reason})", number=number)
        else:
            yield _as_record(location, record, number)


def _json_document(name: str, file: IO[bytes]) -> Iterator[RawRecord]:
    content = file.read().removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        return
    try:
        document = jsonio.loads(content.decode("utf-8"), strict=False)
    except UnicodeDecodeError as reason:
        line = content.count(b"\n", 0, reason.start) + 1
        raise DataError(f"{name}, line {line}: not UTF-8. Save the file as UTF-8.") from None
    except json.JSONDecodeError as reason:
        raise DataError(
            f"{name}, line {reason.lineno}: not JSON ({_told(reason)}, column {reason.colno}). Fix the file, or write "
            f"one object per line into a .jsonl file."
        ) from None
    except ValueError as reason:
        raise DataError(f"{name}: not JSON that can be read ({reason}). Fix the file.") from None
    if isinstance(document, dict):
        document = document["data"] if isinstance(document.get("data"), list) else [document]
    if not isinstance(document, list):
        raise DataError(f'{name}: neither a list of records nor {{"data": [...]}}. Write one object per record.')
    for number, record in enumerate(document, start=1):
        yield _as_record(f"{name}, record {number}", record, number, _MEND_RECORD)


def _as_record(location: str, record: Any, number: int, remedy: str = _MEND_LINE) -> RawRecord:
    if isinstance(record, dict):
        return RawRecord(location, record, remedy=remedy, number=number)
    return RawRecord(location, {}, f"not an object but {_kind_of(record)}", remedy, number)


def _kind_of(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _table_lines(name: str, file: IO[bytes], *, delimiter: str) -> Iterator[RawRecord]:
    csv.field_size_limit(1 << 30)  # the default of 128 KiB is shorter than a long chat
    # Bytes that are no UTF-8 come through as halves of characters, so that only their own row is bad.
    lines = (line.decode("utf-8", "surrogateescape") for line in _without_mark(file))
    reader = csv.reader(lines, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        before = reader.line_num
        location = f"{name}, line {before + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as reason:
            if header is None:
                raise DataError(f"{location}: not CSV ({reason}). Fix the file.") from None
            text = str(reason).split(" - ")[0]  # Python's advice on it is to a programmer
            yield RawRecord(location, {}, f"not CSV ({text})", number=before + 1)
            continue
        if not row:
            continue
        is_text = all(map(_is_text, row))
        if header is None:
            if not is_text:
                raise DataError(f"{location}: not UTF-8. Save the file as UTF-8.")
            header = row
        elif not is_text:
            yield RawRecord(location, {}, "not UTF-8", _SAVE_AS_UTF8, before + 1)
        elif len(row) != len(header):
            problem = f"has {len(row)} values where the header has {len(header)}"
            yield RawRecord(location, {}, problem, number=before + 1)
        else:
            yield RawRecord(location, dict(zip(header, row, strict=True)), number=before + 1)


def _without_mark(file: IO[bytes]) -> Iterator[bytes]:
    for number, line in enumerate(file):
        yield line if number else line.removeprefix(b"\xef\xbb\xbf")


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parquet(name: str, file: IO[bytes]) -> Iterator[RawRecord]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield RawRecord(f"{name}, record {number}", row, remedy=_MEND_RECORD, number=number)
    except (pyarrow.ArrowException, OSError, ValueError, UnicodeDecodeError) as reason:
        raise DataError(f"{name}: not a readable Parquet file ({_one_line(reason)}). Write it again.") from None
