"""Writes a precision plan into a graph: types, constants and the casts between parts of different types."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnx_autoglm.cast_tensor import cast_tensor
from onnx_autoglm.op_kinds import LAYOUT, bodies, is_constant, is_float
from onnx_autoglm.precision_islands import TYPE_OF_OUTPUT, Islands

_SUFFIX = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}


class Rewriter:
    """Applies `Islands` to a model in place.

    Every value has one type where it is made; who wants another reads a Cast that all such readers share.
    """

    def __init__(self, model: ir.Model, islands: Islands, interface: dict[str, ir.DataType]) -> None:
        """Args: `interface` has the type of every float input and output of the model."""
        self._model = model
        self._islands = islands
        self._interface = interface
        self._names = {value.name for graph in model.graphs() for value in _values(graph)}
        self._owners = {body: node for node in model.graph.all_nodes() for body in bodies(node)}
        self._types: dict[ir.Value, ir.DataType] = {}  # what a float value will be
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def apply(self) -> None:
        """Rewrites constants, inserts casts, and sets all types."""
        graphs = list(self._model.graphs())
        for graph in graphs:
            self._type(graph, is_main=graph is self._model.graph)
        for graph in graphs:
            for node in [node for node in graph if node in self._islands.signatures]:  # no new casts
                for index, value in enumerate(node.inputs):
                    if value is not None and is_float(value):
                        node.replace_input_with(index, self._as(value, self._islands.reads(node, index)))
        for graph in graphs:
            self._outputs(graph)
        for value, dtype in self._types.items():
            _set_dtype(value, dtype)
        for node in list(self._model.graph.all_nodes()):
            _set_attribute(node)

    def _type(self, graph: ir.Graph, *, is_main: bool) -> None:
        for value in graph.inputs:
            if is_float(value):
                self._types[value] = self._interface[value.name or ""] if is_main else ir.DataType.FLOAT
        for node in graph:
            for index, value in enumerate(node.outputs):
                if is_float(value):
                    self._types[value] = self._islands.makes(node, index)

    def _as(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """The value itself if it has that type, or what holds it in that type."""
        own = self._types.get(value, ir.DataType.FLOAT)
        if wanted == own:
            return value
        if (value, wanted) not in self._casts:
            self._casts[value, wanted] = (
                self._constant(value, wanted) if is_constant(value) else self._cast(value, wanted)
            )
        return self._casts[value, wanted]

    def _constant(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """A copy of an initializer in another type; the original goes if nobody reads it any more."""
        assert value.const_value is not None and value.graph is not None
        copy = ir.Value(name=self._name(value, wanted), const_value=cast_tensor(value.const_value, wanted))
        copy.dtype, copy.shape = wanted, ir.Shape(value.const_value.shape.numpy())
        value.graph.register_initializer(copy)
        return copy

    def _cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """A Cast right behind the value; from what the value was cast from, if that was no float."""
        producer, source = value.producer(), value
        if producer is not None and producer.op_type == "Cast":
            before = producer.inputs[0]
            assert before is not None
            if before.dtype is not None and before.dtype.is_integer():
                source = before
        cast = ir.node("Cast", [source], {"to": int(wanted)})
        result = cast.outputs[0]
        result.name, result.shape = self._name(value, wanted), value.shape
        result.dtype = wanted
        graph = value.graph
        assert isinstance(graph, ir.Graph)
        if producer is not None:
            graph.insert_after(producer, cast)
        elif len(graph):
            graph.insert_before(graph[0], cast)
        else:
            graph.append(cast)
        return result

    def _outputs(self, graph: ir.Graph) -> None:
        """Gives what a graph returns the type that is expected of it."""
        owner = self._owners.get(graph)
        returned = [
            (index, value, self._returns(owner, value, index))
            for index, value in enumerate(graph.outputs)
            if is_float(value)
        ]
        for index, value, wanted in returned:
            if self._types.get(value, ir.DataType.FLOAT) != wanted:
                graph.outputs[index] = self._returned(graph, value, wanted)

    def _returns(self, owner: ir.Node | None, value: ir.Value, index: int) -> ir.DataType:
        """The type that is expected of an output of the model, or of a body of `owner`."""
        if owner is None:
            return self._interface[value.name or ""]
        return self._islands.makes(owner, index) if owner.op_type == "If" else ir.DataType.FLOAT

    def _returned(self, graph: ir.Graph, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """What is returned in place of a value of another type, under the name of that value."""
        result = self._as(value, wanted)
        if value.graph is not graph or result.graph is not graph or result.is_graph_output():
            return result  # it is from around the body, or returned twice
        name = value.name
        value.name = self._name(value, self._types.get(value, ir.DataType.FLOAT))
        result.name = name
        return result

    def _name(self, value: ir.Value, dtype: ir.DataType) -> str:
        name = base = f"{value.name}/{_SUFFIX[dtype]}"
        number = 2
        while name in self._names:
            name, number = f"{base}/{number}", number + 1
        self._names.add(name)
        return name


def drop_float_casts(model: ir.Model) -> int:
    """Takes casts from float32 to float32 (what is left of casts between float types) out of a model, in place.

    Returns how many. A CastLike to float32 becomes a Cast, or goes as well.
    """
    count = 0
    for graph in list(model.graphs()):
        for node in list(graph):
            source = node.inputs[0] if node.inputs else None
            if (
                node.domain
                or source is None
                or node.op_type not in ("Cast", "CastLike")
                or not is_float(node.outputs[0])
            ):
                continue
            if not is_float(source):
                if node.op_type == "CastLike":
                    _as_cast(graph, node)
                continue
            output = node.outputs[0]
            if output.is_graph_output() and (
                source.is_graph_input() or source.is_graph_output() or is_constant(source)
            ):
                continue
            if output.is_graph_output() and source.graph is not graph:
                continue
            name = output.name if output.is_graph_output() else None
            ir.convenience.replace_all_uses_with(output, source, replace_graph_outputs=True)
            graph.remove(node)
            if name is not None:
                source.name = name
            count += 1
    return count


def _as_cast(graph: ir.Graph, node: ir.Node) -> None:
    cast = ir.node("Cast", [node.inputs[0]], {"to": int(ir.DataType.FLOAT)}, name=node.name)
    new, old = cast.outputs[0], node.outputs[0]
    graph.insert_before(node, cast)
    name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node)
    new.name = name


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]


def _set_dtype(value: ir.Value, dtype: ir.DataType) -> None:
    if isinstance(value.type, ir.SequenceType | ir.OptionalType):
        value.type = type(value.type)(ir.TensorType(dtype))
    else:
        value.type = ir.TensorType(dtype)


def _set_attribute(node: ir.Node) -> None:
    """Makes the attribute that says what a node makes agree with the type of its output."""
    name = TYPE_OF_OUTPUT.get(node.op_type)
    if name is None or node.domain or not node.outputs:
        return
    dtype = node.outputs[0].dtype
    if dtype not in _SUFFIX:
        return
    if name != "value":
        node.attributes[name] = ir.AttrInt64(name, int(dtype))
        return
    attribute = node.attributes.get(name)
    tensor = attribute.as_tensor() if attribute is not None else ir.tensor(np.zeros(1, np.float32))
    node.attributes[name] = ir.AttrTensor(name, cast_tensor(tensor, dtype))


@dataclasses.dataclass(frozen=True)
class CastCounts:
    """Casts between float types in a model.

    `all` of them; `cancelling`: casts of a cast back to the type from before it; `detours`: the same with nothing in
    between but operators that move numbers; `repeated`: casts of one value to one type beyond the first.
    """

    all: int
    cancelling: int
    detours: int
    repeated: int


def count_casts(model: ir.Model) -> CastCounts:
    """Counts the casts between float types, bodies included."""
    floats = {node for node in model.graph.all_nodes() if node.op_type == "Cast" and _is_between_floats(node)}
    distinct = {(node.inputs[0], node.outputs[0].dtype) for node in floats}
    cancelling = detours = 0
    for node in floats:
        producer, moved = _producer(node), False
        while producer is not None and producer.op_type in LAYOUT:
            producer, moved = _producer(producer), True
        if producer is not None and producer in floats:
            first = producer.inputs[0]
            assert first is not None
            back = first.dtype == node.outputs[0].dtype
            cancelling += back and not moved
            detours += back and moved
    return CastCounts(len(floats), cancelling, detours, len(floats) - len(distinct))


def _producer(node: ir.Node) -> ir.Node | None:
    source = node.inputs[0] if node.inputs else None
    return None if source is None else source.producer()


def _is_between_floats(node: ir.Node) -> bool:
    source = node.inputs[0]
    types = (None if source is None else source.dtype, node.outputs[0].dtype)
    return all(dtype in _SUFFIX for dtype in types)
