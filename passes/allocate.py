"""Spends one budget on structures of all kinds and layers: what adds least loss per saving goes first."""

from __future__ import annotations

import dataclasses
import heapq
from collections import defaultdict
from collections.abc import Callable, Mapping

from onnx_autoglm.axes.structures import Structure
from onnx_autoglm.passes.price import LossCurve

Saving = Callable[[Structure, int], float]  # what a structure saves when this many indices stay


@dataclasses.dataclass(frozen=True)
class Allocate:
    """`uniform` keeps the same count in all structures of a kind and size."""

    uniform: bool = False

    def __call__(
        self, curves: Mapping[Structure, LossCurve], saving: Saving, wanted: float
    ) -> dict[Structure, int]:
        return allocate(curves, saving, wanted, uniform=self.uniform)


def allocate(
    curves: Mapping[Structure, LossCurve], saving: Saving, wanted: float, *, uniform: bool = False
) -> dict[Structure, int]:
    """Chooses how many indices of each structure stay, so that the saving is reached to the nearest step.

    Losses are taken to add up. Steps are taken in the order of loss per saving, which is best where curves
    only steepen.

    Args:
        curves: of all structures that compete.
        saving: of a structure at a count, in the unit of the budget; it falls as the count grows.
    """
    groups: dict[object, list[LossCurve]] = defaultdict(list)
    for structure, curve in curves.items():
        groups[(structure.kind, structure.size) if uniform else structure].append(curve)
    bids = [_Bid(members, saving) for members in groups.values()]
    spent = 0.0
    queue = [(bid.rate, number) for number, bid in enumerate(bids) if bid.following is not None]
    heapq.heapify(queue)
    while queue:
        _, number = heapq.heappop(queue)
        bid = bids[number]
        # A step that overshoots by more than half of it is left out; smaller ones of others may still fit.
        if spent + bid.saved / 2 > wanted:
            continue
        spent += bid.saved
        bid.take()
        if bid.following is not None:
            heapq.heappush(queue, (bid.rate, number))
    return {curve.ladder.structure: bid.keep for bid in bids for curve in bid.curves}


class _Bid:
    """Structures that step down together, and what their next step saves and costs."""

    def __init__(self, curves: list[LossCurve], saving: Saving) -> None:
        self.curves, self._saving = curves, saving
        self.keep = curves[0].ladder.structure.size
        self._look()

    def _look(self) -> None:
        self.rate = self.saved = 0.0
        steps = [curve.ladder.step_below(self.keep) for curve in self.curves]
        self.following = None if None in steps else steps[0]
        if self.following is None:
            return
        loss = sum(curve.loss(self.following) - curve.loss(self.keep) for curve in self.curves)
        for curve in self.curves:
            structure = curve.ladder.structure
            self.saved += self._saving(structure, self.following) - self._saving(structure, self.keep)
        self.rate = loss / max(self.saved, 1e-30)

    def take(self) -> None:
        assert self.following is not None
        self.keep = self.following
        self._look()
