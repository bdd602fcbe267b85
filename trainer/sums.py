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
    (folder / NAME).write_text("".join(_line(folder, name) for name in sorted(names)), encoding="ascii")


def changed_since(folder: Path, names: Iterable[str]) -> str | None:
    """The first of these files that is not as SHA256SUMS says, or SHA256SUMS itself; None where all are.

    The lines are made anew and compared: what stands in the file is never a path to follow.

    Raises:
        OSError, UnicodeDecodeError: SHA256SUMS or one of the files cannot be read.
    """
    told = (folder / NAME).read_text(encoding="ascii")
    lines = {name: _line(folder, name) for name in sorted(names)}
    if told == "".join(lines.values()):
        return None
    named = [line for line in told.splitlines() if line.endswith(tuple(f"  {name}" for name in lines))]
    if len(named) != len(lines) or not told.endswith("\n"):
        return NAME
    return next((name for name, line in lines.items() if line not in told), NAME)


def denied_by_sums(folder: Path, name: str) -> bool:
    """Whether SHA256SUMS says that this file was another one; not where it says nothing of it, or cannot be read.

    Raises:
        OSError: the file itself cannot be read.
    """
    try:
        told = (folder / NAME).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False
    lines = [line for line in told.splitlines(keepends=True) if line.rstrip("\n").endswith(f"  {name}")]
    return bool(lines) and _line(folder, name) not in lines


def _line(folder: Path, name: str) -> str:
    with open(folder / name, "rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n"
