"""Whole branches of residual streams: attentions, feed-forward layers, residual convolutions.

A block is the branch of an Add of two values of the same axes, one of which (the branch) is computed from the other
(the stream) by products with weights, and of which nothing else in the graph reads an inner value. Without it the Add is
the identity. Masking a block zeroes the last weights of the branch, so that it adds zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from onnx_autoglm.axes.analysis import Analysis, captured
from onnx_autoglm.axes.dims import leaves, resolve
from onnx_autoglm.axes.facts import Role, label

# Operators that make zeros of a first input of zeros, whatever else they read.
_PASS = frozenset(
    "Identity Cast Dropout Reshape Transpose Squeeze Unsqueeze Flatten Expand Slice Div Neg Relu "
    "ReduceSum ReduceMean Gather GatherElements GatherND".split()
)
_SCALED = frozenset(
    "LayerNormalization RMSNormalization SimplifiedLayerNormalization BatchNormalization "
    "InstanceNormalization GroupNormalization".split()
)
# Of a weight, before it is read.
_MOVES = frozenset(
    "Identity Cast Reshape Transpose Squeeze Unsqueeze Expand Slice Split Gather GatherND".split()
)
Zeroed = tuple[ir.Value, ir.Node]  # an initializer, and the node that reads it


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A branch that can go, or that could but for `reason`.

    `stream` and `branch` are the two operands of `add`, `nodes` those of the branch in the order of the graph,
    `zeroed` the initializers that mask it, and `axis` the one of its channels.
    """

    add: ir.Node
    stream: ir.Value
    branch: ir.Value
    nodes: list[ir.Node]
    zeroed: list[Zeroed]
    axis: int
    reason: str = ""
    where: str = ""  # what gives the reason

    def dying(self) -> set[ir.Node]:
        """The nodes that nothing needs without the branch: its own, and what was computed for it alone."""
        gone = set(self.nodes)
        stack = [value for node in self.nodes for value in _read(node)]
        while stack:
            node = stack.pop().producer()
            if node is None or node in gone or any(value.is_graph_output() for value in node.outputs):
                continue
            if all(user in gone for value in node.outputs for user, _ in value.uses()):
                gone.add(node)
                stack.extend(_read(node))
        return gone

    def parameters(self) -> int:
        """Entries of the initializers that nothing but the branch reads."""
        gone = self.dying()
        read = {value for node in gone for value in _read(node)}
        tensors = [value.const_value for value in read if all(user in gone for user, _ in value.uses())]
        return sum(int(tensor.size) for tensor in tensors if tensor is not None)


def find_blocks(analysis: Analysis) -> list[Block]:
    """All blocks in the order of the graph, those that must stay with the reason."""
    nodes = list(analysis.graph)
    order = {node: index for index, node in enumerate(nodes)}
    weighted = {contraction.node for contraction in analysis.contractions}
    weighted.update(node for node in nodes if node.op_type == "Conv")
    made = {
        atom for dim, role, _ in analysis.roles if role in (Role.MADE, Role.CONVOLVED) for atom in leaves(dim)
    }
    blocks = []
    for add in nodes:
        operands = _operands(analysis, add, order)
        if operands is None:
            continue
        stream, branch = operands
        origin = _origin(stream)
        inner = _between(origin, branch, nodes[_position(origin, order) + 1 : order[add]])
        if not weighted & set(inner):
            continue
        zeroed: list[Zeroed] = []
        reason, where = _leak(inner, branch, add)
        if not reason:
            reason, where = _zero(analysis, branch, set(inner), zeroed), label(add)
        dims = analysis.values.get(add.outputs[0]) or []
        channels = [axis for axis, dim in enumerate(dims) if made & set(leaves(dim))]
        axis = channels[-1] if channels else len(dims) - 1
        blocks.append(Block(add, stream, branch, inner, zeroed, axis, reason, where))
    return blocks


def _position(value: ir.Value, order: dict[ir.Node, int]) -> int:
    producer = value.producer()
    return -1 if producer is None else order.get(producer, -1)


def _origin(value: ir.Value) -> ir.Value:
    """What a stream is but for numbers that scale it (as the first GLM does)."""
    while (node := value.producer()) is not None and node.op_type == "Mul":
        numbers = [v for v in node.inputs if v is not None and v.const_value is not None]
        others = [v for v in node.inputs if v is not None and v.const_value is None]
        if len(others) != 1 or numbers[0].const_value is None or numbers[0].const_value.size != 1:
            break
        value = others[0]
    return value


def _operands(
    analysis: Analysis, add: ir.Node, order: dict[ir.Node, int]
) -> tuple[ir.Value, ir.Value] | None:
    """Stream and branch of an Add: two activations of the same axes, the stream made first."""
    if add.op_type not in ("Add", "Sum") or add.domain or len(add.inputs) != 2 or len(set(add.inputs)) != 2:
        return None
    first, second = sorted(
        (v for v in add.inputs if v is not None), key=lambda value: _position(_origin(value), order)
    )
    shapes = []
    for value in (first, second, add.outputs[0]):
        dims = analysis.values.get(value)
        if value in analysis.weights or value in analysis.contents or not dims:
            return None
        shapes.append([resolve(dim) for dim in dims])
    return (first, second) if shapes[0] == shapes[1] == shapes[2] else None


def _between(stream: ir.Value, branch: ir.Value, nodes: list[ir.Node]) -> list[ir.Node]:
    """The nodes on the way from the stream to the branch; none if the branch is not computed from it."""
    reached = {stream}
    touched = []
    for node in nodes:
        if any(value in reached for value in _read(node)):
            reached.update(node.outputs)
            touched.append(node)
    if branch not in reached:
        return []
    wanted, inner = {branch}, []
    for node in reversed(touched):
        if wanted & set(node.outputs):
            inner.append(node)
            wanted.update(value for value in _read(node) if value in reached and value is not stream)
    return inner[::-1]


def _read(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    yield from captured(node)


def _leak(inner: Iterable[ir.Node], branch: ir.Value, add: ir.Node) -> tuple[str, str]:
    """How values of a branch leave it other than through the Add, and where."""
    own = set(inner)
    for node in inner:
        for value in node.outputs:
            if value.is_graph_output():
                return "a graph output would be lost with it", value.name or ""
            for user, _ in value.uses():
                if user not in own and not (value is branch and user is add):
                    return "a value inside it is read elsewhere", label(user)
    return "", ""


def _zero(analysis: Analysis, value: ir.Value, inner: set[ir.Node], zeroed: list[Zeroed]) -> str:
    """Collects the initializers that make a value zero; returns why that cannot be."""
    node = value.producer()
    if node is None or node not in inner:
        return f"it adds {value.name}, which is not computed in it"
    kind, inputs = node.op_type, [given for given in node.inputs if given is not None]
    weights = [given for given in inputs if given in analysis.weights]
    rest = [given for given in inputs if given not in analysis.weights]
    if kind in ("Add", "Sub", "Sum"):
        reasons = [_zero_weights([weight], node, zeroed) for weight in weights]
        reasons += [_zero(analysis, given, inner, zeroed) for given in rest]
        return next((reason for reason in reasons if reason), "")
    if kind in _SCALED:
        return _zero_weights(inputs[1:3], node, zeroed)
    if kind in ("MatMul", "Gemm", "FusedMatMul", "Einsum", "Conv", "Mul"):
        return _zero_product(analysis, node, weights, rest, inner, zeroed)
    if kind in _PASS and inputs[0] in rest:
        return _zero(analysis, inputs[0], inner, zeroed)
    return f"no weight ends it: its last operator is {label(node)}"


def _zero_product(
    analysis: Analysis,
    node: ir.Node,
    weights: list[ir.Value],
    rest: list[ir.Value],
    inner: set[ir.Node],
    zeroed: list[Zeroed],
) -> str:
    """One factor of zeros is enough: a weight (a plain number says nothing of a block), else what makes the other."""
    bias = node.inputs[2] if node.op_type in ("Gemm", "Conv") and len(node.inputs) > 2 else None
    reasons = [] if bias is None else [_zero_weights([bias], node, zeroed)]
    if any(reasons):
        return reasons[0]
    for weight in weights:
        if weight is not bias and (weight.const_value is None or weight.const_value.size > 1):
            reasons.append(_zero_weights([weight], node, zeroed))
            if not reasons[-1]:
                return ""
    for given in rest:
        found: list[Zeroed] = []
        reasons.append(_zero(analysis, given, inner, found))
        if not reasons[-1]:
            zeroed.extend(found)
            return ""
    return next((reason for reason in reasons if reason), f"no weight ends it ({label(node)})")


def _zero_weights(weights: list[ir.Value], reader: ir.Node, zeroed: list[Zeroed]) -> str:
    """Notes the initializers behind weights; the reason where one is computed, or has no axis."""
    for weight in weights:
        user = reader
        while (producer := weight.producer()) is not None and producer.op_type in _MOVES:
            assert producer.inputs[0] is not None
            if len(weight.uses()) > 1:
                return f"its last weight is moved for other nodes, too ({label(producer)})"
            weight, user = producer.inputs[0], producer
        tensor = weight.const_value
        if not weight.is_initializer() or tensor is None or not len(tensor.shape):
            return f"its last weight is computed, or a single number ({label(reader)})"
        zeroed.append((weight, user))
    return ""
