"""Parts of a network that must not be computed in 16 bits, whatever the size of their numbers.

Found by what operators do and where their results go: no name and no arrangement of nodes is looked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnx_autoglm.op_kinds import PRODUCTS, inputs_of, is_constant, is_float, is_pointwise

STATISTICS, POSITIONS, ROUTER, LOGITS = (
    "statistics of a norm",
    "positions and counts, which 16 bits cannot tell apart",
    "scores that choose experts",
    "scores of the model",
)

_AVERAGES = frozenset({"ReduceMean", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp"})
_CHOOSERS = frozenset({"TopK", "ArgMax", "ArgMin"})
_NORMALISERS = frozenset({"Softmax", "LogSoftmax"})


def sensitive_nodes(graph: ir.Graph) -> dict[ir.Node, str]:
    """The nodes of the graph that compute in float32, with what they are."""
    nodes = list(graph)
    found: dict[ir.Node, str] = {}
    for reason, part in (
        (STATISTICS, _statistics(nodes)),
        (POSITIONS, _positions(nodes)),
        (ROUTER, _routers(nodes)),
    ):
        for node in part:
            found.setdefault(node, reason)
    return found


def score_nodes(output: ir.Value) -> list[ir.Node]:
    """The nodes that make scores: back from the output to the product, itself included."""
    return _back_to_product([output])


def _statistics(nodes: Sequence[ir.Node]) -> set[ir.Node]:
    """Averages and sums of squares, the squares themselves, and all that is computed from them up to the
    operation that applies them to something else."""
    found: set[ir.Node] = set()
    for node in nodes:
        if node.op_type in _AVERAGES or (node.op_type == "ReduceSum" and _is_square(_behind(node.inputs[0]))):
            found.add(node)
            square = _behind(node.inputs[0])
            if square is not None and _is_square(square):
                found.add(square)
    statistics = {value for node in found if not _is_square(node) for value in node.outputs}
    for node in nodes:  # in order, so one pass is enough
        inner = [value for value in inputs_of(node) if is_float(value) and not is_constant(value)]
        if not is_pointwise(node) or not any(value in statistics for value in inner):
            continue
        found.add(node)
        if all(value in statistics for value in inner):
            statistics.update(node.outputs)
    return found


def _behind(value: ir.Value | None) -> ir.Node | None:
    """The node that made a value, seen through those that move numbers only."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze"):
        source = node.inputs[0]
        node = None if source is None else source.producer()
    return node


def _is_square(node: ir.Node | None) -> bool:
    if node is None or len(node.inputs) < 2:
        return False
    first, second = node.inputs[0], node.inputs[1]
    if node.op_type == "Mul":
        return first is second
    if node.op_type != "Pow" or second is None or second.const_value is None:
        return False
    exponent = np.asarray(second.const_value.numpy())
    return exponent.size == 1 and float(exponent.reshape(-1)[0]) == 2.0


def _positions(nodes: Sequence[ir.Node]) -> set[ir.Node]:
    """Arithmetic on numbers that were integers, and all that leads from there into a sine or cosine.

    float16 counts to 2048 and bfloat16 to 256, so positions and the angles made of them need more.
    """
    pointwise: set[ir.Value] = set()  # made of integers, each by itself
    angles: set[ir.Value] = set()  # made of integers, products among it
    given = {
        v for node in nodes for v in inputs_of(node) if v.is_graph_input() and is_float(v)
    }  # float time steps
    found: set[ir.Node] = set()
    for node in nodes:
        floats = [value for value in inputs_of(node) if is_float(value) and not is_constant(value)]
        starts = _counts(node)
        if starts or (is_pointwise(node) and floats and all(value in pointwise for value in floats)):
            found.add(node)
            pointwise.update(node.outputs)
        through = is_pointwise(node) or node.op_type in ("MatMul", "Einsum")
        if starts or (through and floats and all(value in angles for value in floats)):
            angles.update(node.outputs)
        if is_pointwise(node) and floats and all(value in given or value in angles for value in floats):
            given.update(node.outputs)
    waves = [node for node in nodes if node.op_type in ("Sin", "Cos") and node.inputs[0] in angles | given]
    stack = list(waves)
    while stack:
        node = stack.pop()
        found.add(node)
        for value in inputs_of(node):
            producer = value.producer()
            if (value in angles or value in given) and producer is not None and producer not in found:
                stack.append(producer)
    return found


def _counts(node: ir.Node) -> bool:
    """Whether a node turns integers into floats (truth values are no integers)."""
    if not node.outputs or not is_float(node.outputs[0]):
        return False
    if node.op_type == "Range":
        return True
    source = node.inputs[0] if node.op_type == "Cast" else None
    return source is not None and source.dtype is not None and source.dtype.is_integer()


def _routers(nodes: Sequence[ir.Node]) -> set[ir.Node]:
    """From a product to the choice that its numbers decide, where the network goes on behind the choice.

    Rounded scores choose other experts, and then everything is different.
    """
    leads_to_product: set[ir.Value] = set()
    for node in reversed(nodes):
        if node.op_type in PRODUCTS or any(value in leads_to_product for value in node.outputs):
            leads_to_product.update(inputs_of(node))
    found: set[ir.Node] = set()
    for node in nodes:
        if node.op_type in _CHOOSERS and any(value in leads_to_product for value in node.outputs):
            source = node.inputs[0]
            if is_float(source) and source is not None:
                found |= {node, *_back_to_product([source])}
    return found


def _back_to_product(values: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes that made the values, back to the first product on each way, itself included."""
    found: dict[ir.Node, None] = {}
    stack = [value.producer() for value in values]
    while stack:
        node = stack.pop()
        if node is None or node in found:
            continue
        through = is_pointwise(node) or node.op_type in _CHOOSERS | _NORMALISERS | {"ReduceSum", "ReduceMax"}
        if not through and node.op_type not in PRODUCTS:
            continue
        found[node] = None
        if through:
            stack += [value.producer() for value in inputs_of(node) if is_float(value)]
    return list(found)
