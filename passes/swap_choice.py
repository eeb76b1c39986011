"""Exchanges what stays for what goes while that lowers the error after the best refit (OSSCAR's local search).

With `H` the damped covariance of what a consumer reads, `T = H W`, and kept rows P, the best weight is
`V = (H_PP)^-1 T_P`. Keeping rows i as well lowers the error by `r' s^-1 r`, with `r = T_i - H_iP V` and
`s = H_ii - H_iP (H_PP)^-1 H_Pi`; removing rows j raises it by `V_j' [((H_PP)^-1)_jj]^-1 V_j`. Errors add up over the
consumers of a structure, and each exchange is chosen by its exact effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnx_autoglm.axes.selection import Indices, Selection
from onnx_autoglm.axes.structures import Structure
from onnx_autoglm.consumers import Consumer, Weight, consumers_of, members
from onnx_autoglm.passes.score_obs import damped
from onnx_autoglm.statistics import Key, Observed, key_of

_TRIED = 16  # of what went, those that help most alone are tried for an exchange


@dataclasses.dataclass(frozen=True)
class SwapChoice:
    """`swaps` is the most exchanges per structure."""

    swaps: int

    def __call__(
        self,
        selection: Selection,
        structures: Sequence[Structure],
        consumers: list[Consumer],
        observed: Mapping[Key, Observed],
        step: Callable[[str], None] = lambda _: None,
    ) -> int:
        return swap_choice(selection, structures, consumers, observed, self.swaps, step)


def swap_choice(
    selection: Selection,
    structures: Sequence[Structure],
    consumers: list[Consumer],
    observed: Mapping[Key, Observed],
    swaps: int,
    step: Callable[[str], None] = lambda _: None,
) -> int:
    """Improves a selection in place, at equal counts, structure by structure; returns the number of exchanges."""
    total = 0
    for structure in structures:
        own = consumers_of(structure, consumers)
        if structure.atom not in selection.kept or not own:
            continue
        step(f"exchange in {structure.id}")
        mask = selection.kept[structure.atom].copy()
        kept = mask.reshape(-1)
        problems = [
            Problem(
                members(structure, c), c.rows(), damped(observed[key_of(c.contraction)].all.covariance), kept
            )
            for c in own
        ]
        for _ in range(swaps):
            pair = _best_pair(problems, kept, structure.size)
            if pair is None:
                break
            back, gone = pair
            kept[back], kept[gone] = True, False
            for problem in problems:
                problem.exchange(back, gone)
            total += 1
        selection.keep(structure.atom, structure.outers, mask)
    return total


def _best_pair(problems: Sequence[Problem], kept: np.ndarray, size: int) -> tuple[int, int] | None:
    """What should come back and what should go for it, in one selection; None if no exchange helps."""
    removed = np.flatnonzero(~kept)
    gains = {int(unit): sum(problem.gain(int(unit)) for problem in problems) for unit in removed}
    error = sum(problem.error() for problem in problems)
    best, change = None, -1e-9 * max(error, 1e-30)
    for unit in sorted(gains, key=lambda unit: -gains[unit])[:_TRIED]:
        group = unit // size * size
        others = group + np.flatnonzero(kept[group : group + size])
        if not len(others):
            continue
        costs = np.sum([problem.costs(unit, others) for problem in problems], axis=0)
        least = int(np.argmin(costs))
        if costs[least] - gains[unit] < change:
            best, change = (unit, int(others[least])), float(costs[least] - gains[unit])
    return best


class Problem:
    """One consumer: its kept rows, the inverse of their covariance, and their best weight."""

    def __init__(self, index: Indices, weight: Weight, covariance: Weight, kept: np.ndarray) -> None:
        """`index [k]` has the unit of each row, or -1 for rows that stay; `kept` says which units stay."""
        self._index, self._h, self._target = index, covariance, covariance @ weight
        self._whole = float((weight * self._target).sum())
        self._rows = np.flatnonzero((index < 0) | kept[index])
        self._inverse = np.linalg.inv(covariance[np.ix_(self._rows, self._rows)])
        self._weight = self._inverse @ self._target[self._rows]

    def error(self) -> float:
        """The squared error that the best weight leaves."""
        return self._whole - float((self._weight * self._target[self._rows]).sum())

    def gain(self, unit: int) -> float:
        """By how much the error falls if a unit comes back."""
        if not (self._index == unit).any():
            return 0.0
        _, _, missed, solved = self._added(unit)
        return float((missed * solved).sum())

    def costs(self, back: int, units: Indices) -> Weight:
        """By how much the error rises if one of the units goes after another has come back."""
        weight, spread, own = self._weight, None, self._inverse
        if (self._index == back).any():
            spread, rest, _, solved = self._added(back)
            weight = weight - spread @ solved
            rest = np.asarray(np.linalg.inv(rest), dtype=np.float64)
        places = self._index[self._rows]
        costs = np.zeros(len(units))
        for number, unit in enumerate(units):
            at = np.flatnonzero(places == unit)
            if len(at):
                block = own[np.ix_(at, at)]
                if spread is not None:
                    block = block + spread[at] @ rest @ spread[at].T
                costs[number] = float((weight[at] * np.linalg.solve(block, weight[at])).sum())
        return costs

    def exchange(self, back: int, gone: int) -> None:
        kept = self._index[self._rows] != gone
        rows = np.concatenate([self._rows[kept], np.flatnonzero(self._index == back)])
        self._rows = np.sort(rows)
        self._inverse = np.linalg.inv(self._h[np.ix_(self._rows, self._rows)])
        self._weight = self._inverse @ self._target[self._rows]

    def _added(self, unit: int) -> tuple[Weight, Weight, Weight, Weight]:
        """For the rows of a unit: `(H_PP)^-1 H_Pi`, `s`, `r` and `s^-1 r`."""
        own = np.flatnonzero(self._index == unit)
        across = self._h[np.ix_(self._rows, own)]
        spread = self._inverse @ across
        rest = self._h[np.ix_(own, own)] - across.T @ spread
        missed = self._target[own] - across.T @ self._weight
        return spread, rest, missed, np.asarray(np.linalg.solve(rest, missed), dtype=np.float64)
