"""The largest magnitude of every float value of a graph, measured on feeds, and masks that fit a format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from onnx_autoglm.cast_tensor import largest
from onnx_autoglm.dataset import Arrays
from onnx_autoglm.op_kinds import LAYOUT, is_constant, is_float
from onnx_autoglm.runtime import Session

_ORDER = frozenset(
    "Softmax LogSoftmax Attention MultiHeadAttention GroupQueryAttention TopK ArgMax Exp".split()
)
_CARRY = LAYOUT | {"Where", "Mul", "Add", "Sub", "Cast", "CastLike", "ConstantOfShape"}


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


@dataclasses.dataclass(frozen=True)
class Masks:
    """Constants that were moved into range, by name with what was there before, and the values that carry them."""

    before: dict[str, ir.TensorProtocol]
    carriers: frozenset[str]


def clamp_masks(model: ir.Model, kind: Format) -> Masks:
    """Moves numbers that stand for "never" (such as the lowest float32) into the range of the format, in place.

    Only constants that reach a softmax or another choice by order, where all that counts is that they are far
    below the rest. Infinities stay.
    """
    before: dict[str, ir.TensorProtocol] = {}
    carriers: set[str] = set()
    places: list[tuple[ir.Value, ir.TensorProtocol, ir.Node | None]] = [
        (value, value.const_value, None)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None and is_constant(value) and is_float(value)
    ]
    for node in model.graph.all_nodes():
        attribute = node.attributes.get("value")
        if node.op_type == "ConstantOfShape" and attribute is not None and is_float(node.outputs[0]):
            places.append((node.outputs[0], attribute.as_tensor(), node))
    for value, tensor, maker in places:
        carried = _carried_to_order(value)
        if not carried or largest(tensor) <= kind.mask:
            continue
        before[value.name or ""] = tensor
        carriers |= carried
        moved = _clamped(tensor, kind.mask)
        if maker is None:
            value.const_value = moved
        else:
            maker.attributes["value"] = ir.AttrTensor("value", moved)
    return Masks(before, frozenset(carriers))


def _carried_to_order(value: ir.Value) -> set[str]:
    """The names of the values that a constant is carried to, itself included, if it reaches a choice by order."""
    seen, stack, reached = {value}, [value], False
    while stack:
        for node, _ in stack.pop().uses():
            reached |= node.op_type in _ORDER
            if node.op_type in _CARRY:
                new = [output for output in node.outputs if output not in seen]
                seen.update(new)
                stack += new
    return {each.name or "" for each in seen} if reached else set()


def _clamped(tensor: ir.TensorProtocol, bound: float) -> ir.TensorProtocol:
    def clamp() -> ir.TensorProtocol:
        array = np.asarray(tensor.numpy())
        return ir.Tensor(np.where(np.isfinite(array), np.clip(array, -bound, bound), array), name=tensor.name)

    return ir.LazyTensor(clamp, tensor.dtype, ir.Shape(tensor.shape.numpy()), name=tensor.name)
