"""One structure while its count is being decided: counts it may step down to, and the errors on the way."""

from __future__ import annotations

import numpy as np

from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.structures import Structure
from onnx_autoglm.kinds import ALIGNED
from onnx_autoglm.options import PruningOptions
from onnx_autoglm.passes.score_norm import Scores


class Ladder:
    """Counts of one structure from its size down to a floor, in whole tiles.

    `errors` are its scores in the order of removal, a mean over the outer indices, normalised as `how` says.
    `deepest` is the largest share that may go.
    """

    def __init__(
        self,
        structure: Structure,
        scores: Scores,
        options: PruningOptions,
        *,
        how: str,
        deepest: float = 1.0,
    ) -> None:
        self.structure = structure
        self.tile = options.align if structure.kind in ALIGNED else 1
        least = max(structure.floor, options.min_keep, self.tile, round(structure.size * (1 - deepest)))
        self.floor = min(least, structure.size)
        ascending = np.sort(scores.reshape(-1, structure.size), axis=-1)
        self.errors = _normalise(ascending, how).mean(axis=0)

    def rounded_up(self, count: int) -> int:
        """The nearest allowed count that is not below `count`."""
        return min(max(-(-count // self.tile) * self.tile, self.floor), self.structure.size)

    def step_below(self, count: int) -> int | None:
        """The next smaller count that is aligned and not below the floor."""
        following = (count - 1) // self.tile * self.tile
        return following if following >= self.floor else None

    def error(self, start: int, stop: int) -> float:
        """The sum of errors between two counts, `start` the larger one."""
        size = self.structure.size
        return float(self.errors[size - start : size - stop].sum())


def keep_best(selection: Selection, structure: Structure, scores: Scores, count: int) -> None:
    """Keeps the `count` indices of highest score, in every outer index; all of them leaves the axis alone."""
    if count == structure.size:
        return
    order = np.argsort(-scores, axis=-1, kind="stable")
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, order[..., :count], True, axis=-1)
    selection.keep(structure.atom, structure.outers, mask)


def _normalise(scores: Scores, how: str) -> Scores:
    """Makes the scores of one layer comparable with others; formulas as in DepGraph."""
    tiny = float(np.finfo(np.float64).tiny)
    if how == "mean":
        return scores / max(float(scores.mean()), tiny)
    if how == "max":
        return scores / max(float(scores.max()), tiny)
    if how == "z-score":
        return (scores - scores.mean()) / max(float(scores.std()), tiny)
    return scores
