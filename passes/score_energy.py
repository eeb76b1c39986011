"""Scores channels of queries and keys by their energy in the attention scores.

A rotary pair (or a channel without rotation) M adds `sum over j in M of q_tj k_uj` to the score of position t for u.
Its energy is the mean square of that over all t and u: with the second moments `Q = E[q_M q_M']` and
`K = E[k_M k_M']` it is the sum of the entries of `Q * K`. Positions of queries and keys are taken as independent: which
of them a mask hides is not looked at. Where several heads or layers share a pair, their energies add up.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_autoglm.axes.analysis import Analysis
from onnx_autoglm.axes.dims import Atom, leaves, size_of
from onnx_autoglm.axes.facts import Role, ScoredProduct, label
from onnx_autoglm.axes.selection import Indices, coordinates, merged
from onnx_autoglm.axes.structures import Structure
from onnx_autoglm.dataset import Arrays
from onnx_autoglm.errors import UserError
from onnx_autoglm.passes.score_norm import Scores
from onnx_autoglm.walk import Walk


@dataclasses.dataclass(frozen=True)
class ScoreEnergy:
    """The mean square of what an index adds to a product of two activations that sums over it."""

    def __call__(
        self,
        structures: Sequence[Structure],
        analysis: Analysis,
        model: ir.Model,
        feeds: Sequence[Arrays],
        step: Callable[[str], None] = lambda _: None,
    ) -> dict[Structure, Scores]:
        return score_energy(structures, analysis, model, feeds, step)


def score_energy(
    structures: Sequence[Structure],
    analysis: Analysis,
    model: ir.Model,
    feeds: Sequence[Arrays],
    step: Callable[[str], None] = lambda _: None,
) -> dict[Structure, Scores]:
    """Scores of shape `Structure.shape`; structures that no product of two activations sums over are left out.

    Args:
        analysis: of a clone of the model, in which the structures were found.
        model: the canonical source, which is run piece by piece.

    Raises UserError if the model does not run, or an operand is not finite.
    """
    jobs = [
        _Job(product, structure, sides)
        for product in analysis.scored
        for structure in structures
        if structure.atom in leaves(product.dim)
        for sides in [_sides(analysis, product, structure)]
        if sides is not None
    ]
    scores: dict[Structure, Scores] = {}
    if not jobs:
        return scores
    order = {node: index for index, node in enumerate(analysis.graph)}
    with Walk(model, feeds) as walk:
        for number, job in enumerate(sorted(jobs, key=lambda job: order[job.product.node]), 1):
            step(f"observe attention scores {number} of {len(jobs)}")
            energy = _energy(job, walk)
            scores[job.structure] = scores.get(job.structure, np.zeros(job.structure.shape)) + energy
    return scores


@dataclasses.dataclass(frozen=True, eq=False)
class _Side:
    """One operand: its axes of heads and channels make columns, in groups of one head and one index each."""

    name: str
    axes: tuple[int, ...]
    columns: Indices  # [groups, channels of an index]
    heads: list[dict[Atom, int]]  # of each group
    units: list[int]  # of each group, flat over the structure's shape

    def moments(self, array: np.ndarray) -> tuple[Scores, int]:
        """Sums of products `[groups, channels, channels]` over all other axes, and their number."""
        rows = np.moveaxis(array, self.axes, range(-len(self.axes), 0))
        rows = rows.reshape(-1, int(np.prod(rows.shape[-len(self.axes) :])))
        picked = rows.astype(np.float64)[:, self.columns].transpose(1, 0, 2)
        return picked.transpose(0, 2, 1) @ picked, len(rows)


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    product: ScoredProduct
    structure: Structure
    sides: tuple[_Side, _Side]


def _sides(analysis: Analysis, product: ScoredProduct, structure: Structure) -> tuple[_Side, _Side] | None:
    """Both operands; None where one of them does not hold whole groups of equal size."""
    heads = {
        atom
        for dim, role, node in analysis.roles
        if node is product.node and role == Role.HEAD
        for atom in leaves(dim)
    }
    left, right = (_side(analysis, product, structure, operand, heads) for operand in product.operands)
    if left is None or right is None or left.columns.shape[1] != right.columns.shape[1]:
        return None
    return left, right


def _side(
    analysis: Analysis, product: ScoredProduct, structure: Structure, operand: int, heads: set[Atom]
) -> _Side | None:
    dims, value = analysis.input_dims(product.node, operand) or [], product.node.inputs[operand]
    summed = set(leaves(product.dim))
    axes = [
        axis
        for axis, dim in enumerate(dims)
        if isinstance(size_of(dim), int) and (summed | heads) & set(leaves(dim))
    ]
    shape = [int(str(size_of(dims[axis]))) for axis in axes]
    index: dict[Atom, Indices] = {}
    for place, axis in enumerate(axes):
        layout = [-1 if other == place else 1 for other in range(len(axes))]
        for atom, row in merged(coordinates(dims[axis])).items():
            index[atom] = np.broadcast_to(row.reshape(layout), shape).reshape(-1)
    if value is None or not {structure.atom, *structure.outers} <= set(index):
        return None
    units = index[structure.atom]
    stride = structure.size
    for outer, size in zip(reversed(structure.outers), reversed(structure.shape[:-1]), strict=True):
        units = np.where(units >= 0, units + stride * index[outer], -1)
        stride *= size
    around = [atom for atom in index if atom not in summed]
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for column in np.flatnonzero(units >= 0):
        groups[(*(int(index[atom][column]) for atom in around), int(units[column]))].append(int(column))
    if len({len(columns) for columns in groups.values()}) != 1:
        return None
    return _Side(
        value.name or "",
        tuple(axes),
        np.array(list(groups.values())),
        [dict(zip(around, key[:-1], strict=True)) for key in groups],
        [key[-1] for key in groups],
    )


def _energy(job: _Job, walk: Walk) -> Scores:
    left, right = job.sides
    names = [left.name, right.name]
    walk.reach(names)
    sums: list[Scores] = [np.zeros(()), np.zeros(())]
    counts = [0, 0]
    for arrays in walk.values(names):
        for number, side in enumerate(job.sides):
            if not np.isfinite(arrays[side.name]).all():
                raise UserError(
                    f"{side.name}, which {label(job.product.node)} reads, is not finite on the data"
                )
            products, rows = side.moments(arrays[side.name])
            sums[number] = sums[number] + products
            counts[number] += rows
    queries, keys = (total / max(count, 1) for total, count in zip(sums, counts, strict=True))
    result = np.zeros(job.structure.groups * job.structure.size)
    first, second = _matched(left, right)
    np.add.at(result, np.array(left.units)[first], (queries[first] * keys[second]).sum(axis=(1, 2)))
    return result.reshape(job.structure.shape)


def _matched(left: _Side, right: _Side) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The groups of both sides that meet: of one index, and of one head in all atoms that both have."""
    shared = [atom for atom in left.heads[0] if atom in right.heads[0]]

    def key(side: _Side, group: int) -> tuple[int, ...]:
        return (side.units[group], *(side.heads[group][atom] for atom in shared))

    partners: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for group in range(len(right.units)):
        partners[key(right, group)].append(group)
    pairs = [(g, other) for g in range(len(left.units)) for other in partners[key(left, g)]]
    found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]
