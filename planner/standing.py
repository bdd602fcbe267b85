"""Workers that stand between two calls of `measure`, so that a search on a GPU does not start the same one again.

A start there takes seconds that no import saves: a CUDA context, the weights, the first of each kernel. What a worker
holds at most is measured anew for each call (`memory` resets it). On a CPU it cannot be: the resident memory of a
process keeps what earlier layouts left, so there each call starts its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.group import Group
from planner.measurement import StepSignature
from planner.prober import LoadReply, Prober


@dataclass(frozen=True, slots=True, eq=False)
class _Idle:
    prober: Prober
    load: LoadReply | None
    reserved: int  # bytes that it holds on the device


class Standing:
    """Workers by what they can time. Close it at the end of the search."""

    def __init__(self) -> None:
        self._idle: dict[StepSignature, _Idle] = {}

    def give(self, groups: list[Group]) -> None:
        """Give each group its worker, where one stands; the others end, and their memory is free."""
        for group in groups:
            found = self._idle.pop(group.signature, None)
            if found is not None:
                group.prober, group.load, group.reserved = found.prober, found.load, found.reserved
        self.close()

    def keep(self, group: Group) -> None:
        """Take a group's worker back, if it has one that is sound."""
        if group.prober is None:
            return
        if group.error is not None or group.is_postponed or group.signature.device != "cuda":
            group.close()
            return
        self._idle[group.signature] = _Idle(group.prober, group.load, group.reserved)
        group.prober = None

    def close(self) -> None:
        """End all that stand."""
        for one in self._idle.values():
            one.prober.stop()
        self._idle.clear()
