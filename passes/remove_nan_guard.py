"""Removes the guard that exporters put behind a masked softmax, which keeps runtimes from fusing attention.

Exported attention masks by adding minus infinity to scores. A row that is masked everywhere (padding) then has a
softmax of NaN, so exporters write `Where(IsNaN(p), 0, p)` behind it. With a large finite number in place of minus
infinity no row is NaN, and the guard can go. Rows that attend to something compute exactly what they did: their masked
scores are so low that their weights are zero either way. Rows that attend to nothing held zeros and now hold a mean of
the values; nothing reads them, because what may not attend is padding and is masked as a key, too.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

# Between the choice of mask values and the sum with the scores: operators that only move numbers.
_MOVES = frozenset({"Expand", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


@dataclasses.dataclass(frozen=True)
class Guards:
    """How many guards went, and why the others stayed."""

    removed: int
    kept: tuple[str, ...]


def remove_nan_guard(model: ir.Model) -> Guards:
    """Makes masks finite and removes the guards behind them, in place.

    A guard stays, with the reason, unless all that its softmax can read of minus infinity is a constant by which the
    graph masks a product, and nothing but masks is made of it.
    """
    removed, kept = 0, []
    for node in list(model.graph):
        softmax = _guarded(node)
        if softmax is None:
            continue
        reason = _refusal(node, softmax) or _make_finite(softmax, model.graph)
        if reason:
            kept.append(f"{softmax.name or softmax.outputs[0].name}: {reason}")
            continue
        test = node.inputs[0]
        ir.convenience.replace_all_uses_with(node.outputs[0], softmax.outputs[0])
        model.graph.remove(node, safe=True)
        guard = None if test is None else test.producer()
        if guard is not None and not list(guard.outputs[0].uses()):
            model.graph.remove(guard, safe=True)
        removed += 1
    return Guards(removed, tuple(kept))


def _refusal(node: ir.Node, softmax: ir.Node) -> str:
    if node.outputs[0].is_graph_output():
        return "the guard gives a graph output"
    if softmax.graph is not node.graph:
        return "the guard stands in another graph"
    return ""


def _guarded(node: ir.Node) -> ir.Node | None:
    """The softmax p of a node `Where(IsNaN(p), 0, p)`."""
    if node.op_type != "Where" or node.domain:
        return None
    condition, zero, value = node.inputs
    if condition is None or zero is None or value is None:
        return None
    test, softmax = condition.producer(), value.producer()
    if test is None or softmax is None or test.op_type != "IsNaN" or test.inputs[0] is not value:
        return None
    constant = _scalar(zero)
    return softmax if softmax.op_type == "Softmax" and constant == 0 else None


def _scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of one element."""
    tensor = None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size != 1 or not tensor.dtype.is_floating_point():
        return None
    return float(np.asarray(tensor.numpy()).reshape(-1)[0])


def _make_finite(softmax: ir.Node, graph: ir.Graph) -> str:
    """Replaces every minus infinity that the softmax reads. Returns why it cannot, or an empty text."""
    scores = softmax.inputs[0]
    chosen = None if scores is None else _masking(scores)
    if chosen is None:
        return "it does not read a product that is masked by constants"
    if not _masks_only(chosen.outputs[0]):
        return "the values of its mask are read elsewhere, too"
    for slot in (1, 2):
        value = chosen.inputs[slot]
        if _scalar(value) == -np.inf:
            assert value is not None
            chosen.replace_input_with(slot, _finite(value, graph))
    return ""


def _masking(scores: ir.Value) -> ir.Node | None:
    """The node `Where(attend, a, b)` that masks a product: by a sum with it, or by choosing between both."""
    node = scores.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "Where":
        free = [value for value in node.inputs[1:] if _scalar(value) is None]
        return node if len(free) == 1 and _is_product(free[0]) else None
    if node.op_type != "Add":
        return None
    choices = [_constant_choice(value) for value in node.inputs]
    free = [value for value, choice in zip(node.inputs, choices, strict=True) if choice is None]
    if len(free) != 1 or not _is_product(free[0]):
        return None
    return choices[0] or choices[1]


def _is_product(value: ir.Value | None) -> bool:
    """Whether a value is a matrix product, scaled, capped or moved: it holds no infinity by design."""
    node = None if value is None else value.producer()
    if node is None or node.domain:
        return False
    if node.op_type in ("MatMul", "Einsum", "Gemm"):
        return True
    if node.op_type in ("Mul", "Div"):
        factors = [factor for factor in node.inputs if _scalar(factor) is None]
        return len(factors) == 1 and _is_product(factors[0])
    return node.op_type in (*_MOVES, "Cast", "Tanh") and _is_product(node.inputs[0])


def _constant_choice(value: ir.Value | None) -> ir.Node | None:
    """A node that chooses between two constants, behind operators that only move its result."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _MOVES and not node.domain and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Where" or node.domain:
        return None
    return node if all(_scalar(node.inputs[slot]) is not None for slot in (1, 2)) else None


def _masks_only(value: ir.Value) -> bool:
    """Whether a value is read, moved or not, as the input of softmaxes alone or in a sum that is."""
    if value.is_graph_output():
        return False
    for node, slot in value.uses():
        if node.op_type == "Softmax" and not node.domain:
            continue
        moved = node.op_type in _MOVES and slot == 0
        if node.domain or not (moved or node.op_type == "Add") or not _masks_only(node.outputs[0]):
            return False
    return True


def _finite(value: ir.Value, graph: ir.Graph) -> ir.Value:
    """A constant of the same shape with half the lowest number of its type.

    Half, so that the sum with a score is finite, too.
    """
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None
    name = f"{value.name}_finite"
    if name not in graph.initializers:
        array = np.full(tensor.shape.numpy(), tensor.dtype.min / 2, dtype=tensor.dtype.numpy())
        finite = ir.Tensor(array, dtype=tensor.dtype, name=name)
        graph.register_initializer(
            ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=finite
            )
        )
    return graph.initializers[name]
