"""Follows integer values through the operators that graphs use to compute shapes.

One function per operator; each returns the contents of the outputs, or None where nothing is known, in
which case the operator is treated as any other by its rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnx_autoglm.axes import contents as known
from onnx_autoglm.axes.contents import Contents, Extent

if TYPE_CHECKING:
    from onnx_autoglm.axes.op import Op

# Inputs that state sizes of the node's own axes; shape repair re-derives them from those axes.
SIZE_INPUTS: dict[str, frozenset[int]] = {
    "Reshape": frozenset({1}),
    "Expand": frozenset({1}),
    "ConstantOfShape": frozenset({0}),
    "Tile": frozenset({1}),
    "Split": frozenset({1}),
    "SplitToSequence": frozenset({1}),
    "Slice": frozenset({1, 2, 3, 4}),
    "Resize": frozenset({3}),
}

Follower = Callable[["Op", list[Contents]], "list[Contents] | None"]


def follow(op: Op) -> list[Contents] | None:
    """The contents of the outputs of a node, if all that it computes from is known."""
    if op.node.domain:
        return None
    if op.node.op_type in ("Shape", "Size"):
        return _observe(op)
    follower = FOLLOWERS.get(op.node.op_type)
    if follower is None:
        return None
    inputs = [op.analysis.contents.get(value) for value in op.node.inputs if value is not None]
    if not inputs or any(contents is None for contents in inputs):
        return None
    try:
        results = follower(op, [contents for contents in inputs if contents is not None])
    except (IndexError, ValueError, TypeError):
        return None
    if results is None or any(result.size > known.MAX_ENTRIES for result in results):
        return None
    return results


def _observe(op: Op) -> list[Contents] | None:
    dims = op.analysis.input_dims(op.node, 0)
    if dims is None:
        return None
    if op.value(0) in op.analysis.contents:  # the rank of a shape is no size of the data
        sizes = known.constant(np.array(op.analysis.contents[op.value(0)].shape, np.int64))
        if op.node.op_type == "Size":
            return [known.constant(np.array(op.analysis.contents[op.value(0)].size))]
        return [sizes[slice(op.attr_int("start", 0), op.attr_int("end", len(dims)))]]
    if op.node.op_type == "Size":
        return [known.array([Extent(tuple(atom for dim in dims for atom in dim))]).reshape(())]
    start, end = op.attr_int("start", 0), op.attr_int("end", len(dims))
    return [known.array([Extent(dim) for dim in dims[slice(start, end)]])]


def _same(op: Op, inputs: list[Contents]) -> list[Contents]:
    return [inputs[0]]


def _cast(op: Op, inputs: list[Contents]) -> list[Contents] | None:
    target = ir.DataType(op.attr_int("to", 0))
    if target == ir.DataType.BOOL:
        zero = known.constant(np.zeros((), np.int64))
        return [known.apply("not", known.apply("equal", inputs[0], zero))]
    return [inputs[0]] if target.is_integer() else None


def _operator(name: str) -> Follower:
    return lambda op, inputs: [known.apply(name, *inputs)]


def _variadic(name: str) -> Follower:
    def run(op: Op, inputs: list[Contents]) -> list[Contents]:
        result = inputs[0]
        for other in inputs[1:]:
            result = known.apply(name, result, other)
        return [result]

    return run


def _swapped_not(name: str) -> Follower:
    return lambda op, inputs: [known.apply("not", known.apply(name, *inputs))]


def _gather(op: Op, inputs: list[Contents]) -> list[Contents] | None:
    data, indices = inputs
    if not known.is_constant(indices):
        return None
    taken = np.take(data, indices.astype(np.int64), axis=op.attr_int("axis", 0))
    return [_wrap(taken)]


def _slice(op: Op, inputs: list[Contents]) -> list[Contents] | None:
    data = inputs[0]
    if op.attr_ints("starts") is not None:
        starts, ends = op.attr_ints("starts") or [], op.attr_ints("ends") or []
        axes, steps = op.attr_ints("axes") or list(range(len(starts))), [1] * len(starts)
    else:
        if not all(known.is_constant(part) for part in inputs[1:]):
            return None
        given = [[int(entry) for entry in part.flat] for part in inputs[1:]]
        starts, ends = given[0], given[1]
        axes = given[2] if op.has(3) else list(range(len(starts)))
        steps = given[-1] if op.has(4) else [1] * len(starts)
    window = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        backwards_to_start = step < 0 and end <= -data.shape[axis] - 1
        window[axis] = slice(start, None if backwards_to_start else end, step)
    return [_wrap(data[tuple(window)])]


def _concat(op: Op, inputs: list[Contents]) -> list[Contents]:
    return [np.concatenate(inputs, axis=op.attr_int("axis", 0))]


def _split(op: Op, inputs: list[Contents]) -> list[Contents] | None:
    data, axis, count = inputs[0], op.attr_int("axis", 0), len(op.node.outputs)
    sizes = op.settled(1) if op.has(1) else op.attr_ints("split")
    if sizes is None:
        chunk = -(-data.shape[axis] // count)
        sizes = [min(chunk, data.shape[axis] - chunk * index) for index in range(count)]
    return list(np.split(data, np.cumsum(sizes)[:-1], axis=axis))


def _unsqueeze(op: Op, inputs: list[Contents]) -> list[Contents] | None:
    axes = op.attr_ints("axes") if len(inputs) == 1 else op.settled(1)
    if axes is None:
        return None
    rank = inputs[0].ndim + len(axes)
    result = inputs[0]
    for axis in sorted(axis % rank for axis in axes):
        result = np.expand_dims(result, axis)
    return [result]


def _squeeze(op: Op, inputs: list[Contents]) -> list[Contents] | None:
    axes = op.attr_ints("axes") if len(inputs) == 1 else op.settled(1)
    return [_wrap(np.squeeze(inputs[0], None if axes is None else tuple(axes)))]


def _reshape(op: Op, inputs: list[Contents]) -> list[Contents] | None:
    target = op.settled(1)
    if target is None:
        return None
    shape = [inputs[0].shape[index] if size == 0 else size for index, size in enumerate(target)]
    return [inputs[0].reshape(shape)]


def _expand(op: Op, inputs: list[Contents]) -> list[Contents] | None:
    target = op.settled(1)
    if target is None:
        return None
    return [np.broadcast_to(inputs[0], np.broadcast_shapes(inputs[0].shape, tuple(target))).copy()]


def _constant_of_shape(op: Op, inputs: list[Contents]) -> list[Contents] | None:
    shape = op.settled(0)
    attribute = op.node.attributes.get("value")
    fill = 0 if attribute is None else attribute.as_tensor().numpy().reshape(-1)[0]
    is_float = attribute is None or attribute.as_tensor().dtype.is_floating_point()
    if shape is None or is_float or np.prod(shape, dtype=np.int64) > known.MAX_ENTRIES:
        return None
    return [known.constant(np.full(shape, int(fill), np.int64))]


def _range(op: Op, inputs: list[Contents]) -> list[Contents] | None:
    bounds = [op.settled(index) for index in range(3)]
    if any(bound is None for bound in bounds):
        return None
    start, limit, delta = (bound[0] for bound in bounds if bound is not None)
    if len(range(start, limit, delta)) > known.MAX_ENTRIES:
        return None
    return [known.constant(np.arange(start, limit, delta))]


def _reduce(name: str) -> Follower:
    def run(op: Op, inputs: list[Contents]) -> list[Contents] | None:
        if inputs[0].ndim != 1 or not inputs[0].size:
            return None
        result = inputs[0][:1]
        for index in range(1, inputs[0].size):
            result = known.apply(name, result, inputs[0][index : index + 1])
        return [result if op.attr_int("keepdims", 1) else result.reshape(())]

    return run


def _transpose(op: Op, inputs: list[Contents]) -> list[Contents]:
    return [np.transpose(inputs[0], op.attr_ints("perm"))]


def _wrap(result: object) -> Contents:
    """NumPy unwraps 0-d object arrays; this puts the box back."""
    if isinstance(result, np.ndarray):
        return result
    boxed = np.empty((), dtype=object)
    boxed[()] = result
    return boxed


FOLLOWERS: dict[str, Follower] = {
    "Identity": _same,
    "Cast": _cast,
    "Add": _operator("add"),
    "Sub": _operator("sub"),
    "Mul": _operator("mul"),
    "Div": _operator("div"),
    "Mod": _operator("mod"),
    "Neg": _operator("neg"),
    "Abs": _operator("abs"),
    "Min": _variadic("min"),
    "Max": _variadic("max"),
    "Sum": _variadic("add"),
    "Equal": _operator("equal"),
    "Greater": _operator("greater"),
    "Less": _operator("less"),
    "GreaterOrEqual": _swapped_not("less"),
    "LessOrEqual": _swapped_not("greater"),
    "Not": _operator("not"),
    "And": _operator("and"),
    "Or": _operator("or"),
    "Where": _operator("where"),
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Split": _split,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "ReduceProd": _reduce("mul"),
    "ReduceSum": _reduce("add"),
    "ReduceMax": _reduce("max"),
    "ReduceMin": _reduce("min"),
    "Transpose": _transpose,
}
