"""Whether a plan's worst micro-batch fits, and what it needs: proven in a worker, the smallest configuration first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from planner.group import Group, rows_of, shape_of
from planner.measurement import LEFT_OUT, PlannedRow, RowVerdict
from planner.prober import DoesNotFit, MemoryReply, MicroRows
from planner.strata import keys
from presets.errors import MeasurementError, PlanError
from trainer.batching import BatchPlan, MicroShapes
from trainer.evaluate import LEAST_TOKENS, evaluation_batches, tokens_at_once
from trainer.tokens import TokenizedDataset
from trainer.widths import shared_width

SAME_SHAPE = 0.95  # a worst micro-batch this near to a larger one is judged by the larger one's peak
# On a CPU the heap keeps growing over the first few of the longest micro-batches, since freed blocks seldom fit the
# next tensor exactly: with glibc 2.36 one long micro-batch after another took 1.47, 1.61, 1.64, 1.66 GB (2026-11-25).
LONG_ONES = 10  # so many are run, as far as the plan holds them, while their time lasts
LONG_ONES_SHARE = 0.2  # of the budget, for all rows' together
# Of the budget: micro-batches that take less are run twice, to tell what a GPU's process loads in its first ones.
AGAIN_SHARE = 0.1
# Of several layouts to choose from: one that takes this many times the seconds of the best of its kind so far, by its
# padding and its quickest micro-step (noise only slows), will not win; nor will larger ones.
HOPELESS = 1.25


class MemoryProbe:
    """Fills in the verdicts of groups.

    Args:
        groups: all of them, since workers that stand idle take room from the one that is tried.
        shapes: of the micro-batches, by the identity of a plan.
        start: gives a group its worker.
        tell: what is being done, and the share of the budget spent.
        warnings: added to.
        optional: names of rows that may be left out where they are plainly slower than others.
        thorough: run more than the worst micro-batch, so that the peaks are those of a run.
    """

    def __init__(
        self,
        groups: list[Group],
        data: TokenizedDataset,
        shapes: dict[int, MicroShapes],
        *,
        start: Callable[[Group], None],
        tell: Callable[[str, float], None],
        warnings: list[str],
        budget: float,
        optional: frozenset[str] = frozenset(),
        thorough: bool = True,
    ) -> None:
        self._optional, self._thorough = optional, thorough
        self._groups, self._data, self._shapes = groups, data, shapes
        self._start, self._tell, self._warnings = start, tell, warnings
        self._budget = budget

    def probe(self, group: Group) -> None:
        """Whether each row fits at its worst micro-batch: the smallest worst first; of larger ones none is tried.

        Larger is what has at least the padded tokens and the width of one that did not fit: memory can grow with tokens
        or, as under eager attention, with the square of the width.

        Ascending, since a process's peak never falls: each row's own peak is read before a larger one covers it.
        """
        self._make_room_beside(group)
        group.verdicts = {row.name: RowVerdict(name=row.name, signature=group.signature) for row in group.rows}
        trials = self._worst_micro_batches(group.rows)
        failures: list[tuple[int, int, DoesNotFit]] = []  # padded tokens and width of what did not fit
        # Packed or not: a long row of one document pays more for attention than one of several, so each has its own.
        hopeless: set[bool] = set()
        least = {True: np.inf, False: np.inf}
        for plan, micro, members in trials:
            shapes = self._shapes[id(plan)]
            is_packed = members[0].job.packing
            if is_packed in hopeless and self._optional.issuperset(row.name for row in members):
                for row in members:
                    verdict = group.verdicts[row.name]
                    group.verdicts[row.name] = replace(verdict, error=LEFT_OUT)
                continue
            for row in members:
                group.verdicts[row.name] = replace(
                    group.verdicts[row.name], worst_rows=int(shapes.rows[micro]), worst_width=int(shapes.width[micro])
                )
            padded, width = int(shapes.padded_tokens[micro]), int(shapes.width[micro])
            failed = next((why for tokens, wide, why in failures if padded >= tokens and width >= wide), None)
            if failed is None:
                self._tell(f"memory: {members[0].name}", 0.0)
                try:
                    seconds = LONG_ONES_SHARE * self._budget / (len(trials) * len(self._groups))
                    windows = self._worst_windows(members, plan, micro)[: None if self._thorough else 1]
                    windows += self._most_learnt(members, windows)
                    windows += self._most_spread(members, windows)
                    is_growing = group.signature.device == "cpu" and self._thorough
                    more = self._long_windows(members) if is_growing else []
                    reply = self._try_alone(group, windows, more, seconds)
                    # Its process has met these shapes: in a round they are no new ones.
                    met = [shape_of(plan, rows, self._data) for window in windows for rows in window]
                    is_new = group.first_times.meet([(count, shared_width(wide)) for count, wide in met])
                    # The quickest: the others may have loaded.
                    again_seconds = len(reply.taken) * min(reply.taken, default=math.inf)
                    is_quick = again_seconds < AGAIN_SHARE * self._budget / len(self._groups)
                    is_asked = self._thorough and not group.first_times.is_probed
                    if is_asked and is_quick and group.signature.device != "cpu":
                        again = self._try_alone(group, windows, [], 0.0)
                        group.first_times.probe(zip(reply.taken, again.taken, is_new, strict=True))
                    if group.signature.device == "cpu" and reply.token_seconds is not None:
                        # Not on a GPU: its first micro-steps load kernels, and even the largest do not take long.
                        expected = reply.token_seconds * float(shapes.padded_tokens.sum() / shapes.tokens.sum())
                        least[is_packed] = min(least[is_packed], expected)
                        hopeless |= {is_packed} if expected > HOPELESS * least[is_packed] else set()
                    # Else told after the timing. A search, too, judges by what a run's heap grows to on a CPU.
                    headroom = self._headroom(group) if not self._thorough else None
                    group.reserved = reply.reserved_bytes
                    group.first_seconds += reply.first_seconds
                    group.largest_key = max(group.largest_key, float(keys(shapes)[micro]))
                    group.probed[float(padded)] = reply.micro_step_seconds
                    for row in members:
                        group.verdicts[row.name] = replace(
                            group.verdicts[row.name],
                            fits=True,
                            peak_allocated_bytes=reply.allocated_bytes,
                            peak_reserved_bytes=reply.reserved_bytes,
                            headroom_bytes=headroom,
                        )
                    continue
                except DoesNotFit as reason:
                    failed = reason
                    failures.append((padded, width, reason))
                    group.close()  # what is left of it is not a clean place to time in
                except PlanError as reason:
                    group.error = str(reason)
                    group.close()
                    return
            for row in members:
                text = f"does not fit: {failed}"
                group.verdicts[row.name] = replace(group.verdicts[row.name], fits=False, error=text)

    def probe_evaluation(self, group: Group) -> None:
        """Raise the peaks where the largest batch of held-out examples needs more than a step.

        Before any timing: on a CPU a process's peak only grows, and hundreds of shapes in random order leave the heap
        in a state that no run knows.
        """
        if not group.fitting or group.prober is None or group.is_reference:
            return
        held_out = group.fitting[0].plan.evaluation
        if not len(held_out):
            return
        # The smallest that a row uses: what is larger fits, since the row's own micro-batches are as large.
        batches = evaluation_batches(self._data, held_out, group.signature.device, self.evaluated_at_once(group)[0])
        largest = max(batches, key=lambda batch: len(batch) * int(self._data.lengths[batch].max()))
        learnt = max(batches, key=lambda batch: int(self._data.num_supervised[batch].sum()))  # see `_most_learnt`
        try:
            group.prober.evaluate([batch.tolist() for batch in ([largest] if learnt is largest else [largest, learnt])])
            reply = group.prober.peak()
        except DoesNotFit as reason:
            names = ", ".join(row.name for row in group.fitting)
            then = "take smaller ones" if self.evaluated_at_once(group)[0] > LEAST_TOKENS else "stop there"
            self._warnings.append(
                f"{names}: a batch of held-out examples does not fit ({reason}); the run would {then}"
            )
            group.close()
            return
        except PlanError as reason:
            group.error = str(reason)
            group.close()
            return
        if reply.reserved_bytes > group.reserved:
            self.raise_peaks(group, to=reply.reserved_bytes, headroom=reply.headroom_bytes)
            group.reserved = reply.reserved_bytes  # what comes on top of it is told from there

    def evaluated_at_once(self, group: Group) -> list[int]:
        """Padded tokens of the evaluation batches of a group's rows, ascending."""
        return sorted(tokens_at_once(row.job, self._shapes[id(row.plan)].largest) for row in group.fitting)

    def _try_alone(
        self, group: Group, windows: list[list[MicroRows]], more: list[list[MicroRows]], seconds: float
    ) -> MemoryReply:
        """The memory reply; out of memory is believed only of a worker that had the device to itself."""
        try:
            self._start(group)
            assert group.prober is not None
            return group.prober.memory(windows, more, seconds)
        except DoesNotFit:
            others = [other for other in self._groups if other is not group and other.prober is not None]
            if not others:
                raise
            for other in others:
                other.close()
            group.close()
            self._start(group)
            assert group.prober is not None
            return group.prober.memory(windows, more, seconds)

    def _headroom(self, group: Group) -> int | None:
        """Bytes that stay free at the peak, on a CPU."""
        if group.signature.device != "cpu" or group.prober is None:
            return None
        return group.prober.peak().headroom_bytes

    def _worst_windows(self, members: list[PlannedRow], plan: BatchPlan, micro: int) -> list[list[MicroRows]]:
        """The longest micro-batch with its neighbours in its window, and the same of the longest that is at no head.

        At the head of a window no gradients lie beside the activations; a shorter one further on may need more.
        """
        windows = [_neighbourhood(plan, micro)]
        for other in {id(row.plan): row.plan for row in members}.values():
            key = keys(self._shapes[id(other)]).copy()
            heads = (other.window_offsets[:-1, None] + np.arange(other.num_devices)).ravel()
            key[heads[heads < len(key)]] = -1.0
            if len(key) and key.max() > 0:
                windows.append(_neighbourhood(other, int(key.argmax())))
        return windows

    def _most_learnt(self, members: list[PlannedRow], windows: list[list[MicroRows]]) -> list[list[MicroRows]]:
        """The micro-batch of each plan that most tokens are learnt from, where that is more than in these windows.

        Only such positions go through the output layer, whose logits are the largest tensors where the vocabulary is
        large: a long prompt with a short answer holds less than a shorter text that is learnt from as a whole.
        """
        if all(row.job.loss == "lean" for row in members) and not self._thorough:
            return []  # a chunk at a time, however many there are, unless the model refuses that
        supervised = self._data.num_supervised
        known = max(int(sum(supervised[row].sum() for row in rows)) for window in windows for rows in window)
        found = []
        for plan in {id(row.plan): row.plan for row in members}.values():
            learnt = plan.per_micro_batch(supervised)
            if len(learnt) and learnt.max() > known:
                found.append(_neighbourhood(plan, int(learnt.argmax())))
        return found

    def _most_spread(self, members: list[PlannedRow], windows: list[list[MicroRows]]) -> list[list[MicroRows]]:
        """The micro-batch of each plan whose documents come to most, each as a whole, where that is more than in these.

        Of what a row's documents share, attention holds keys and values for each of them (see `trainer.documents`).
        """
        lengths = self._data.lengths
        known = max(int(sum(lengths[row].sum() for row in rows)) for window in windows for rows in window)
        found = []
        for plan in {id(row.plan): row.plan for row in members}.values():
            if plan.shares_beginnings:
                spread = plan.per_micro_batch(lengths)
                if len(spread) and spread.max() > known:
                    found.append(_neighbourhood(plan, int(spread.argmax())))
        return found

    def _long_windows(self, members: list[PlannedRow]) -> list[list[MicroRows]]:
        """The longest micro-batches of the plans with their neighbours, each plan's in its order, in turns.

        As many in all as for one plan: what a run's heap grows beyond them (see planner.estimate) is known for so many.
        """
        windows = []
        plans = list({id(row.plan): row.plan for row in members}.values())
        for number, plan in enumerate(plans):
            key = keys(self._shapes[id(plan)])
            many = len(range(number, LONG_ONES, len(plans)))
            for micro in np.sort(np.argsort(-key, kind="stable")[:many]).tolist():
                windows.append(_neighbourhood(plan, micro))
        return windows

    def _worst_micro_batches(self, rows: list[PlannedRow]) -> list[tuple[BatchPlan, int, list[PlannedRow]]]:
        """(plan, micro-batch, rows judged by it), ascending. Of rows alike those near the largest share it."""
        worst = []
        for row in rows:
            shapes = self._shapes[id(row.plan)]
            micro = int(keys(shapes).argmax())  # most padded tokens; of equals the widest
            worst.append((float(keys(shapes)[micro]), (int(shapes.rows[micro]), row.job.packing), micro, row))
        worst.sort(key=lambda entry: (entry[1], entry[0]), reverse=True)
        trials: list[tuple[float, tuple[int, bool], BatchPlan, int, list[PlannedRow]]] = []
        for key, kind, micro, row in worst:
            if trials and trials[-1][1] == kind and key >= SAME_SHAPE * trials[-1][0]:
                trials[-1][4].append(row)
            else:
                trials.append((key, kind, row.plan, micro, [row]))
        trials.sort(key=lambda trial: trial[0])
        return [(plan, micro, members) for _, _, plan, micro, members in trials]

    def _make_room_beside(self, group: Group) -> None:
        """Stop the other workers unless there is plainly room: a third of what is free would hold another like them."""
        idle = [other for other in self._groups if other is not group and other.prober is not None]
        if not idle:
            return
        try:
            assert idle[0].prober is not None
            roomy = idle[0].prober.free() > 3 * max(other.reserved for other in idle)
        except (DoesNotFit, MeasurementError):
            roomy = False
        if not roomy:
            for other in idle:
                other.close()

    def raise_peaks(self, group: Group, *, by: int = 0, to: int = 0, headroom: int) -> None:
        """Add to the rows' peaks what timing showed beside the largest micro-batch alone."""
        for row in group.fitting:
            verdict = group.verdicts[row.name]
            if verdict.peak_reserved_bytes is None or verdict.peak_allocated_bytes is None:
                continue
            more = max(0, by, to - verdict.peak_reserved_bytes)
            reserved = verdict.peak_reserved_bytes + more
            group.verdicts[row.name] = replace(
                verdict,
                peak_reserved_bytes=reserved,
                peak_allocated_bytes=verdict.peak_allocated_bytes + more,
                headroom_bytes=headroom + max(0, group.reserved + by - reserved) if not to else headroom,
            )


def _neighbourhood(plan: BatchPlan, micro: int) -> list[MicroRows]:
    """A micro-batch with the one before it and the one after it in its device's share of its window."""
    window = int(np.searchsorted(plan.window_offsets, micro, side="right")) - 1
    first, last = int(plan.window_offsets[window]), int(plan.window_offsets[window + 1])
    places = (micro - plan.num_devices, micro, micro + plan.num_devices)
    found = [rows_of(plan, place) for place in places if first <= place < last]
    return [rows for rows in found if any(rows)]
