"""A step signature that was timed, as a `Measurement`, and what is to be said of how it was."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planner.estimator import fit_cost
from planner.first_times import deviation
from planner.group import Group
from planner.measurement import Measurement, NewShape, Round

# On a GPU kernels are loaded and chosen when first asked for: on an H100 up to half of the first ten seconds went into
# it, and later nothing that showed (2026-11-26). So the micro-batches of a round are run twice there, and the second
# time counts. Where the first time still takes this much longer at the end, it is said.
SETTLED = 0.03
SURELY = 3.0  # standard deviations of a sum of a few timings


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
        one_off_seconds=group.first_seconds + _loaded_while_probing(group, kept, new.seconds) + group.first_times.once,
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


def _loaded_while_probing(group: Group, kept: tuple[Round, ...], new_shape: float) -> float:
    """Seconds that the micro-steps of the memory probe took beyond what such ones take later, on a GPU.

    They are the first of their process: kernels are loaded in them and memory is taken from the driver, as in the run's
    first steps. Left out, the first quarter of runs of 15 s took 15 to 20 % longer than planned (an H200, 2026-11-27).
    """
    if group.signature.device == "cpu" or not kept or not group.probed_first:
        return 0.0
    fit = fit_cost(kept)
    usual = np.array([fit.micro_seconds(*shape) + new_shape * is_new for shape, _, is_new in group.probed_first])
    beyond = float(sum(seconds for _, seconds, _ in group.probed_first) - usual.sum())
    ratios = [
        one.seconds / fit.micro_seconds(one.rows, one.width) for each in kept for one in each.samples if one.seconds
    ]
    return beyond if beyond > SURELY * deviation(np.array(ratios)) * math.sqrt(float((usual**2).sum())) else 0.0


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
            f"{name}: timed for {group.spent:.0f} s, until the range of ±{width:.1%} was narrower than the "
            f"±{target:.1%} asked for"
        )
    if group.ended_by == "budget" and width <= target:
        notes.append(
            f"{name}: timed for {group.spent:.0f} s, until the budget was spent; the range of ±{width:.1%} was within "
            f"the ±{target:.1%} asked for"
        )
    has_windows = any(before > len(group.rounds) - len(kept) for before, _ in group.windows)
    if kept and not has_windows and group.is_live:
        notes.append(
            f"{name}: no whole window could be timed in the budget, so the sum of the parts was not checked against "
            "one. A longer --budget checks it"
        )
    return Told(tuple(notes), tuple(warnings))
