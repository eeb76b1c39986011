"""Runs an engine behind the interface of `runtime.Session`: arrays in, arrays out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from onnx_autoglm.engine_backend import Backend, device, find_backend
from onnx_autoglm.engine_log import BuildLog, logger_for
from onnx_autoglm.engine_memory import DeviceMemory, DeviceValue, Recording
from onnx_autoglm.engine_plan import backend_of, described, deserialize, refuse_foreign
from onnx_autoglm.errors import UserError

Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]

_TYPES = {
    "BF16": ir.DataType.BFLOAT16,
    "BOOL": ir.DataType.BOOL,
    "FLOAT": ir.DataType.FLOAT,
    "HALF": ir.DataType.FLOAT16,
    "INT32": ir.DataType.INT32,
    "INT64": ir.DataType.INT64,
    "INT8": ir.DataType.INT8,
    "UINT8": ir.DataType.UINT8,
}
RECORDINGS = 16  # shapes of which the launches are kept


class EngineSession:
    """An engine with an execution context, device memory for its inputs and outputs, and a stream.

    The optimization profile is chosen by the shapes of the feeds: of those that take them the tightest. Launches of
    shapes that were seen before are recorded and replayed at once (CUDA graphs), which pays where shapes repeat: a
    growing KV cache has other shapes in every step, one of fixed length has not.

    One session is for one thread. Close it, or use it as a context manager.
    """

    def __init__(self, path: Path | str, *, backend: str = "auto", record: bool = True) -> None:
        """Load the plan.

        Args:
            path: the engine file; an `engine.json` beside it is checked first.
            backend: `tensorrt` or `rtx`; by default what `engine.json` says, or what is installed.
            record: replay launches of shapes that repeat.

        Raises:
            UserError: no backend, no GPU, not enough device memory, or a plan for something else.
        """
        path = Path(path)
        loaded = find_backend(backend_of(path, backend))
        report = described(path)
        if report is not None:
            refuse_foreign(report, path, loaded, device())
        self._open(path, loaded, None, record)

    @classmethod
    def over(cls, path: Path, backend: Backend, memory: Any, record: bool = True) -> EngineSession:
        """A session on a given backend and given memory, without looking at `engine.json`."""
        session = cls.__new__(cls)
        session._open(path, backend, memory, record)
        return session

    def _open(self, path: Path, backend: Backend, memory: Any, record: bool) -> None:
        trt = backend.trt
        self._log = BuildLog()
        self._logger = logger_for(trt, self._log)  # must outlive the runtime
        self._runtime = trt.Runtime(self._logger)
        self._engine = deserialize(path, backend, self._runtime, self._log)
        if self._engine.streamable_weights_size > 0:
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        self._context = self._engine.create_execution_context()
        if self._context is None:
            needed = self._engine.device_memory_size_v2
            raise UserError(
                f"{path} does not fit the device: it needs {needed:,} bytes besides its weights "
                f"({self._log.reason('no context could be made')}); build it with smaller largest sizes or with "
                "--weight-streaming, or take a larger device"
            )
        self.memory = DeviceMemory() if memory is None else memory
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self.input_names = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        self.output_names = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        self._dtypes = {name: self._dtype(name) for name in names}
        self._sizes_on_host = {name for name in self.input_names if self._engine.is_shape_inference_io(name)}
        self._profiles = [self._limits(index) for index in range(self._engine.num_optimization_profiles)]
        self._profile = 0
        self._record = record
        self._recordings: dict[object, Recording | None] = {}
        self._blocks: dict[str, tuple[int, int]] = {}  # of each input and output: address and bytes
        self._host: Arrays = {}  # inputs that the engine reads from the host; held while it may

    def _dtype(self, name: str) -> np.dtype[Any]:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _TYPES:
            raise UserError(
                f"{name!r} is of type {kind}, which numpy cannot hold: build the engine without it"
            )
        return np.dtype(_TYPES[kind].numpy())

    def _limits(self, profile: int) -> dict[str, tuple[Shape, Shape]]:
        """The smallest and the largest shape of each input in a profile."""
        limits = {}
        for name in self.input_names:
            low, _, high = self._engine.get_tensor_profile_shape(name, profile)
            limits[name] = (tuple(low), tuple(high))
        return limits

    # --- running

    def run(self, feeds: Arrays, outputs: Sequence[str] | None = None) -> Arrays:
        """Compute `outputs` (all of them by default).

        Raises:
            UserError: a feed is missing, of another type, or of a shape that no profile takes; the device failed.
        """
        names = self.output_names if outputs is None else list(outputs)
        shapes = self._bind_inputs(feeds)
        addresses = {name: self._block(name, self._nbytes(name, shape)) for name, shape in shapes.items()}
        self._bind_outputs(addresses)
        self._launch(addresses)
        results = {name: np.empty(shapes[name], self._dtypes[name]) for name in names}
        for name, array in results.items():
            self.memory.download(addresses[name], array)
        self.memory.synchronize()
        return results

    def run_values(
        self, feeds: Mapping[str, np.ndarray | DeviceValue], outputs: Sequence[str]
    ) -> list[DeviceValue]:
        """Compute `outputs` as values that stay on the device and can be fed again without a copy.

        Raises:
            UserError: as `run`.
        """
        shapes = self._bind_inputs(feeds)
        addresses = {
            name: self.memory.allocate(self._nbytes(name, shape))
            if name in outputs
            else self._block(name, self._nbytes(name, shape))
            for name, shape in shapes.items()
        }
        self._bind_outputs(addresses)
        self._enqueue()
        self.memory.synchronize()
        return [DeviceValue(addresses[n], shapes[n], self._dtypes[n], self.memory) for n in outputs]

    def _bind_inputs(self, feeds: Mapping[str, np.ndarray | DeviceValue]) -> dict[str, Shape]:
        """Puts the feeds on the device; returns the shapes of the outputs."""
        arrays = {name: self._checked(name, feeds) for name in self.input_names}
        self._choose_profile({name: tuple(array.shape) for name, array in arrays.items()})
        self._bound: dict[str, tuple[int, Shape]] = {}
        for name, array in arrays.items():
            if not self._context.set_input_shape(name, tuple(array.shape)):
                raise UserError(f"the engine refuses shape {list(array.shape)} of {name!r}: {self._reason()}")
            address = self._place(name, array)
            self._context.set_tensor_address(name, address)
            self._bound[name] = (address, tuple(array.shape))
        missing = self._context.infer_shapes()
        if missing:
            raise UserError(f"the engine does not know the sizes of {', '.join(missing)}")
        shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in self.output_names}
        for name, shape in shapes.items():
            if any(size < 0 for size in shape):
                raise UserError(f"the size of output {name!r} depends on the data, which is not supported")
        return shapes

    def _checked(self, name: str, feeds: Mapping[str, np.ndarray | DeviceValue]) -> np.ndarray | DeviceValue:
        if name not in feeds:
            raise UserError(f"input {name!r} is missing; inputs are {', '.join(self.input_names)}")
        value = feeds[name]
        if value.dtype != self._dtypes[name]:
            raise UserError(f"input {name!r} is of type {value.dtype} instead of {self._dtypes[name]}")
        return value

    def _choose_profile(self, shapes: dict[str, Shape]) -> None:
        """Switches to the tightest profile that takes the shapes."""
        fitting = [index for index, limits in enumerate(self._profiles) if _fits(shapes, limits)]
        if not fitting:
            raise UserError(self._misfit(shapes))
        best = min(
            fitting, key=lambda index: sum(math.prod(high) for _, high in self._profiles[index].values())
        )
        if best != self._profile:
            if not self._context.set_optimization_profile_async(best, self.memory.stream):
                raise UserError(f"the engine refuses its profile {best}: {self._reason()}")
            self._profile = best

    def _misfit(self, shapes: dict[str, Shape]) -> str:
        """Which input no profile takes."""
        for name, shape in shapes.items():
            limits = [profile[name] for profile in self._profiles]
            if not any(_fits({name: shape}, {name: limit}) for limit in limits):
                allowed = " or ".join(f"{list(low)} to {list(high)}" for low, high in limits)
                return f"input {name!r} has shape {list(shape)}, the engine takes {allowed}"
        return f"no profile of the engine takes these shapes together: {shapes}"

    def _place(self, name: str, array: np.ndarray | DeviceValue) -> int:
        """The address of an input: on the device, or on the host where the engine reads sizes from it."""
        if name in self._sizes_on_host:
            value = array.numpy() if isinstance(array, DeviceValue) else array
            self._host[name] = np.ascontiguousarray(value).reshape(value.shape)
            return int(self._host[name].ctypes.data)
        if isinstance(array, DeviceValue):
            return array.address
        self._host[name] = np.ascontiguousarray(array).reshape(array.shape)  # held until the copy is done
        address = self._block(name, array.nbytes)
        self.memory.upload(address, self._host[name])
        return address

    def _nbytes(self, name: str, shape: Shape) -> int:
        return math.prod(shape) * self._dtypes[name].itemsize

    def _block(self, name: str, nbytes: int) -> int:
        """The session's own memory for an input or output, which grows if it has to."""
        address, size = self._blocks.get(name, (0, -1))
        if size < nbytes:
            if size >= 0:
                self.memory.release(address)
            address = self.memory.allocate(nbytes)
            self._blocks[name] = (address, nbytes)
        return address

    def _bind_outputs(self, addresses: dict[str, int]) -> None:
        for name, address in addresses.items():
            self._context.set_tensor_address(name, address)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self.memory.stream):
            raise UserError(f"the engine does not run on these feeds: {self._reason()}")

    def _launch(self, addresses: dict[str, int]) -> None:
        """Runs; the second time with the same shapes and addresses records, and later ones replay."""
        key = (self._profile, tuple(sorted(self._bound.items())), tuple(sorted(addresses.items())))
        if not self._record or self._sizes_on_host:
            self._enqueue()
        elif key not in self._recordings:
            self._enqueue()  # the first run of a shape may allocate, which cannot be recorded
            if len(self._recordings) >= RECORDINGS:
                self._forget(next(iter(self._recordings)))
            self._recordings[key] = None
        else:
            recording = self._recordings.pop(key) or self.memory.record(self._enqueue)
            self._recordings[key] = recording  # last: used last
            if recording is None:
                self._enqueue()
            else:
                recording.launch(self.memory.stream)

    def _forget(self, key: object) -> None:
        recording = self._recordings.pop(key)
        if recording is not None:
            recording.free()

    def _reason(self) -> str:
        return self._log.reason("it gives no reason")

    # --- the end

    def close(self) -> None:
        """Gives the device memory back; values on the device are gone, too."""
        for key in list(self._recordings):
            self._forget(key)
        del self._context, self._engine, self._runtime
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _fits(shapes: dict[str, Shape], limits: dict[str, tuple[Shape, Shape]]) -> bool:
    for name, shape in shapes.items():
        low, high = limits[name]
        if len(shape) != len(low) or any(
            not a <= size <= b for a, size, b in zip(low, shape, high, strict=True)
        ):
            return False
    return True
