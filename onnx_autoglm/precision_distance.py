"""How far a converted model is from its source."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnx_autoglm.cast_tensor import cast_tensor
from onnx_autoglm.cast_tensor import largest as largest_of
from onnx_autoglm.dataset import Arrays
from onnx_autoglm.emulate import emulate
from onnx_autoglm.precision_ranges import BFLOAT16, Format
from onnx_autoglm.runtime import Session, compare
from onnx_autoglm.upcast import Float32Tensor, upcast

SMALL_BYTES = 256  # smaller constants (exponents, tables of angles) are no weights


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far a result is from its source, on `feeds` inputs.

    `largest` is the worst max|a-b| / max|a| over outputs and inputs, and `output` where that was; `rms` the worst root
    mean square of the difference over that of the output. `rounding` is what `rms` would be if the source only had
    its weights rounded to the format: how much a network amplifies rounding, which no conversion can help. `expected`
    is eight times that (activations are rounded more often than weights), but at least eight roundings. `reason` says why the distance is infinite.
    """

    largest: float
    rms: float
    rounding: float
    expected: float
    output: str
    feeds: int
    reason: str | None = None

    @property
    def within(self) -> bool:
        """Whether rounding explains it."""
        return self.reason is None and self.rms <= self.expected


def runnable(model: ir.Model, kind: Format) -> ir.Model:
    """The model as this machine runs it: float16 as it is, bfloat16 with its rounding in float32."""
    return emulate(model) if kind is BFLOAT16 else model


def distance(source: ir.Model, result: ir.Model, kind: Format, feeds: Iterable[Arrays]) -> Distance:
    """Runs both side by side: the source in float32, the result in its own types (`runnable`).

    Raises UserError if one of them does not run.
    """
    floats, running = upcast(source), runnable(result, kind)
    before, after, rounded = Session(floats), Session(running), Session(_with_rounded_weights(source, kind))
    largest, rms, rounding, output, count, reason = 0.0, 0.0, 0.0, "", 0, None
    for feed in feeds:
        count += 1
        given = as_inputs(feed, floats.graph.inputs)
        expected = before.run(given)
        rounding = max(rounding, _worst_rms(expected, rounded.run(given)))
        actual = after.run(as_inputs(feed, running.graph.inputs))
        found = compare(expected, actual)
        reason = reason or found.reason
        if found.relative >= largest:
            largest, output = found.relative, found.output or ""
        if found.reason is None:
            rms = max(rms, _worst_rms(expected, actual))
    if reason is not None:
        rms = math.inf
    bound = 8 * max(rounding, kind.roundoff)
    return Distance(largest, rms, rounding, bound, output, count, reason)


def _with_rounded_weights(source: ir.Model, kind: Format) -> ir.Model:
    """The source in float32, with every weight that fits the format rounded to it."""
    model = upcast(source)
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.nbytes <= SMALL_BYTES:
                continue
            if largest_of(tensor) <= kind.highest:
                value.const_value = Float32Tensor(cast_tensor(tensor, kind.dtype))
    return model


def _worst_rms(expected: Arrays, actual: Arrays) -> float:
    return max((_rms(expected[name], actual[name]) for name in expected), default=0.0)


def as_inputs(feed: Arrays, inputs: Sequence[ir.Value]) -> Arrays:
    """The feed in the types of float inputs."""
    types = {
        value.name: value.dtype.numpy() for value in inputs if value.dtype and value.dtype.is_floating_point()
    }
    return {name: array.astype(types.get(name, array.dtype), copy=False) for name, array in feed.items()}


def _rms(expected: np.ndarray, actual: np.ndarray) -> float:
    """The root mean square of the difference over that of what was expected; 0 for what is not float."""
    if expected.dtype.kind in "OSUbiu":
        return 0.0
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    known = np.isfinite(a)
    size = float(np.square(a[known]).sum())
    return math.sqrt(float(np.square(a[known] - b[known]).sum()) / size) if size else 0.0
