"""Scores structures by the norm of all the weights that go with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_autoglm.axes.dims import Atom, Dim, leaves
from onnx_autoglm.axes.places import Place
from onnx_autoglm.axes.selection import Indices, coordinates, merged
from onnx_autoglm.axes.structures import Structure

Scores = npt.NDArray[np.float64]
_CHUNK_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class ScoreNorm:
    """L1 or L2 norm over all initializer slices of an index, grouped as DepGraph does.

    `score = (sum over places and entries |w|^p)^(1/p)`, so that an index which lives in several
    initializers is weighed by all of them.
    """

    p: int = 2

    def __call__(self, structures: Sequence[Structure]) -> dict[Structure, Scores]:
        return score_norm(structures, self.p)


def score_norm(structures: Sequence[Structure], p: int) -> dict[Structure, Scores]:
    """Scores of shape `[*sizes of the outer atoms, size]` for each structure.

    Weights are read in pieces and summed in float64; each initializer is read once per set of axes.
    """
    reduced: dict[tuple[ir.Value, tuple[int, ...]], Scores] = {}
    scores: dict[Structure, Scores] = {}
    for structure in structures:
        sizes = [_number(outer.size) for outer in structure.outers]
        total = np.zeros([*sizes, structure.size])
        for place in structure.places:
            _add_place(total, structure, place, p, reduced)
        scores[structure] = total ** (1.0 / p)
    return scores


def _add_place(
    total: Scores,
    structure: Structure,
    place: Place,
    p: int,
    reduced: dict[tuple[ir.Value, tuple[int, ...]], Scores],
) -> None:
    dims, value = place.use.dims, place.use.value
    own = coordinates(dims[place.axis])
    known = merged(own)
    elsewhere = [outer for outer in structure.outers if outer not in known]
    axes: tuple[int, ...] = (place.axis,)
    if elsewhere:
        axes += (_axis_of(dims, elsewhere, place.axis),)
    key = (value, axes)
    if key not in reduced:
        assert value.const_value is not None
        reduced[key] = sum_powers(value.const_value, axes, p)
    other = merged(coordinates(dims[axes[1]])) if elsewhere else {}
    for atom, index in own:
        if atom is structure.atom:
            _scatter(total, structure, reduced[key], index, known, other)


def _scatter(
    total: Scores,
    structure: Structure,
    sums: Scores,
    index: Indices,
    known: dict[Atom, Indices],
    other: dict[Atom, Indices],
) -> None:
    """Adds the sums of one axis (or one axis by an outer one) to the indices they belong to."""
    present = index >= 0
    column = (slice(None), None) if other else (slice(None),)
    where = [
        other[outer][None, :] if outer in other else known[outer][present][column]
        for outer in structure.outers
    ]
    np.add.at(total, (*where, index[present][column]), sums[present])


def _axis_of(dims: list[Dim], atoms: list[Atom], axis: int) -> int:
    return next(other for other, dim in enumerate(dims) if other != axis and set(atoms) <= set(leaves(dim)))


def _number(size: Any) -> int:
    assert isinstance(size, int)
    return size


def sum_powers(tensor: ir.TensorProtocol, axes: tuple[int, ...], p: int) -> Scores:
    """`sum |w|^p` over all axes but the given ones, in their order, reading a few megabytes at a time."""
    array = tensor.numpy()
    kept = sorted(axes)
    result = np.zeros([array.shape[axis] for axis in kept])
    others = tuple(axis for axis in range(array.ndim) if axis not in kept)
    row_bytes = max(array.nbytes // max(array.shape[0], 1), 1)
    step = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, array.shape[0], step):
        piece = np.abs(array[start : start + step].astype(np.float32))
        powers = piece if p == 1 else np.square(piece, out=piece)
        sums = powers.sum(axis=others, dtype=np.float64)
        if 0 in kept:
            result[start : start + step] = sums
        else:
            result += sums
    return result if tuple(kept) == axes else result.T
