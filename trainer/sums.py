"""Checksums beside a checkpoint's files: safetensors has none, and a zeroed page inside a tensor loads like any other.

The file has the form of `sha256sum`, so that `sha256sum -c SHA256SUMS` says the same without this program.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

NAME = "SHA256SUMS"


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write SHA256SUMS over these files of a folder."""
    lines = [f"{_digest(folder / name)}  {name}\n" for name in sorted(names)]
    (folder / NAME).write_text("".join(lines), encoding="ascii")


def changed_since(folder: Path, names: Iterable[str]) -> str | None:
    """The first of these files that is not as SHA256SUMS says; None where all are.

    Names are compared, never opened: what stands in the file is not a path to follow.

    Raises:
        OSError, UnicodeDecodeError: SHA256SUMS or one of the files cannot be read.
    """
    wanted = sorted(names)
    told = dict(line.split("  ", 1)[::-1] for line in _lines(folder) if "  " in line)
    if sorted(told) != wanted:
        return NAME
    return next((name for name in wanted if told[name] != _digest(folder / name)), None)


def _lines(folder: Path) -> list[str]:
    return (folder / NAME).read_text(encoding="ascii").splitlines()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
