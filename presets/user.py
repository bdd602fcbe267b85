"""A user's own presets: TOML files in a folder of theirs, beside the bundled ones, or anywhere by path."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

from presets.errors import PresetError, did_you_mean
from presets.home import expanded, plan_home
from presets.schema import Preset, load_preset, parse_preset, preset_names

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,49}")
RESERVED = ("yours",)
LARGEST_FILE = 100_000  # bytes


def user_folder() -> Path:
    """Where a user's presets lie: `PLAN_HOME`/presets, or the platform's folder for a user's settings. Not created."""
    if os.environ.get("PLAN_HOME"):
        return plan_home() / "presets"
    import platformdirs

    return Path(platformdirs.user_config_dir("training-planner")) / "presets"


def all_names() -> list[str]:
    """Names of the bundled presets, then of the user's own; a bundled name cannot be taken."""
    bundled = preset_names()
    folder = user_folder()
    try:
        own = sorted(path.stem for path in folder.iterdir() if path.suffix == ".toml")
    except OSError:  # none is there, or it may not be read: the bundled ones are
        own = []
    taken = (*bundled, *RESERVED)
    return [*bundled, *(name for name in own if name not in taken and NAME.fullmatch(name))]


def is_path(name: str) -> bool:
    """Whether a preset is named by its file."""
    return name.endswith(".toml") or "/" in name or os.sep in name


def find_preset(name: str) -> Preset:
    """The preset of this name, bundled or the user's own, or of this file.

    Raises:
        PresetError: there is none, or it is not sound; all problems at once.
    """
    if not is_path(name) and name in preset_names():
        return load_preset(name)
    path, text = _read(name)
    if is_path(name) and (path.stem in preset_names() or path.stem in RESERVED):
        raise PresetError(
            f"preset '{name}': '{path.stem}' is the name of a bundled preset. Give the file another name."
        )
    return parse_preset(path.stem, text)


def text_of(name: str) -> str:
    """The file of a preset, as it is.

    Raises:
        PresetError: as `find_preset`.
    """
    find_preset(name)
    if not is_path(name) and name in preset_names():
        return (resources.files("presets") / f"{name}.toml").read_text(encoding="utf-8")
    return _read(name)[1]


def new_preset(name: str, source: str) -> Path:
    """A copy of a preset under a name of the user's own, with its comments, to be edited; returns its path.

    Raises:
        PresetError: the name is taken or no name, there is no such source, or the folder cannot be written.
    """
    if not NAME.fullmatch(name):
        raise PresetError(f"'{name}' is no name for a preset: use small letters, digits and hyphens.")
    if name in preset_names() or name in RESERVED:
        raise PresetError(f"'{name}' is the name of a bundled preset. Choose another one.")
    text = text_of(source)
    path = user_folder() / f"{name}.toml"
    head = (
        f"# A preset of your own, copied from '{source}'. Run it with: plan --run {name}\n"
        "# What is left out takes its default; 'plan presets show' of the bundled ones shows every key in use.\n"
        "# The published_* figures belong to the original and are left out of this copy.\n\n"
    )
    kept = [line for line in text.splitlines() if not line.startswith("published_")]
    kept = [f'summary = "a copy of {source}"' if line.startswith("summary =") else line for line in kept]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(head + "\n".join(kept).strip() + "\n")
    except FileExistsError:
        raise PresetError(f"there is a preset '{name}' already: {path}. Edit it, or choose another name.") from None
    except OSError as reason:
        raise PresetError(f"{path}: cannot be written ({reason.strerror or reason}).") from None
    return path


def _read(name: str) -> tuple[Path, str]:
    path = expanded(name) if is_path(name) else user_folder() / f"{name}.toml"
    try:
        if path.is_file() and path.stat().st_size > LARGEST_FILE:
            raise PresetError(f"preset '{name}': a file of over {LARGEST_FILE:,} bytes is no preset.")
        return path, path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        if is_path(name):
            raise PresetError(f"preset '{name}': there is no such file.") from None
        raise PresetError(
            f"no preset '{name}'.{did_you_mean(name, all_names())} Run 'plan presets' to list them."
        ) from None
    except OSError as reason:
        raise PresetError(f"preset '{name}': cannot be read ({reason.strerror or reason}).") from None
    except UnicodeDecodeError as reason:
        raise PresetError(f"preset '{name}': not UTF-8 (byte {reason.start}). Save it as UTF-8.") from None
