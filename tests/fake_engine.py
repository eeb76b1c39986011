"""An engine and a device made of numpy and host memory, with the interface of the real ones."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from onnx_autoglm.engine_backend import Backend
from onnx_autoglm.engine_memory import DeviceMemory, _block


class Recorded:
    def __init__(self, log: list[str], run: Callable[[], None]) -> None:
        self.log, self.run = log, run

    def launch(self, stream: int) -> None:
        self.log.append("replay")
        self.run()

    def free(self) -> None:
        self.log.append("forget")


class Memory(DeviceMemory):
    """The blocks are numpy arrays; an address is theirs."""

    stream = 7

    def __init__(self) -> None:
        self._idle, self._sizes = {}, {}
        self.blocks: dict[int, np.ndarray] = {}
        self.log: list[str] = []
        self.work: Callable[[], None] | None = None
        self.recording = False

    def allocate(self, nbytes: int) -> int:
        idle = self._idle.get(_block(nbytes))
        if idle:
            return idle.pop()
        block = np.empty(_block(nbytes), np.uint8)
        self.blocks[block.ctypes.data] = block
        self._sizes[block.ctypes.data] = block.nbytes
        return int(block.ctypes.data)

    def upload(self, address: int, array: np.ndarray) -> None:
        assert self._sizes[address] >= array.nbytes and array.flags.c_contiguous
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, array: np.ndarray) -> None:
        assert self._sizes[address] >= array.nbytes
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def synchronize(self) -> None:
        self.log.append("wait")

    def record(self, enqueue: Callable[[], None]) -> Any:
        self.recording = True
        enqueue()
        self.recording = False
        self.log.append("record")
        assert self.work is not None
        return Recorded(self.log, self.work)

    def close(self) -> None:
        self.log.append("close")


def kind(name: str) -> Any:
    return types.SimpleNamespace(name=name)


class Context:
    """Computes y = 2 x and the longer cache [p, x] along axis 1."""

    def __init__(self, engine: Engine, memory: Memory) -> None:
        self.engine, self.memory = engine, memory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.memory.log.append(f"profile {index}")
        return stream == self.memory.stream

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name == "y":
            return self.shapes["x"]
        (batch, new), (_, past) = self.shapes["x"], self.shapes["p"]
        return (batch, past + new)

    def execute_async_v3(self, stream: int) -> bool:
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        outputs = {name: self.get_tensor_shape(name) for name in ("y", "q")}

        def work() -> None:
            def view(name: str, shape: tuple[int, ...]) -> np.ndarray:
                size = int(np.prod(shape))
                buffer = (ctypes.c_float * max(size, 1)).from_address(addresses[name])
                return np.frombuffer(buffer, np.float32)[:size].reshape(shape)

            x, p = view("x", shapes["x"]), view("p", shapes["p"])
            view("y", outputs["y"])[...] = 2 * x
            view("q", outputs["q"])[...] = np.concatenate([p, x], axis=1)

        self.memory.work = work
        if not self.memory.recording:
            self.memory.log.append("run")
            work()
        return self.engine.works


class Engine:
    num_io_tensors, num_optimization_profiles, streamable_weights_size, device_memory_size_v2 = 4, 2, 0, 12345
    works = True

    def __init__(self, memory: Memory, fits: bool = True) -> None:
        self.memory, self.fits = memory, fits

    def get_tensor_name(self, index: int) -> str:
        return "xpyq"[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in "xp" else "out"

    def get_tensor_dtype(self, name: str) -> Any:
        return kind("FLOAT")

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        prefill = {"x": [(1, 1), (1, 8), (4, 16)], "p": [(1, 0), (1, 0), (4, 16)]}
        decode = {"x": [(1, 1), (1, 1), (4, 1)], "p": [(1, 1), (1, 8), (4, 16)]}
        return (prefill, decode)[profile][name]

    def create_execution_context(self) -> Context | None:
        return Context(self, self.memory) if self.fits else None


def fake(engine: Engine | None) -> Backend:
    class Plain:
        def __init__(self, *_: Any) -> None: ...

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            assert data == b"plan"
            if engine is None:
                self.logger.log(
                    kind("ERROR"), "[engine.cpp::check::12] Error Code 6: built for another device"
                )
            return engine

    modes = types.SimpleNamespace(INPUT="in", OUTPUT="out")
    return Backend("rtx", "1.0", types.SimpleNamespace(ILogger=Plain, Runtime=Runtime, TensorIOMode=modes))
