"""Gives the tables of a RotaryEmbedding the batch of what they rotate.

Exporters compute one row of cosines and sines for the whole batch and pass it with a batch of one. The operator is
defined for tables of the same batch as its input, and runtimes hold to that beyond batch 1.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def expand_rotary(model: ir.Model) -> int:
    """Expands tables `[1, sequence, channels]` to `[batch, sequence, channels]`, in place, and says how many."""
    expanded: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding" or node.domain or len(node.inputs) < 3:
            continue
        data = node.inputs[0]
        if data is None or data.shape is None or data.shape[0] == 1:
            continue
        for slot in (1, 2):
            table = node.inputs[slot]
            if table is None or table.shape is None or len(table.shape) != 3 or table.shape[0] != 1:
                continue
            if (table, data) not in expanded:
                expanded[table, data] = _expand(table, data, node, model.graph)
            node.replace_input_with(slot, expanded[table, data])
    return len(expanded)


def _expand(table: ir.Value, data: ir.Value, node: ir.Node, graph: ir.Graph) -> ir.Value:
    ones = graph.initializers.get(_ONES)
    if ones is None:
        tensor = ir.Tensor(np.ones(2, np.int64), name=_ONES)
        ones = ir.Value(
            name=_ONES, shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
        )
        graph.register_initializer(ones)
    assert data.shape is not None and table.shape is not None
    name = f"{table.name}_of_{data.name}"
    batch = ir.node("Shape", [data], {"start": 0, "end": 1}, name=f"{name}_batch")
    shape = ir.node("Concat", [batch.outputs[0], ones], {"axis": 0}, name=f"{name}_shape")
    expand = ir.node("Expand", [table, shape.outputs[0]], name=name)
    result = expand.outputs[0]
    result.name, result.type = name, table.type
    result.shape = ir.Shape([data.shape[0], *table.shape[1:]])
    batch.outputs[0].name, shape.outputs[0].name = f"{name}_batch", f"{name}_shape"
    graph.insert_before(node, [batch, shape, expand])
    return result


_ONES = "rotary_table_ones"
