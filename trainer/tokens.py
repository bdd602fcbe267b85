"""TokenizedDataset: every example as token ids and a loss mask, in flat numpy arrays. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from presets import jsonio
from presets.errors import DataError

if TYPE_CHECKING:
    from trainer.beginning import Beginnings

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_AT_ONCE = 1 << 22  # tokens
PER_TOKEN = ("token_ids", "supervised")  # arrays that may hold one value for all


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """What became of the records: counts a user wants to see before hours are spent."""

    source: str  # as shown to the user
    num_records: int  # read
    lengths: str = "measured"  # or "assumed"
    num_bad_lines: int = 0  # skipped on request
    num_unsupervised: int = 0  # left out: no token to learn from
    num_truncated: int = 0  # cut at the maximum length
    notes: tuple[str, ...] = ()  # one line each


class Tails:
    """A mask in which the last so many tokens of each example are True, for data that are too many to hold one.

    It is read as `TokenizedDataset.supervised` is: an example at a time.
    """

    strides = (0,)  # as of an array that holds one value for all
    nbytes = 0

    def __init__(self, offsets: IntArray, counts: IntArray) -> None:
        self.offsets, self.counts = offsets, counts

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, tokens: slice) -> npt.NDArray[np.bool_]:
        """Of tokens that lie in one example."""
        example = int(np.searchsorted(self.offsets, tokens.start, side="right")) - 1
        assert tokens.stop <= self.offsets[example + 1], "a slice over several examples"
        first = int(self.offsets[example + 1]) - int(self.counts[example])
        return np.arange(tokens.start, tokens.stop) >= first


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenizedDataset:
    """Examples end to end. Example i is `token_ids[offsets[i]:offsets[i + 1]]`."""

    token_ids: npt.NDArray[np.int32]  # (num_tokens,)
    supervised: npt.NDArray[np.bool_]  # (num_tokens,) this token is a target; never an example's first token
    offsets: IntArray  # (num_examples + 1,)
    report: DataReport
    engagement: FloatArray | None = None  # (num_examples,) a score, or None where the data has none
    created_at: FloatArray | None = None  # (num_examples,) seconds since 1970, or None where the data has none
    # Which examples begin alike, see trainer.beginning. None: not looked for yet.
    families: npt.NDArray[np.int32] | None = None  # (num_examples,); (0,) where no beginning is worth sharing
    sizes: IntArray | None = None  # (families + 1,) tokens of each one's beginning
    shares_beginnings: bool = True  # whether packed rows hold a beginning once
    # Asked for hundreds of times in one table, and each takes a pass over all examples or tokens: made once.
    _lengths: IntArray | None = field(default=None, init=False, repr=False)
    _num_supervised: IntArray | None = field(default=None, init=False, repr=False)
    _longest: int | None = field(default=None, init=False, repr=False)
    _beginnings: tuple[Beginnings | None] | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> IntArray:
        """Tokens per example, (num_examples,); read-only."""
        if self._lengths is None:
            object.__setattr__(self, "_lengths", _read_only(np.diff(self.offsets)))
        assert self._lengths is not None
        return self._lengths

    @property
    def longest(self) -> int:
        """Tokens of the longest example; 0 where there is none."""
        if self._longest is None:
            object.__setattr__(self, "_longest", int(self.lengths.max(initial=0)))
        assert self._longest is not None
        return self._longest

    @property
    def beginnings(self) -> Beginnings | None:
        """What examples begin with in common and packed rows hold once; None where they do not."""
        if not self.shares_beginnings:
            return None
        if self._beginnings is None:
            from trainer.beginning import Beginnings, find_beginnings

            if self.families is None or self.sizes is None:
                found = find_beginnings(self)
            else:
                found = Beginnings(self.sizes, self.families) if len(self.families) else None
            object.__setattr__(self, "_beginnings", (found,))
        assert self._beginnings is not None
        return self._beginnings[0]

    def row_tokens(self, row: IntArray | list[int], *, shared: bool = True) -> int:
        """Tokens of a row that holds these examples, what they begin with in common counted once.

        Args:
            shared: as the row's batch plan has it; else it is counted as often as it comes.
        """
        total = int(self.lengths[row].sum())
        return total - self.beginnings.saved_by(row) if shared and self.beginnings is not None else total

    def as_planned(self, *, shares_beginnings: bool) -> TokenizedDataset:
        """The same examples for packed rows that hold once what they begin with in common, or that do not."""
        same = shares_beginnings == self.shares_beginnings
        return self if same else replace(self, shares_beginnings=shares_beginnings)

    @property
    def num_bytes(self) -> int:
        """Of the tokens, their mask and offsets: what a process holds of the data, memory-mapped or not.

        Nothing of assumed data that are too large to hold, one and the same number for every token.
        """
        arrays = (self.token_ids, self.supervised, self.offsets)
        return sum(int(array.nbytes) for array in arrays if array.strides != (0,))

    @property
    def num_supervised(self) -> IntArray:
        """Target tokens per example, (num_examples,); read-only."""
        if self._num_supervised is None:
            object.__setattr__(self, "_num_supervised", _read_only(self._count_supervised()))
        assert self._num_supervised is not None
        return self._num_supervised

    def _count_supervised(self) -> IntArray:
        if isinstance(self.supervised, Tails):
            return self.supervised.counts
        if self.supervised.strides == (0,):  # every token is one and the same byte
            return self.lengths if self.supervised[0] else np.zeros(len(self), dtype=np.int64)
        found = np.zeros(len(self), dtype=np.int64)
        mask = np.asarray(self.supervised).view(np.uint8)
        # For an example without a token reduceat gives the next one's first.
        filled = np.flatnonzero(self.lengths)
        starts, ends = self.offsets[filled], self.offsets[filled + 1]
        # Sums take 32 bits a token while they are made: of all at once, four times the memory of the mask itself.
        first = 0
        while first < len(filled):
            last = max(first + 1, int(np.searchsorted(ends, starts[first] + _AT_ONCE, side="right")))
            here = starts[first:last]
            part = mask[here[0] : ends[last - 1]]
            found[filled[first:last]] = np.add.reduceat(part, here - here[0], dtype=np.int32)
            first = last
        return found

    def save(self, folder: Path) -> None:
        """Write the arrays as .npy files and the report as JSON into an existing folder.

        One value that stands for all tokens is written once: ten million assumed examples would take 6 GB else.
        """
        for name in ("token_ids", "supervised", "offsets", "engagement", "created_at"):
            array = getattr(self, name)
            if isinstance(array, Tails):
                np.save(folder / "tails.npy", array.counts, allow_pickle=False)
            elif array is not None:
                is_one = name in PER_TOKEN and array.strides == (0,) and len(array)
                written = array[0] if is_one else array
                np.save(folder / f"{name}.npy", written, allow_pickle=False)
        self.save_beginnings(folder)
        (folder / "report.json").write_text(jsonio.to_json(self.report), encoding="utf-8")

    def save_beginnings(self, folder: Path) -> None:
        """Write which examples begin alike, so that no process that opens the folder has to look for it."""
        found = self.beginnings
        np.save(folder / "families.npy", np.zeros(0, dtype=np.int32) if found is None else found.families)
        np.save(folder / "sizes.npy", np.zeros(1, dtype=np.int64) if found is None else found.sizes)

    @classmethod
    def load(cls, folder: Path, *, into_memory: bool = False) -> TokenizedDataset:
        """Open what `save` wrote: memory-mapped, or read whole.

        Raises:
            DataError: files are missing or damaged.
        """
        try:
            arrays: dict[str, Any] = {
                name: np.load(folder / f"{name}.npy", mmap_mode=None if into_memory else "r", allow_pickle=False)
                for name in ("token_ids", "supervised", "offsets", "engagement", "created_at", "families", "sizes")
                if (folder / f"{name}.npy").exists()
            }
            if (folder / "tails.npy").exists():
                arrays["supervised"] = Tails(arrays["offsets"], np.load(folder / "tails.npy", allow_pickle=False))
            for name in PER_TOKEN:
                if getattr(arrays[name], "ndim", 1) == 0:
                    arrays[name] = np.broadcast_to(arrays[name], (int(arrays["offsets"][-1]),))
            report = jsonio.from_json(
                DataReport, (folder / "report.json").read_text(encoding="utf-8"), what="report.json", error=DataError
            )
            return cls(report=report, **arrays)
        except (OSError, ValueError, TypeError, KeyError, IndexError) as reason:
            raise DataError(f"{folder}: the tokenised data cannot be read ({reason}).") from None


def _read_only(shared: IntArray) -> IntArray:
    """The same array, which many readers are given."""
    shared.flags.writeable = False
    return shared
