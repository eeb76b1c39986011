"""Which nodes of a float32 graph compute in 16 bits, and why the others do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from onnx_autoglm.cast_tensor import largest
from onnx_autoglm.op_kinds import LAYOUT, bodies, inputs_of, is_constant, is_float, is_pointwise
from onnx_autoglm.op_types import Signature, signature
from onnx_autoglm.precision_ranges import Format
from onnx_autoglm.precision_roles import LOGITS, score_nodes, sensitive_nodes

BODY = "inside a control-flow body, whose numbers cannot be measured"
CACHE = "a cache that comes and goes in float32"
MASKS = "masks, beside which scores would not vanish as they do in the source"
BETWEEN = "between parts in float32"
SMALL_BYTES = 4096

# Inputs that are added: biases.
_ADDED = {
    "Add": (0, 1),
    "Sub": (1,),
    "Conv": (2,),
    "ConvTranspose": (2,),
    "Gemm": (2,),
    "BatchNormalization": (2, 3),
    "LayerNormalization": (2,),
    "InstanceNormalization": (2,),
    "GroupNormalization": (2,),
}

# Attributes that say which type a node without typed inputs makes.
TYPE_OF_OUTPUT = {
    "Cast": "to",
    "EyeLike": "dtype",
    "RandomNormal": "dtype",
    "RandomUniform": "dtype",
    "RandomNormalLike": "dtype",
    "RandomUniformLike": "dtype",
    "Bernoulli": "dtype",
    "SequenceEmpty": "dtype",
    "ConstantOfShape": "value",
}


@dataclasses.dataclass
class Islands:
    """The nodes that stay in float32, each with its reason, and the signatures of all nodes."""

    kind: Format
    wide: dict[ir.Node, str]
    signatures: dict[ir.Node, Signature | None]

    def dtype(self, node: ir.Node) -> ir.DataType:
        """The type that a node computes in."""
        return ir.DataType.FLOAT if node in self.wide else self.kind.dtype

    def reads(self, node: ir.Node, index: int) -> ir.DataType:
        """The type that a node wants for a float input."""
        own = self.signatures.get(node)
        if node in self.wide or own is None:
            return ir.DataType.FLOAT
        return self.kind.dtype if own.allows(own.input(index), self.kind.dtype) else ir.DataType.FLOAT

    def makes(self, node: ir.Node, index: int) -> ir.DataType:
        """The type of a float output of a node."""
        own = self.signatures.get(node)
        if node in self.wide or (own is None and not _branches(node)):
            return ir.DataType.FLOAT
        if own is None or _branches(node):
            return self.kind.dtype
        variable = own.output(index)
        # Side results of a type of their own (the mean of a LayerNormalization) stay as they are.
        return self.kind.dtype if index == 0 or variable in own.inputs else ir.DataType.FLOAT


def find_islands(
    model: ir.Model,
    kind: Format,
    ranges: Mapping[str, float] | None,
    *,
    interface: Mapping[str, ir.DataType],
    masked: Container[str] = (),
    wide_masks: bool = False,
    scores: ir.Value | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> Islands:
    """Decides for each node of a canonical float32 model, bodies included, what it computes in.

    Args:
        model: the model; it is only read.
        kind: the 16-bit format.
        ranges: the largest magnitude of every float value (`observe_ranges`); None where all that a float32 can
            be fits the format. With ranges, bodies of control flow stay in float32, as nothing measures them.
        interface: the type of every float input and output that the result will have.
        masked: names of the values that carry masks.
        wide_masks: whether all that touches those computes in float32.
        scores: an output whose numbers are to be made in float32.
        step: told what is being read.
    """
    opsets = tuple(model.opset_imports.items())
    all_nodes = list(model.graph.all_nodes())
    signatures = {node: signature(node, opsets) for node in all_nodes}
    wide: dict[ir.Node, str] = {}
    if scores is not None:
        wide |= dict.fromkeys(score_nodes(scores), LOGITS)
    for graph in model.graphs():
        for node, reason in sensitive_nodes(graph).items():
            wide.setdefault(node, reason)
    tops = set(model.graph)
    step("ranges of the weights")
    for node in all_nodes:
        reason = _obstacle(node, signatures[node], kind, dict(opsets))
        if wide_masks and any(value.name in masked for value in (*inputs_of(node), *node.outputs)):
            reason = reason or MASKS
        reason = reason or _misfit(node, kind, ranges, masked)
        if ranges is not None and node not in tops:
            reason = reason or BODY
        if reason:
            wide.setdefault(node, reason)
    for node in _handed_through(model.graph, interface):
        wide.setdefault(node, CACHE)
    for graph in model.graphs():
        _tie_sequences(graph, wide)
        _fill(graph, wide)
    return Islands(kind, wide, signatures)


def _branches(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type == "If"


def _obstacle(node: ir.Node, own: Signature | None, kind: Format, opsets: Mapping[str, int]) -> str:
    """Why the operator cannot compute in the format, or nothing."""
    if _branches(node) or not any(is_float(value) for value in (*node.inputs, *node.outputs)):
        return ""
    if own is None or bodies(node):
        return (
            f"{node.op_type} is known in float32 only" if own is None else f"values carried by {node.op_type}"
        )
    made = next((index for index, value in enumerate(node.outputs) if is_float(value)), None)
    read = next((index for index, value in enumerate(node.inputs) if is_float(value)), None)
    if made is not None and read is None and node.op_type not in TYPE_OF_OUTPUT:
        return f"{node.op_type} makes float32"
    variable = own.output(made) if made is not None else own.input(read or 0)
    if own.allows(variable, kind.dtype) and _inputs_allowed(node, own, kind):
        return ""
    return f"{node.op_type} has no {kind.dtype.name.lower()} in opset {opsets.get(node.domain, 1)}"


def _inputs_allowed(node: ir.Node, own: Signature, kind: Format) -> bool:
    """Whether all float inputs of the same type variable as an output may have the format."""
    made = {own.output(index) for index, value in enumerate(node.outputs) if is_float(value)}
    return all(
        own.allows(own.input(i), kind.dtype)
        for i, v in enumerate(node.inputs)
        if is_float(v) and own.input(i) in made
    )


def _misfit(node: ir.Node, kind: Format, ranges: Mapping[str, float] | None, masked: Container[str]) -> str:
    """Why the numbers that a node reads or makes do not fit the format, or nothing."""
    name = kind.dtype.name.lower()
    for index, value in enumerate((*node.inputs, *node.outputs)):
        if value is None or not is_float(value):
            continue
        least = kind.smallest
        if is_constant(value):
            assert value.const_value is not None
            if ranges is None and value.const_value.nbytes > SMALL_BYTES:
                continue  # weights that a float32 model trained with
            size, what = _largest(value), "weight" if value.const_value.size > 1 else "constant"
            top = kind.highest
            if index in _ADDED.get(node.op_type, ()) and value.const_value.size > 1:
                least = 0.0  # small beside what it is added to
        elif ranges is not None and value.name in ranges:
            size, what = ranges[value.name or ""], "value"
            top = kind.masked_limit if value.name in masked else kind.limit
        else:
            continue
        if size > top:
            return f"{what} {value.name!r} reaches {size:.3g}, and {name} holds {top:.3g} safely"
        if 0 < size < least:
            return f"{what} {value.name!r} is {size:.3g} at most, and {name} is exact from {kind.smallest:.2g} only"
    if node.op_type == "BatchNormalization" and not _scales_fit(node, kind):
        return "variances that the format rounds to nothing"
    return ""


def _largest(value: ir.Value) -> float:
    """The largest magnitude in an initializer, remembered on the value while the tensor is the same."""
    known = value.meta.get("autoglm.largest")
    if known is None or known[0] is not value.const_value:
        assert value.const_value is not None
        known = value.meta["autoglm.largest"] = (value.const_value, largest(value.const_value))
    return float(known[1])


def _scales_fit(node: ir.Node, kind: Format) -> bool:
    """Whether a BatchNormalization's scale factors survive the rounding of its variances."""
    variance = node.inputs[4]
    if variance is None or variance.const_value is None or not is_float(variance):
        return True
    exact = np.asarray(variance.const_value.numpy()).astype(np.float64)
    rounded = exact.astype(np.float32).astype(kind.dtype.numpy()).astype(np.float64)
    epsilon = node.attributes.get_float("epsilon", 1e-5) or 1e-5
    return bool(np.all(np.abs(np.sqrt((exact + epsilon) / (rounded + epsilon)) - 1) <= 2 * kind.roundoff))


def _handed_through(graph: ir.Graph, interface: Mapping[str, ir.DataType]) -> Iterator[ir.Node]:
    """Nodes that add to a float32 input and return it: one cast of the whole cache less in float32."""
    for node in graph:
        ends = [value for value in inputs_of(node) if value.is_graph_input()]
        ends_out = [value for value in node.outputs if value.is_graph_output()]
        wide_in = any(interface.get(value.name or "") == ir.DataType.FLOAT for value in ends)
        wide_out = any(interface.get(value.name or "") == ir.DataType.FLOAT for value in ends_out)
        if node.op_type in LAYOUT and not node.domain and wide_in and wide_out:
            yield node


def _tie_sequences(graph: ir.Graph, wide: dict[ir.Node, str]) -> None:
    """A sequence cannot be cast: all that touch it compute in float32 if one of them does."""
    changed = True
    while changed:
        changed = False
        for node in graph:
            for value in node.outputs:
                if isinstance(value.type, ir.SequenceType):
                    touching = {node, *(user for user, _ in value.uses())}
                    kept = [each for each in touching if each in wide]
                    if kept and len(kept) < len(touching):
                        changed = True
                        wide |= dict.fromkeys(touching - set(kept), wide[kept[0]])


def _fill(graph: ir.Graph, wide: dict[ir.Node, str]) -> None:
    """Takes pointwise nodes that lie between float32 parts only into float32: two casts less, and no rounding."""
    nodes = [node for node in graph if any(is_float(v) for v in (*node.inputs, *node.outputs))]
    open_nodes = {node for node in nodes if node not in wide and is_pointwise(node)}
    while open_nodes:
        region, stack = set(), [open_nodes.pop()]
        before: set[ir.Node] = set()
        after: set[ir.Node] = set()
        while stack:
            node = stack.pop()
            region.add(node)
            for near, edge in _neighbours(node):
                if near in open_nodes:
                    open_nodes.discard(near)
                    stack.append(near)
                elif near not in region:
                    (before if edge == "before" else after).add(near)
        enclosed = before and after and all(node in wide for node in before | after)
        if enclosed and not any(_holds_table(node) for node in region):
            wide |= dict.fromkeys(region, BETWEEN)


def _neighbours(node: ir.Node) -> Iterator[tuple[ir.Node, str]]:
    """The nodes that share a float value with this one."""
    for value in inputs_of(node):
        producer = value.producer()
        if is_float(value) and producer is not None:
            yield producer, "before"
    for value in node.outputs:
        if is_float(value):
            for user, _ in value.uses():
                yield user, "after"


def _holds_table(node: ir.Node) -> bool:
    """Whether a node reads a weight that is worth halving."""
    return any(
        is_float(value) and value.const_value is not None and value.const_value.nbytes > SMALL_BYTES
        for value in inputs_of(node)
    )
