"""Computes beforehand what does not depend on the data: sizes that the graph fixes, and what follows from constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from onnx_autoglm.passes.canonicalize import has_sequences

SMALL = 1 << 12  # elements: sizes, indices, masks of a few tokens; weights are larger and stay as they are

# Quantized weights must stay behind their DequantizeLinear, and these have no one result.
_KEPT = frozenset(
    {
        "Bernoulli",
        "DequantizeLinear",
        "Dropout",
        "Multinomial",
        "QuantizeLinear",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)


def fold_shapes(model: ir.Model) -> int:
    """Replaces nodes by constants, in place, and says how many went.

    A `Shape` is a constant where all that is read of it is fixed, also when other axes of the value are not.
    """
    before = model.graph.num_nodes()
    if not has_sequences(model):
        common.ShapeInferencePass()(model)
    partial: dict[ir.Value, np.ndarray] = {}
    for node in list(model.graph):
        array = _folded(node, partial, model)
        if array is not None and not node.outputs[0].is_graph_output():
            _replace(node, array, model.graph)
    common.RemoveUnusedNodesPass()(model)
    return before - model.graph.num_nodes()


def _folded(node: ir.Node, partial: dict[ir.Value, np.ndarray], model: ir.Model) -> np.ndarray | None:
    """What the single output of a node is, if it can be told. Notes sizes of which only some are known."""
    if node.domain or len(node.outputs) != 1 or node.op_type in _KEPT:
        return None
    sizes = _sizes(node, partial)
    if sizes is not None:
        if any(size is None for size in sizes.reshape(-1)):
            partial[node.outputs[0]] = sizes
            return None
        return sizes.astype(np.int64)
    arrays = [None if value is None else _constant(value) for value in node.inputs]
    known = all(value is None or array is not None for value, array in zip(node.inputs, arrays, strict=True))
    has_body = any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())
    if not known or not any(array is not None for array in arrays) or has_body:
        return None
    result = _computed(node, arrays, model)
    return result if result is not None and result.size <= SMALL else None


def _sizes(node: ir.Node, partial: dict[ir.Value, np.ndarray]) -> np.ndarray | None:
    """Sizes of a value, or some of them; None stands for one that is not fixed."""
    source = node.inputs[0] if node.inputs else None
    if node.op_type == "Shape" and source is not None and source.shape is not None:
        start, end = node.attributes.get_int("start", 0), node.attributes.get("end")
        stop = len(source.shape) if end is None else end.as_int()
        dims = [dim if isinstance(dim, int) else None for dim in source.shape]
        return np.array(dims[start:stop], dtype=object)
    if source not in partial:
        return None
    rest = [None if value is None else _constant(value) for value in node.inputs[1:]]
    if any(array is None for array in rest):
        return None
    known = partial[source]
    if node.op_type == "Gather":
        return np.asarray(known[rest[0]], dtype=object)
    if node.op_type == "Slice" and len(rest) < 4:
        starts, ends = (int(array.reshape(-1)[0]) for array in rest[:2])  # type: ignore[union-attr]
        return known[starts:ends]
    if node.op_type == "Squeeze":
        return known.reshape(())
    return known.reshape(-1) if node.op_type == "Unsqueeze" else None


def _constant(value: ir.Value) -> np.ndarray | None:
    if value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > SMALL or tensor.dtype == ir.DataType.STRING:
        return None
    return np.asarray(tensor.numpy())


def _computed(node: ir.Node, arrays: list[np.ndarray | None], model: ir.Model) -> np.ndarray | None:
    from onnx.reference import ReferenceEvaluator

    names = [f"in{index}" if array is not None else "" for index, array in enumerate(arrays)]
    proto = ir.serde.serialize_node(node)
    del proto.input[:]
    proto.input.extend(names)
    feeds: dict[str, Any] = {name: array for name, array in zip(names, arrays, strict=True) if name}
    try:
        evaluator: Any = ReferenceEvaluator(proto, opsets=dict(model.opset_imports))
        result = evaluator.run(None, feeds)[0]
    except Exception:  # noqa: BLE001 - what the reference does not know stays as it is
        return None
    array, kind = np.asarray(result), node.outputs[0].dtype
    return array if kind is None or array.dtype == kind.numpy() else None


def _replace(node: ir.Node, array: np.ndarray, graph: ir.Graph) -> None:
    old = node.outputs[0]
    name, kind = old.name or "", old.dtype or ir.DataType.from_numpy(array.dtype)
    tensor = ir.Tensor(array, dtype=kind, name=name)
    constant = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(kind), const_value=tensor)
    ir.convenience.replace_all_uses_with(old, constant)
    graph.remove(node, safe=True)
    graph.register_initializer(constant)
