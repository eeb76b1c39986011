"""Scores structures by the error that removing them leaves after the best refit: greedy, centred OBS.

With centred statistics the score is the unavoidable squared error at the consumer after an affine refit of
what remains, so selection and repair have one objective. After Hassibi's optimal brain surgeon in blocks, as
ZipLM and OSSCAR use it: removing rows M of a weight costs `tr(W_M' [(H^-1)_MM]^-1 W_M)`, and afterwards
`W -= (H^-1)_:M [(H^-1)_MM]^-1 W_M`, with the inverse down-dated alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnx_autoglm.axes.selection import Indices
from onnx_autoglm.axes.structures import Structure
from onnx_autoglm.consumers import Consumer, Weight, consumers_of, members
from onnx_autoglm.passes.score_norm import Scores
from onnx_autoglm.statistics import Key, Observed, key_of

_ROUNDS = 48  # removals are done in about this many batches, each after an exact update
_DAMPING = 1e-2  # of the mean variance, added to every variance
_LARGEST_CUT = 0.9  # what survives longer is not ranked by error: nothing sensible cuts that deep


@dataclasses.dataclass(frozen=True)
class ScoreObs:
    """Greedy optimal brain surgeon with exact updates between batches."""

    rounds: int = _ROUNDS

    def __call__(
        self,
        structures: Sequence[Structure],
        consumers: list[Consumer],
        observed: Mapping[Key, Observed],
        step: Callable[[str], None] = lambda _: None,
    ) -> dict[Structure, Scores]:
        return score_obs(structures, consumers, observed, self.rounds, step)


def score_obs(
    structures: Sequence[Structure],
    consumers: list[Consumer],
    observed: Mapping[Key, Observed],
    rounds: int = _ROUNDS,
    step: Callable[[str], None] = lambda _: None,
) -> dict[Structure, Scores]:
    """Scores of shape `[*sizes of the outer atoms, size]`; structures without a consumer are left out.

    A score is the error that the index added when it was removed, relative to the variance of what the
    consumers compute, and never falls along the order of removal.
    """
    scores: dict[Structure, Scores] = {}
    for structure in structures:
        own = consumers_of(structure, consumers)
        if own:
            step(f"score {structure.id}")
            problems = [
                _Problem(members(structure, c), c.rows(), observed[key_of(c.contraction)].all.covariance)
                for c in own
            ]
            scores[structure] = _eliminate(structure, problems, rounds)
    return scores


def _eliminate(structure: Structure, problems: list[_Problem], rounds: int) -> Scores:
    groups, size = structure.groups, structure.size
    scale = sum(problem.variance for problem in problems) or 1.0
    scores = np.full((groups, size), np.inf)
    left = size - max(structure.floor, round(size * (1 - _LARGEST_CUT)))
    batch, worst = max(1, -(-left // rounds)), 0.0
    while left > 0:
        errors = sum(problem.errors(groups * size) for problem in problems)
        assert isinstance(errors, np.ndarray)
        errors = np.where(np.isinf(scores), errors.reshape(groups, size), np.inf)
        count = min(batch, left)
        chosen = np.argsort(errors, axis=1)[:, :count]
        # One batch counts as one step of equal parts: within it the order of errors decides ties alone.
        worst = max(worst, float(np.take_along_axis(errors, chosen, axis=1).mean()) / scale)
        np.put_along_axis(scores, chosen, worst * (1 + 1e-9 * np.arange(count)), axis=1)
        units = (chosen + size * np.arange(groups)[:, None]).reshape(-1)
        for problem in problems:
            problem.remove(units)
        left -= count
    survivors = np.isinf(scores)
    final = sum(problem.errors(groups * size) for problem in problems)
    assert isinstance(final, np.ndarray)
    scores[survivors] = np.maximum(final.reshape(groups, size)[survivors] / scale, worst * (1 + 1e-6))
    return scores.reshape(structure.shape)


def damped(covariance: Weight) -> Weight:
    """A covariance that can be inverted."""
    damping = _DAMPING * float(np.diag(covariance).mean())
    return np.asarray(covariance + max(damping, 1e-12) * np.eye(len(covariance)))


class _Problem:
    """One consumer during elimination: its remaining rows, their inverse covariance and weight."""

    def __init__(self, index: Indices, weight: Weight, covariance: Weight) -> None:
        self.index = index
        self.weight = weight.copy()
        self.variance = float(np.einsum("ko,kl,lo->", weight, covariance, weight, optimize=True))
        self.inverse = np.linalg.inv(damped(covariance))

    def errors(self, count: int) -> Weight:
        """The error of removing each unit now; infinite for those that are gone."""
        result = np.full(count, np.inf)
        units = [np.flatnonzero(self.index == unit) for unit in np.unique(self.index[self.index >= 0])]
        if all(len(rows) == 1 for rows in units):
            rows = np.flatnonzero(self.index >= 0)
            result[self.index[rows]] = np.square(self.weight[rows]).sum(axis=1) / np.diag(self.inverse)[rows]
            return result
        for rows in units:
            block = self.weight[rows]
            solved = np.linalg.solve(self.inverse[np.ix_(rows, rows)], block)
            result[self.index[rows[0]]] = float((block * solved).sum())
        return result

    def remove(self, units: Indices) -> None:
        gone = np.isin(self.index, units)
        kept = ~gone
        cross = self.inverse[np.ix_(kept, gone)]
        solved = np.linalg.solve(self.inverse[np.ix_(gone, gone)], np.hstack([self.weight[gone], cross.T]))
        outputs = self.weight.shape[1]
        self.weight = self.weight[kept] - cross @ solved[:, :outputs]
        self.inverse = self.inverse[np.ix_(kept, kept)] - cross @ solved[:, outputs:]
        self.index = self.index[kept]
