"""Experiment trackers through Accelerate: refused in one line where they cannot work, dropped where they break.

Nothing here imports torch at once: the planner asks before anything is measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from presets.errors import SettingsError, did_you_mean

# What each of Accelerate's trackers is imported from; one of them will do. Accelerate itself leaves out a tracker whose
# package is missing without a word.
PACKAGES = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}


def check_tracker(name: str) -> None:
    """Refuse a tracker that does not exist or whose package is not installed here.

    Raises:
        SettingsError: with what to install, or which names there are.
    """
    if name == "all":
        if not any(_is_installed(one) for one in PACKAGES):
            raise SettingsError(f"tracker 'all': none of them is installed. Install one: {', '.join(PACKAGES)}.")
        return
    if name not in PACKAGES:
        raise SettingsError(f"no tracker '{name}'.{did_you_mean(name, PACKAGES)} Known: {', '.join(PACKAGES)}, all.")
    if not _is_installed(name):
        package = PACKAGES[name][0].replace("_", "-")
        raise SettingsError(
            f"tracker '{name}' needs the package {package}, which is not installed. "
            f"Install it (pip install {package}), or leave --tracker out."
        )


def _is_installed(name: str) -> bool:
    return any(importlib.util.find_spec(package) is not None for package in PACKAGES[name])


class Trackers:
    """The trackers of one run. One that fails is told of once and left out from then on: the run is worth more."""

    def __init__(self, accelerator: Any, say: Callable[[str], None]) -> None:
        self.live: list[Any] = list(accelerator.trackers)
        accelerator.trackers.clear()  # its own end_training() would raise what a tracker's end raises
        self.say = say

    def log(self, values: dict[str, Any], step: int) -> None:
        """The numbers of one step."""
        self._each(lambda tracker: tracker.log(values, step=step), f"step {step}: ")

    def finish(self) -> None:
        """Let them write what they still hold."""
        self._each(lambda tracker: tracker.finish(), "")
        self.live = []

    def _each(self, call: Callable[[Any], Any], where: str) -> None:
        for tracker in list(self.live):
            try:
                call(tracker)
            except Exception as reason:  # network, quota, disk, a defect of its own: no reason to lose a run
                self.live.remove(tracker)
                self.say(
                    f"{where}the tracker {tracker.name} failed ({_one_line(reason)}). The run goes on without "
                    "it; metrics.jsonl has every step."
                )


def start_trackers(accelerator: Any, name: str, say: Callable[[str], None], *, must_start: bool) -> Trackers:
    """Start what `--tracker` asked for; on the main process.

    Args:
        must_start: a new run has lost nothing yet and stops where the tracker does not start. A resumed one goes on.

    Raises:
        SettingsError: the tracker does not start.
    """
    try:
        accelerator.init_trackers("training-planner")
    except Exception as reason:  # a missing login, a server that does not answer: whatever the tracker raises
        said = f"tracker '{name}' does not start ({_one_line(reason)})."
        if must_start:
            raise SettingsError(f"{said} Mend that and go on with 'plan --resume', or run without --tracker.") from None
        say(f"{said} The run goes on without it; metrics.jsonl has every step.")
        accelerator.trackers.clear()
    return Trackers(accelerator, say)


def _one_line(reason: Exception) -> str:
    return " ".join(f"{type(reason).__name__}: {reason}".split())
