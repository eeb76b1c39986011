"""Run graphs in ONNX Runtime without copying their weights into memory, and compare what they compute."""

import math
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import onnx_ir as ir

from onnx_autoglm import lean
from onnx_autoglm.errors import UserError

if TYPE_CHECKING:
    import onnxruntime

Arrays = dict[str, np.ndarray]

EMBED_BYTES = 4096  # smaller tensors travel inside the model
ALIGNMENT = 4096
MESSAGE_LENGTH = 300
RELATIVE_FLOOR = 1e-6
# A column of an output may be off by this share of its own size, or of the usual size of a column.
COLUMN_TOLERANCE, COLUMN_ROUNDING = 1e-4, 1e-6


class Session:
    """An ONNX Runtime session over an in-memory model whose weights stay on disk.

    ONNX Runtime receives a skeleton in which every large tensor is external data. Tensors that already lie in
    a file are mapped from there, wherever that is; the others (lazy or in memory) are streamed to one file in
    `scratch` (by default the system's folder for temporary files), which is removed as soon as it is mapped.
    Nothing is written beside the model, and the model is not changed.

    Work on weights alone (a mask times a weight) is scheduled just before its first use, so that only
    one such product lives at a time.
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        optimize: bool = False,
        threads: int | None = None,
        prepack: bool = True,
        scratch: Path | None = None,
    ) -> None:
        """Load the model.

        Args:
            model: the graph; it is only read.
            optimize: let ONNX Runtime rewrite the graph and pack weights, as a deployed session would. It
                runs faster, but packed weights are copied into memory.
            threads: worker threads; by default ONNX Runtime's own choice.
            prepack: whether an optimized model may copy its weights into the layout of the kernels, which doubles
                their memory and makes runs of few rows faster.
            scratch: folder for weights that are not in a file yet.

        Raises:
            UserError: ONNX Runtime refuses the model, or `scratch` cannot hold the weights.
        """
        import onnxruntime

        options = _session_options(optimize, threads)
        with tempfile.TemporaryDirectory(
            prefix="onnx-autoglm-", dir=scratch, ignore_cleanup_errors=True
        ) as folder:
            skeleton, root = _skeleton(model, Path(folder) / "weights", cast_when_run=not optimize)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", root)
            if not prepack:
                options.add_session_config_entry("session.disable_prepacking", "1")
            try:
                self._session = onnxruntime.InferenceSession(
                    skeleton, options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:
                raise UserError(f"ONNX Runtime cannot load the model: {_core_message(error)}") from error
        self.input_names = [item.name for item in self._session.get_inputs()]
        self.output_names = [item.name for item in self._session.get_outputs()]
        ends = (*self._session.get_inputs(), *self._session.get_outputs())
        self._plain = all(_is_plain(item.type) for item in ends)

    def run(self, feeds: Arrays, outputs: Sequence[str] | None = None) -> Arrays:
        """Compute `outputs` (all of them by default); 16-bit floats keep their type.

        Raises:
            UserError: the graph does not run on these feeds.
        """
        names = self.output_names if outputs is None else list(outputs)
        try:
            if self._plain:
                return dict(zip(names, self._session.run(names, feeds), strict=True))
            values = {name: _to_ort(array) for name, array in feeds.items()}
            results = self._session.run_with_ort_values(names, values)
        except Exception as error:
            raise UserError(f"ONNX Runtime cannot run the model: {_core_message(error)}") from error
        return {name: _from_ort(result) for name, result in zip(names, results, strict=True)}

    def run_values(
        self, feeds: "dict[str, np.ndarray | onnxruntime.OrtValue]", outputs: Sequence[str]
    ) -> "list[onnxruntime.OrtValue]":
        """Compute `outputs` as values of ONNX Runtime, which can be fed again without a copy.

        Raises:
            UserError: the graph does not run on these feeds.
        """
        try:
            values = {n: _to_ort(v) if isinstance(v, np.ndarray) else v for n, v in feeds.items()}
            return list(self._session.run_with_ort_values(list(outputs), values))
        except Exception as error:
            raise UserError(f"ONNX Runtime cannot run the model: {_core_message(error)}") from error


@dataclass(frozen=True)
class Difference:
    """How far two runs are apart.

    `relative` is the worst max|a-b| / max|a| over the outputs, `absolute` the max|a-b| of that same output.
    `reason` says why the difference is infinite. `inconclusive` says why equality would prove nothing. `unseen`
    names outputs that hold no finite number, of which nothing is known.
    """

    relative: float
    absolute: float
    output: str | None
    reason: str | None = None
    inconclusive: str | None = None
    unseen: tuple[str, ...] = ()

    def within(self, tolerance: float) -> bool:
        """Whether the runs agree to a relative tolerance, and their agreement means something."""
        return self.inconclusive is None and self.relative <= tolerance


def compare(expected: Arrays, actual: Arrays, reference: Arrays | None = None) -> Difference:
    """The worst relative difference between two sets of outputs, matched by name.

    Per output it is max|a-b| / max(max|a|, 1e-6) over the finite elements. With a `reference` (what `expected`
    was before it was changed on purpose) only the elements that the change moved set the scale, so that a
    constant such as the lowest float cannot hide an error; and no column of the last axis may differ by as
    much as the change itself moved it, unless that is rounding.

    A missing output, another shape, a NaN or infinity that the other side does not have: an infinite
    difference, with the reason. If no element anywhere is finite, or none is different from zero, the result is
    marked inconclusive.
    """
    worst = Difference(0.0, 0.0, None)
    largest, any_finite, unseen = 0.0, False, []
    for name, a in expected.items():
        found = _difference(name, a, actual.get(name), None if reference is None else reference.get(name))
        if worst.output is None or found.relative > worst.relative:
            worst = found
        finite = np.abs(_as_float(a)[np.isfinite(_as_float(a))])
        any_finite |= finite.size > 0
        if np.size(a) and not finite.size:
            unseen.append(name)
        largest = max(largest, float(finite.max(initial=0.0)))
    worst = replace(worst, unseen=tuple(unseen))
    if math.isinf(worst.relative) or largest > 0:
        return worst
    doubt = "all outputs are zero" if any_finite else "the outputs hold no finite number"
    return replace(worst, reason=None, inconclusive=doubt)


def _difference(
    name: str, expected: np.ndarray, actual: np.ndarray | None, reference: np.ndarray | None
) -> Difference:
    if not isinstance(expected, np.ndarray) or (actual is not None and not isinstance(actual, np.ndarray)):
        reason = f"output {name!r} is a sequence, which cannot be compared"
        return Difference(math.inf, math.inf, name, reason)
    if actual is None:
        return Difference(math.inf, math.inf, name, f"output {name!r} is missing")
    if expected.shape != actual.shape:
        reason = f"output {name!r} has shape {list(actual.shape)} instead of {list(expected.shape)}"
        return Difference(math.inf, math.inf, name, reason)
    a, b = _as_float(expected), _as_float(actual)
    finite = np.isfinite(a) & np.isfinite(b)
    same = finite | (a == b) | (np.isnan(a) & np.isnan(b))
    if not same.all():
        count = int((~same).sum())
        reason = f"output {name!r} has {count} elements that are NaN or infinite on one side only"
        return Difference(math.inf, math.inf, name, reason)
    apart = np.where(finite, np.abs(np.where(finite, a, 0) - np.where(finite, b, 0)), 0.0)
    size = np.where(finite, np.abs(np.where(finite, a, 0)), 0.0)
    absolute = float(apart.max(initial=0.0))
    if reference is None or reference.shape != expected.shape:
        return Difference(absolute / max(float(size.max(initial=0.0)), RELATIVE_FLOOR), absolute, name)
    return _against(name, apart, size, finite, np.abs(a - _as_float(reference)))


def _against(
    name: str, apart: np.ndarray, size: np.ndarray, finite: np.ndarray, effect: np.ndarray
) -> Difference:
    """The difference seen beside the effect that a deliberate change had, all of one shape."""
    absolute = float(apart.max(initial=0.0))
    moved = finite & ~(effect == 0)
    effect = np.where(finite & np.isfinite(effect), effect, 0.0)
    scale = float(size[moved].max(initial=0.0)) if moved.any() else float(size.max(initial=0.0))
    relative = absolute / max(scale, RELATIVE_FLOOR)
    if not apart.ndim or not apart.size:
        return Difference(relative, absolute, name)
    column = tuple(range(apart.ndim - 1))
    off, by, own = (array.max(axis=column) for array in (apart, effect, size))
    rounding = COLUMN_ROUNDING * float(np.median(own))
    wrong = (off > 0.05 * by) & (off > COLUMN_TOLERANCE * own) & (off > rounding)
    if not wrong.any():
        return Difference(relative, absolute, name)
    found = int(np.argmax(np.where(wrong, off / np.maximum(own, 1e-300), 0.0)))
    return Difference(
        max(relative, float(off[found] / own[found]) if own[found] else math.inf), absolute, name
    )


def _as_float(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "OSU":  # strings: equal or not
        _, codes = np.unique(array.astype(str), return_inverse=True)
        return codes.reshape(array.shape).astype(np.float64)
    return array.astype(np.float64)


def _session_options(optimize: bool, threads: int | None) -> "onnxruntime.SessionOptions":
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimize:
        return options
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    # The default order runs everything that depends on weights alone first, and keeps it all in memory.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False  # the arena never gives memory back
    options.enable_mem_pattern = False
    return options


def _skeleton(model: ir.Model, spill: Path, *, cast_when_run: bool) -> tuple[bytes, str]:
    """The serialized model with every large tensor as external data, and the folder its locations start from.

    Tensors that lie in no file are written to `spill`.
    """
    copy = model.clone()
    lean.prepare(copy, cast_when_run=cast_when_run)
    placer = _Placer(_tensors(copy), spill)
    for value in _initializers(copy):
        assert value.const_value is not None
        value.const_value = placer.place(value.const_value)
    for node, name, tensor in _attribute_tensors(copy):
        node.attributes[name] = ir.AttrTensor(name, placer.place(tensor))
    return ir.serde.serialize_model(copy).SerializeToString(), placer.root


def _initializers(model: ir.Model) -> list[ir.Value]:
    graphs = [model.graph, *model.graph.subgraphs()]
    values = [value for graph in graphs for value in graph.initializers.values()]
    return [value for value in values if value.const_value is not None]


def _attribute_tensors(model: ir.Model) -> list[tuple[ir.Node, str, ir.TensorProtocol]]:
    return [
        (node, name, attribute.as_tensor())
        for node in model.graph.all_nodes()
        for name, attribute in node.attributes.items()
        if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref()
    ]


def _tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    weights = [value.const_value for value in _initializers(model) if value.const_value is not None]
    return weights + [tensor for _, _, tensor in _attribute_tensors(model)]


class _Placer:
    """Gives each tensor a place in a file below `root`, the deepest folder that holds all files."""

    def __init__(self, tensors: Iterable[ir.TensorProtocol], spill: Path) -> None:
        # ONNX Runtime resolves links and refuses a file outside the root, so all paths are real ones.
        self._spill = os.path.realpath(spill)
        files = [_real_path(tensor) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
        self.root = os.path.commonpath([os.path.dirname(path) for path in (self._spill, *files)])
        self._offsets: dict[int, int] = {}  # of tensors in the spill file, by id: the model keeps them alive

    def place(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """The tensor as small in-memory data, or as external data with a location below the root."""
        if tensor.dtype == ir.DataType.STRING:
            return tensor
        if tensor.nbytes < EMBED_BYTES:
            shape = ir.Shape(tensor.shape.numpy())
            return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=shape, name=tensor.name)
        if isinstance(tensor, ir.ExternalTensor):
            path, offset = _real_path(tensor), tensor.offset or 0
        else:
            path, offset = self._spill, self._spilled(tensor)
        return ir.ExternalTensor(
            Path(os.path.relpath(path, self.root)).as_posix(),
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            base_dir=self.root,
        )

    def _spilled(self, tensor: ir.TensorProtocol) -> int:
        if id(tensor) not in self._offsets:
            self._offsets[id(tensor)] = _append(Path(self._spill), tensor)
        return self._offsets[id(tensor)]


def _real_path(tensor: ir.ExternalTensor) -> str:
    return os.path.realpath(tensor.path)


def _append(path: Path, tensor: ir.TensorProtocol) -> int:
    """Write the tensor at the end of the file; return its offset."""
    try:
        with open(path, "ab") as file:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            offset = file.tell()
            _write(tensor, file)
    except OSError as error:
        raise UserError(
            f"cannot write temporary weights to {path.parent}: {error.strerror}. Point the environment"
            " variable TMPDIR at a folder with enough space."
        ) from error
    return offset


def _write(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    if hasattr(tensor, "tofile"):
        tensor.tofile(file)  # in pieces, where the tensor knows how
    else:
        file.write(tensor.tobytes())


def _core_message(error: Exception) -> str:
    """ONNX Runtime's message on one line, without its status prefix, its C++ signatures and its dump."""
    text = " ".join(str(error).split()) or type(error).__name__
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    text = re.sub(r"\S+\.(?:cc|h|cpp):\d+ [^()]*\([^()]*\)(?: const)? ", "", text)
    return text if len(text) <= MESSAGE_LENGTH else text[:MESSAGE_LENGTH] + "..."


def _is_plain(kind: str) -> bool:
    """Whether numpy alone can carry values of this ONNX Runtime type, e.g. 'tensor(float)'."""
    return not any(word in kind for word in ("bfloat16", "float8", "float4", "int4", "int2"))


def _to_ort(array: np.ndarray) -> "onnxruntime.OrtValue":
    import onnxruntime

    contiguous = np.array(array, order="C", copy=None)
    dtype = contiguous.dtype
    if dtype.kind == "V":  # an ml_dtypes type
        raw: Any = contiguous.view(np.uint16 if dtype.itemsize == 2 else np.uint8)
        element_type = int(ir.DataType.from_numpy(dtype))
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, element_type)
    return onnxruntime.OrtValue.ortvalue_from_numpy(contiguous)


def _from_ort(value: "onnxruntime.OrtValue") -> np.ndarray:
    """The tensor as numpy array; also of the types that ONNX Runtime itself cannot hand to numpy."""
    if _is_plain(value.data_type()):
        return np.asarray(value.numpy())
    import ctypes

    dtype = ir.DataType(value.element_type()).numpy()
    size = value.tensor_size_in_bytes()
    buffer = (ctypes.c_char * size).from_address(value.data_ptr())
    array: np.ndarray = np.frombuffer(bytes(buffer), dtype=dtype)
    return array.reshape(value.shape())
