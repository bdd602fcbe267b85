"""Arrays that grow in files: what is tokenised goes to the disk piece by piece. numpy only."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.tokens import FloatArray, IntArray

_BUFFER = 1 << 20  # bytes


class GrowingFile:
    """A .npy file of one dimension, appended to; whole after `close`, and as numpy itself would have written it."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.size = 0
        self._file = open(path, "wb", buffering=_BUFFER)  # noqa: SIM115  # closed by close()
        self._begin = self._header()

    def add(self, values: npt.NDArray[np.generic]) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        self.size += len(values)

    def close(self) -> None:
        # numpy leaves room in the header for a longer length, for exactly this.
        self._file.seek(0)
        if self._header() != self._begin:
            raise OSError("the header of the array has outgrown its place")
        self._file.close()

    def abandon(self) -> None:
        self._file.close()

    def _header(self) -> int:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.size,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()


class TokenFiles:
    """Tokenised examples on their way into a folder; in memory are a few numbers an example.

    Use it as a context: an exception leaves the files as they are, for the caller to remove.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ids = GrowingFile(folder / "token_ids.npy", np.int32)
        self._supervised = GrowingFile(folder / "supervised.npy", np.bool_)
        self._ends = array("q")
        self._scores = {"engagement": array("d"), "created_at": array("d")}
        self._prints = array("q")
        self._numbers = array("q")

    def __enter__(self) -> TokenFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, _reason: object, _trace: object) -> None:
        if kind is not None:
            self._ids.abandon()
            self._supervised.abandon()

    def __len__(self) -> int:
        return len(self._ends)

    def add(
        self,
        ids: npt.NDArray[np.int32],
        supervised: npt.NDArray[np.bool_],
        *,
        engagement: float,
        created_at: float,
        fingerprint: int,
        number: int,
    ) -> None:
        """One example; `fingerprint`: the same for copies; `number`: its line or record, from 1."""
        self._ids.add(ids)
        self._supervised.add(supervised)
        self._ends.append(self._ids.size)
        self._scores["engagement"].append(engagement)
        self._scores["created_at"].append(created_at)
        self._prints.append(fingerprint)
        self._numbers.append(number)

    def copies(self) -> tuple[int, int, int]:
        """(examples that are copies of an earlier one, number of the first of them, number of what it copies)."""
        prints = np.frombuffer(self._prints, dtype=np.int64)
        order = np.argsort(prints, kind="stable")
        again = np.flatnonzero(prints[order][1:] == prints[order][:-1]) + 1
        if not len(again):
            return 0, 0, 0
        first = again[np.argmin(order[again])]
        # Stable: the neighbour before the first copy of all is what it copies.
        return len(again), self._numbers[int(order[first])], self._numbers[int(order[first - 1])]

    def finish(self, *, with_scores: dict[str, bool]) -> None:
        """Write what is left: offsets and the scores that the data has."""
        self._ids.close()
        self._supervised.close()
        offsets: IntArray = np.concatenate([[0], np.frombuffer(self._ends, dtype=np.int64)]).astype(np.int64)
        np.save(self.folder / "offsets.npy", offsets, allow_pickle=False)
        for name, values in self._scores.items():
            if with_scores[name]:
                scores: FloatArray = np.frombuffer(values, dtype=np.float64)
                np.save(self.folder / f"{name}.npy", scores, allow_pickle=False)
