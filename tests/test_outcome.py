"""What `plan check` says of a finished run."""

from __future__ import annotations

import pytest
from fakes import make_job

from planner.outcome import FEW_STEPS, check_text
from trainer.evaluate import EvaluationResult
from trainer.finished import Check

HELD_OUT = Check(
    before=EvaluationResult(loss=2.0, num_examples=8, num_tokens=100),
    after=EvaluationResult(loss=1.5, num_examples=8, num_tokens=100),
    answers=(),
)


@pytest.mark.parametrize(
    ("preset", "num_steps", "remedies"),
    [
        ("baseline", 500, "raise the learning rate slightly (it was 0.0002)."),
        # The published guide's own line, for its own case.
        ("aggressive", 985, "reduce gradient accumulation to 32, or raise the learning rate slightly (it was 0.0003)."),
        (
            "baseline",
            20,
            "train for longer: 20 optimizer steps are few (more epochs, more data), "
            "or raise the learning rate slightly (it was 0.0002).",
        ),
    ],
)
def test_what_to_do_where_the_quality_is_poor(preset: str, num_steps: int, remedies: str) -> None:
    text = check_text(HELD_OUT, make_job(preset), num_steps=num_steps)
    assert text.splitlines()[-1] == f"If the quality is poor: {remedies}"


def test_a_run_of_a_hundred_steps_is_not_called_short() -> None:
    assert "few" not in check_text(HELD_OUT, make_job(), num_steps=FEW_STEPS)
    assert "few" in check_text(HELD_OUT, make_job(), num_steps=FEW_STEPS - 1)
