"""The ranges of the 16-bit formats, and of every float value of a graph, measured on feeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from onnx_autoglm.dataset import Arrays
from onnx_autoglm.op_kinds import is_float
from onnx_autoglm.runtime import Session


@dataclasses.dataclass(frozen=True)
class Format:
    """A 16-bit format: its largest number, its smallest normal one, and the relative error of rounding to it.

    `limit` is what a measured value may reach: half the range, for other inputs give other numbers. `mask` is what
    stands for infinity in a mask: scores can be added to it, and vanish beside it as they did in float32. Values that
    carry a mask may reach `masked_limit`.
    """

    dtype: ir.DataType
    highest: float
    smallest: float
    roundoff: float

    @property
    def limit(self) -> float:
        return self.highest / 2

    @property
    def mask(self) -> float:
        return self.highest * 0.75

    @property
    def masked_limit(self) -> float:
        return self.highest * 0.9


FLOAT16 = Format(ir.DataType.FLOAT16, 65504.0, 2.0**-14, 2.0**-11)
BFLOAT16 = Format(ir.DataType.BFLOAT16, (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-8)


def observe_ranges(
    model: ir.Model, feeds: Iterable[Arrays], step: Callable[[str], None] = lambda _: None
) -> dict[str, float]:
    """The largest finite magnitude of every float value of the graph (bodies apart) over all feeds.

    ONNX Runtime reduces each value to one number as it goes, so no value is kept.
    """
    probed = model.clone()
    probes = _add_probes(probed)
    ranges = dict.fromkeys(probes.values(), 0.0)
    if not probes:
        return ranges
    session = Session(probed)
    for number, feed in enumerate(feeds, 1):
        step(f"ranges, run {number}")
        found = session.run(feed, list(probes))
        for probe, name in probes.items():
            ranges[name] = max(ranges[name], float(found[probe]))
    return ranges


def _add_probes(model: ir.Model) -> dict[str, str]:
    """Adds an output with the largest magnitude of each value; returns their names with those of the values."""
    graph = model.graph
    values = [value for node in graph for value in node.outputs if _is_tensor(value)]
    values = [*(value for value in graph.inputs if _is_tensor(value) and not value.is_initializer()), *values]
    if not values:
        return {}
    constants = {}
    for name, array in (
        ("infinity", np.array(np.inf, np.float32)),
        ("zero", np.zeros((), np.float32)),
        ("none", np.zeros(1, np.float32)),  # so that nothing is empty
        ("flat", np.array([-1], np.int64)),
    ):
        value = ir.Value(name=f"range/{name}", const_value=ir.tensor(array, name=f"range/{name}"))
        value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        graph.register_initializer(value)
        constants[name] = value
    probes: dict[str, str] = {}
    for number, value in enumerate(values):
        flat = ir.node("Reshape", [value, constants["flat"]])
        size = ir.node("Abs", [flat.outputs[0]])
        finite = ir.node("Less", [size.outputs[0], constants["infinity"]])
        kept = ir.node("Where", [finite.outputs[0], size.outputs[0], constants["zero"]])
        all_of = ir.node("Concat", [kept.outputs[0], constants["none"]], {"axis": 0})
        top = ir.node("ReduceMax", [all_of.outputs[0]], {"keepdims": 0})
        for node in (flat, size, finite, kept, all_of, top):
            graph.append(node)
        output = top.outputs[0]
        output.name, output.dtype, output.shape = f"range/{number}", ir.DataType.FLOAT, ir.Shape([])
        graph.outputs.append(output)
        probes[output.name] = value.name or ""
    return probes


def _is_tensor(value: ir.Value) -> bool:
    return is_float(value) and not isinstance(value.type, ir.SequenceType | ir.OptionalType)
