"""Device memory, a stream and recorded launches, over polygraphy's binding of the CUDA runtime."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from onnx_autoglm.errors import UserError

_GRANULE = 256  # bytes; also what an empty tensor gets, since it needs an address, too
_RELAXED = 2  # cudaStreamCaptureModeRelaxed: other threads may allocate meanwhile


class Recording:
    """Launches recorded from a stream (a CUDA graph), to be repeated with one call."""

    def __init__(self, handle: ctypes.CDLL, graph: ctypes.c_void_p, executable: ctypes.c_void_p) -> None:
        self._handle, self._graph, self._executable = handle, graph, executable

    def launch(self, stream: int) -> None:
        status = self._handle.cudaGraphLaunch(self._executable, ctypes.c_void_p(stream))
        if status != 0:
            raise UserError(f"the device refuses a recorded run (CUDA error {status})")

    def free(self) -> None:
        self._handle.cudaGraphExecDestroy(self._executable)
        self._handle.cudaGraphDestroy(self._graph)


@dataclasses.dataclass
class DeviceValue:
    """A result that stays on the device and can be fed again. `free` lets its memory be used for others."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    memory: DeviceMemory

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def numpy(self) -> np.ndarray:
        array = np.empty(self.shape, self.dtype)
        self.memory.download(self.address, array)
        self.memory.synchronize()
        return array

    def free(self) -> None:
        self.memory.release(self.address)


class DeviceMemory:
    """Blocks of device memory, which are kept for the next use, and one stream.

    Raises UserError where there is no CUDA runtime, or no memory left.
    """

    def __init__(self) -> None:
        from polygraphy import cuda
        from polygraphy.logger import G_LOGGER

        with self._explained("cannot use a GPU"), G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            self._cuda = cuda.wrapper()
            self._to_device, self._to_host = cuda.MemcpyKind.HostToDevice, cuda.MemcpyKind.DeviceToHost
            self._on_device = cuda.MemcpyKind.DeviceToDevice
            self.stream: int = self._cuda.create_stream()
        self._idle: dict[int, list[int]] = {}
        self._sizes: dict[int, int] = {}

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        from polygraphy.exception import PolygraphyException

        try:
            yield
        except (OSError, PolygraphyException) as error:
            raise UserError(f"{what}: {str(error).splitlines()[0]}") from error

    def allocate(self, nbytes: int) -> int:
        """An address of at least so many bytes, from what is idle or fresh."""
        size = _block(nbytes)
        idle = self._idle.get(size)
        if idle:
            return idle.pop()
        with self._explained(f"no {size:,} bytes of device memory are left"):
            address: int = self._cuda.malloc(size)
        self._sizes[address] = size
        return address

    def release(self, address: int) -> None:
        """Keeps the block for the next use."""
        if address in self._sizes:
            self._idle.setdefault(self._sizes[address], []).append(address)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copies a contiguous array to the device, in the order of the stream."""
        if array.nbytes:
            self._cuda.memcpy(address, array.ctypes.data, array.nbytes, self._to_device, self.stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        if nbytes:
            self._cuda.memcpy(target, source, nbytes, self._on_device, self.stream)

    def download(self, address: int, array: np.ndarray) -> None:
        """Fills a contiguous array from the device once the stream has come there; call `synchronize` after it."""
        if array.nbytes:
            self._cuda.memcpy(array.ctypes.data, address, array.nbytes, self._to_host, self.stream)

    def synchronize(self) -> None:
        with self._explained("the device failed"):
            self._cuda.stream_synchronize(self.stream)

    def record(self, enqueue: Callable[[], None]) -> Recording | None:
        """Records what `enqueue` puts on the stream, without running it. None if it cannot be recorded."""
        handle, stream = self._cuda.handle, ctypes.c_void_p(self.stream)
        if handle.cudaStreamBeginCapture(stream, _RELAXED) != 0:
            return None
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        try:
            enqueue()
        finally:  # a stream that goes on recording is lost
            ended = handle.cudaStreamEndCapture(stream, ctypes.byref(graph))
        if ended != 0:
            return None
        status = handle.cudaGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        return Recording(handle, graph, executable) if status == 0 else None

    def close(self) -> None:
        """Gives all memory back."""
        for address in self._sizes:
            self._cuda.free(address)
        self._sizes, self._idle = {}, {}
        self._cuda.destroy_stream(self.stream)


def _block(nbytes: int) -> int:
    """The size of the block for so many bytes: a power of two up to 1 MiB, then whole MiB.

    Caches grow by a token per step; blocks that do not follow each step can be used again.
    """
    if nbytes <= _GRANULE:
        return _GRANULE
    if nbytes <= 1 << 20:
        return 1 << (nbytes - 1).bit_length()
    return -(-nbytes >> 20) << 20
