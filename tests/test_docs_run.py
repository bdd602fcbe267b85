"""Every command of the documentation is run, page by page and from top to bottom, as a reader would."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a reader does once, on a bare machine: CI does it before any test runs.
INSTALLS = ("git clone", "make venv", "python -m venv", "source ", "pip install", ".venv/bin/plan", "make demo")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks."""
    return FENCED.findall(page.read_text(encoding="utf-8"))


def lines_to_run(page: Path) -> list[str]:
    found = []
    for language, content in blocks(page):
        if language == "sh":
            found += [re.sub(r"\s+#.*$", "", line).strip() for line in content.splitlines() if line.strip()]
    return [line for line in found if not line.startswith((*INSTALLS, "#"))]


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One history for all pages: what one of them measured or tuned, the next does not do again."""
    return tmp_path_factory.mktemp("reader-home")


@pytest.fixture
def desk(tmp_path: Path, tiny_model: Path, chat_file: Path) -> Path:
    """A reader's folder: messages, a table with columns of its own, a model."""
    shutil.copytree(tiny_model, tmp_path / "my-model")
    shutil.copy(chat_file, tmp_path / "messages.jsonl")
    with open(tmp_path / "tickets.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["customer", "agent"])
        for line in chat_file.read_text(encoding="utf-8").splitlines()[:40]:
            question, answer = json.loads(line)["messages"]
            rows.writerow([question["content"], answer["content"]])
    (tmp_path / "accelerate.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n", encoding="utf-8")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if lines_to_run(page)], ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(page: Path, desk: Path, preloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAN_BUDGET", "2")
    for language, content in blocks(page):
        if language == "ini":
            (desk / ".env").write_text(content, encoding="utf-8")
    for line in lines_to_run(page):
        words = shlex.split(line)
        assert words[0] == "plan", f"{page.name}: what is this line to a reader? {line}"
        done = subprocess.run(
            [sys.executable, "-m", "planner.cli", *words[1:]],
            cwd=desk, capture_output=True, text=True, input="Where is my parcel?\n\n", timeout=300, check=False,
        )  # fmt: skip
        # A doctor may find something wrong, and advice that nothing is done in time; both say so with 1.
        allowed = (0, 1) if words[1:2] in (["doctor"], ["advise"]) else (0,)
        assert done.returncode in allowed, f"{page.name}: {line}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, line
    for language, content in blocks(page):
        if language == "python":
            done = subprocess.run(
                [sys.executable, "-c", content], cwd=desk, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{page.name}\n{content}\n{done.stderr}"
            assert done.stdout, content


def test_the_pages_have_commands_and_the_readme_names_every_page() -> None:
    assert sum(len(lines_to_run(page)) for page in PAGES) > 30
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in readme, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_links_to_exists(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
