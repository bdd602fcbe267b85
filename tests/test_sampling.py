"""Which examples a pass uses: exact counts, the published rule, and nothing held out."""

from __future__ import annotations

import numpy as np
import pytest

from presets.errors import DataError
from presets.schema import Sampling
from trainer.sampling import RECENT_SECONDS, evaluation_size, select, split_evaluation

DAY = 86_400.0


def scores(count: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    return generator.lognormal(2, 1, count), 1.7e9 + np.sort(generator.uniform(0, 700, count)) * DAY


def test_a_random_sample_has_exactly_the_asked_size_and_is_seeded() -> None:
    everything = np.arange(1000)
    for sampling, size in ((Sampling(size=137), 137), (Sampling(ratio=0.5), 500), (Sampling(ratio=0.0011), 1)):
        first, _ = select(sampling, everything, engagement=None, created_at=None, seed=1)
        again, _ = select(sampling, everything, engagement=None, created_at=None, seed=1)
        other, _ = select(sampling, everything, engagement=None, created_at=None, seed=2)
        assert len(first) == len(set(first.tolist())) == size
        assert (first == again).all()
        assert size == 1 or (first != other).any()


@pytest.mark.parametrize("score", ["engagement", "recency", "loss"])
def test_top_takes_the_highest_scores_by_name(score: str) -> None:
    engagement, created = scores()
    loss = np.random.default_rng(9).uniform(0, 5, 1000)
    by = {"engagement": engagement, "recency": created, "loss": loss}[score]
    candidates = np.arange(0, 1000, 2)
    chosen, _ = select(
        Sampling(strategy="top", size=50, score=score),
        candidates,
        engagement=engagement,
        created_at=created,
        loss=loss,
        seed=1,
    )
    assert set(chosen.tolist()) == set(candidates[np.argsort(-by[candidates])[:50]].tolist())


def test_prioritized_takes_all_of_high_engagement_all_recent_ones_and_fills_up_to_the_ratio() -> None:
    engagement, created = scores()
    everything = np.arange(1000)
    chosen, notes = select(
        Sampling(strategy="prioritized", ratio=0.6), everything, engagement=engagement, created_at=created, seed=1
    )
    high = engagement >= np.quantile(engagement, 0.75)
    recent = created >= created.max() - RECENT_SECONDS
    assert len(chosen) == 600
    assert set(everything[high | recent].tolist()) <= set(chosen.tolist())
    assert "of high engagement" in notes[0]


def test_prioritized_with_too_many_must_haves_keeps_the_highest_scores_and_says_so() -> None:
    engagement, created = scores()
    chosen, notes = select(
        Sampling(strategy="prioritized", ratio=0.1), np.arange(1000), engagement=engagement, created_at=created, seed=1
    )
    assert len(chosen) == 100
    assert set(chosen.tolist()) == set(np.argsort(-engagement)[:100].tolist())
    assert "more than the 100" in notes[0]


def test_recent_is_counted_from_the_newest_message_not_from_today() -> None:
    created = 1.0e9 + np.arange(100) * DAY * 10  # the newest of them many years ago
    engagement = np.zeros(100)
    engagement[:2] = 5.0
    chosen, _ = select(
        Sampling(strategy="prioritized", ratio=0.15), np.arange(100), engagement=engagement, created_at=created, seed=1
    )
    assert {0, 1, 99, 98, 97, 96, 95, 94, 93, 92, 91, 90} <= set(chosen.tolist())


def test_data_without_the_field_is_refused_with_the_option_that_names_it() -> None:
    with pytest.raises(DataError, match=r"needs the field 'engagement'.*--columns engagement=COLUMN"):
        select(Sampling(strategy="top", size=5), np.arange(10), engagement=None, created_at=None, seed=1)
    with pytest.raises(DataError, match="created_at"):
        select(
            Sampling(strategy="prioritized", ratio=0.5), np.arange(10), engagement=np.ones(10), created_at=None, seed=1
        )


def test_asking_for_more_than_there_is_uses_all_and_says_so() -> None:
    chosen, notes = select(Sampling(size=50), np.arange(10), engagement=None, created_at=None, seed=1)
    assert len(chosen) == 10
    assert "there are 10" in notes[0]


@pytest.mark.parametrize(("count", "expected"), [(10, 3), (100, 8), (10_000, 200), (1_000_000, 1000), (1, 0)])
def test_the_held_out_part_is_two_percent_at_least_a_handful_at_most_a_thousand(count: int, expected: int) -> None:
    assert evaluation_size(count, 0.02, 8, 1000) == expected


def test_training_and_evaluation_are_apart_and_together_everything() -> None:
    training, evaluation = split_evaluation(500, 17, seed=4)
    assert len(evaluation) == 17
    assert sorted([*training.tolist(), *evaluation.tolist()]) == list(range(500))


def test_prioritized_names_both_fields_that_are_missing_and_an_option_that_works() -> None:
    sampling = Sampling(strategy="prioritized", ratio=0.5)
    with pytest.raises(DataError, match=r"'engagement' and 'created_at'.*--sampling-strategy random"):
        select(sampling, np.arange(10), engagement=None, created_at=None, seed=1)
