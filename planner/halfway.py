"""What a search for tuned twins knows before its last stage, so that an interrupted one goes on there. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.twin import Change, Wanted, changed
from presets.errors import SettingsError
from trainer.job import Job


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Changes of one preset's split or packing, and the seconds of its loop beside those of the others."""

    changes: tuple[Change, ...]  # none: as written
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Halfway:
    """What the stages before the last one found for one preset. Kept in the history for a day.

    It decides only what the last stage times: that one times its whole chain itself, the baseline included.
    """

    preset: str
    layouts: tuple[Layout, ...]  # the fastest first; as written is among them where it fits
    bounded: tuple[tuple[Change, ...], ...] = ()  # layouts that memory left out, still to be tried with less
    steps: tuple[Change, ...] | None = None  # changes of the step that save time; None: not searched yet
    refused: tuple[str, ...] = ()
    budget_seconds: float = 0.0  # of the command; a more generous one begins anew
    found_at: str = ""


def usable(earlier: Sequence[Halfway], wanted: Sequence[Wanted]) -> dict[str, list[tuple[Job, Layout]]]:
    """The layouts of each wanted preset with the jobs that they make; nothing where one preset lacks them.

    Stages compare presets in turns, so what is known of some spares nothing as long as others are missing.
    """
    known = {one.preset: one for one in earlier}
    found: dict[str, list[tuple[Job, Layout]]] = {}
    for one in wanted:
        layouts = known[one.name].layouts if one.name in known else ()
        if not layouts:
            return {}
        try:
            found[one.name] = [(changed(one.job, layout.changes), layout) for layout in layouts]
        except SettingsError:
            return {}
    return found
