"""Replaces sequences that are only taken apart again by a Split, which every runtime has."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def split_sequences(model: ir.Model) -> int:
    """`SequenceAt(SplitToSequence(x), i)` becomes output i of a `Split`, in place; says how many sequences went.

    A sequence stays if it is used otherwise, at an index that is no constant, or if its parts are not fixed.
    """
    replaced = 0
    for node in list(model.graph):
        if node.op_type != "SplitToSequence" or node.domain:
            continue
        parts = _parts(node)
        reads = [(user, _index(user)) for user, _ in node.outputs[0].uses()]
        if parts is None or not reads or node.outputs[0].is_graph_output():
            continue
        if any(index is None or not -len(parts) <= index < len(parts) for _, index in reads):
            continue
        outputs = _split(node, parts, model.graph)
        for user, index in reads:
            assert index is not None
            old, new = user.outputs[0], outputs[index]
            new.type, new.shape = old.type or new.type, old.shape or new.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            model.graph.remove(user, safe=True)
        model.graph.remove(node, safe=True)
        replaced += 1
    return replaced


def _parts(node: ir.Node) -> list[int] | None:
    """The sizes of the parts, if they are fixed and keep the axis."""
    data = node.inputs[0]
    sizes = node.inputs[1] if len(node.inputs) > 1 else None
    axis = node.attributes.get_int("axis", 0)
    dim = None if data is None or data.shape is None else data.shape[axis]
    if sizes is None:  # parts of one; unless told otherwise, without the axis
        keeps = node.attributes.get_int("keepdims", 1) == 1
        return [1] * dim if keeps and isinstance(dim, int) else None
    array = _constant(sizes)
    if array is None:
        return None
    if array.ndim:
        return [int(size) for size in array]
    step = int(array)
    if not isinstance(dim, int):
        return None
    return [min(step, dim - start) for start in range(0, dim, step)]


def _index(user: ir.Node) -> int | None:
    if user.op_type != "SequenceAt" or user.domain:
        return None
    array = _constant(user.inputs[1])
    return None if array is None else int(array.reshape(()))


def _constant(value: ir.Value | None) -> np.ndarray | None:
    tensor = None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def _split(node: ir.Node, parts: list[int], graph: ir.Graph) -> list[ir.Value]:
    name = node.outputs[0].name or ""
    tensor = ir.Tensor(np.array(parts, np.int64), name=f"{name}_parts")
    sizes = ir.Value(
        name=f"{name}_parts",
        shape=ir.Shape([len(parts)]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=tensor,
    )
    graph.register_initializer(sizes)
    axis = node.attributes.get_int("axis", 0)
    split = ir.node("Split", [node.inputs[0], sizes], {"axis": axis}, num_outputs=len(parts), name=node.name)
    for index, output in enumerate(split.outputs):
        output.name = f"{name}_{index}"
        output.type = None if node.inputs[0] is None else node.inputs[0].type
    graph.insert_before(node, split)
    return list(split.outputs)
