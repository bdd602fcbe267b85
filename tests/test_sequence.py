"""Micro-batches as a GPU is given them: windows begin where they begin in a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import FakeDevice, make_data, make_job, make_row

from planner.decks import Decks, Drawn, sample_of
from planner.group import rows_of
from planner.measure import measure
from planner.measurement import PlannedRow
from planner.sequence import Sequence, place_in_window, sequence
from planner.strata import keys, make_strata
from trainer.widths import shared_width

LENGTHS = np.random.default_rng(5).integers(200, 900, 640)
DATA = make_data(LENGTHS)


def drawn(row: PlannedRow, *micros: int) -> list[Drawn]:
    shapes = row.plan.micro_shapes(LENGTHS)
    samples = [sample_of(shapes, micro, 0) for micro in micros]
    return [
        Drawn(row.plan, micro, row.kind, one.rows * one.width, one) for micro, one in zip(micros, samples, strict=True)
    ]


def run_of(drawn: list[Drawn], *, in_windows: bool = True, most: float = 1e9) -> Sequence:
    return sequence(drawn, range(len(drawn)), DATA, in_windows=in_windows, most=most)


def row_of(**changes: Any) -> PlannedRow:
    return make_row(make_job(device="cuda", **changes), DATA)


def test_the_second_of_a_window_of_two_follows_its_first_as_in_the_run() -> None:
    row = row_of(micro_batch_size=8)
    assert place_in_window(row.plan, 6) == (0, 2)
    assert place_in_window(row.plan, 7) == (1, 2)
    found = run_of(drawn(row, 7, 2), in_windows=True)
    assert found.micro_batches == [rows_of(row.plan, micro) for micro in (6, 7, 2)]
    assert found.begins == [0, 2]
    assert found.places == [1, 2]
    shapes = row.plan.micro_shapes(LENGTHS)
    widths = shared_width(shapes.width)
    assert found.shapes == [(int(shapes.rows[micro]), int(widths[micro])) for micro in (6, 7, 2)]
    assert found.longest_rows == [0, 0, 0]


def test_one_that_does_not_fit_is_not_run_for_the_sake_of_another() -> None:
    row = row_of(micro_batch_size=8)
    first = row.plan.micro_shapes(LENGTHS).padded_tokens[6]
    found = run_of(drawn(row, 7), in_windows=True, most=float(first) - 1)
    assert found.micro_batches == [rows_of(row.plan, 7)]
    assert found.begins == [0]


def test_the_largest_of_all_that_fits_is_run_before_its_second() -> None:
    """As wide as the plan has it, whatever a GPU's widths are rounded up to."""
    row = row_of(micro_batch_size=8)
    shapes = row.plan.micro_shapes(LENGTHS)
    largest = int(keys(shapes).argmax())
    assert place_in_window(row.plan, largest) == (0, 2)
    assert shared_width(int(shapes.width[largest])) > shapes.width[largest]
    found = run_of(drawn(row, largest + 1), most=float(keys(shapes).max()))
    assert found.micro_batches == [rows_of(row.plan, largest), rows_of(row.plan, largest + 1)]


def test_those_of_longer_windows_make_windows_of_their_own_from_the_longest_to_the_shortest() -> None:
    """As many as they would fill: behind a long one what the host does for a short one is hidden, and there are few."""
    row = row_of(micro_batch_size=4)
    micros = (5, 4, 6, 7, 0, 9, 30, 21)
    found = run_of(drawn(row, *micros))
    assert found.begins == [0, 4]
    keys = row.plan.micro_shapes(LENGTHS).padded_tokens
    at = {place: micro for place, micro in zip(found.places, micros, strict=True)}
    for first in found.begins:
        window = [int(keys[at[place]]) for place in range(first, first + 4)]
        assert window == sorted(window, reverse=True)
    heads = sorted(int(keys[at[place]]) for place in found.begins)
    assert heads == sorted(int(keys[micro]) for micro in micros)[-2:]
    assert [found.micro_batches[place] for place in found.places] == [rows_of(row.plan, micro) for micro in micros]


def test_the_order_that_is_asked_for_holds_where_there_are_no_windows() -> None:
    row = row_of(micro_batch_size=4)
    asked = drawn(row, 5, 4, 6)
    found = sequence(asked, [2, 0, 1], DATA, in_windows=False, most=1e9)
    assert found.micro_batches == [rows_of(row.plan, micro) for micro in (6, 5, 4)]
    assert found.places == [1, 2, 0]
    assert found.begins == []


def test_each_micro_batch_is_made_as_wide_as_its_own_plan_has_it() -> None:
    """A worker serves plans that are packed and plans that are not, and of several lengths."""
    rows = [row_of(packing=True, packed_length=length) for length in (4096, 1 << 15)] + [row_of(micro_batch_size=8)]
    shapes = {id(row.plan): row.plan.micro_shapes(LENGTHS) for row in rows}
    deck = Decks(rows, shapes, make_strata([(row.kind, shapes[id(row.plan)]) for row in rows], 4), 4)
    found = {id(one.plan): one.longest_row for one in deck.draw(np.random.default_rng(0))}
    widest = [shapes[id(row.plan)].widest for row in rows]
    assert [found[id(row.plan)] for row in rows] == [widest[0], widest[1], 0]
    assert widest[1] < 1 << 15  # a window's rows, not what a row could hold: else each would be called a rest
    (rest,) = (micro for micro in [int(np.argmin(shapes[id(rows[0].plan)].width))])
    one = replace(drawn(rows[0], rest)[0], longest_row=widest[0])
    asked = run_of([one], in_windows=False)
    assert asked.longest_rows == [widest[0]]
    assert asked.shapes == [(1, shared_width(int(shapes[id(rows[0].plan)].width[rest]), widest[0]))]
    assert asked.shapes[0][1] % (widest[0] // 32) == 0


def test_each_device_has_its_own_place_in_a_window() -> None:
    row = row_of(micro_batch_size=4, num_devices=2)
    assert [place_in_window(row.plan, micro) for micro in range(4, 8)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    found = run_of(drawn(row, 7), in_windows=True)
    assert found.micro_batches == [rows_of(row.plan, micro) for micro in (5, 7)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_windows_matter_where_a_host_launches_ahead_of_a_gpu(device: str) -> None:
    fake = FakeDevice(LENGTHS)
    begun: list[list[int]] = []
    factory = fake.factory

    def watched(job: Any) -> Any:
        prober = factory(job)
        run = prober.run

        def noted(micro_batches: Any, begins: list[int], longest_rows: list[int]) -> list[float]:
            begun.append(begins)
            return run(micro_batches, begins, longest_rows)

        prober.run = noted  # type: ignore[method-assign]
        return prober

    row = make_row(make_job(device=device, micro_batch_size=16), DATA)
    measure([row], DATA, watched, budget_seconds=20, clock=fake.clock)
    assert begun
    assert all(bool(begins) == (device == "cuda") for begins in begun)
