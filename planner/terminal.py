"""What the commands share of the terminal: a line to the user, its width, its characters, the history."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from planner.history import History


def say(text: str) -> None:
    """Progress and warnings, on stderr, free of control sequences."""
    from planner.report import printable

    click.echo(printable(text), err=True)


def out(text: str) -> None:
    """Text on stdout, in characters that its encoding has."""
    if ascii_only():
        text = text.replace("–", "-").replace("→", "->").encode("ascii", "backslashreplace").decode("ascii")
    click.echo(text)


def width() -> int | None:
    """Columns of the terminal; None where stdout is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def ascii_only() -> bool:
    """Whether stdout's encoding lacks the characters of a table's lines."""
    try:
        "┌–".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return True
    return False


def open_history(say: Callable[[str], None]) -> History:
    from planner.history import History

    return History(say=say)
