"""Constants that stand for "never": what a mask adds to scores that must not be chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnx_autoglm.cast_tensor import largest
from onnx_autoglm.op_kinds import LAYOUT, is_constant, is_float
from onnx_autoglm.precision_ranges import Format

_ORDER = frozenset(
    "Softmax LogSoftmax Attention MultiHeadAttention GroupQueryAttention TopK ArgMax Exp".split()
)
_CARRY = LAYOUT | {"Where", "Mul", "Add", "Sub", "Cast", "CastLike", "ConstantOfShape"}


@dataclasses.dataclass(frozen=True)
class Masks:
    """`moved` names the constants that were moved into range, `carriers` the values that carry any mask."""

    moved: tuple[str, ...]
    carriers: frozenset[str]


def find_masks(model: ir.Model, kind: Format, *, move: bool) -> Masks:
    """Finds constants beside which scores vanish when they are added in 16 bits.

    Only those that reach a softmax or another choice by order, where all that counts is that they are far from the
    rest. With `move`, those beyond the range of the format (such as the lowest float32) are moved into it, in place.
    Infinities stay.
    """
    moved: list[str] = []
    carriers: set[str] = set()
    for value, tensor, maker in _constants(model):
        carried = _carried_to_order(value)
        size = largest(tensor) if carried else 0.0
        if size * kind.roundoff < 1:
            continue
        carriers |= carried
        if not move or size <= kind.mask:
            continue
        moved.append(value.name or "")
        smaller = _clamped(tensor, kind.mask)
        if maker is None:
            value.const_value = smaller
        else:
            maker.attributes["value"] = ir.AttrTensor("value", smaller)
    return Masks(tuple(moved), frozenset(carriers))


def _constants(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol, ir.Node | None]]:
    """Float constants, with the ConstantOfShape that makes them if one does."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and is_constant(value) and is_float(value):
                yield value, value.const_value, None
    for node in model.graph.all_nodes():
        attribute = node.attributes.get("value")
        if node.op_type == "ConstantOfShape" and attribute is not None and is_float(node.outputs[0]):
            yield node.outputs[0], attribute.as_tensor(), node


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
