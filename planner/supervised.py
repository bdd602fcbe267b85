"""The share of tokens that are learnt from, which the cost of the loss depends on: how much it may differ."""

from __future__ import annotations

from planner.measurement import Measurement
from trainer.job import Loss

# By how much, of all tokens. The lean loss takes these tokens alone through the output layer, the plain one only
# through the softmax. With all tokens instead of 5 % the bundled model's micro-step took 10 % longer with the lean loss
# and 3 % with the plain one (1,792 words, one core, 2026-11-27). The larger the vocabulary beside the layers, the more
# that is: by the sizes of a 0.5 B model of 152,000 words 38 % with the lean loss, of which 2 % are let through here.
NEAR: dict[Loss, float] = {"lean": 0.05, "plain": 0.25}


def is_near(lowest: float, highest: float, wanted: float, measurement: Measurement) -> bool:
    """Whether timings of plans with shares from lowest to highest may stand for a plan with another."""
    is_lean = measurement.signature.loss == "lean" and not (measurement.load and measurement.load.lean_refused)
    near = NEAR["lean" if is_lean else "plain"]
    return lowest - near <= wanted <= highest + near
