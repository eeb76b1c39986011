"""A tensor that is a selection of another one, read only while it is being written.

Pruning keeps some indices on some axes of a weight. Holding the result in memory would cost as much as the
model; a `SlicedTensor` holds the indices only, and reads its (memory-mapped) source a few megabytes at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

CHUNK_BYTES = 16 << 20

Selection = dict[int, np.ndarray]
OuterAxes = dict[int, int]


class SlicedTensor(ir.LazyTensor):
    """The entries of `source` at the kept indices of each axis.

    Args:
        source: The tensor that is selected from; it is neither read nor changed here.
        kept: For an axis, the ascending source indices that stay. One dimension selects alike everywhere; two
            dimensions `[size of the outer axis, n]` hold one selection per source index of another axis.
        outer: For each axis with a two-dimensional selection, that other axis.
        name: The tensor's name; that of the source if not given.
    """

    def __init__(
        self,
        source: ir.TensorProtocol,
        kept: Mapping[int, np.ndarray],
        outer: Mapping[int, int] | None = None,
        *,
        name: str | None = None,
    ) -> None:
        if source.dtype == ir.DataType.STRING or source.dtype.bitwidth % 8:
            raise NotImplementedError(f"cannot select from {source.dtype.name} tensor {source.name!r}")
        shape = tuple(source.shape.numpy())
        selection = {axis: np.asarray(indices, dtype=np.int64) for axis, indices in kept.items()}
        varying = dict(outer or {})
        _check_selection(shape, selection, varying)
        sizes = [selection[a].shape[-1] if a in selection else n for a, n in enumerate(shape)]
        super().__init__(
            lambda: ir.Tensor(self.numpy(), dtype=source.dtype, name=self.name),
            source.dtype,
            ir.Shape(sizes),
            name=name or source.name,
            doc_string=source.doc_string,
            metadata_props=dict(source.metadata_props),
        )
        if isinstance(source, SlicedTensor) and not varying:
            source, selection, varying = source._narrow(selection)
        self._source = source
        self._kept = selection
        self._outer = varying

    @property
    def source(self) -> ir.TensorProtocol:
        """The tensor that is selected from (for a selection of a selection, the first source)."""
        return self._source

    @property
    def kept(self) -> Selection:
        """For each selected axis, the source indices that stay."""
        return dict(self._kept)

    @property
    def outer(self) -> OuterAxes:
        """For each axis whose selection varies, the axis it varies along."""
        return dict(self._outer)

    def numpy(self) -> np.ndarray:
        """The whole selection as a new array; nothing is cached."""
        result = np.empty(self.shape.numpy(), dtype=self.dtype.numpy())
        flat = result.reshape(-1)
        position = 0
        for chunk in self.chunks():
            flat[position : position + chunk.size] = chunk.reshape(-1)
            position += chunk.size
        return result

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
        """The selection in pieces, in C order: joined end to end, the flattened pieces are the tensor.

        A piece is a contiguous block of full rank. It reads about `max_bytes` of the source at most, unless one
        innermost row alone is larger.
        """
        array = self._source.numpy()
        # Plain unsigned integers move faster than the types that numpy learnt from ml_dtypes.
        plain = _plain_dtype(array.dtype.itemsize)
        for chunk in _blocks(array.view(plain), self._kept, self._outer, max_bytes):
            yield np.ascontiguousarray(chunk).view(self.dtype.numpy())

    def tobytes(self) -> bytes:
        """The whole selection as little-endian bytes."""
        return b"".join(chunk.tobytes() for chunk in self.chunks())

    def tofile(self, file: BinaryIO) -> None:
        """Write the selection to a binary file, piece by piece."""
        file.writelines(chunk.reshape(-1).view(np.uint8).data for chunk in self.chunks())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def __repr__(self) -> str:
        axes = {axis: indices.shape[-1] for axis, indices in self._kept.items()}
        return f"{self._repr_base()}(name={self.name!r}, kept={axes}, source={self._source!r})"

    def _narrow(self, kept: Selection) -> tuple[ir.TensorProtocol, Selection, OuterAxes]:
        """The source, and what to select from it, so that `kept` is selected from this selection."""
        narrowed = dict(self._kept)
        for axis, indices in kept.items():
            narrowed[axis] = narrowed[axis][..., indices] if axis in narrowed else indices
        return self._source, narrowed, self._outer


def root_source(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor that a selection, or a selection of selections, reads from; any other tensor itself."""
    return root_source(tensor.source) if isinstance(tensor, SlicedTensor) else tensor


def _check_selection(shape: tuple[int, ...], kept: Selection, outer: OuterAxes) -> None:
    varying = {axis for axis, indices in kept.items() if indices.ndim == 2}
    if varying != set(outer):
        raise ValueError(f"axes {sorted(varying)} have a selection that varies, but outer is {outer}")
    for axis, indices in kept.items():
        if not 0 <= axis < len(shape):
            raise ValueError(f"no axis {axis} in shape {list(shape)}")
        if indices.ndim not in (1, 2):
            raise ValueError(f"axis {axis}: a selection has one or two dimensions, not {indices.ndim}")
        if indices.size and not 0 <= indices.min() <= indices.max() < shape[axis]:
            raise ValueError(f"axis {axis}: an index is outside 0..{shape[axis] - 1}")
        if (np.diff(indices, axis=-1) <= 0).any():
            raise ValueError(f"axis {axis}: the indices do not ascend")
    for axis, along in outer.items():
        if not 0 <= along < len(shape) or along == axis or along in outer:
            raise ValueError(f"axis {axis} cannot vary along axis {along}")
        if kept[axis].shape[0] != shape[along]:
            rows = kept[axis].shape[0]
            raise ValueError(f"axis {axis}: {rows} selections, but axis {along} has {shape[along]} indices")


def _blocks(array: np.ndarray, kept: Selection, outer: OuterAxes, max_bytes: int) -> Iterator[np.ndarray]:
    """The selected entries of `array`, as blocks of its rank in C order."""
    if array.ndim == 0:
        yield array
        return
    if not all(indices.shape[-1] for indices in kept.values()):
        return
    row_bytes = array.nbytes // max(array.shape[0], 1)
    large_rows = row_bytes > max_bytes and array.ndim > 1
    if 0 not in outer and (large_rows or 0 in outer.values()):
        for row in kept.get(0, np.arange(array.shape[0])):
            inner, inner_outer = _below(kept, outer, int(row))
            for block in _blocks(array[row], inner, inner_outer, max_bytes):
                yield block[np.newaxis]
        return
    count = kept[0].shape[-1] if 0 in kept else array.shape[0]
    step = max(1, max_bytes // max(row_bytes, 1))
    for first in range(0, count, step):
        rows = slice(first, min(first + step, count))
        if outer:
            yield _gather(array, kept, outer, rows)
        else:
            yield _take(array, kept, rows)


def _below(kept: Selection, outer: OuterAxes, row: int) -> tuple[Selection, OuterAxes]:
    """What is selected from the sub-array at index `row` of axis 0: all axes move down by one."""
    inner = {axis - 1: indices for axis, indices in kept.items() if axis > 0}
    for axis, along in outer.items():
        if along == 0:
            inner[axis - 1] = kept[axis][row]
    return inner, {axis - 1: along - 1 for axis, along in outer.items() if along > 0}


def _take(array: np.ndarray, kept: Selection, rows: slice) -> np.ndarray:
    """Some rows of the selection, where it is the same everywhere."""
    block = array[rows] if 0 not in kept else _select(array, kept[0][rows], 0)
    for axis in sorted(kept):
        if axis > 0:
            block = _select(block, kept[axis], axis)
    return block


def _select(array: np.ndarray, indices: np.ndarray, axis: int) -> np.ndarray:
    first, last = int(indices[0]), int(indices[-1])
    if last - first + 1 == indices.size:  # one run: a view will do
        return array[(slice(None),) * axis + (slice(first, last + 1),)]
    if axis > 0:
        return np.take(array, indices, axis=axis)
    # `take` copies an unaligned source whole before it selects, and weights inside a model file start at any
    # byte. Bytes are always aligned.
    if array.size and not array.flags.aligned:
        taken = np.take(array.reshape(len(array), -1).view(np.uint8), indices, axis=0)
        return taken.view(array.dtype).reshape(-1, *array.shape[1:])
    return np.take(array, indices, axis=0)


def _gather(array: np.ndarray, kept: Selection, outer: OuterAxes, rows: slice) -> np.ndarray:
    """Some rows of the selection, where it varies along other axes than the first: one index array per axis."""
    rank = array.ndim
    index: list[np.ndarray] = [np.empty(0)] * rank
    for axis in sorted(range(rank), key=lambda axis: axis in outer):  # outer axes come before inner ones
        indices = kept.get(axis, np.arange(array.shape[axis]))
        if axis == 0:
            indices = indices[..., rows]
        if axis not in outer:
            index[axis] = indices.reshape([-1 if a == axis else 1 for a in range(rank)])
            continue
        along = index[outer[axis]].reshape(-1)
        selected = indices[along]  # [outer, inner]
        shape = [1] * rank
        shape[outer[axis]], shape[axis] = selected.shape
        index[axis] = (selected if outer[axis] < axis else selected.T).reshape(shape)
    return np.asarray(array[tuple(index)])


def _plain_dtype(itemsize: int) -> np.dtype[Any]:
    return np.dtype(f"u{itemsize}") if itemsize in (1, 2, 4, 8) else np.dtype(f"V{itemsize}")
