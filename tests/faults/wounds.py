"""What a power cut or a failing disk does to the newest checkpoint of a stopped run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness import Server, why_lost

PAGE = 4096


@dataclass(frozen=True, slots=True)
class Wound:
    """One way to spoil one file."""

    name: str
    file: str
    inflict: Callable[[Path], None]


def cut(share: float, less: int = 0) -> Callable[[Path], None]:
    """Leave a share of a file, less some bytes."""

    def inflict(path: Path) -> None:
        os.truncate(path, max(0, int(path.stat().st_size * share) - less))

    return inflict


def zeroed(path: Path) -> None:
    """A page in the middle that was never written: the file is as long as it should be."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(bytes(min(PAGE, size - size // 2)))


def all_zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flipped(path: Path) -> None:
    """One bit, as memory and cables do it."""
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    path.write_bytes(content)


WAYS = {
    "empty": cut(0.0),
    "half of it": cut(0.5),
    "all but a byte": cut(1.0, 1),
    "a page of zeros": zeroed,
    "all zeros": all_zero,
    "a flipped bit": flipped,
    "gone": Path.unlink,
}


def newest_checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def wounds(run: Path) -> Iterator[Wound]:
    """Every way, for every file of the newest checkpoint."""
    for path in sorted(newest_checkpoint(run).iterdir()):
        for way, inflict in WAYS.items():
            yield Wound(f"{path.name}: {way}", path.name, inflict)


def damaged_run(server: Server, run: Path) -> Path:
    """A run that was killed when it had a few checkpoints."""
    log = run.with_suffix(".calls")
    whole = run.with_suffix(".whole")
    shutil.copytree(run, whole)
    ended = server.train(whole, below=str(whole), at=0, mode="count", calls=str(log))
    assert ended.code == 0, ended.said
    renames = [n for n, line in enumerate(log.read_text().splitlines(), 1) if line.endswith("/step-000003")]
    ended = server.train(run, below=str(run), at=renames[-1] + 2, mode="kill")
    assert ended.code < 0, ended.said
    assert newest_checkpoint(run).name == "step-000003"
    shutil.rmtree(whole)
    return run


def survives_damage(server: Server, stopped: Path, run: Path, whole: Path, wound: Wound) -> str | None:
    """Spoil the newest checkpoint of a copy, resume, compare; what was lost, or None."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(stopped, run)
    newest = newest_checkpoint(run)
    wound.inflict(newest / wound.file)
    ended = server.train(run, resume=True)
    if ended.code != 0:
        return f"the resume ended with {ended.code}: {ended.said[-1500:]}"
    if f"damaged-{newest.name}" not in ended.said or not newest.with_name(f"damaged-{newest.name}").is_dir():
        return f"the damaged one was not set aside and named: {ended.said[-1500:]}"
    return why_lost(run, whole)
