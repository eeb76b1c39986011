"""How far a converted model is from its source."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnx_autoglm.dataset import Arrays
from onnx_autoglm.emulate import emulate
from onnx_autoglm.precision_ranges import BFLOAT16, Format
from onnx_autoglm.runtime import Session, compare
from onnx_autoglm.upcast import upcast


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far a result is from its source, on `feeds` inputs.

    `largest` is the worst max|a-b| / max|a| over outputs and inputs, and `output` where that was; `rms` the worst root
    mean square of the difference over that of the output. `expected` is what rounding alone may do to `rms`: twice
    the format's rounding error times the square root of the number of operations, since errors add up at random.
    `reason` says why it is infinite.
    """

    largest: float
    rms: float
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


def distance(
    source: ir.Model, result: ir.Model, kind: Format, operations: int, feeds: Iterable[Arrays]
) -> Distance:
    """Runs both side by side: the source in float32, the result in its own types (`runnable`).

    Raises UserError if one of them does not run.
    """
    floats, running = upcast(source), runnable(result, kind)
    before, after = Session(floats), Session(running)
    largest, rms, output, count, reason = 0.0, 0.0, "", 0, None
    for feed in feeds:
        count += 1
        expected = before.run(as_inputs(feed, floats.graph.inputs))
        actual = after.run(as_inputs(feed, running.graph.inputs))
        found = compare(expected, actual)
        reason = reason or found.reason
        if found.relative >= largest:
            largest, output = found.relative, found.output or ""
        if found.reason is None:
            rms = max([rms, *(_rms(expected[name], actual[name]) for name in expected)])
    if reason is not None:
        rms = math.inf
    return Distance(largest, rms, 2 * kind.roundoff * math.sqrt(operations), output, count, reason)


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
