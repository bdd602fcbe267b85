"""What micro-batches take longer the first time a process runs them, on a GPU: kernels to load, shapes to choose for.

Two things are told apart, since a run meets them differently often:

- Kernels are loaded and handles made in the first seconds of a process, once, whatever the run's length.
- For each *shape* that it has not met, cuBLAS chooses a kernel for every product of that shape anew: 8 to 30 ms a
  micro-step of 60 to 100 on an H200 (a 1 B model; the time lies in the host's calls of mm and addmm, 2026-11-27). A run
  meets as many new shapes as its batch plan has: most of the micro-batches of a short run, few of a long one. It is the
  host that is held up: behind a GPU that is busy anyhow nothing of it shows, and so each class of micro-batches has its
  own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from planner.estimator import Z_90
from trainer.tokens import FloatArray

Shape = tuple[int, int]  # rows, width
LEAST = 8  # micro-batches of a new shape, before their excess is believed
LEAST_ROUNDS = 3  # a single one after the first cannot tell what shapes take from what is still loaded
# Of strata that are neighbours in work, where it shows in all of few, or in more than half: a kernel that is still
# loaded now and then is in one or two, a choice of kernels in each that no GPU's work hides.
LEAST_OF_FEW, ENOUGH = 3, 5
SURE = 2.5  # standard errors
NOISE = 2.0  # standard deviations of a sum of differences
SURELY = 3.0  # the same, of a sum of a few


@dataclass(frozen=True, slots=True)
class First:
    """A micro-batch that was run twice."""

    seconds: float  # the first time
    again: float
    is_new: bool  # its shape
    stratum: int

    @property
    def excess(self) -> float:
        return self.seconds - self.again


@dataclass(frozen=True, slots=True)
class NewShapes:
    """Seconds that a micro-step takes more where its shape is new, and their standard error; 0 where none shows."""

    seconds: float = 0.0
    error: float = 0.0
    apart: Mapping[int, tuple[float, float]] = field(default_factory=dict)  # the same of strata that plainly differ
    noise: float | None = None  # standard deviation of one such difference, over the second time; None: not known

    def of(self, stratum: int) -> float:
        return self.apart[stratum][0] if stratum in self.apart else self.seconds


@dataclass(slots=True, eq=False)
class FirstTimes:
    """First and second times of the micro-batches that one process ran twice."""

    met: set[Shape] = field(default_factory=set)
    _rounds: list[list[First]] = field(default_factory=list)
    _probed: list[First] = field(default_factory=list)  # the first of all, each waited for
    _known: tuple[int, NewShapes] = (0, NewShapes())  # after so many rounds

    def meet(self, shapes: list[Shape]) -> list[bool]:
        """Of each shape in turn, as a GPU is given it (see trainer.widths), whether it is new; it no longer is."""
        found = []
        for shape in shapes:
            found.append(shape not in self.met)
            self.met.add(shape)
        return found

    def probe(self, twice: Iterable[tuple[float, float, bool]]) -> None:
        """(seconds, seconds again, is its shape new) of a memory probe's micro-batches, of the process's first one."""
        self._probed = [First(seconds, again, is_new, stratum=-1) for seconds, again, is_new in twice]

    @property
    def is_probed(self) -> bool:
        return bool(self._probed)

    def add(self, timed: list[First]) -> None:
        """A round's micro-batches."""
        self._rounds.append(timed)

    def new_shapes(self) -> NewShapes:
        """What a new shape takes: over all strata, and where one of them plainly differs from that, there."""
        if self._known[0] != len(self._rounds):
            self._known = len(self._rounds), self._new_shapes()
        return self._known[1]

    def _new_shapes(self) -> NewShapes:
        of: dict[int, list[tuple[int, First]]] = {}  # (round, one) from all but the first round: of one stratum few
        for number, timed in enumerate(self._rounds[1:]):
            for one in timed:
                of.setdefault(one.stratum, []).append((number, one))
        noise = _relative_noise([one for _, one in timed] for timed in of.values())
        apart: dict[int, tuple[float, float]] = {}
        # The median over the later half of the rounds: in the first ones kernels are loaded too, and a rare slow timing
        # is in either time.
        rounds = self._rounds[len(self._rounds) // 2 :]
        if sum(one.is_new for timed in rounds for one in timed) < LEAST:
            rounds = self._rounds[1:]
        every = np.array([one.excess for timed in rounds for one in timed if one.is_new])
        if not len(every) or len(self._rounds) < LEAST_ROUNDS:
            return NewShapes(noise=noise)
        seconds, error = float(np.median(every)), _error_of_median(every)
        if len(every) < LEAST or seconds <= SURE * error:
            seconds, error = 0.0, 0.0
        for strata in _neighbours(of):
            found = [(number, one) for stratum in strata for number, one in of[stratum] if one.is_new]
            if len(found) < LEAST_OF_FEW:
                continue
            values = np.array([one.excess for _, one in found]) - seconds
            single = np.array([(noise or 0.0) * one.again for _, one in found])
            own, of_one = float(np.median(values)), float(np.median(single))
            shows = np.sign(own) * values > SURE * single
            # What is loaded shows less and less often.
            when = np.array([number for number, _ in found])
            often = min(shows.mean(), shows[when >= np.median(when)].mean()) > 0.5
            is_shown = often if len(found) >= ENOUGH else bool(shows.all())
            if is_shown and abs(own) > SURE * math.hypot(_of_median(of_one, len(found)), error):
                # What of it a GPU's work hides differs from one to the next, far more than the clock does.
                own_error = _of_median(max(of_one, deviation(values)), len(found))
                if len(found) < LEAST:  # kernels that are still loaded may be all that shows
                    own_error = max(own_error, abs(own) / Z_90)
                # One figure for all of them: their errors do not even out, as separate ones would.
                one_of = own_error * math.sqrt(len(strata))
                apart |= dict.fromkeys(strata, (max(0.0, seconds + own), one_of))
        return NewShapes(seconds, error, apart, noise)

    @property
    def while_probing(self) -> float:
        """Seconds of what was loaded in the memory probe, new shapes apart; 0 where that is no more than noise.

        Its micro-steps are the first of their process: kernels are loaded in them and memory is taken from the driver,
        as in the run's first steps. It was left out when the first quarter of runs of 15 s took 15 to 20 % longer than
        planned (an H200, 2026-11-27); how much of that it is has not been seen yet.
        """
        new = self.new_shapes()
        if new.noise is None:
            return 0.0
        # Each was waited for, so that no GPU's work hid what the host chose for it. Where all of it is hidden in the
        # rounds, it is not known and counts as loaded: tens of milliseconds for each of a few.
        exposed = max([new.seconds, *(own for own, _ in new.apart.values())])
        total = sum(one.excess - exposed * one.is_new for one in self._probed)
        return total if total > SURELY * new.noise * math.hypot(*(one.again for one in self._probed)) else 0.0

    @property
    def once(self) -> float:
        """Seconds of what is loaded once: beyond what new shapes take; 0 where that is no more than noise."""
        return self._surely(self._rounds)

    @property
    def share_to_the_end(self) -> float:
        """By how much the first time still took longer in the later half of the rounds, relative, new shapes apart."""
        later = self._rounds[len(self._rounds) // 2 :]
        second = sum(one.again for timed in later for one in timed)
        return self._surely(later) / second if second > 0 else 0.0

    def _surely(self, rounds: list[list[First]]) -> float:
        """The sum of the excess of first times, where it is larger than that of as many differences by chance."""
        excess = self._excess(rounds)
        spread = deviation(self._excess(self._rounds[len(self._rounds) // 2 :]))
        total = float(excess.sum())
        return total if total > NOISE * spread * math.sqrt(len(excess)) else 0.0

    def _excess(self, rounds: list[list[First]]) -> FloatArray:
        new = self.new_shapes()
        return np.array([one.excess - new.of(one.stratum) * one.is_new for timed in rounds for one in timed])


def _neighbours(of: Mapping[int, list[tuple[int, First]]]) -> list[list[int]]:
    """Strata by the seconds that their micro-batches take, so many together that enough of them were new.

    What a GPU's work hides of the host's choice, it hides of micro-batches that take about as long. After few rounds
    one stratum alone says nothing.
    """
    found: list[list[int]] = [[]]
    held = 0
    for stratum in sorted(of, key=lambda one: float(np.mean([first.again for _, first in of[one]]))):
        found[-1].append(stratum)
        held += sum(first.is_new for _, first in of[stratum])
        if held >= ENOUGH:
            found.append([])
            held = 0
    return found


def deviation(values: FloatArray) -> float:
    """Standard deviation, from the median absolute deviation: rare large ones do not count."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values)))) if len(values) else 0.0


def _relative_noise(strata: Iterable[list[First]]) -> float | None:
    """Standard deviation of an excess, over the second time, from its differences from one to the next of a stratum.

    None where no stratum has two.
    """
    pairs = [
        abs(one.excess - other.excess) / max(0.5 * (one.again + other.again), 1e-12)
        for timed in strata
        for one, other in itertools.pairwise(timed)
    ]
    return float(np.median(pairs)) / (math.sqrt(2) * 0.6745) if pairs else None


def _error_of_median(values: FloatArray) -> float:
    """Standard error of a median."""
    return _of_median(deviation(values), len(values))


def _of_median(spread: float, count: int) -> float:
    """Standard error of a median of so many values that spread so much, as of a normal distribution."""
    return math.sqrt(math.pi / 2) * spread / math.sqrt(count)
