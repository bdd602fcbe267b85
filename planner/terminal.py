"""What the commands share of the terminal: a line to the user, its width, its characters, the history."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from planner.history import History
    from planner.measure import Progress


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


@contextmanager
def measuring_bar(say: Callable[[str], None]) -> Iterator[Progress]:
    """What is being measured, and how much of the budget is spent: a bar in a terminal, lines elsewhere."""
    from planner.candidates import each_once

    if not sys.stderr.isatty():
        yield each_once(say)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def tell(text: str, share: float) -> None:
            # Starting and the memory check are not paid from the budget: the bar moves only while that is spent.
            bar.update(task, description=text, total=1.0 if share else None, completed=share)

        yield tell
