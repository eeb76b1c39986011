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
            if _is_scale(place):
                continue  # counted with the numbers that it scales
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
        reduced[key] = sum_powers(value.const_value, axes, p, _Scale.of(place))
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


def _is_scale(place: Place) -> bool:
    return all(
        node.op_type in ("QuantizeLinear", "DequantizeLinear") and index > 0
        for node, index in place.use.consumers
    )


@dataclasses.dataclass(frozen=True)
class _Scale:
    """How DequantizeLinear turns the stored integers of a weight into numbers: `(w - zero) * scale`.

    Scale and zero point are held per tensor (a scalar), per index of `axis`, or per `block` of it.
    """

    scale: npt.NDArray[np.float32]
    zero: npt.NDArray[np.float32]
    axis: int
    block: int

    @classmethod
    def of(cls, place: Place) -> _Scale | None:
        """The scale of a stored weight; None where it is not quantized, or by a scale that is computed."""
        node, index = place.use.consumers[0]
        if node.op_type != "DequantizeLinear" or index != 0:
            return None
        found = [None if value is None else value.const_value for value in node.inputs[1:3]]
        if found[0] is None:
            return None
        scale = found[0].numpy().astype(np.float32)
        zero = found[1] if len(found) > 1 else None
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
        zeros = np.zeros_like(scale) if zero is None else zero.numpy().astype(np.float32)
        return cls(scale, zeros, axis % max(len(place.use.dims), 1), block)

    def apply(self, piece: npt.NDArray[np.float32], start: int) -> npt.NDArray[np.float32]:
        """The numbers of rows `start ...` of the weight."""
        scale, zero = (self._spread(array, piece, start) for array in (self.scale, self.zero))
        return (piece - zero) * scale

    def _spread(
        self, array: npt.NDArray[np.float32], piece: npt.NDArray[np.float32], start: int
    ) -> npt.NDArray[np.float32]:
        if array.size == 1:
            return array.reshape(())
        rows = np.arange(start, start + len(piece))
        if self.block:
            if self.axis == 0:
                return array[rows // self.block]
            whole = np.repeat(array[rows], self.block, axis=self.axis)
            return whole.take(range(piece.shape[self.axis]), axis=self.axis)
        if self.axis == 0:
            array = array[rows]
        return array.reshape([-1 if axis == self.axis else 1 for axis in range(piece.ndim)])


def sum_powers(
    tensor: ir.TensorProtocol, axes: tuple[int, ...], p: int, scale: _Scale | None = None
) -> Scores:
    """`sum |w|^p` over all axes but the given ones, in their order, reading a few megabytes at a time."""
    array = tensor.numpy()
    kept = sorted(axes)
    result = np.zeros([array.shape[axis] for axis in kept])
    others = tuple(axis for axis in range(array.ndim) if axis not in kept)
    row_bytes = max(array.nbytes // max(array.shape[0], 1), 1)
    step = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, array.shape[0], step):
        piece = array[start : start + step].astype(np.float32)
        piece = np.abs(piece if scale is None else scale.apply(piece, start))
        powers = piece if p == 1 else np.square(piece, out=piece)
        sums = powers.sum(axis=others, dtype=np.float64)
        if 0 in kept:
            result[start : start + step] = sums
        else:
            result += sums
    return result if tuple(kept) == axes else result.T
