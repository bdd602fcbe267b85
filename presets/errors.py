"""The exception tree. It stands on the lowest floor because every floor raises into it.

PlanError                 anything a user can mend; the message says what, value, rule and remedy
├── PresetError           a preset file, name or field is wrong
├── SettingsError         `.env`, the environment or an option is wrong, or settings contradict each other
│   └── OptionError       an option's value is wrong by itself, whatever files hold; the exit code is 2
├── DataError             the dataset cannot be read, or holds nothing to train on
├── ModelError            the model or tokenizer cannot be loaded, or is not what the job needs
├── MeasurementError      the worker process failed in a way that is not "does not fit"
└── RunError              the run cannot start, go on or be resumed
    ├── NonFiniteLossError  a loss, a gradient or a weight became NaN or infinite
    └── OutOfMemoryError    micro-batch 1 does not fit any more
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


class PlanError(Exception):
    """Base of every error that a user can mend. Only `planner.cli` turns it into an exit code."""


class PresetError(PlanError):
    """A preset file, its name or one of its fields is wrong."""


class SettingsError(PlanError):
    """A setting from `.env`, the environment or an option is wrong or contradicts another."""


class OptionError(SettingsError):
    """The value of an option is wrong by itself, whatever files, presets and `.env` hold."""


class DataError(PlanError):
    """The dataset cannot be read, or nothing in it can be trained on."""


class ModelError(PlanError):
    """The model or its tokenizer cannot be loaded, or is not what the job needs."""


class MeasurementError(PlanError):
    """The worker process failed in a way that is not "does not fit"."""


class RunError(PlanError):
    """The run cannot start, go on or be resumed."""


class NonFiniteLossError(RunError):
    """A loss, a gradient or a weight became NaN or infinite; the message names the step."""


class OutOfMemoryError(RunError):
    """The device ran out of memory at micro-batch 1."""


def together(*checks: Callable[[], object]) -> None:
    """Make every check, and raise what they raised as one error, a line each.

    Raises:
        PlanError: of the first one's kind.
    """
    raised: list[PlanError] = []
    for check in checks:
        try:
            check()
        except PlanError as reason:
            raised.append(reason)
    if raised:
        raise type(raised[0])("\n".join(dict.fromkeys(map(str, raised))))


SLIP = 0.85  # likeness of two names from which a slip of the pen is likelier than another thing of that name


def did_you_mean(word: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """ " Did you mean 'x'?" for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=likeness)
    return f" Did you mean '{close[0]}'?" if close else ""
