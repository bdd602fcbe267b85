"""What is said of a finished run, at its end and by `plan check`."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import make_job

from planner.outcome import FEW_STEPS, check_text, outcome_text
from trainer.evaluate import EvaluationResult
from trainer.finished import Check
from trainer.record import Actual, Predicted, RunRecord

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


@pytest.mark.parametrize(
    ("then", "now", "is_told"), [(0.02, 0.6, True), (0.6, 0.02, True), (0.1, 0.2, False), (None, 0.6, False)]
)
def test_a_run_that_others_slowed_says_so(tmp_path: Path, then: float | None, now: float, is_told: bool) -> None:
    predicted = Predicted(seconds=100.0, seconds_low=90.0, seconds_high=110.0, others_share=then)
    record = RunRecord(
        status="finished",
        job=make_job(),
        predicted=predicted,
        actual=Actual(seconds=180.0, train_seconds=170.0, others_share=now),
        versions={},
    )
    (verdict,) = (line for line in outcome_text(record, tmp_path).splitlines() if "does NOT hold" in line)
    assert ("Others (programs" in verdict) is is_told
    if is_told and then is not None:
        assert f"took {now:.0%} of the CPU's time while it ran, and {then:.0%} while it was timed" in verdict
