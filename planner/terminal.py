"""What the commands share of the terminal: a line to the user, its width, its characters, the history."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from planner.history import History
    from planner.measure import Progress
    from planner.resolve import Options
    from presets.env import Settings
    from trainer.job import Job


def say(text: str) -> None:
    """Progress and warnings, on stderr, free of control sequences."""
    from presets.text import printable

    click.echo(_encodable(printable(text), sys.stderr.encoding), err=True)


def out(text: str, *, nl: bool = True) -> None:
    """Text on stdout: free of control sequences but for ends of lines, in characters that its encoding has.

    The one way out of every command. Whatever a data file, a preset or a model has put into the text, here it ends.
    """
    from presets.text import printable_lines

    click.echo(_encodable(printable_lines(text), sys.stdout.encoding), nl=nl)


def out_json(text: str) -> None:
    """JSON on stdout: what a terminal would obey, or its encoding lacks, is written as JSON escapes."""
    from presets.jsonio import harmless

    click.echo(harmless(text.rstrip("\n"), ascii_only=ascii_only()))


def _encodable(text: str, encoding: str | None) -> str:
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return text.replace("–", "-").replace("→", "->").encode("ascii", "backslashreplace").decode("ascii")
    return text


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


def settings_of(options: Options, names: Sequence[str], *, running: bool = False) -> Settings:
    """The settings of the working folder and the environment; their warnings are said.

    Raises:
        PlanError: they break their rules; what else is wrong with presets, data and model is told in the same breath.
    """
    from planner.resolve import presets_to_compare, resolve_data, resolve_model
    from presets.env import Settings, read_settings
    from presets.errors import PlanError, together
    from trainer.model import inspect_model

    def read() -> Settings:
        return read_settings(Path.cwd(), os.environ)

    try:
        settings = read()
    except PlanError:
        none = Settings()
        together(
            read,
            lambda: presets_to_compare(none, tuple(name for name in names if name != "yours")),
            lambda: resolve_data(options, none, running=running),
            lambda: inspect_model(resolve_model(options, none)[0]),
        )
        raise
    for warning in settings.warnings:
        say(warning)
    return settings


def open_trusted(folder: Path, *, trusted: bool) -> Job:
    """The job of a run folder. That it was once run with code of its model is no leave to run it again: it may come
    from somebody else.

    Raises:
        RunError: it is not a run folder.
        SettingsError: it would run code of the model, and nobody has said so now.
    """
    from planner.launch import open_run
    from presets.errors import SettingsError

    job = open_run(folder)
    if job.trust_remote_code and not trusted:
        raise SettingsError(
            f"'{folder}' was made with --trust-remote-code: '{job.model}' comes with code of its own, which would run "
            "here. Pass --trust-remote-code again if you trust it."
        )
    return job


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
