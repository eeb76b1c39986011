"""Chooses what stays, from scores and the user's fractions."""

from __future__ import annotations

import dataclasses
import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.structures import Structure
from onnx_autoglm.kinds import ALIGNED
from onnx_autoglm.options import PruningOptions, matches
from onnx_autoglm.passes.ladder import Ladder, keep_best
from onnx_autoglm.passes.score_norm import Scores

# Reasons that are the user's own choice rather than the model's.
BY_CHOICE = frozenset({"not included", "excluded", "protected", "all of them are excluded or protected"})


@dataclasses.dataclass
class Decision:
    """What becomes of one structure that the user asked about; `reason` says why nothing was removed."""

    structure: Structure
    keep: int
    reason: str = ""
    counted: bool = False  # it took part in the choice, whatever came of it

    def settle(self, keep: int, why_all: str) -> None:
        """Sets the count; `why_all` is the reason if that is all of them."""
        self.keep, self.counted = keep, True
        self.reason = why_all if keep == self.structure.size else ""


def candidates(
    structures: Sequence[Structure], fractions: Mapping[str, float], options: PruningOptions, *, asked: bool
) -> list[Decision]:
    """One decision per structure of the kinds in `fractions`; those with a reason stay whole.

    Args:
        asked: whether the user named the kinds. Only then may the shape of a cache change.
    """
    by_kind: dict[str, list[Structure]] = defaultdict(list)
    for structure in structures:
        if structure.kind in fractions:
            by_kind[structure.kind].append(structure)
    decisions = []
    for row in by_kind.values():
        count = len(row)
        for position, structure in enumerate(row):
            reason = _why_not(structure, row, options, asked)
            if structure.names and not reason:
                reason = "all of them are excluded or protected" if _spared(structure, options).all() else ""
            elif not reason and (
                position < options.protect_first or position >= count - options.protect_last
            ):
                reason = "protected"
            decisions.append(Decision(structure, structure.size, reason))
    return decisions


def _left_out(structure: Structure, options: PruningOptions) -> bool:
    return bool(structure.pins) or bool(_by_name(structure.id, options))


def _by_name(name: str, options: PruningOptions) -> str:
    if options.target_layers and not matches(name, options.target_layers):
        return "not included"
    return "excluded" if matches(name, options.exclude_layers) else ""


def _spared(structure: Structure, options: PruningOptions) -> npt.NDArray[np.bool_]:
    """Which of the named indices of a structure the user wants left alone."""
    last = structure.size - options.protect_last
    return np.array(
        [
            bool(_by_name(name, options)) or not options.protect_first <= index < last
            for index, name in enumerate(structure.names)
        ]
    )


def _why_not(structure: Structure, row: list[Structure], options: PruningOptions, asked: bool) -> str:
    if structure.pins:
        return "; ".join(str(pin) for pin in structure.pins[:3])
    if not structure.names and _by_name(structure.id, options):
        return _by_name(structure.id, options)
    if structure.interface and not asked:
        return f"would change the shape of {', '.join(structure.interface[:2])}: ask with --prune {structure.kind}="
    inner = [other for other in row if structure.atom in other.outers and not _left_out(other, options)]
    if inner:
        return f"its inner factor {inner[0].id} is cut instead"
    return ""


def shortfalls(
    decisions: Sequence[Decision], fractions: Mapping[str, float], options: PruningOptions
) -> list[str]:
    """One line per kind whose target was missed by more than the rounding of its counts.

    Layers that the model pins, or that the user left out, are no part of the target.
    """
    lines = []
    for kind, fraction in fractions.items():
        row = [d for d in decisions if d.structure.kind == kind and (d.counted or not d.reason)]
        total = sum(d.structure.parameters for d in row)
        removed = sum((d.structure.size - d.keep) * d.structure.cost * d.structure.groups for d in row)
        tile = options.align if kind in ALIGNED else 1
        rounding = sum(tile * d.structure.cost * d.structure.groups for d in row) / 2
        if row and fraction * total - removed > rounding + 1e-6 * total:
            lines.append(
                f"{kind}={fraction:g} cannot be reached: {removed / total:.3f} can be removed with counts of "
                f"{_sizes(row)}, floor {max(options.min_keep, *(d.structure.floor for d in row))}, tile {tile}"
            )
        elif row and not removed:
            lines.append(
                f"{kind}={fraction:g} removes nothing: the smallest step is 1 of {_sizes(row)}; raise it"
            )
    return lines


def _sizes(row: Sequence[Decision]) -> str:
    return ", ".join(str(size) for size in sorted({decision.structure.size for decision in row})[:4])


def choose(
    structures: Sequence[Structure],
    scores: Mapping[Structure, Scores],
    fractions: Mapping[str, float],
    options: PruningOptions,
    decisions: list[Decision] | None = None,
) -> tuple[Selection, list[Decision]]:
    """Decides how many indices of each structure stay, and which: those of highest score.

    A fraction is what is removed, rounded to the nearest count; ties remove less.
    """
    decisions = candidates(structures, fractions, options, asked=True) if decisions is None else decisions
    selection = Selection()
    for kind, fraction in fractions.items():
        row = [
            _Layer(decision, scores[decision.structure], options)
            for decision in decisions
            if decision.structure.kind == kind and not decision.reason
        ]
        if options.scope == "global":
            _spend(row, fraction * sum(layer.parameters for layer in row))
        else:
            _per_layer(row, fraction)
        for layer in row:
            layer.select(selection)
    return selection, decisions


def _per_layer(row: list[_Layer], fraction: float) -> None:
    wanted = 0.0
    for layer in row:
        size = layer.structure.size
        removed = int(np.ceil(fraction * size - 0.5))
        layer.keep = layer.rounded_up(size - removed)
        wanted += removed * layer.cost
    if any(layer.tile > 1 for layer in row):
        _spend(row, wanted)


def _spend(row: list[_Layer], budget: float) -> None:
    """Removes the cheapest tile of all layers until the budget of parameters is spent, to the nearest."""
    spent = sum((layer.structure.size - layer.keep) * layer.cost for layer in row)
    queue = [(layer.next_score(), index) for index, layer in enumerate(row) if layer.next_keep() is not None]
    heapq.heapify(queue)
    while queue:
        _, index = heapq.heappop(queue)
        layer = row[index]
        following = layer.next_keep()
        assert following is not None
        step = (layer.keep - following) * layer.cost
        if spent + step / 2 > budget:
            return
        layer.keep = following
        spent += step
        if layer.next_keep() is not None:
            heapq.heappush(queue, (layer.next_score(), index))


class _Layer(Ladder):
    """A ladder with the decision that it comes to."""

    def __init__(self, decision: Decision, scores: Scores, options: PruningOptions) -> None:
        spared = _spared(decision.structure, options)
        if spared.any():
            scores = np.where(spared, scores.max() + 1, scores)
        super().__init__(decision.structure, scores, options, how=options.normalize)
        self.floor = min(max(self.floor, int(spared.sum())), self.structure.size)
        self.decision, self.scores = decision, scores
        self.keep = self.structure.size
        self.cost = self.structure.cost * self.structure.groups

    @property
    def parameters(self) -> float:
        return self.cost * self.structure.size

    def next_keep(self) -> int | None:
        return self.step_below(self.keep)

    def next_score(self) -> float:
        """The mean score of the indices that the next step would remove."""
        following = self.next_keep()
        assert following is not None
        return self.error(self.keep, following) / (self.keep - following)

    def select(self, selection: Selection) -> None:
        self.decision.settle(
            self.keep, f"the fraction leaves all {self.structure.size} (floor {self.floor}, tile {self.tile})"
        )
        keep_best(selection, self.structure, self.scores, self.keep)
