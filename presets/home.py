"""Where measurements, histories and tokenised data are kept."""

from __future__ import annotations

import os
from pathlib import Path

from presets.errors import SettingsError


def expanded(path: str | Path) -> Path:
    """The path with a leading "~" or "~user" as that home; as it is where there is no such user; pathlib raises."""
    return Path(os.path.expanduser(path))


def plan_home() -> Path:
    """`PLAN_HOME`, or the platform's folder for a user's application data. Not created here.

    Raises:
        SettingsError: `PLAN_HOME` names the home of a user that there is not.
    """
    chosen = os.environ.get("PLAN_HOME")
    if chosen:
        found = expanded(chosen)
        if str(found).startswith("~"):
            raise SettingsError(f"PLAN_HOME is '{chosen}': there is no such user. Name a folder.")
        return found
    import platformdirs

    return Path(platformdirs.user_data_dir("training-planner"))
