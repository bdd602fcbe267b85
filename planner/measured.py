"""A step signature that was timed, as a `Measurement`, and what is to be said of how it was."""

from __future__ import annotations

from dataclasses import dataclass

from planner.group import Group
from planner.measurement import Measurement, NewShape, Round

# On a GPU kernels are loaded and chosen when first asked for: on an H100 up to half of the first ten seconds went into
# it, and later nothing that showed (2026-11-26). So the micro-batches of a round are run twice there, and the second
# time counts. Where the first time still takes this much longer at the end, it is said.
SETTLED = 0.03


@dataclass(frozen=True, slots=True)
class Told:
    """What is said under the table."""

    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def measurement_of(group: Group, kept: tuple[Round, ...]) -> Measurement:
    """What was measured of a signature.

    Args:
        kept: its rounds without warm-up.
    """
    first = len(group.rounds) - len(kept)  # what lies before it is warm-up, windows too
    new = group.first_times.new_shapes()
    return Measurement(
        signature=group.signature,
        load=group.load,
        warmup=tuple(group.rounds[:first]),
        rounds=kept,
        windows=tuple(window for before, window in group.windows if before > first),
        fixed=group.fixed,
        one_off_seconds=group.first_seconds + group.first_times.while_probing + group.first_times.once,
        first_time_share=group.first_times.share_to_the_end,
        new_shape_seconds=new.seconds,
        new_shape_error=new.error,
        new_shapes_apart=tuple(
            NewShape(stratum=stratum, seconds=own, error=error) for stratum, (own, error) in sorted(new.apart.items())
        ),
        seconds_spent=group.spent,
        ended_by=group.ended_by,
        error=group.error,
    )


def what_to_tell(group: Group, kept: tuple[Round, ...], width: float, *, budget: float, target: float) -> Told:
    """What ended the timing of a signature, and what it could not show; nothing of a reference.

    Args:
        kept: as for `measurement_of`.
        width: half of the 90 % interval that the timings allow, relative.
        budget: seconds.
        target: of the width.
    """
    if group.is_reference:
        return Told()
    name, notes, warnings = group.rows[0].name, [], []
    if group.ended_by == "budget" and width > target:
        warnings.append(
            f"{name}: the budget of {budget:g} s was spent while the timings alone still allowed ±{width:.1%} "
            f"(--precision-target is ±{target:.1%}). Give more time with --budget."
        )
    share = group.first_times.share_to_the_end
    if share > SETTLED:
        notes.append(
            f"{name}: new micro-batches took {share:.0%} longer the first time to the end; the range reaches up for "
            "it. A longer --budget shows whether it ends"
        )
    if group.ended_by == "precision":
        notes.append(
            f"{name}: timed for {group.spent:.0f} s, until the timings alone allowed no more than ±{width:.1%}, "
            f"narrower than the ±{target:.1%} asked for"
        )
    if group.ended_by == "budget" and width <= target:
        notes.append(
            f"{name}: timed for {group.spent:.0f} s, until the budget was spent; the timings alone allow ±{width:.1%}, "
            f"within the ±{target:.1%} asked for"
        )
    if group.ended_by == "rounds":
        notes.append(
            f"{name}: timed for {group.spent:.0f} s of the {budget:g} s, until {len(group.rounds):,} rounds were done; "
            f"the timings alone allow ±{width:.1%}, which more would hardly narrow"
        )
    has_windows = any(before > len(group.rounds) - len(kept) for before, _ in group.windows)
    if kept and not has_windows and group.is_live:
        notes.append(
            f"{name}: no whole window could be timed in the budget, so the sum of the parts was not checked against "
            "one. A longer --budget checks it"
        )
    return Told(tuple(notes), tuple(warnings))
