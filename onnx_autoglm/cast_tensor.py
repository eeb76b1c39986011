"""A float tensor stored in another float type: cast while it is written, never held whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from onnx_autoglm.sliced_tensor import SlicedTensor
from onnx_autoglm.upcast import Float32Tensor

CHUNK_BYTES = 16 << 20  # in float32


class CastTensor(ir.LazyTensor):
    """`source` in another float type: read and cast a chunk at a time."""

    def __init__(self, source: ir.TensorProtocol, dtype: ir.DataType) -> None:
        def cast() -> ir.TensorProtocol:
            return ir.Tensor(_cast(np.asarray(source.numpy()), dtype), dtype=dtype, name=source.name)

        shape = ir.Shape(source.shape.numpy())
        super().__init__(cast, dtype, shape, name=source.name, doc_string=source.doc_string)
        self.source = source

    def tofile(self, file: BinaryIO) -> None:
        """Write the little-endian bytes a chunk at a time, so that memory stays flat."""
        file.writelines(
            np.ascontiguousarray(_cast(chunk, self.dtype)).view(np.uint8).data
            for chunk in chunks(self.source)
        )


def cast_tensor(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """The tensor in that type; itself, or what it was cast from, where that has the type already."""
    if tensor.dtype == dtype:
        return tensor
    if isinstance(tensor, Float32Tensor):
        return cast_tensor(tensor.source, dtype)
    return CastTensor(tensor, dtype)


def chunks(tensor: ir.TensorProtocol) -> Iterator[np.ndarray]:
    """The entries in C order, in flat pieces of at most 16 MB of float32."""
    if isinstance(tensor, Float32Tensor):
        yield from chunks(tensor.source)
        return
    if isinstance(tensor, SlicedTensor):
        yield from (piece.reshape(-1) for piece in tensor.chunks(CHUNK_BYTES))
        return
    flat = np.asarray(tensor.numpy()).reshape(-1)
    step = CHUNK_BYTES // 4
    yield from (flat[start : start + step] for start in range(0, flat.size, step))


def largest(tensor: ir.TensorProtocol) -> float:
    """The largest finite magnitude in a tensor, 0 if it has none; read a chunk at a time."""
    found = 0.0
    for chunk in chunks(tensor):
        sizes = np.abs(chunk.astype(np.float32, copy=False))
        found = max(found, float(sizes.max(initial=0.0, where=np.isfinite(sizes))))
    return found


def _cast(array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):  # what does not fit was kept out of here
        return np.asarray(array.astype(dtype.numpy()))
