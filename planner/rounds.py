"""What a round of timing holds: which classes of micro-batches, how many of each, and whose turn it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from planner.decks import part_of
from planner.group import Group
from planner.strata import Kind, Strata, make_strata
from trainer.batching import MicroShapes

STRATA = (11, 8, 6, 4, 3, 2)  # tried from the left until three rounds fit the budget
LEAST_PER_ROUND = 8  # micro-batches: where strata are few, several of each
LEAST_ROUNDS = 5  # before the interval is believed narrow enough to stop
# References tell the speed factor and nothing else, in the slowest precision: in every round they took half of the
# budget and more where the others compute in fp16.
REFERENCE_EVERY = 8
REFERENCE_SHARE = 0.25  # of the first rounds
# Of a search on a GPU: strata are few enough for so many rounds. It takes three that are no warm-up to tell two apart,
# and a worker that has just been started may be slow for two.
SEARCH_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Classes:
    """The strata of a measurement, and how many micro-batches of each a round holds."""

    strata: Strata
    draws: int
    warnings: tuple[str, ...] = ()


def choose_classes(live: list[Group], shapes: Mapping[int, MicroShapes], budget: float, *, is_search: bool) -> Classes:
    """Strata few enough for a warm-up and two rounds within the budget.

    Args:
        shapes: of each plan, by the plan's identity.
        budget: seconds.
    """
    populations = []
    for group in live:
        for row in group.fitting:
            populations.append((row.kind, part_of(shapes[id(row.plan)])[1]))
    rounds = 3 if live[0].signature.device == "cpu" else 4  # on a GPU two, each run twice
    if is_search:
        rounds = 2 * SEARCH_ROUNDS
    strata, guess = Strata(kinds=()), 0.0
    for count in STRATA:
        strata = make_strata(populations, count)
        guess = _round_seconds(live, populations, strata, is_search)
        if rounds * guess <= budget:
            break
    warnings: tuple[str, ...] = ()
    if count != STRATA[0]:
        warnings = (
            f"micro-steps are slow for a budget of {budget:g} s: {strata.count} classes of micro-batches are timed "
            f"instead of about {STRATA[0]}. Give more time with --budget.",
        )
    guess *= 2 if is_search else 1
    most = LEAST_PER_ROUND // strata.count
    draws = max((some for some in range(2, most + 1) if LEAST_ROUNDS * some * guess <= budget), default=1)
    return Classes(strata, draws, warnings)


def _round_seconds(
    live: list[Group], populations: list[tuple[Kind, MicroShapes]], strata: Strata, is_search: bool
) -> float:
    """Of a round over all signatures, each with its own kinds, about, by what was seen while probing memory."""
    sizes: dict[Kind, list[float]] = {}  # mean padded tokens of each stratum
    for one in strata.kinds:
        stratum = np.concatenate([strata.of(of, some) for of, some in populations if of == one.kind])
        padded = np.concatenate([some.padded_tokens for of, some in populations if of == one.kind])
        numbers = [number for number in range(one.first, one.first + one.count) if (stratum == number).any()]
        sizes[one.kind] = [float(padded[stratum == number].mean()) for number in numbers]
    seconds = 0.0
    for group in live:
        share = REFERENCE_SHARE if group.is_reference and len(live) > 1 else 1.0
        for kind in {row.kind for row in group.fitting}:
            seconds += share * sum(_micro_seconds(group, tokens, is_search) for tokens in sizes[kind])
    return seconds


def _micro_seconds(group: Group, padded: float, is_search: bool) -> float:
    """Of a micro-batch of so many padded tokens, about.

    A search on a GPU goes by what was probed and is like it in size: the rate of the largest says nothing of small ones
    there, which may take as long.
    """
    return group.probed_seconds(padded) if is_search else group.seconds_per_padded_token * padded


def turn_of(groups: list[Group], number: int) -> list[Group]:
    """Who takes part in a round: references in the first, and in few of the others where there are others."""
    timed = [group for group in groups if not group.is_reference]
    has_all = number == 0 or number % REFERENCE_EVERY == REFERENCE_EVERY // 2
    return timed if timed and not has_all else groups
