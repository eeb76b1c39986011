"""Prices structures: what cutting each of them alone does to the model's loss.

Errors at consumers of different layers cannot be compared, not even relative to their variance: models have
layers whose few massive activations dwarf all others. So the loss is measured, at a few depths, and the errors
say only how it runs between them.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.structures import Structure
from onnx_autoglm.options import PruningOptions
from onnx_autoglm.passes.ladder import Ladder, keep_best
from onnx_autoglm.passes.score_norm import Scores
from onnx_autoglm.trial import Trial

DEPTHS = (0.2, 0.5)
# Above this share of a structure the scores are no longer errors that one would accept.
_DEEPEST = 0.9


class LossCurve:
    """The loss of a model as one structure is cut down, from a few measured points.

    Between two points it runs as the summed scores do; beyond the last one, by the slope before it.
    """

    def __init__(self, ladder: Ladder, points: Sequence[tuple[int, float]]) -> None:
        """`points` are (count kept, loss); without any, the summed scores themselves are the loss."""
        self.ladder = ladder
        size = ladder.structure.size
        if not points:
            points = [(ladder.floor, ladder.error(size, ladder.floor))]
        self._errors, self._losses = [0.0], [0.0]
        for keep, loss in sorted(points, reverse=True):
            error = ladder.error(size, keep)
            if error > self._errors[-1]:
                self._errors.append(error)
                self._losses.append(max(loss, self._losses[-1]))

    def points(self) -> list[list[float]]:
        """Pairs of (error, loss) that the curve runs through."""
        return [[error, loss] for error, loss in zip(self._errors, self._losses, strict=True)]

    def loss(self, keep: int) -> float:
        """The loss when `keep` indices stay."""
        error = self.ladder.error(self.ladder.structure.size, keep)
        if len(self._errors) < 2:
            return 0.0
        upper = min(max(bisect_left(self._errors, error), 1), len(self._errors) - 1)
        left, right = self._errors[upper - 1], self._errors[upper]
        low, high = self._losses[upper - 1], self._losses[upper]
        return low + (high - low) * (error - left) / (right - left)


@dataclasses.dataclass(frozen=True)
class Price:
    """`depths`: the shares of a structure that are removed to measure its loss."""

    depths: tuple[float, ...] = DEPTHS

    def __call__(
        self,
        trial: Trial | None,
        scores: Mapping[Structure, Scores],
        options: PruningOptions,
        step: Callable[[str], None] = lambda _: None,
    ) -> dict[Structure, LossCurve]:
        return price(trial, scores, self.depths, options, step)


def price(
    trial: Trial | None,
    scores: Mapping[Structure, Scores],
    depths: Sequence[float],
    options: PruningOptions,
    step: Callable[[str], None] = lambda _: None,
) -> dict[Structure, LossCurve]:
    """One curve per structure; without a trial, of its normalised scores alone."""
    curves: dict[Structure, LossCurve] = {}
    for number, (structure, own) in enumerate(scores.items(), 1):
        ladder = Ladder(structure, own, options, how="mean", deepest=_DEEPEST)
        points: list[tuple[int, float]] = []
        counts = {ladder.rounded_up(round(structure.size * (1 - depth))) for depth in depths}
        for keep in sorted(counts - {structure.size}, reverse=True) if trial is not None else ():
            assert trial is not None
            step(f"price {number} of {len(scores)}: {structure.id}, {keep} of {structure.size}")
            selection = Selection()
            keep_best(selection, structure, own, keep)
            points.append((keep, trial.measure(selection, quick=True).divergence))
        curves[structure] = LossCurve(ladder, points)
    return curves
