"""Lengths -> BatchPlan: the list of batches that the estimator sums and the trainer executes. numpy only.

A plan is four nested lists in flat arrays: windows of micro-batches of rows of documents. A document is one example; a
row holds one document, or several when packed; a window is one optimizer step. Micro-batch j of a window belongs to
device j % num_devices, and every window holds a multiple of `num_devices` micro-batches (empty ones at the end where a
partial window has too few rows), so that each process does the same number.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, fields
from dataclasses import field as dataclass_field
from pathlib import Path

import numpy as np

from presets.errors import DataError, RunError
from trainer.beginning import Beginnings
from trainer.packing import pack
from trainer.tokens import IntArray

MEGA_WINDOWS = 50  # windows whose examples are sorted together when grouping by length, as in transformers
AT_ONCE = 1 << 18  # examples or micro-batches that are worked on together: what that takes besides stays small


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Consecutive windows of one size."""

    phase: int  # index of the phase it belongs to
    global_batch_size: int  # examples per window
    num_steps: int | None = None  # windows; None: to the end of the pass


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pass:
    """Some examples, gone over `num_epochs` times, each epoch shuffled anew and ended by its own partial window."""

    examples: IntArray  # (num_examples_of_the_pass,)
    num_epochs: int
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroShapes:
    """What the cost of each micro-batch depends on; one entry a micro-batch."""

    rows: IntArray  # sequences
    width: IntArray  # tokens in the longest row: the padded length
    tokens: IntArray  # real tokens

    @property
    def padded_tokens(self) -> IntArray:
        return self.rows * self.width

    @property
    def widest(self) -> int:
        """Tokens in the longest row; 0 where there is none."""
        return int(self.width.max(initial=0))

    def longest_row(self, packing: bool) -> int:
        """What `trainer.widths.shared_width` goes by: tokens in the longest row of a packed plan, else 0."""
        return self.widest if packing else 0

    @property
    def largest(self) -> int:
        """Padded tokens of the largest; 0 where there is none."""
        return max((int(some.padded_tokens.max()) for some in self.blocks()), default=0)

    def part(self, micro_batches: IntArray | slice) -> MicroShapes:
        """Those of some micro-batches."""
        return MicroShapes(
            rows=self.rows[micro_batches], width=self.width[micro_batches], tokens=self.tokens[micro_batches]
        )

    def blocks(self, multiple: int = 1) -> Iterator[MicroShapes]:
        """Neighbours together, about `AT_ONCE` of them and a multiple of `multiple`; views, no copies."""
        step = max(1, AT_ONCE // multiple) * multiple
        for start in range(0, len(self.rows), step):
            yield self.part(slice(start, start + step))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BatchPlan:
    """Every window, micro-batch, row and document of a run, in the order of execution."""

    order: IntArray  # (num_documents,) example index of each document
    row_offsets: IntArray  # (num_rows + 1,) into order
    micro_offsets: IntArray  # (num_micro_batches + 1,) into rows
    window_offsets: IntArray  # (num_windows + 1,) into micro-batches
    window_phase: IntArray  # (num_windows,)
    window_epoch: IntArray  # (num_windows,) counted from 0 within its pass
    evaluation: IntArray  # held-out examples, ascending
    num_devices: int = 1
    # (num_rows,) tokens that a row saves by holding only once what its documents begin with (trainer.beginning); (0,):
    # rows hold their documents whole.
    saved: IntArray = dataclass_field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def shares_beginnings(self) -> bool:
        return len(self.saved) > 0

    @property
    def num_steps(self) -> int:
        return len(self.window_offsets) - 1

    @property
    def num_micro_batches(self) -> int:
        return len(self.micro_offsets) - 1

    @property
    def num_examples(self) -> int:
        """Documents consumed, counted once per epoch."""
        return len(self.order)

    @property
    def window_documents(self) -> IntArray:
        """Offsets of each window's documents in `order`, (num_windows + 1,)."""
        return self.row_offsets[self.micro_offsets[self.window_offsets]]

    def documents_of_window(self, window: int) -> IntArray:
        """Example indices of one window, in execution order."""
        bounds = self.row_offsets[self.micro_offsets[self.window_offsets[window : window + 2]]]
        return self.order[bounds[0] : bounds[1]]

    def rows_of_micro_batch(self, micro: int) -> list[IntArray]:
        """Example indices of one micro-batch, one array a row; empty for an empty micro-batch."""
        first, last = self.micro_offsets[micro], self.micro_offsets[micro + 1]
        return [self.order[self.row_offsets[row] : self.row_offsets[row + 1]] for row in range(first, last)]

    def micro_shapes(self, lengths: IntArray) -> MicroShapes:
        """Rows, padded width and real tokens of each micro-batch; `lengths` are tokens per example."""
        row_tokens = lengths[self.order]
        if not _is_one_each(self.row_offsets, len(self.order)):
            row_tokens = _sums(row_tokens, self.row_offsets)
        if self.shares_beginnings:
            row_tokens = row_tokens - self.saved
        if _is_one_each(self.micro_offsets, len(row_tokens)):
            return MicroShapes(rows=_ones(len(row_tokens)), width=row_tokens, tokens=row_tokens)
        return MicroShapes(
            rows=np.diff(self.micro_offsets),
            width=_maxima(row_tokens, self.micro_offsets),
            tokens=_sums(row_tokens, self.micro_offsets),
        )

    def per_window(self, per_document: IntArray) -> IntArray:
        """Sum over each window's documents of a number per example, (num_windows,)."""
        return _sums(per_document[self.order], self.window_documents)

    def per_micro_batch(self, per_document: IntArray) -> IntArray:
        """Sum over each micro-batch's documents of a number per example, (num_micro_batches,)."""
        return _sums(per_document[self.order], self.row_offsets[self.micro_offsets])

    def digest(self) -> str:
        """What tells this plan from any other: SHA-256 over its arrays, in hexadecimal."""
        sha = hashlib.sha256()
        for field in fields(self):
            if field.name == "saved" and not self.shares_beginnings:
                continue  # as it was before there were any
            values = np.ascontiguousarray(getattr(self, field.name), dtype=np.int64)
            sha.update(f"{field.name} {values.shape}\n".encode())
            sha.update(values.data)
        return sha.hexdigest()

    def save(self, path: Path) -> None:
        """Write it whole or not at all, also in a power cut."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(aside, "wb") as file:
            np.savez_compressed(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)

    @classmethod
    def load(cls, path: Path) -> BatchPlan:
        """Raises: RunError where the file is missing or damaged."""
        try:
            # Opened here: of a damaged file numpy would leave the one that it opened open.
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                names = [field.name for field in fields(cls) if field.name != "saved" or "saved" in archive]
                arrays = {name: archive[name] for name in names}
            arrays["num_devices"] = int(arrays["num_devices"])
            plan = cls(**arrays)
            problem = plan._problem()
        except Exception as reason:  # a damaged archive raises anything, from zlib.error to NotImplementedError
            problem = " ".join(str(reason).split())[:200] or type(reason).__name__
        if problem:
            raise RunError(
                f"{path}: the batch plan cannot be read ({problem}). Remove the file: a resume makes it anew from the "
                "same data."
            )
        return plan

    def _problem(self) -> str | None:
        """What is wrong with the arrays of a file: offsets must rise from 0 to the end of what they point into."""
        levels = (self.order, self.row_offsets, self.micro_offsets, self.window_offsets)
        every = (*levels, self.window_phase, self.window_epoch, self.evaluation, self.saved)
        if any(array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) for array in every):
            return "an array is no list of whole numbers"
        lengths = (len(self.order), *(len(level) - 1 for level in levels[1:-1]))
        for offsets, length in zip(levels[1:], lengths, strict=True):
            if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != length or bool((np.diff(offsets) < 0).any()):
                return "its offsets do not fit together"
        if {len(self.window_phase), len(self.window_epoch)} != {self.num_steps} or self.num_devices < 1:
            return "its windows do not fit together"
        if len(self.saved) not in (0, len(self.row_offsets) - 1):
            return "its rows do not fit together"
        if any(len(array) and int(array.min()) < 0 for array in (self.order, self.evaluation, self.saved)):
            return "it names an example below 0"
        return None


def make_batch_plan(
    lengths: IntArray,
    passes: tuple[Pass, ...],
    *,
    micro_batch_size: int,
    evaluation: IntArray | None = None,
    num_devices: int = 1,
    seed: int = 42,
    sort_window: bool = True,
    packed_length: int | None = None,
    group_by_length: bool = False,
    beginnings: Beginnings | None = None,
) -> BatchPlan:
    """The batches of a run, the same for the same arguments.

    Sorting by length and packing happen inside a window only: its examples, and so its gradient, stay what they are.
    Grouping by length is another thing: it decides which examples share a window.

    Args:
        lengths: tokens per example, (num_examples,).
        passes: what is gone over, in order.
        micro_batch_size: rows per micro-batch and device.
        evaluation: held-out examples, carried along; none may be in a pass.
        sort_window: put a window's longest examples first, so that neighbours in a micro-batch are alike.
        packed_length: tokens per packed row; None: one document a row.
        group_by_length: make windows of examples that are alike in length, see `_grouped`.
        beginnings: what packed rows hold once.

    Raises:
        DataError: a pass is empty.
    """
    held_out = np.zeros(0, dtype=np.int64) if evaluation is None else evaluation
    parts: list[_Part] = []
    of_parts: list[tuple[int, int]] = []  # phase and epoch
    for number, one_pass in enumerate(passes):
        if len(one_pass.examples) == 0:
            raise DataError("no training example is left after sampling and holding out the evaluation part.")
        steps_done = 0
        for epoch in range(one_pass.num_epochs):
            # One generator per pass and epoch: the order of epoch 2 does not depend on what epoch 1 consumed.
            shuffled = np.random.default_rng([seed, 0xBA, number, epoch]).permutation(one_pass.examples)
            # Of its own, so that grouping leaves the shuffle before it as it is.
            of_windows = np.random.default_rng([seed, 0x6C, number, epoch])
            for stretch, examples in _stretches(one_pass.stretches, shuffled, steps_done):
                if group_by_length:
                    examples = _grouped(lengths, examples, stretch.global_batch_size, of_windows)
                for windows in _windows(examples, stretch.global_batch_size):
                    if packed_length is not None:
                        made = _packed(lengths, windows, micro_batch_size, num_devices, packed_length, beginnings)
                    else:
                        made = _plain(lengths, windows, micro_batch_size, num_devices, sort_window)
                    steps_done += len(windows)
                    parts += made
                    of_parts += [(stretch.phase, epoch)] * len(made)
    num_windows = [part.num_windows for part in parts]
    order = np.concatenate([part.order for part in parts]) if len(parts) > 1 else parts[0].order
    return BatchPlan(
        order=order,
        row_offsets=_offsets([part.rows for part in parts]),
        micro_offsets=_offsets([part.micros for part in parts]),
        window_offsets=_offsets([part.windows for part in parts]),
        window_phase=np.repeat([phase for phase, _ in of_parts], num_windows),
        window_epoch=np.repeat([epoch for _, epoch in of_parts], num_windows),
        evaluation=held_out,
        num_devices=num_devices,
        saved=np.concatenate([part.saved for part in parts]),
    )


def _stretches(stretches: tuple[Stretch, ...], shuffled: IntArray, steps_done: int) -> list[tuple[Stretch, IntArray]]:
    """One epoch's examples, cut at the changes of window size; steps are counted over all epochs of the pass."""
    found: list[tuple[Stretch, IntArray]] = []
    position, first_step = 0, 0
    for stretch in stretches:
        if position >= len(shuffled):
            break
        if stretch.num_steps is None:
            end = len(shuffled)
        else:
            remaining = first_step + stretch.num_steps - max(steps_done, first_step)
            first_step += stretch.num_steps
            if remaining <= 0:
                continue
            end = min(position + remaining * stretch.global_batch_size, len(shuffled))
        found.append((stretch, shuffled[position:end]))
        steps_done += -(-(end - position) // stretch.global_batch_size)
        position = end
    if position < len(shuffled):  # the last stretch goes on to the end, whatever its number of steps
        last = stretches[-1]
        found.append((last, shuffled[position:]))
    return found


def _grouped(lengths: IntArray, examples: IntArray, size: int, random: np.random.Generator) -> IntArray:
    """Shuffled examples in another order, whose full windows hold neighbours in length; each example once, as before.

    The shuffle is cut into mega-batches of `MEGA_WINDOWS` windows, each is sorted by length and cut into windows, and
    all full windows are shuffled: chance still decides what meets whom, and no length comes before another. What is
    left over for the partial window stays at the end, unsorted.
    """
    full = len(examples) // size * size
    mega = MEGA_WINDOWS * size
    whole = full // mega * mega
    pieces = []
    for piece in (examples[:whole].reshape(-1, mega), examples[whole:full].reshape(1, -1)):
        by_length = np.argsort(lengths[piece], axis=1, kind="stable")
        pieces.append(np.take_along_axis(piece, by_length, axis=1).reshape(-1, size))
    windows = np.concatenate(pieces)
    return np.concatenate([windows[random.permutation(len(windows))].ravel(), examples[full:]])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Part:
    """Some windows of a plan. Sizes that are all 1 may be `_ones`, which take no memory."""

    order: IntArray  # (documents,)
    rows: IntArray  # (rows,) documents in each
    micros: IntArray  # (micro-batches,) rows in each
    windows: IntArray  # (windows,) micro-batches in each
    saved: IntArray = dataclass_field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # as in BatchPlan

    @property
    def num_windows(self) -> int:
        return len(self.windows)


def _windows(examples: IntArray, size: int) -> list[IntArray]:
    """The full windows, (windows, size), and the partial one, (1, rest), where there are any."""
    full = len(examples) // size * size
    found = (examples[:full].reshape(-1, size), examples[full:].reshape(1, -1))
    return [windows for windows in found if windows.size]


def _blocks(windows: IntArray) -> list[slice]:
    """Neighbouring windows of about `AT_ONCE` examples together."""
    step = max(1, AT_ONCE // windows.shape[1])
    return [slice(start, start + step) for start in range(0, len(windows), step)]


def _longest_first(lengths: IntArray, windows: IntArray) -> IntArray:
    longest_first = np.argsort(-lengths[windows], axis=1, kind="stable")
    return np.take_along_axis(windows, longest_first, axis=1)


def _plain(
    lengths: IntArray, windows: IntArray, micro_batch_size: int, num_devices: int, sort_window: bool
) -> list[_Part]:
    """Windows of the same number of documents, one document a row: the sizes in one are those in all."""
    if sort_window:
        for block in _blocks(windows):  # in place: the shuffle was made for this plan
            windows[block] = _longest_first(lengths, windows[block])
    num_windows, size = windows.shape
    in_window, micros = _deal(np.array([size]), micro_batch_size, num_devices)
    one_each = len(micros) == size  # then no device is left over either
    return [
        _Part(
            order=windows.ravel(),
            rows=_ones(windows.size),
            micros=_ones(windows.size) if one_each else np.tile(micros, num_windows),
            windows=np.repeat(in_window, num_windows),
        )
    ]


def _packed(
    lengths: IntArray,
    windows: IntArray,
    micro_batch_size: int,
    num_devices: int,
    packed_length: int,
    beginnings: Beginnings | None,
) -> list[_Part]:
    """Windows of the same number of documents, packed into rows."""
    parts = []
    for block in _blocks(windows):
        some = _longest_first(lengths, windows[block])
        rows = pack(lengths[some], packed_length, None if beginnings is None else (beginnings, some))
        # Those of a family stand together in a row, the longest first, which holds what they begin with.
        families = np.zeros_like(some) if beginnings is None else beginnings.families[some].astype(np.int64)
        by_row = np.argsort(rows * (1 + int(families.max())) + families, axis=1, kind="stable")
        some, rows = np.take_along_axis(some, by_row, axis=1), np.take_along_axis(rows, by_row, axis=1)
        families = np.take_along_axis(families, by_row, axis=1)
        starts_row = np.ones(rows.shape, dtype=bool)
        starts_row[:, 1:] = rows[:, 1:] != rows[:, :-1]
        in_window, micros = _deal(starts_row.sum(axis=1), micro_batch_size, num_devices)
        sizes = np.diff(np.append(np.flatnonzero(starts_row.ravel()), some.size))
        saved = sizes[:0]
        if beginnings is not None:
            is_next = ~starts_row
            is_next[:, 1:] &= families[:, 1:] == families[:, :-1]
            saved = np.add.reduceat((beginnings.sizes[families] * is_next).ravel(), np.flatnonzero(starts_row.ravel()))
        parts.append(_Part(order=some.ravel(), rows=sizes, micros=micros, windows=in_window, saved=saved))
    return parts


def _deal(rows: IntArray, micro_batch_size: int, num_devices: int) -> tuple[IntArray, IntArray]:
    """Micro-batches of each window and rows of each micro-batch, from the rows of each window.

    Rows are dealt evenly: 10 rows in micro-batches of 4 become 4, 3, 3, so that no process waits for another's.
    """
    in_window = -(-rows // (micro_batch_size * num_devices)) * num_devices
    window_of_micro = np.repeat(np.arange(len(rows)), in_window)
    place = np.arange(len(window_of_micro)) - (np.cumsum(in_window) - in_window)[window_of_micro]
    share, extra = np.divmod(rows, in_window)
    return in_window, share[window_of_micro] + (place < extra[window_of_micro])


def _offsets(sizes: list[IntArray]) -> IntArray:
    """Where each of some neighbours starts and the last ends."""
    if all(one.strides == (0,) for one in sizes):
        return _one_each(sum(map(len, sizes)))
    known = np.concatenate(sizes)
    found = np.zeros(len(known) + 1, dtype=np.int64)
    np.cumsum(known, out=found[1:])
    return found


def _ones(count: int) -> IntArray:
    """(count,), read-only; told from others by its stride of 0."""
    return np.broadcast_to(np.int64(1), (count,))


_counted: weakref.ref[IntArray] | None = None


def _one_each(count: int) -> IntArray:
    """0, 1, 2 ... `count`, read-only: offsets where each holds one.

    All plans that live at the same time share the memory. It would be more than a gigabyte for eight plans of ten
    million examples.
    """
    global _counted
    longest = None if _counted is None else _counted()
    if longest is None or len(longest) <= count:
        longest = np.arange(count + 1)
        longest.flags.writeable = False
        _counted = weakref.ref(longest)
    return longest[: count + 1]


def _is_one_each(offsets: IntArray, count: int) -> bool:
    return len(offsets) == count + 1 and bool((offsets[1:] > offsets[:-1]).all())


def _sums(values: IntArray, offsets: IntArray) -> IntArray:
    running = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=running[1:])
    return np.asarray(running[offsets[1:]] - running[offsets[:-1]])


def _maxima(values: IntArray, offsets: IntArray) -> IntArray:
    sizes = np.diff(offsets)
    result = np.zeros(len(sizes), dtype=np.int64)
    filled = sizes > 0  # reduceat reads one element too many for an empty slice
    if filled.any():
        result[filled] = np.maximum.reduceat(values, offsets[:-1][filled])
    return result
