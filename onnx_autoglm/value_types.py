"""The type of every value of a graph, where the exporter did not write it down."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common

from onnx_autoglm.errors import UserError
from onnx_autoglm.op_types import Signature, signature

_MAKE_SEQUENCES = frozenset(
    {
        "SplitToSequence",
        "SequenceConstruct",
        "SequenceInsert",
        "SequenceErase",
        "SequenceEmpty",
        "SequenceMap",
    }
)
_NAMES = {
    f"tensor({name})": dtype
    for name, dtype in (
        ("float", ir.DataType.FLOAT),
        ("int64", ir.DataType.INT64),
        ("int32", ir.DataType.INT32),
        ("bool", ir.DataType.BOOL),
        ("uint8", ir.DataType.UINT8),
        ("int8", ir.DataType.INT8),
    )
}


def complete_types(model: ir.Model) -> None:
    """Gives every value that lacks one its type, in place: by shape inference, and by the signatures of operators
    that it does not know.

    Raises UserError for a value whose type nobody can tell.
    """
    values = [value for node in model.graph.all_nodes() for value in node.outputs]
    if all(value.type is not None for value in values):
        return
    # Shape inference gives sequences the type of their tensors.
    sequences = {value: value.type for value in values if isinstance(value.type, ir.SequenceType)}
    common.ShapeInferencePass()(model)
    for value, kind in sequences.items():
        value.type = kind
    opsets = tuple(model.opset_imports.items())
    for node in model.graph.all_nodes():
        own = signature(node, opsets)
        for index, value in enumerate(node.outputs):
            if value.type is None and own is not None:
                value.type = _told_by(own, node, index)
            if value.type is None and (value.uses() or value.is_graph_output()):
                raise UserError(
                    f"the type of value {value.name!r} (made by {node.op_type}) is unknown: export the model with the types of "
                    "all values"
                )
            if node.op_type in _MAKE_SEQUENCES and isinstance(value.type, ir.TensorType):
                value.type = ir.SequenceType(value.type)


def _told_by(own: Signature, node: ir.Node, index: int) -> ir.TypeProtocol | None:
    """The type of an output that shares a type variable with an input, or has a fixed type."""
    variable = own.output(index)
    bound: Mapping[str, ir.TypeProtocol] = {
        own.input(position): value.type
        for position, value in enumerate(node.inputs)
        if value is not None and value.type is not None
    }
    if variable in _NAMES:
        return ir.TensorType(_NAMES[variable])
    found = bound.get(variable)
    return None if found is None or found.dtype is None else ir.TensorType(found.dtype)
