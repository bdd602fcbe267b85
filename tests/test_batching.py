"""The batch plan: every example where it belongs, whatever the lengths, splits, devices and packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presets.errors import DataError, RunError
from trainer import batching
from trainer.batching import BatchPlan, Pass, Stretch, make_batch_plan
from trainer.packing import pack

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=120).map(np.array)


def one_pass(count: int, size: int, epochs: int = 1) -> tuple[Pass, ...]:
    stretches = (Stretch(phase=0, global_batch_size=size),)
    return (Pass(examples=np.arange(count), num_epochs=epochs, stretches=stretches),)


def windows(plan: BatchPlan) -> list[tuple[int, ...]]:
    return [tuple(sorted(plan.documents_of_window(w).tolist())) for w in range(plan.num_steps)]


@settings(max_examples=150, deadline=None)
@given(
    lengths=LENGTHS,
    size=st.integers(1, 24),
    micro=st.integers(1, 9),
    devices=st.integers(1, 4),
    epochs=st.integers(1, 3),
    packed=st.one_of(st.none(), st.integers(20, 1000)),  # up to rows longer than any example
    sort=st.booleans(),
)
def test_every_example_is_in_the_plan_once_per_epoch_and_each_window_keeps_its_examples(
    lengths: np.ndarray, size: int, micro: int, devices: int, epochs: int, packed: int | None, sort: bool
) -> None:
    passes = one_pass(len(lengths), size, epochs)
    plain = make_batch_plan(lengths, passes, micro_batch_size=1, sort_window=False)
    plan = make_batch_plan(
        lengths, passes, micro_batch_size=micro, num_devices=devices, packed_length=packed, sort_window=sort
    )
    assert (np.bincount(plan.order, minlength=len(lengths)) == epochs).all()
    assert windows(plan) == windows(plain)  # the optimizer sees the same batches, however they are split
    assert plan.num_steps == epochs * -(-len(lengths) // size)
    in_window = np.diff(plan.window_offsets)
    assert (in_window % devices == 0).all()
    shapes = plan.micro_shapes(lengths)
    assert shapes.rows.max() <= micro
    assert shapes.tokens.sum() == epochs * lengths.sum()
    if packed is not None:
        rows = np.add.reduceat(lengths[plan.order], plan.row_offsets[:-1])
        alone = np.diff(plan.row_offsets) == 1
        assert ((rows <= packed) | alone).all()


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40), room=st.integers(1, 150))
def test_packing_is_best_fit_and_close_to_the_fewest_rows(lengths: list[int], room: int) -> None:
    ordered = sorted(lengths, reverse=True)
    rows = pack(np.array([ordered]), room)[0]
    left: list[int] = []  # best-fit decreasing, one document at a time
    expected = []
    for length in ordered:
        fitting = [(space, index) for index, space in enumerate(left) if space >= length]
        if fitting:
            index = min(fitting)[1]
        else:
            index = len(left)
            left.append(room)
        left[index] -= length
        expected.append(index)
    assert rows.tolist() == expected


def test_the_plan_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    lengths = np.arange(1, 101)
    first, again, other = (make_batch_plan(lengths, one_pass(100, 8), micro_batch_size=2, seed=s) for s in (1, 1, 2))
    assert (first.order == again.order).all()
    assert (first.order != other.order).any()


def test_the_second_epoch_is_shuffled_anew_and_ends_with_its_own_partial_window() -> None:
    plan = make_batch_plan(np.ones(20, dtype=np.int64), one_pass(20, 8, epochs=2), micro_batch_size=1)
    sizes = np.diff(plan.window_documents)
    assert sizes.tolist() == [8, 8, 4, 8, 8, 4]
    assert plan.window_epoch.tolist() == [0, 0, 0, 1, 1, 1]
    assert plan.order[:20].tolist() != plan.order[20:].tolist()


def test_a_change_of_window_size_comes_at_its_step_also_across_epochs() -> None:
    stretches = (Stretch(phase=0, global_batch_size=8, num_steps=4), Stretch(phase=1, global_batch_size=4))
    passes = (Pass(examples=np.arange(20), num_epochs=2, stretches=stretches),)
    plan = make_batch_plan(np.ones(20, dtype=np.int64), passes, micro_batch_size=1)
    assert np.diff(plan.window_documents).tolist() == [8, 8, 4, 8, 4, 4, 4]
    assert plan.window_phase.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_rows_of_a_partial_window_are_dealt_evenly_over_devices() -> None:
    plan = make_batch_plan(np.ones(5, dtype=np.int64), one_pass(5, 8), micro_batch_size=4, num_devices=2)
    assert plan.micro_shapes(np.ones(5, dtype=np.int64)).rows.tolist() == [3, 2]


def test_a_plan_survives_saving_and_a_damaged_file_is_an_error_of_one_line(tmp_path) -> None:
    plan = make_batch_plan(np.arange(1, 51), one_pass(50, 8), micro_batch_size=4, packed_length=60)
    plan.save(tmp_path / "plan.npz")
    back = BatchPlan.load(tmp_path / "plan.npz")
    for name in ("order", "row_offsets", "micro_offsets", "window_offsets", "window_phase", "evaluation"):
        assert (getattr(back, name) == getattr(plan, name)).all()
    content = (tmp_path / "plan.npz").read_bytes()
    (tmp_path / "plan.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=r"plan\.npz: the batch plan cannot be read"):
        BatchPlan.load(tmp_path / "plan.npz")


def test_an_empty_pass_is_an_error() -> None:
    with pytest.raises(DataError, match="no training example is left"):
        make_batch_plan(np.ones(0, dtype=np.int64), one_pass(0, 8), micro_batch_size=1)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=400).map(np.array),
    size=st.integers(1, 5),
    epochs=st.integers(1, 2),
    packed=st.one_of(st.none(), st.integers(20, 1000)),
    seed=st.integers(0, 1000),
)
def test_grouping_by_length_keeps_each_example_once_per_epoch_and_never_takes_a_held_out_one(
    lengths: np.ndarray, size: int, epochs: int, packed: int | None, seed: int
) -> None:
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    training, held_out = np.sort(shuffled[: -(-len(lengths) * 3 // 4)]), np.sort(shuffled[-(-len(lengths) * 3 // 4) :])
    stretches = (Stretch(phase=0, global_batch_size=size, num_steps=7), Stretch(phase=1, global_batch_size=2 * size))
    passes = (Pass(examples=training, num_epochs=epochs, stretches=stretches),)
    named = {"micro_batch_size": size, "evaluation": held_out, "seed": seed, "packed_length": packed}
    plan = make_batch_plan(lengths, passes, group_by_length=True, **named)
    plain = make_batch_plan(lengths, passes, **named)
    assert (np.diff(plan.window_documents) == np.diff(plain.window_documents)).all()
    documents_of_epoch = np.repeat(plan.window_epoch, np.diff(plan.window_documents))
    for epoch in range(epochs):
        assert sorted(plan.order[documents_of_epoch == epoch].tolist()) == training.tolist()


def test_grouping_by_length_saves_most_of_the_padding_in_windows_of_all_lengths_in_random_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 8_000)
    plain = make_batch_plan(lengths, one_pass(8_000, 16), micro_batch_size=16)
    grouped = make_batch_plan(lengths, one_pass(8_000, 16), micro_batch_size=16, group_by_length=True)
    again = make_batch_plan(lengths, one_pass(8_000, 16), micro_batch_size=16, group_by_length=True)
    assert (grouped.order == again.order).all()
    assert windows(grouped) != windows(plain)

    def padding(plan: BatchPlan) -> float:
        return float(1 - lengths.sum() / plan.micro_shapes(lengths).padded_tokens.sum())

    assert padding(plain) > 0.4
    assert padding(grouped) < 0.05
    widths = grouped.micro_shapes(lengths).width
    assert abs(np.corrcoef(np.arange(len(widths)), widths)[0, 1]) < 0.1  # no length comes before another
    assert abs(np.corrcoef(widths[1:], widths[:-1])[0, 1]) < 0.1
    # A mega-batch mixes what the shuffle mixed: examples of one length do not always meet the same others.
    other = make_batch_plan(lengths, one_pass(8_000, 16), micro_batch_size=16, group_by_length=True, seed=1)
    assert not set(windows(grouped)) & set(windows(other))


@pytest.mark.parametrize("packed", [None, 300])
@pytest.mark.parametrize(("micro", "devices"), [(1, 1), (4, 1), (1, 3)])
def test_plans_and_their_shapes_are_the_same_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, packed: int | None, micro: int, devices: int
) -> None:
    lengths = np.random.default_rng(1).integers(1, 200, 500)
    stretches = (Stretch(phase=0, global_batch_size=24, num_steps=9), Stretch(phase=1, global_batch_size=12))
    passes = (Pass(examples=np.arange(500), num_epochs=2, stretches=stretches),)

    def made() -> BatchPlan:
        return make_batch_plan(lengths, passes, micro_batch_size=micro, num_devices=devices, packed_length=packed)

    whole = made()
    monkeypatch.setattr(batching, "AT_ONCE", 50)
    assert made().digest() == whole.digest()
    shapes = whole.micro_shapes(lengths)
    for micro_batch in range(whole.num_micro_batches):  # what it says, counted by hand
        rows = [int(lengths[row].sum()) for row in whole.rows_of_micro_batch(micro_batch)]
        found = (shapes.rows[micro_batch], shapes.width[micro_batch], shapes.tokens[micro_batch])
        assert found == (len(rows), max(rows, default=0), sum(rows))
    blocks = list(shapes.blocks(multiple=7))
    assert len(blocks) > 1
    assert all(len(one.rows) % 7 == 0 for one in blocks[:-1])
    assert np.concatenate([one.tokens for one in blocks]).tolist() == shapes.tokens.tolist()


def test_plans_that_live_together_share_the_offsets_that_only_count_up() -> None:
    lengths = np.ones(90, dtype=np.int64)
    many, few = (make_batch_plan(lengths, one_pass(count, 8), micro_batch_size=1) for count in (90, 60))
    assert few.row_offsets.tolist() == few.micro_offsets.tolist() == list(range(61))
    for offsets in (many.micro_offsets, few.row_offsets, few.micro_offsets):
        assert np.shares_memory(offsets, many.row_offsets)
        assert not offsets.flags.writeable
