"""Edits of integer values that state sizes: wrong entries are replaced, right ones left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnx_autoglm.axes.analysis import Analysis
from onnx_autoglm.axes.contents import Contents, evaluate
from onnx_autoglm.axes.dims import Dim, size_of
from onnx_autoglm.axes.facts import label
from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.size import Size, exact_div, mul
from onnx_autoglm.errors import CheckFailed, UserError


class ShapeEditor:
    """Gives nodes shape inputs that hold after a selection; equal edits of one value are made once."""

    def __init__(self, analysis: Analysis, selection: Selection) -> None:
        self.analysis = analysis
        self.graph = analysis.graph
        self.selection = selection
        self.changed = 0
        self._taken = value_names(self.graph)
        self._constants: dict[tuple[ir.DataType, tuple[int, ...], tuple[int, ...]], ir.Value] = {}
        self._patches: dict[tuple[ir.Value, tuple[tuple[int, Size], ...]], ir.Value] = {}

    def rewrite(
        self,
        node: ir.Node,
        index: int,
        axes: Sequence[Dim | None],
        marker: int | None = None,
        *,
        may_infer: bool = False,
    ) -> None:
        """Makes an integer input state the new sizes of `axes`.

        Entries that are right stay, as do the literal `marker` and entries that the cut does not reach:
        neither the axis nor what the graph computes for it changed. `None` leaves an entry alone. With
        `may_infer` one entry that cannot be derived may become -1, as in a Reshape.
        """
        sizes = [None if dim is None else (size_of(dim), self.selection.size(dim)) for dim in axes]
        self.replace_entries(node, index, sizes, marker, may_infer=may_infer)

    def replace_entries(
        self,
        node: ir.Node,
        index: int,
        sizes: Sequence[tuple[Size, Size] | None],
        marker: int | None = None,
        *,
        may_infer: bool = False,
    ) -> None:
        """As `rewrite`, for given (old, new) values of each entry."""
        value = node.inputs[index]
        assert value is not None
        contents = self.analysis.contents.get(value)
        if contents is None:
            raise CheckFailed(f"{label(node)}: nothing is known of input {index}")
        replacements: dict[int, Size] = {}
        for position, (entry, size) in enumerate(zip(contents.flat, sizes, strict=True)):
            before, now = evaluate(entry, size_of), evaluate(entry, self.selection.size)
            if size is None or before is None or now == size[1] or entry == marker:
                continue
            if before != now or size[0] != size[1]:
                replacements[position] = size[1]
        lost = [
            position
            for position, wanted in replacements.items()
            if not isinstance(wanted, int)
            and _ratio(wanted, evaluate(contents.flat[position], self.selection.size)) is None
        ]
        if may_infer and len(lost) == 1 and not any(entry == -1 for entry in contents.flat):
            replacements[lost[0]] = -1
        if replacements:
            node.replace_input_with(index, self._patched(node, value, contents, replacements))
            self.changed += 1

    def set_constant(
        self, node: ir.Node, index: int, numbers: Sequence[int], *, shape: Sequence[int] | None = None
    ) -> None:
        """Makes an integer input a constant, in the type of the old one; by default a row of numbers."""
        old = node.inputs[index] if index < len(node.inputs) else None
        if old is None:
            node.resize_inputs(max(index + 1, len(node.inputs)))
        node.replace_input_with(index, self._constant(numbers, old, shape))
        self.changed += 1

    def _patched(
        self, node: ir.Node, value: ir.Value, contents: Contents, replacements: Mapping[int, Size]
    ) -> ir.Value:
        key = (value, tuple(replacements.items()))
        if key not in self._patches:
            now = [evaluate(entry, self.selection.size) for entry in contents.flat]
            known = [replacements.get(position, size) for position, size in enumerate(now)]
            numbers = [size for size in known if isinstance(size, int)]
            if len(numbers) == len(known):
                patched = self._constant(numbers, value, contents.shape)
            else:
                patched = self._assembled(node, value, now, replacements)
            self._patches[key] = patched
        return self._patches[key]

    def _assembled(
        self, node: ir.Node, value: ir.Value, now: list[Size | None], replacements: Mapping[int, Size]
    ) -> ir.Value:
        """A computed shape with some entries replaced: the pieces that stay, joined with the new ones."""
        pieces: list[ir.Value] = []
        position = 0
        for piece, length in self._pieces(value, len(now)):
            end = position + length
            if piece is not None and not any(p in replacements for p in range(position, end)):
                pieces.append(piece)
                position = end
                continue
            while position < end:
                if position in replacements:
                    wanted = replacements[position]
                    pieces.append(self._replacement(node, value, position, now[position], wanted))
                    position += 1
                    continue
                stop = next((p for p in range(position, end) if p in replacements), end)
                pieces.append(self._window(node, value, position, stop))
                position = stop
        return pieces[0] if len(pieces) == 1 else self._insert(node, "Concat", pieces, {"axis": 0})

    def _pieces(self, value: ir.Value, length: int) -> list[tuple[ir.Value | None, int]]:
        """What a Concat joined to make the value, with lengths; one unknown piece otherwise."""
        producer = value.producer()
        if producer is None or producer.op_type != "Concat":
            return [(None, length)]
        pieces = [
            (piece, self.analysis.contents.get(piece)) for piece in producer.inputs if piece is not None
        ]
        if any(contents is None for _, contents in pieces):
            return [(None, length)]
        return [(piece, contents.size) for piece, contents in pieces if contents is not None]

    def _replacement(
        self, node: ir.Node, value: ir.Value, position: int, now: Size | None, wanted: Size
    ) -> ir.Value:
        """A wrong entry: a number, or the runtime entry times a ratio of numbers."""
        if isinstance(wanted, int):
            return self._constant([wanted], value)
        ratio = _ratio(wanted, now)
        if ratio is None:
            raise CheckFailed(f"{label(node)}: entry {position} became {wanted} from {now}")
        entry = self._window(node, value, position, position + 1)
        grown = self._insert(node, "Mul", [entry, self._constant([ratio[0]], value)])
        return self._insert(node, "Div", [grown, self._constant([ratio[1]], value)])

    def _window(self, node: ir.Node, value: ir.Value, start: int, end: int) -> ir.Value:
        if self.analysis.opset("") < 10:
            raise UserError(
                "cannot repair computed shapes below opset 10: convert the model to opset 11 or newer"
            )
        bounds = [self._constant([number]) for number in (start, end, 0)]
        return self._insert(node, "Slice", [value, *bounds])

    def _insert(
        self, before: ir.Node, op_type: str, inputs: list[ir.Value], attributes: dict[str, int] | None = None
    ) -> ir.Value:
        created = ir.node(op_type, inputs, attributes or {})
        created.outputs[0].dtype = inputs[0].dtype or ir.DataType.INT64
        self.graph.insert_before(before, created)
        return created.outputs[0]

    def _constant(
        self, numbers: Sequence[int], like: ir.Value | None = None, shape: Sequence[int] | None = None
    ) -> ir.Value:
        """An initializer of the type of `like` (int64 by default), shared between equal uses."""
        dtype = ir.DataType.INT64 if like is None or like.dtype is None else like.dtype
        shape = (len(numbers),) if shape is None else tuple(shape)
        key = (dtype, shape, tuple(numbers))
        if key not in self._constants:
            array = np.array(numbers, dtype=dtype.numpy()).reshape(shape)
            name = f"cut_shape_{len(self._constants)}"
            while name in self._taken:
                name += "_"
            self._taken.add(name)
            value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
            value.shape, value.dtype = ir.Shape(shape), dtype
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]


def value_names(graph: ir.Graph) -> set[str]:
    """The names of all values of a graph and of its bodies."""
    nodes = [*graph.all_nodes()]
    values = [*graph.inputs, *graph.initializers.values(), *(out for node in nodes for out in node.outputs)]
    inner = [value for body in graph.subgraphs() for value in (*body.inputs, *body.initializers.values())]
    return {value.name for value in (*values, *inner) if value.name}


def _ratio(wanted: Size | None, now: Size | None) -> tuple[int, int] | None:
    """`wanted / now` as two numbers, where both have the same symbols."""
    if wanted is None or now is None:
        return None
    for denominator in range(1, 4097):
        grown = exact_div(wanted if denominator == 1 else mul(wanted, denominator), now)
        if isinstance(grown, int):
            return grown, denominator
    return None
