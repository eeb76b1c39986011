"""A 16-bit graph that runs in float32 and rounds as the 16 bits would."""

from __future__ import annotations

import onnx_ir as ir

from onnx_autoglm.upcast import HALF_TYPES, upcast


def emulate(model: ir.Model) -> ir.Model:
    """A float32 copy of the model in which whatever a node makes in 16 bits is rounded to them.

    For formats without kernels on the machine. Operators sum in float32, as the units of a GPU do. The casts that
    round must not be optimised away: run it in a session without optimisation.
    """
    result = upcast(model)
    for source, graph in zip(model.graphs(), result.graphs(), strict=True):
        for original, node in zip(list(source), list(graph), strict=True):
            for before, value in zip(original.outputs, node.outputs, strict=True):
                if before.dtype in HALF_TYPES and isinstance(value.type, ir.TensorType):
                    _round(graph, node, value, before.dtype)
    return result


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> None:
    narrow = ir.node("Cast", [value], {"to": int(dtype)})
    back = ir.node("Cast", [narrow.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    name, result = value.name, back.outputs[0]
    result.type, result.shape = value.type, value.shape
    ir.convenience.replace_all_uses_with(value, result, replace_graph_outputs=True)
    narrow.replace_input_with(0, value)
    graph.insert_after(node, [narrow, back])
    value.name, narrow.outputs[0].name, result.name = f"{name}/exact", f"{name}/narrow", name
    narrow.outputs[0].dtype = dtype
