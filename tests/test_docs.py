"""Every command that the README and the help show can be parsed as it stands; the files that they name exist."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path

import click
import pytest

from planner.cli import cli

ROOT = Path(__file__).resolve().parent.parent


def shown_commands() -> list[str]:
    """`plan ...` in the pages, in blocks and in the text, and in the commands' own help; comments are cut off."""
    found = []
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        found += re.findall(r"^(plan\b.*)$", text, re.MULTILINE) + [
            f"{line} --help"
            for line in re.findall(r"`(plan [^`\n]+)`", text)  # perhaps without what it needs
        ]
    for name in cli.list_commands(click.Context(cli)):
        command = cli.get_command(click.Context(cli), name)
        examples = ((command.help if command else None) or "").partition("Example")[2]
        found += re.findall(r"^\s+(plan\b.*)$", examples, re.MULTILINE)
    commands = [re.sub(r"\s{2,}.*$|\s#.*$", "", line.strip()) for line in found]
    return sorted({line for line in commands if "..." not in line and "|" not in line})


def parse(words: list[str]) -> None:
    """As click does before it calls anything."""
    command: click.Command = cli
    context: click.Context | None = None
    while True:
        context = command.make_context(command.name or "plan", words, parent=context)
        rest = [*context._protected_args, *context.args] if isinstance(command, click.Group) else []
        if not isinstance(command, click.Group) or not rest:
            return
        _, found, words = command.resolve_command(context, rest)
        assert found is not None
        command = found


def test_there_are_commands_to_try() -> None:
    assert len(shown_commands()) > 20


@pytest.mark.parametrize("line", shown_commands())
def test_every_command_that_is_shown_can_be_parsed(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "accelerate.yaml").touch()  # options that name a file look for it
    with contextlib.suppress(click.exceptions.Exit):  # --help and --version
        parse(shlex.split(line)[1:])


@pytest.mark.parametrize("line", ["plan --no-such", "plan advise --when now", "plan nothing"])
def test_a_command_that_does_not_exist_would_be_noticed(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(shlex.split(line)[1:])


def test_the_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(bench/[\w./]+|constraints\.txt)`", text) + re.findall(r"\]\(([\w./]+)\)", text):
        assert (ROOT / name).exists(), name


def test_the_tests_that_promises_name_exist() -> None:
    text = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", text)
    tests = [(file, name) for file, name in named if not file.startswith("bench/")]
    assert len(tests) > 40
    for file, name in tests:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"\b(def|class) {name}\b", source), f"{file}::{name}"
