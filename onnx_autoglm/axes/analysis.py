"""The walk over a graph that collects and solves the equations of all its axes."""

from __future__ import annotations

import itertools

import onnx_ir as ir

from onnx_autoglm.axes import contents as known
from onnx_autoglm.axes import dims as ax
from onnx_autoglm.axes.contents import Contents
from onnx_autoglm.axes.dims import Dim
from onnx_autoglm.axes.facts import (
    Contraction,
    CountedAttribute,
    DefaultedAttribute,
    Pin,
    PinKind,
    Role,
    ScoredProduct,
    ZeroCheck,
    label,
)
from onnx_autoglm.axes.follow import SIZE_INPUTS, follow
from onnx_autoglm.axes.op import Op, Unknown
from onnx_autoglm.axes.rules import RULES
from onnx_autoglm.axes.size import Size, parse, symbol

# Ops through which a weight stays a weight: they move or select its entries.
_MOVES = frozenset(
    "Identity Cast CastLike Reshape Transpose Squeeze Unsqueeze Flatten Expand Slice Split Concat Gather "
    "GatherND QuantizeLinear DequantizeLinear".split()
)
_LOOKS_UP = frozenset("Gather GatherND GatherElements ScatterElements".split())


class Analysis:
    """Dimension expressions of every value of a graph, and all facts stated about them.

    The graph must be topologically sorted, with constants lifted to initializers and functions inlined
    (`onnx_autoglm.passes.canonicalize`). The analysis never changes it.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph = model.graph
        self.values: dict[ir.Value, list[Dim] | None] = {}
        self.views: dict[tuple[ir.Node, int], list[Dim]] = {}
        self.contents: dict[ir.Value, Contents] = {}
        self.weights: set[ir.Value] = set()
        self.index_of: dict[ir.Value, Dim] = {}
        self.sequences: dict[ir.Value, list[list[Dim]]] = {}
        self.pins: list[tuple[Dim, Pin]] = []
        self.floors: list[tuple[Dim, int]] = []
        self.roles: list[tuple[Dim, Role, ir.Node]] = []
        self.products: list[tuple[ir.Node, list[Dim]]] = []  # all axes of each, before any is summed over
        self.mixed: list[list[Dim]] = []  # axes of a value but for the one along which an op mixes it
        self.contractions: list[Contraction] = []
        self.scored: list[ScoredProduct] = []
        self.zero_checks: list[ZeroCheck] = []
        self.counted: list[CountedAttribute] = []
        self.defaulted: list[DefaultedAttribute] = []
        self.is_static = all(
            value.shape is not None and all(isinstance(size, int) for size in value.shape)
            for value in self.graph.inputs
        )
        self._symbols: dict[str, Dim] = {}
        self._counter = itertools.count()
        self._walk()

    # --- reading the graph

    def opset(self, domain: str) -> int:
        return self.graph.opset_imports.get(domain, 1)

    def opaque(self) -> Size:
        return symbol(f"?{next(self._counter)}")

    def input_dims(self, node: ir.Node, index: int) -> list[Dim] | None:
        """The axes of an input as this node sees them."""
        value = node.inputs[index]
        if value is None:
            return None
        return self.views.get((node, index)) or self.values.get(value)

    # --- the walk

    def _walk(self) -> None:
        for value in self.graph.initializers.values():
            self._enter_initializer(value)
        for value in self.graph.inputs:
            self._enter_input(value)
        for node in self.graph:
            self._visit(node)
        self._pin_sizes_used_as_data()
        for value in self.graph.outputs:
            if value in self.contents:
                self._pin_extents(value, Pin("its size is a graph output", value.name or ""))
            if value in self.index_of:
                self.pins.append((self.index_of[value], Pin("its index is a graph output", value.name or "")))
            for axis, dim in enumerate(self.values.get(value) or []):
                self.pins.append(
                    (dim, Pin(f"axis {axis} of the graph output {value.name}", "", PinKind.INTERFACE))
                )

    def _enter_initializer(self, value: ir.Value) -> None:
        tensor = value.const_value
        if tensor is None:
            return
        self.weights.add(value)
        shape = list(tensor.shape.numpy())
        whole = tensor.dtype.is_integer() or tensor.dtype == ir.DataType.BOOL
        if whole and tensor.size <= known.MAX_ENTRIES and tensor.dtype.bitwidth >= 8:
            self.contents[value] = known.constant(tensor.numpy())
        if tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth < 8:
            self.values[value] = dims = [ax.fresh(size) for size in shape]
            pin = Pin(f"a weight of type {tensor.dtype.name}, which cannot be cut", value.name or "")
            self.pins.extend((dim, pin) for dim in dims if dim)
            return
        uses = value.uses()
        # Exporters merge equal vectors of different layers (biases of zeros, norms of ones). Each use of
        # a vector is its own axis, cloned on write; untying a shared matrix would duplicate it instead.
        outside = value.is_graph_output() or self._is_overridable(value)
        if len(uses) > 1 and sum(size > 1 for size in shape) <= 1 and not outside:
            by_node = {node: [ax.fresh(size) for size in shape] for node, _ in uses}
            self.views.update(((node, index), by_node[node]) for node, index in uses)
        self.values[value] = dims = [ax.fresh(size) for size in shape]
        if self._is_overridable(value):
            reason = "a graph input with a default, which callers may replace: take it off the graph inputs"
            self.pins.extend((dim, Pin(reason, value.name or "")) for dim in dims if dim)

    def _is_overridable(self, value: ir.Value) -> bool:
        """Before version 4 of the IR all initializers had to be listed as inputs, and none could be replaced."""
        return value.is_graph_input() and (self.model.ir_version or 0) >= 4

    def _enter_input(self, value: ir.Value) -> None:
        if value in self.values:
            return
        if value.shape is None:
            self.values[value] = None
            return
        dims = [self._declared(size) for size in value.shape]
        for axis, dim in enumerate(dims):
            self.pins.append(
                (dim, Pin(f"axis {axis} of the graph input {value.name}", "", PinKind.INTERFACE))
            )
        self.values[value] = dims

    def _declared(self, size: int | ir.SymbolicDim) -> Dim:
        if isinstance(size, int):
            return ax.fresh(size)
        if size.value is None:
            return ax.fresh(self.opaque())
        text = str(size.value)
        if text not in self._symbols:
            self._symbols[text] = ax.fresh(parse(text))
        return self._symbols[text]

    def _visit(self, node: ir.Node) -> None:
        op = Op(self, node)
        if self._makes_weight(op):
            self.weights.update(node.outputs)
        if node.op_type in _MOVES and op.has(0) and op.value(0) in self.index_of:
            self.index_of.update((output, self.index_of[op.value(0)]) for output in node.outputs)
        self._pin_used_indices(node)
        contents = follow(op)
        if contents is not None:
            self._enter_contents(node, contents)
            return
        rule = RULES.get((node.domain, node.op_type))
        if rule is None:
            self._give_up(node, _why_no_rule(node))
            return
        try:
            rule(op)
        except Unknown as reason:
            self._give_up(node, str(reason))
        for output in node.outputs:
            if output not in self.values:
                self.values[output] = self._declared_dims(output, "an output without a rule", node)

    def _makes_weight(self, op: Op) -> bool:
        """Whether the outputs are weights: moved ones, or computed from weights alone.

        Rows that data looks up in a table are an activation, unlike experts that were selected.
        """
        if all(value is None or value in self.weights for value in op.node.inputs) and op.node.inputs:
            return True
        if op.node.op_type not in _MOVES or not op.has(0):
            return False
        if op.node.op_type == "Concat":
            return all(op.is_weight(index) for index in range(len(op.node.inputs)))
        index = op.value(1) if op.node.op_type in _LOOKS_UP else None
        known = index is None or any(index in found for found in (self.weights, self.contents, self.index_of))
        return op.is_weight(0) and known

    def _pin_sizes_used_as_data(self) -> None:
        """A size that enters a computation must keep the source's value: a number can be frozen, a symbolic
        size cannot, so the axes it depends on stay.
        """
        for value, contents in self.contents.items():
            if known.is_constant(contents):
                continue
            numbers = [known.evaluate(entry, ax.size_of) for entry in contents.flat]
            if all(isinstance(number, int) for number in numbers) and contents.ndim <= 1:
                continue
            # Shape repair cannot tell whether an entry that has no known value is still right.
            if any(number is None for number in numbers):
                self._pin_extents(
                    value, Pin("a size that is computed from it is not known", value.name or "")
                )
            for node, index in value.uses():
                followed = any(output in self.contents for output in node.outputs)
                stated = index in SIZE_INPUTS.get(node.op_type, ()) and not node.domain
                if not followed and not stated:
                    self._pin_extents(value, Pin("its size is used as data", label(node)))

    def _pin_extents(self, value: ir.Value, pin: Pin) -> None:
        self.pins.extend((dim, pin) for dim in known.extents(self.contents[value]) if dim)

    def _pin_used_indices(self, node: ir.Node) -> None:
        """An index selected along an axis may be looked up with; used as a number, it pins the axis."""
        looks_up = node.op_type in _LOOKS_UP
        for index, value in enumerate(node.inputs):
            moved = index == 0 and node.op_type in _MOVES
            if value not in self.index_of or moved or node.op_type == "Shape":
                continue
            if not (looks_up and index == 1):
                pin = Pin("an index selected along it is used as a number", label(node))
                self.pins.append((self.index_of[value], pin))

    def _enter_contents(self, node: ir.Node, results: list[Contents]) -> None:
        for output, contents in zip(node.outputs, results, strict=False):
            self.contents[output] = contents
            dims = [ax.fresh(size) for size in contents.shape]
            pin = Pin("an integer array computed in the graph", label(node))
            self.pins.extend((dim, pin) for dim in dims if dim)
            self.values[output] = dims

    def _give_up(self, node: ir.Node, reason: str) -> None:
        """Pins every axis that the node touches, those its bodies capture included."""
        for index, value in enumerate(node.inputs):
            self._pin_value(self.input_dims(node, index), reason, node)
            if value is not None:
                self._pin_elements(value, reason, node)
        for value in captured(node):
            self._pin_value(self.values.get(value), f"captured by the body of {node.op_type}", node)
            self._pin_elements(value, f"captured by the body of {node.op_type}", node)
            if value in self.contents:
                self._pin_extents(
                    value, Pin(f"its size is captured by the body of {node.op_type}", label(node))
                )
        for output in node.outputs:
            self.values[output] = self._declared_dims(output, reason, node)

    def _pin_elements(self, value: ir.Value, reason: str, node: ir.Node) -> None:
        """Pins the elements of a sequence, and the axis along which an index was selected."""
        for element in self.sequences.get(value, []):
            self._pin_value(element, reason, node)
        if value in self.index_of:
            self.pins.append(
                (self.index_of[value], Pin(f"an index selected along it: {reason}", label(node)))
            )

    def _pin_value(self, dims: list[Dim] | None, reason: str, node: ir.Node) -> None:
        pin = Pin(reason, label(node))
        self.pins.extend((dim, pin) for dim in dims or [] if dim)

    def _declared_dims(self, value: ir.Value, reason: str, node: ir.Node) -> list[Dim] | None:
        if value.shape is None:
            return None
        # Declared sizes may be those of the sample a model was traced with; only a model whose inputs are
        # all of fixed size cannot be run with others.
        trusted = self.is_static
        dims = [
            ax.fresh(size if isinstance(size, int) and trusted else self.opaque()) for size in value.shape
        ]
        self._pin_value(dims, reason, node)
        return dims


def _why_no_rule(node: ir.Node) -> str:
    if any(attribute.type in _BODIES for attribute in node.attributes.values()):
        return f"a boundary of control flow ({node.op_type})"
    where = f"{node.domain}::" if node.domain else ""
    return f"no rule for the operator {where}{node.op_type}"


_BODIES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def captured(node: ir.Node) -> list[ir.Value]:
    """Values of the outer graph that the bodies of a control-flow node read."""
    bodies: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            bodies.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            bodies.extend(attribute.as_graphs())
    found: list[ir.Value] = []
    for body in bodies:
        for inner in body.all_nodes():
            found.extend(value for value in inner.inputs if value is not None)
        found.extend(body.outputs)
    return found
