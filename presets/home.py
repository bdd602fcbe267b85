"""Where measurements, histories and tokenised data are kept."""

from __future__ import annotations

import os
from pathlib import Path


def plan_home() -> Path:
    """`PLAN_HOME`, or the platform's folder for a user's application data. Not created here."""
    chosen = os.environ.get("PLAN_HOME")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("training-planner"))
