"""Batch plans of any lengths and settings: every example once an epoch, windows that add up, packed or not."""

from __future__ import annotations

import io
import itertools
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from budget import MUTANTS, SEEDS, fuzzed, mutants
from hypothesis import given
from hypothesis import strategies as st

from presets.errors import RunError
from trainer.batching import BatchPlan, Pass, Stretch, make_batch_plan


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


@fuzzed()
@given(SEEDS)
def test_every_example_is_trained_once_an_epoch_in_windows_of_the_global_batch(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(MUTANTS):
        check_plan(
            lengths=[chance.randint(1, 40) for _ in range(chance.randint(1, 12))],
            micro=chance.randint(1, 3),
            devices=chance.randint(1, 3),
            accumulation=[chance.randint(1, 3) for _ in range(chance.randint(1, 3))],
            epochs=chance.randint(1, 3),
            steps=chance.randint(1, 4),
            packed=chance.choice((None, chance.randint(2, 60))),
            sort=chance.random() < 0.5,
            group=chance.random() < 0.3,
            held_out=chance.randint(0, 5),
            seed=chance.getrandbits(32),
        )


def check_plan(
    *, lengths: list[int], micro: int, devices: int, accumulation: list[int], epochs: int, steps: int,
    packed: int | None, sort: bool, group: bool, held_out: int, seed: int,
) -> None:  # fmt: skip
    tokens = np.array(lengths)
    evaluation = np.arange(min(held_out, len(lengths) - 1))
    training = np.arange(len(evaluation), len(lengths))
    sizes = [micro * devices * one for one in accumulation]
    stretches = tuple(
        Stretch(phase=number, global_batch_size=size, num_steps=None if number == len(sizes) - 1 else steps)
        for number, size in enumerate(sizes)
    )
    passes = (Pass(examples=training, num_epochs=epochs, stretches=stretches),)

    def made(packed_length: int | None) -> BatchPlan:
        return make_batch_plan(
            tokens, passes, micro_batch_size=micro, evaluation=evaluation, num_devices=devices, seed=seed,
            sort_window=sort, packed_length=packed_length, group_by_length=group,
        )  # fmt: skip

    plan = made(packed)
    seen: Counter[int] = Counter()
    by_epoch: dict[int, list[int]] = {}
    for window in range(plan.num_steps):
        documents = plan.documents_of_window(window).tolist()
        by_epoch.setdefault(int(plan.window_epoch[window]), []).extend(documents)
        seen.update(documents)
        micros = range(plan.window_offsets[window], plan.window_offsets[window + 1])
        assert len(micros) % devices == 0
        size = sizes[int(plan.window_phase[window])]
        assert 1 <= len(documents) <= size
        rows = [row.tolist() for one in micros for row in plan.rows_of_micro_batch(one)]
        assert sorted(itertools.chain.from_iterable(rows)) == sorted(documents)
        assert all(len(plan.rows_of_micro_batch(one)) <= micro for one in micros)
        for row in rows:
            assert row
            assert len(row) == 1 if packed is None else len(row) == 1 or tokens[row].sum() <= packed
    assert set(by_epoch) == set(range(epochs))
    assert all(sorted(found) == training.tolist() for found in by_epoch.values())
    assert seen == dict.fromkeys(training.tolist(), epochs)
    plain = made(None)
    assert plan.num_steps == plain.num_steps
    assert all(
        sorted(plan.documents_of_window(one)) == sorted(plain.documents_of_window(one)) for one in range(plan.num_steps)
    )
    assert int(plan.micro_shapes(tokens).tokens.sum()) == epochs * int(tokens[training].sum())


def _saved() -> list[bytes]:
    found = []
    for count in (3, 40):
        lengths = np.arange(1, count + 1)
        stretch = Stretch(phase=0, global_batch_size=4)
        plan = make_batch_plan(
            lengths, (Pass(examples=np.arange(count), num_epochs=1, stretches=(stretch,)),), micro_batch_size=2
        )
        for save in (np.savez, np.savez_compressed):
            out = io.BytesIO()
            save(out, **{name: getattr(plan, name) for name in BatchPlan.__dataclass_fields__})
            found.append(out.getvalue())
    return found


@fuzzed()
@given(st.sampled_from(_saved()), SEEDS)
def test_a_damaged_batch_plan_is_whole_or_refused(folder: Path, content: bytes, seed: int) -> None:
    for one in mutants(content, seed):
        check_file(folder / "batch_plan.npz", one)


def check_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    why = ""
    try:
        plan = BatchPlan.load(path)
    except RunError as reason:
        why = str(reason)
    if why:
        assert "batch_plan.npz" in why
        return
    for window in range(plan.num_steps):
        plan.documents_of_window(window)
    for micro in range(plan.num_micro_batches):
        plan.rows_of_micro_batch(micro)
    assert plan.window_documents[-1] == plan.num_examples
