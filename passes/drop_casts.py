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
    value, target = node.inputs[0], _target(node)
    inner = value.producer()
    is_cast = inner is not None and _is_cast(inner)
    kind = _target(inner) if inner is not None and is_cast else value.dtype
    if kind == target:
        return value
    source = inner.inputs[0] if inner is not None and is_cast else None
    return source if source is not None and source.dtype == target and holds(kind, target) else None


def _target(cast: ir.Node) -> ir.DataType:
    return ir.DataType(cast.attributes.get_int("to", 0))


def _is_cast(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.domain == ""


def holds(wide: ir.DataType | None, own: ir.DataType) -> bool:
    """Whether every number of `own` is one of `wide` as well; of an unknown type nothing is said."""
    if wide is None:
        return False
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
    unread = [
        node
        for node in model.graph.all_nodes()
        if _is_cast(node) and not node.outputs[0].is_graph_output() and not node.outputs[0].uses()
    ]
    for node in unread:
        assert node.graph is not None
        node.graph.remove(node, safe=True)
    return len(unread)
