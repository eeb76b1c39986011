"""Tensors whose bytes stay in a file."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class MappedFile:
    """A file mapped into memory once, for all the tensors in it. (One mapping per tensor would use up one file
    descriptor each, and large models have more tensors than a process may have open files.)"""

    path: Path
    data: mmap.mmap

    @classmethod
    def open(cls, path: Path) -> MappedFile:
        """Map a file, which must not be empty."""
        with path.open("rb") as file:
            return cls(path.absolute(), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class MappedTensor(ir.ExternalTensor):
    """A tensor in a mapped file, at any offset; the file may be the model file itself.

    Its location is the file's absolute path, so that it stays right wherever the model is used. Such a location
    must not be saved; `save_model` never does.
    """

    def __init__(self, file: MappedFile, offset: int, tensor: ir.ExternalTensor) -> None:
        # Without a base_dir the base class leaves the question of where the file may lie to its caller; that
        # was settled when the model was opened.
        super().__init__(
            file.path,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )
        self._file = file
        self._start = offset

    @property
    def file(self) -> Path:
        """The file that holds the bytes."""
        return self._file.path

    def numpy(self) -> np.ndarray:
        """A read-only view of the file; types of less than a byte are unpacked into a copy."""
        if self.dtype.bitwidth % 8:
            packed = np.frombuffer(self._file.data, np.uint8, self.nbytes, self._start)
            return ir.PackedTensor(packed, self.dtype, shape=self.shape).numpy()
        dtype = self.dtype.numpy().newbyteorder("<")
        return np.frombuffer(self._file.data, dtype, self.size, self._start).reshape(self.shape.numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def tobytes(self) -> bytes:
        """A copy of the bytes."""
        return self._file.data[self._start : self._start + self.nbytes]

    def __repr__(self) -> str:
        return f"{self._repr_base()}(name={self.name!r}, file={self.file.name!r}, offset={self._start})"
