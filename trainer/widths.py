"""Widths of micro-batches anywhere but on a CPU: rounded up a little, so that shapes come again. No torch.

For each shape that a process has not met a GPU's matrix library chooses a kernel for every product anew, and the host
is held up: on an H200 by 15 to 30 ms of 75 to 100 a micro-step (1 B model, four rows of some 480 tokens). Packed rows,
of which hardly two are alike, took 10 to 12 % longer than the same ones a second time (1 and 1.7 B, up to 8,192 tokens;
2026-11-27). Rounded up by a sixty-fourth of itself at most, a width has 64 values between a number and its double, for
half a per cent more tokens on average.

Of a window's packed rows the last is often a short rest, of few documents and of a width of its own in nearly every
window: with those widths, too, such a window took 40 to 100 ms of 190 to 440 longer (1 to 3 B, the same day). What a
rest is padded with is little beside the full rows of its window, so it has eight widths in all.
"""

from __future__ import annotations

from typing import overload

import numpy as np

from trainer.tokens import IntArray

PARTS = 64  # widths between a power of two and the next
REST_WIDTHS, REST_PARTS = 8, 32  # a packed row of at most 8 / 32 of the longest is a rest, in steps of 1 / 32 of that


@overload
def shared_width(width: int, longest_row: int = ...) -> int: ...
@overload
def shared_width(width: IntArray, longest_row: int = ...) -> IntArray: ...
def shared_width(width: int | IntArray, longest_row: int = 0) -> int | IntArray:
    """The width that micro-batches of about this one share: at least it, at most a sixty-fourth more; 0 stays 0.

    Args:
        longest_row: tokens in the longest packed row of the batch plan; 0: rows are not packed. Rests become longer by
            a thirty-second of it at most.
    """
    found = np.asarray(width, dtype=np.int64)
    # The exponent of the largest power of two that is no larger; frexp is exact where log2 rounds.
    exponent = np.frexp(np.maximum(found, 1).astype(np.float64))[1] - 1
    step = np.left_shift(np.int64(1), np.maximum(exponent - (PARTS.bit_length() - 1), 0).astype(np.int64))
    rest = longest_row // REST_PARTS
    step = np.where(found <= REST_WIDTHS * rest, np.maximum(step, rest), step)
    rounded = -(-found // step) * step
    return int(rounded) if np.ndim(width) == 0 else rounded
