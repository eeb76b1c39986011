"""The largest magnitude of every float value of a graph, measured on feeds, and masks that fit a format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from onnx_autoglm.cast_tensor import largest
from onnx_autoglm.dataset import Arrays
from onnx_autoglm.op_kinds import LAYOUT, is_constant, is_float
from onnx_autoglm.runtime import Session, compare

_ORDER = frozenset(
    "Softmax LogSoftmax Attention MultiHeadAttention GroupQueryAttention TopK ArgMax Exp".split()
)
_CARRY = LAYOUT | {"Where", "Mul", "Add", "Sub", "Cast", "CastLike", "ConstantOfShape"}


@dataclasses.dataclass(frozen=True)
class Format:
    """A 16-bit format: its largest number, its smallest normal one, and the relative error of rounding to it.

    `limit` is what a measured value may reach: half the range, for other inputs give other numbers. `mask` is half
    of that, so that scores, or a second mask, can be added to a mask.
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
        return self.highest / 4


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


def same_outputs(first: ir.Model, second: ir.Model, feeds: Iterable[Arrays], tolerance: float) -> bool:
    """Whether two models give the same outputs on all feeds, to a relative tolerance."""
    sessions = Session(first), Session(second)
    return all(compare(*(session.run(feed) for session in sessions)).relative <= tolerance for feed in feeds)


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


def clamp_masks(model: ir.Model, kind: Format) -> dict[ir.Value | ir.Node, ir.TensorProtocol]:
    """Moves numbers that stand for "never" (such as the lowest float32) into the range of the format, in place.

    Only constants that reach a softmax or another choice by order, where all that counts is that they are far
    below the rest. Infinities stay. Returns what was there before, for `restore_masks`.
    """
    before: dict[ir.Value | ir.Node, ir.TensorProtocol] = {}
    for value in [value for graph in model.graphs() for value in graph.initializers.values()]:
        tensor = value.const_value
        if tensor is not None and is_constant(value) and is_float(value) and _is_mask(value, tensor, kind):
            before[value] = tensor
            value.const_value = _clamped(tensor, kind.mask)
    for node in model.graph.all_nodes():
        attribute = node.attributes.get("value")
        if node.op_type != "ConstantOfShape" or attribute is None:
            continue
        tensor = attribute.as_tensor()
        if tensor.dtype == ir.DataType.FLOAT and _is_mask(node.outputs[0], tensor, kind):
            before[node] = tensor
            node.attributes["value"] = ir.AttrTensor("value", _clamped(tensor, kind.mask))
    return before


def restore_masks(before: dict[ir.Value | ir.Node, ir.TensorProtocol]) -> None:
    """Undoes `clamp_masks`."""
    for place, tensor in before.items():
        if isinstance(place, ir.Value):
            place.const_value = tensor
        else:
            place.attributes["value"] = ir.AttrTensor("value", tensor)


def _is_mask(value: ir.Value, tensor: ir.TensorProtocol, kind: Format) -> bool:
    return _reaches_order(value) and largest(tensor) > kind.mask


def _reaches_order(value: ir.Value) -> bool:
    seen, stack = {value}, [value]
    while stack:
        for node, _ in stack.pop().uses():
            if node.op_type in _ORDER:
                return True
            if node.op_type in _CARRY:
                new = [output for output in node.outputs if output not in seen]
                seen.update(new)
                stack += new
    return False


def _clamped(tensor: ir.TensorProtocol, bound: float) -> ir.TensorProtocol:
    def clamp() -> ir.TensorProtocol:
        array = np.asarray(tensor.numpy())
        return ir.Tensor(np.where(np.isfinite(array), np.clip(array, -bound, bound), array), name=tensor.name)

    return ir.LazyTensor(clamp, tensor.dtype, ir.Shape(tensor.shape.numpy()), name=tensor.name)
