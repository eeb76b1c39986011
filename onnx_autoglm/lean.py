"""Edits of a graph, for running it only, that keep its weights out of memory.

ONNX Runtime maps weights from their files, but whatever is computed from weights alone (a mask times a
weight, a transpose, a cast) it may compute at the start and hold until it is used. These edits make such
work unnecessary, or make it wait for the activation that it meets.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnx_autoglm.upcast import Float32Tensor

CAST_BYTES = 1 << 29  # in float32; larger tensors are upcast into a file rather than in memory
_SMALL_BYTES = 4096  # tensors below this are not worth an edit
_WAIT_BYTES = 1 << 20  # work on weights below this need not wait


def prepare(model: ir.Model, *, cast_when_run: bool) -> None:
    """Applies all edits in place.

    A quantized graph that ONNX Runtime is to optimize stays as it is: its kernels for integers are found by what
    surrounds a DequantizeLinear.
    """
    if not cast_when_run and any(node.op_type == "DequantizeLinear" for node in model.graph):
        return
    if cast_when_run:
        _cast_when_run(model.graph)
    _multiply_transposed(model)
    delay_weight_work(model.graph)
    _wait_for_activations(model.graph)


def _multiply_transposed(model: ir.Model) -> None:
    """`MatMul(x, Transpose(w))` becomes a product that reads `w` as it lies (FusedMatMul)."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Transpose" or node.domain or list(_permutation(node)) != [1, 0]:
            continue
        weight, output = node.inputs[0], node.outputs[0]
        uses = list(output.uses())
        is_right_operand = all(u.op_type == "MatMul" and not u.domain and index == 1 for u, index in uses)
        if weight is None or output.is_graph_output() or not uses or not is_right_operand:
            continue
        kind = weight.dtype if weight.const_value is None else weight.const_value.dtype
        if kind not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):  # what FusedMatMul has kernels for
            continue
        for user, _ in uses:
            product = ir.node(
                "FusedMatMul", [user.inputs[0], weight], {"transB": 1}, domain="com.microsoft", name=user.name
            )
            new, old = product.outputs[0], user.outputs[0]
            graph.insert_before(user, product)
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            name, new.type, new.shape = old.name, old.type, old.shape
            graph.remove(user)
            new.name = name
        graph.remove(node)
        graph.opset_imports.setdefault("com.microsoft", 1)


def _permutation(node: ir.Node) -> list[int]:
    attribute = node.attributes.get("perm")
    return [] if attribute is None else list(attribute.as_ints())


def _wait_for_activations(graph: ir.Graph) -> None:
    """Makes work on large weights depend on the activation that it meets.

    The order of nodes alone does not bind ONNX Runtime. A zero made from the activation's shape does: it is
    added to the mask of a product, or to the shape of a reshape where there is no mask.
    """
    nodes = list(graph)
    from_weights = _weight_work(nodes, graph)
    waiting: set[ir.Node] = set()
    for node in nodes:
        if node in from_weights:
            continue
        activation = next(
            (value for value in node.inputs if value is not None and _varies(value, from_weights)), None
        )
        if activation is None:
            continue
        for root in _ancestors(node, from_weights, {}):
            starts = all(value is None or value.producer() not in from_weights for value in root.inputs)
            if starts and root not in waiting and _largest(root) >= _WAIT_BYTES:
                waiting.add(root)
                _wait(graph, root, activation)


def _varies(value: ir.Value, from_weights: set[ir.Node]) -> bool:
    producer = value.producer()
    return value.is_graph_input() if producer is None else producer not in from_weights


def _bytes(value: ir.Value | None) -> int:
    return 0 if value is None or value.const_value is None else int(value.const_value.nbytes)


def _largest(node: ir.Node) -> int:
    return max((_bytes(value) for value in node.inputs), default=0)


def _wait(graph: ir.Graph, root: ir.Node, activation: ir.Value) -> None:
    weights = [(index, value) for index, value in enumerate(root.inputs) if _bytes(value)]
    if not weights:
        return
    index, small = min(weights, key=lambda item: _bytes(item[1]))
    assert small is not None and small.const_value is not None
    has_mask = root.op_type == "Mul" and len(weights) == 2 and len(small.const_value.shape) > 0
    shape = ir.node("Shape", [activation])
    size = ir.node("ReduceProd", [shape.outputs[0]], {"keepdims": 1})
    zero = ir.node("Mul", [size.outputs[0], _integers(graph, [0])])
    added = [shape, size, zero]
    if has_mask:
        cast = ir.node("Cast", [zero.outputs[0]], {"to": int(small.const_value.dtype)})
        gate = ir.node("Add", [small, cast.outputs[0]])
        added += [cast, gate]
    else:
        dims = _integers(graph, list(small.const_value.shape.numpy()))
        moved = ir.node("Add", [dims, zero.outputs[0]])
        gate = ir.node("Reshape", [small, moved.outputs[0]])
        added += [moved, gate]
    for node in added:
        graph.insert_before(root, node)
    root.replace_input_with(index, gate.outputs[0])


def _integers(graph: ir.Graph, numbers: list[int]) -> ir.Value:
    name = f"lean/{len(graph.initializers)}"
    value = ir.Value(name=name, const_value=ir.tensor(numbers, dtype=ir.DataType.INT64, name=name))
    value.shape, value.dtype = ir.Shape([len(numbers)]), ir.DataType.INT64
    graph.register_initializer(value)
    return value


def _cast_when_run(graph: ir.Graph) -> None:
    """Let ONNX Runtime upcast 16-bit weights from their file, one at a time, instead of writing them out."""
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if (
            not isinstance(tensor, Float32Tensor)
            or not isinstance(tensor.source, ir.ExternalTensor)
            or not _SMALL_BYTES <= tensor.nbytes <= CAST_BYTES
            or value.is_graph_input()
            or value.is_graph_output()
        ):
            continue
        source, name = tensor.source, value.name
        half = ir.Value(
            name=f"{name}/16-bit", type=ir.TensorType(source.dtype), shape=tensor.shape, const_value=source
        )
        cast = ir.node("Cast", [half], {"to": int(ir.DataType.FLOAT)})
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        graph.initializers.pop(value.name or "")
        graph.register_initializer(half)
        cast.outputs[0].name = name
        cast.outputs[0].type, cast.outputs[0].shape = value.type, tensor.shape
        graph.insert_before(graph[0], cast)


def delay_weight_work(graph: ir.Graph) -> None:
    """Move every node that depends on weights alone to just before its first consumer."""
    nodes = list(graph)
    position = {node: index for index, node in enumerate(nodes)}
    from_weights = _weight_work(nodes, graph)
    order: dict[ir.Node, None] = {}
    for node in nodes:
        if node not in from_weights:
            needed = _ancestors(node, from_weights, order)
            order.update(dict.fromkeys([*sorted(needed, key=position.__getitem__), node]))
    order.update(dict.fromkeys(nodes))  # what nothing but a graph output reads
    graph.remove(nodes)
    graph.extend(order)


def _weight_work(nodes: list[ir.Node], graph: ir.Graph) -> set[ir.Node]:
    """The nodes that depend on weights alone."""
    from_weights: set[ir.Node] = set()
    for node in nodes:
        if all(_is_weight(value, graph, from_weights) for value in _reads(node)):
            from_weights.add(node)
    return from_weights


def _reads(node: ir.Node) -> list[ir.Value]:
    """The inputs of a node and of all nodes in its bodies."""
    attributes = node.attributes.values()
    bodies = [a.as_graph() for a in attributes if a.type == ir.AttributeType.GRAPH and not a.is_ref()]
    inner = (value for body in bodies for child in body.all_nodes() for value in child.inputs)
    return [value for value in (*node.inputs, *inner) if value is not None]


def _is_weight(value: ir.Value, graph: ir.Graph, from_weights: set[ir.Node]) -> bool:
    if value.graph is not graph:  # local to a body
        return True
    producer = value.producer()
    if producer is not None:
        return producer in from_weights
    return value.is_initializer() and not value.is_graph_input()


def _ancestors(node: ir.Node, among: set[ir.Node], done: Mapping[ir.Node, None]) -> set[ir.Node]:
    """The ancestors of `node` within `among` that are not done yet."""
    found: set[ir.Node] = set()
    stack = [node]
    while stack:
        for value in _reads(stack.pop()):
            producer = value.producer()
            if producer in among and producer not in done and producer not in found:
                found.add(producer)
                stack.append(producer)
    return found
