"""Quantized weights as tensors of a graph: laid out as the source's, kept in files until they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_autoglm.quantization.places import Place
from onnx_autoglm.quantization.weights import Quantized, nearest


class Shelf:
    """A folder that holds integers, so that memory does not; reading maps them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._count = 0

    def put(self, quantized: Quantized) -> Quantized:
        """The same weight, its integers in a file."""
        path = self._folder / f"{self._count}.npy"
        self._count += 1
        np.save(path, quantized.values)
        return Quantized(np.load(path, mmap_mode="r"), quantized.scales, quantized.bits, quantized.block)


def as_stored(rows: np.ndarray, place: Place, shape: tuple[int, ...]) -> np.ndarray:
    """`[k, n]` in the layout of the initializer of a place, which has this shape."""
    moved = [size for axis, size in enumerate(shape) if axis != place.channel_axis]
    return np.moveaxis(rows.reshape(*moved, rows.shape[-1]), -1, place.channel_axis)


def floats_tensor(quantized: Quantized, place: Place, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """What the integers stand for, in the layout and type of the source's tensor; computed when it is read."""
    shape = tuple(int(size) for size in tensor.shape.numpy())

    def compute() -> ir.TensorProtocol:
        array = as_stored(quantized.floats(), place, shape)
        return ir.Tensor(
            np.ascontiguousarray(array.astype(tensor.dtype.numpy())), dtype=tensor.dtype, name=tensor.name
        )

    return ir.LazyTensor(compute, tensor.dtype, ir.Shape(shape), name=tensor.name)


def rounded_rows(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A table `[rows, columns]` as 8 bits with one scale per row hold it; computed when it is read."""

    def compute() -> np.ndarray:
        held = nearest(np.asarray(tensor.numpy()).astype(np.float32).T, clip=False)
        return held.floats().T.astype(tensor.dtype.numpy())

    return lazy(tensor.name or "", tensor.dtype, tuple(int(size) for size in tensor.shape.numpy()), compute)


def lazy(name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Any) -> ir.TensorProtocol:
    """A tensor computed when it is read; `compute` returns its array."""

    def make() -> ir.TensorProtocol:
        array = np.ascontiguousarray(compute())
        return ir.Tensor(array, dtype=dtype, shape=ir.Shape(shape), name=name)

    return ir.LazyTensor(make, dtype, ir.Shape(shape), name=name)
