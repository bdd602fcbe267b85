"""What a run has still to do beside its steps: evaluations, sample answers, checkpoints, the result. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path

from presets import jsonio
from trainer.batching import BatchPlan
from trainer.job import Job
from trainer.planning import checkpoint_steps, evaluation_steps
from trainer.record import Breakdown

LONGEST = 100 * 365 * 86_400.0  # seconds; beyond, no calendar says when a run is done
LONGEST_PART = 1e8  # seconds: three years; what says that one evaluation took longer is damaged
BEFORE = {"evaluation": 1, "samples": 1}  # of each part, done before the first step


class Ahead:
    """After which steps a run does what, and how long each takes: as it took in this run, else as was predicted."""

    def __init__(
        self,
        job: Job,
        plan: BatchPlan,
        predicted: Breakdown | None,
        *,
        earlier: Mapping[str, float],
        each: Callable[[], Mapping[str, float]],
    ) -> None:
        """`predicted`: seconds of all of each part; `earlier`, `each`: of one, before a resume and since."""
        last = plan.num_steps
        held_out = len(plan.evaluation) > 0
        self._after: dict[str, list[int]] = {  # steps, ascending
            "evaluation": [*sorted(evaluation_steps(job, last)), last] if held_out else [],
            "samples": [last] if held_out and job.evaluation.num_samples else [],
            "checkpoints": sorted(checkpoint_steps(job, last)),
            "save": [last],
        }
        self._known = {
            name: getattr(predicted, name) / (len(steps) + BEFORE.get(name, 0))
            for name, steps in self._after.items()
            if predicted is not None and steps
        }
        self._known |= earlier
        self._each = each

    def remaining(self, done: int) -> dict[str, int]:
        """How often each part is still to come when the step `done` ends: what follows it at once is among it."""
        return {name: len(at) - bisect_left(at, done) for name, at in self._after.items()}

    def seconds(self, done: int) -> float:
        """Seconds of all that remains when the step `done` ends, steps not counted; a part of unknown length is 0."""
        known = self._known | dict(self._each())
        return sum(times * known.get(name, 0.0) for name, times in self.remaining(done).items())


def earlier_evaluations(folder: Path) -> dict[str, float]:
    """{"evaluation": seconds that one took} as a run folder tells, for `Ahead`; empty where it does not."""
    found = []
    try:
        lines = (folder / "evaluations.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            found.append(float(jsonio.loads(line)["seconds"]))
        except (ValueError, KeyError, TypeError, OverflowError):  # of an earlier version, or cut off by a crash
            continue
    found = [seconds for seconds in found if 0 <= seconds <= LONGEST_PART]
    return {"evaluation": found[-1]} if found else {}
