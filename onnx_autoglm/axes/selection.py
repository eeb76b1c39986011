"""From kept indices of atoms to new sizes and to kept indices of every axis.

`coordinates` decodes an axis: for every index of it, the index of each atom. All else is masking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from onnx_autoglm.axes.dims import Atom, Dim, Sum, leaves, parts_of, resolve, size_of
from onnx_autoglm.axes.size import Size, add, mul

Indices = npt.NDArray[np.int64]


Coordinate = tuple[Atom, Indices]


def coordinates(dim: Dim) -> list[Coordinate]:
    """For each free factor of an axis its index at every index of the axis, -1 where it does not occur.

    An atom appears once for every place it has in the expression: `a*a` and `a+a` list it twice. Only for
    axes of known size.
    """
    result: list[Coordinate] = []
    factors = resolve(dim)
    total = size_of(factors)
    assert isinstance(total, int)
    outer = 1
    for factor in factors:
        assert isinstance(factor.size, int)
        inner = total // (outer * factor.size)
        result.extend((atom, np.tile(np.repeat(index, inner), outer)) for atom, index in _decode(factor))
        outer *= factor.size
    return result


def _decode(factor: Atom) -> list[Coordinate]:
    assert isinstance(factor.size, int)
    if not isinstance(factor.bound, Sum):
        return [(factor, np.arange(factor.size))]
    result: list[Coordinate] = []
    offset = 0
    for part in parts_of(factor):
        size = size_of(part)
        assert isinstance(size, int)
        for atom, index in coordinates(part):
            row = np.full(factor.size, -1)
            row[offset : offset + size] = index
            result.append((atom, row))
        offset += size
    return result


def merged(found: Sequence[Coordinate]) -> dict[Atom, Indices]:
    """One index per atom, for atoms whose places exclude each other (`a+a`)."""
    result: dict[Atom, Indices] = {}
    for atom, index in found:
        result[atom] = np.maximum(result[atom], index) if atom in result else index
    return result


class Selection:
    """Which indices of which atoms stay.

    `kept[atom]` is a boolean array `[*sizes of its outer atoms, size]`, with equal counts in each row.
    """

    def __init__(self) -> None:
        self.kept: dict[Atom, npt.NDArray[np.bool_]] = {}
        self.outers: dict[Atom, tuple[Atom, ...]] = {}

    def keep(self, atom: Atom, outers: tuple[Atom, ...], mask: npt.NDArray[np.bool_]) -> None:
        counts = mask.sum(axis=-1)
        if counts.min() != counts.max() or not counts.min():
            raise ValueError("a selection must keep the same count, at least one, for every outer index")
        self.kept[atom] = mask
        self.outers[atom] = outers

    def size(self, dim: Dim) -> Size:
        """The size of an axis after removal."""
        total: Size = 1
        for factor in resolve(dim):
            total = mul(total, self._factor_size(factor))
        return total

    def _factor_size(self, factor: Atom) -> Size:
        if isinstance(factor.bound, Sum):
            total: Size = 0
            for part in parts_of(factor):
                total = add(total, self.size(part))
            return total
        mask = self.kept.get(factor)
        return factor.size if mask is None else int(mask.reshape(-1, mask.shape[-1])[0].sum())

    def touches(self, dim: Dim) -> bool:
        return any(atom in self.kept for atom in leaves(dim))

    def indices(self, dims: Sequence[Dim], axis: int) -> tuple[Indices, int | None]:
        """Kept source indices of one axis of an array, ascending.

        Where the selection varies with an atom of another axis, one row per index of that axis, which
        is returned beside them.
        """
        own = coordinates(dims[axis])
        present = {atom for atom, _ in own}
        missing = {
            outer
            for atom in present
            if atom in self.kept
            for outer in self.outers[atom]
            if outer not in present
        }
        if not missing:
            return np.flatnonzero(self._mask(own, {})), None
        other = next(index for index, dim in enumerate(dims) if index != axis and missing <= set(leaves(dim)))
        decoded = merged(coordinates(dims[other]))
        length = size_of(dims[other])
        assert isinstance(length, int)
        rows = [
            np.flatnonzero(self._mask(own, {atom: int(decoded[atom][index]) for atom in missing}))
            for index in range(length)
        ]
        return np.stack(rows), other

    def _mask(self, own: Sequence[Coordinate], fixed: Mapping[Atom, int]) -> npt.NDArray[np.bool_]:
        length = len(own[0][1])
        places = merged(own)
        mask = np.ones(length, dtype=bool)
        for atom, index in own:
            if atom not in self.kept:
                continue
            where = tuple(
                np.full(length, fixed[outer]) if outer in fixed else places[outer]
                for outer in self.outers[atom]
            )
            mask &= self.kept[atom][(*where, index)] | (index < 0)
        return mask
