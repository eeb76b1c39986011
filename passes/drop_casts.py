"""Drops casts that change nothing: to the type that is there, or to a wider one and back."""

from __future__ import annotations

import onnx_ir as ir

_FLOATS = {
    ir.DataType.FLOAT16: {ir.DataType.FLOAT, ir.DataType.DOUBLE},
    ir.DataType.BFLOAT16: {ir.DataType.FLOAT, ir.DataType.DOUBLE},
    ir.DataType.FLOAT: {ir.DataType.DOUBLE},
}


def drop_casts(model: ir.Model) -> int:
    """Drops them in place, in bodies as well, and says how many.

    `Cast(Cast(x, wide), own)` is `x` where every number of x's own type has a place in the wide one. A cast that
    gives a graph output stays, since the output has its name.
    """
    dropped = 0
    for node in list(model.graph.all_nodes()):
        source = _same_as(node)
        if source is None or node.outputs[0].is_graph_output() or node.graph is None:
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], source)
        node.graph.remove(node, safe=True)
        dropped += 1
    return dropped + _drop_unread(model)


def _same_as(node: ir.Node) -> ir.Value | None:
    """The value that a cast returns unchanged, if it does."""
    if not _is_cast(node) or node.inputs[0] is None:
        return None
    value = node.inputs[0]
    target = ir.DataType(node.attributes.get_int("to", 0))
    if value.dtype == target:
        return value
    inner = value.producer()
    if inner is None or not _is_cast(inner) or inner.inputs[0] is None:
        return None
    source = inner.inputs[0]
    if source.dtype == target and value.dtype is not None and holds(value.dtype, target):
        return source
    return None


def _is_cast(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.domain == ""


def holds(wide: ir.DataType, own: ir.DataType) -> bool:
    """Whether every number of `own` is one of `wide` as well."""
    if own == ir.DataType.BOOL:
        return wide.is_integer() or wide.is_floating_point()
    if own in _FLOATS:
        return wide in _FLOATS[own]
    if not (own.is_integer() and wide.is_integer()):
        return False
    if own.is_signed() and not wide.is_signed():
        return False
    return wide.bitwidth > own.bitwidth or wide == own


def _drop_unread(model: ir.Model) -> int:
    """Removes the inner casts that nothing reads any more."""
    dropped = 0
    for node in list(model.graph.all_nodes()):
        if _is_cast(node) and node.graph is not None and not node.outputs[0].is_graph_output():
            if not list(node.outputs[0].uses()):
                node.graph.remove(node, safe=True)
                dropped += 1
    return dropped
