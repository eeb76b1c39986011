"""Which weights can take over a scale of an activation's columns, so that smoothing needs no new node.

From a value one walks back along operations that are linear in what makes its columns, to constants whose entries can
be divided instead: the gain of a norm, the columns of a projection, the half of a gated layer that is not activated,
the value projection below an attention. Which entry belongs to which column is read off the axis expressions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_autoglm.axes.analysis import Analysis
from onnx_autoglm.axes.dims import Atom, Dim, leaves, size_of
from onnx_autoglm.axes.facts import label
from onnx_autoglm.axes.selection import Indices, coordinates, merged
from onnx_autoglm.quantization.places import Place

# One input, moved or copied; or a positive scale passes through.
_PASSES = frozenset(
    "Identity Cast Neg Reshape Transpose Squeeze Unsqueeze Expand Flatten Relu LeakyRelu MaxPool AveragePool "
    "GlobalAveragePool GlobalMaxPool".split()
)
_NORMS = {"RMSNormalization": (1,), "SimplifiedLayerNormalization": (1,), "LayerNormalization": (1, 2)}


class Refusal(Exception):
    """Why no weight can take a scale over."""


@dataclasses.dataclass(frozen=True)
class Absorber:
    """A constant that is divided along one axis: `scale_of[i]` is the scale of index i, or -1 for none.

    The constant is input `operand` of the node named by its first output.
    """

    node: str
    operand: int
    axis: int
    scale_of: Indices


@dataclasses.dataclass(frozen=True)
class Folding:
    """An activation whose column j may be divided by scale `groups[j]`, and the constants that do it.

    `lookups` are nodes, by their first output, that look rows up in the weight of the only place: a table of embeddings
    that is the output layer as well. What they find is to be divided again, by one more node.
    """

    activation: str
    groups: Indices
    absorbers: tuple[Absorber, ...]
    places: tuple[Place, ...]
    lookups: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Found:
    node: ir.Node
    operand: int
    axis: int
    dim: Dim
    window: tuple[int, int] | None


def find_folding(analysis: Analysis, places: Sequence[Place]) -> Folding:
    """How the columns of what these places read can be scaled. Raises Refusal with the reason.

    All places read the same activation. `analysis` is that of a clone of the model.
    """
    nodes = {node.outputs[0].name: node for node in analysis.graph}
    readers = [nodes[place.node] for place in places]
    value = next(v for v in readers[0].inputs if v is not None and v.name == places[0].activation)
    if value.is_graph_output() or {user for user, _ in value.uses()} != set(readers):
        raise Refusal("something else reads it too")
    lookups: list[str] = []
    for place, node in zip(places, readers, strict=True):
        weight = node.inputs[place.operand]
        assert weight is not None
        lookups += _lookups(analysis.graph.initializers[place.initializer], place)
        if len(weight.uses()) > 1 + (len(lookups) if weight.is_initializer() else 0) or (
            lookups and len(places) > 1
        ):
            raise Refusal(f"the weight of {place.label} has other readers")
    dims = analysis.values.get(value)
    if dims is None:
        raise Refusal("its axes are not known")
    dim = dims[places[0].activation_axis]
    atoms = {atom for atom in leaves(dim) if atom.size != 1}
    found = _walk(analysis, value, atoms, None)
    shared = [atom for atom in atoms if all(atom in leaves(entry.dim) for entry in found)]
    if not shared or not found:
        raise Refusal("its columns are not told apart by what makes them")
    groups = _groups(dim, shared)
    if (groups < 0).any():
        raise Refusal("its columns come from several places")
    absorbers = []
    for entry in found:
        scale_of = _groups(entry.dim, shared)
        if entry.window is not None:
            start, end = entry.window
            inside = np.zeros(len(scale_of), bool)
            inside[start:end] = True
            scale_of = np.where(inside, scale_of, -1)
        counts = np.bincount(scale_of[scale_of >= 0], minlength=int(groups.max()) + 1)
        if (counts != 1).any():
            raise Refusal("one entry of what makes it stands for several columns that differ")
        absorbers.append(Absorber(entry.node.outputs[0].name or "", entry.operand, entry.axis, scale_of))
    return Folding(value.name or "", groups, tuple(absorbers), tuple(places), tuple(lookups))


def _lookups(table: ir.Value, place: Place) -> list[str]:
    """The nodes that look rows up in the weight of a place. Raises Refusal for other readers beside the place's own."""
    others = [(user, index) for user, index in table.uses() if user.op_type == "Gather"]
    own = len(table.uses()) - len(others)
    fits = place.input_axis == 1 and all(
        index == 0 and user.attributes.get_int("axis", 0) == 0 for user, index in others
    )
    if own != 1 or table.is_graph_output() or (others and not fits):
        raise Refusal(f"the weight of {place.label} has other readers")
    return [user.outputs[0].name or "" for user, _ in others]


def _groups(dim: Dim, shared: Sequence[Atom]) -> Indices:
    """For each index of an axis the flat index over the shared atoms, or -1 where one of them does not occur."""
    places = merged(coordinates(dim))
    flat = np.zeros(len(next(iter(places.values()))), np.int64)
    for atom in shared:
        assert isinstance(atom.size, int)
        flat = np.where((flat >= 0) & (places[atom] >= 0), flat * atom.size + places[atom], -1)
    return flat


def _walk(
    analysis: Analysis, value: ir.Value, atoms: set[Atom], window: tuple[int, int] | None
) -> list[_Found]:
    """The constants that make the columns of a value, each once."""
    node = value.producer()
    if node is None:
        raise Refusal("it is made of a graph input")
    kind = node.op_type if node.domain in ("", "ai.onnx", "com.microsoft") else ""
    if kind == "Cast" and not ir.DataType(node.attributes.get_int("to", 0)).is_floating_point():
        raise Refusal(f"{label(node)} rounds what makes its columns")
    if kind in _PASSES:
        moves = kind in ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Flatten")
        return _operand(analysis, node, 0, atoms, None if moves else window)
    if kind in ("Add", "Sub"):
        return [entry for index in (0, 1) for entry in _operand(analysis, node, index, atoms, window)]
    if kind == "Div":
        return _operand(analysis, node, 0, atoms, window)
    if kind == "Mul":
        return _either(analysis, node, atoms, window)
    if kind == "Split":
        return _operand(analysis, node, 0, atoms, _split_window(node, value, atoms, analysis))
    if kind == "MatMul":
        return _operand(analysis, node, 1, atoms, window)
    if kind == "Gemm":
        bias = len(node.inputs) > 2 and node.inputs[2] is not None
        operands = (1, 2) if bias else (1,)
        return [e for index in operands for e in _operand(analysis, node, index, atoms, window)]
    if kind == "Conv":
        bias = len(node.inputs) > 2 and node.inputs[2] is not None
        return [
            e for index in ((1, 2) if bias else (1,)) for e in _operand(analysis, node, index, atoms, None)
        ]
    if kind == "BatchNormalization":
        return [e for index in (1, 2) for e in _operand(analysis, node, index, atoms, None)]
    if kind == "Attention" and node.domain != "com.microsoft" and value is node.outputs[0]:
        return _operand(analysis, node, 2, atoms, None)
    if kind in _NORMS and value is node.outputs[0]:
        present = [
            index for index in _NORMS[kind] if len(node.inputs) > index and node.inputs[index] is not None
        ]
        return [entry for index in present for entry in _operand(analysis, node, index, atoms, window)]
    raise Refusal(f"{label(node)} is not linear in what makes its columns")


def _operand(
    analysis: Analysis, node: ir.Node, index: int, atoms: set[Atom], window: tuple[int, int] | None
) -> list[_Found]:
    """The constants behind one operand: the operand itself, or what its producer is made of."""
    value = node.inputs[index]
    dims = analysis.input_dims(node, index)
    if value is None or dims is None:
        raise Refusal(f"the axes of an input of {label(node)} are not known")
    if value.is_initializer() and not value.is_graph_input():
        axes = [axis for axis, dim in enumerate(dims) if atoms & set(leaves(dim))]
        if node.op_type in ("MatMul", "Gemm") and index == 1:  # not the contracted axis, should it be alike
            is_turned = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0
            made = 0 if is_turned else len(dims) - 1
            axes = [axis for axis in axes if axis == made]
        elif node.op_type == "Conv" and index == 1:
            axes = [axis for axis in axes if axis == 0]
        if value.is_graph_output():
            raise Refusal(f"{value.name} is a graph output")
        if len(dims) > 1 and len(value.uses()) > 1:  # a copy would no longer be the weight of its product
            raise Refusal(f"{value.name} is the weight of several nodes")
        if len(axes) != 1:
            raise Refusal(f"a constant of {label(node)} does not tell the columns apart")
        return [_Found(node, index, axes[0], dims[axes[0]], window)]
    if len(value.uses()) > 1:
        raise Refusal(f"{value.name} is read elsewhere too")
    if value.is_graph_output():
        raise Refusal(f"{value.name} is a graph output")
    if value.producer() is not None and value.producer().op_type == "Transpose":  # type: ignore[union-attr]
        inner = value.producer().inputs[0]  # type: ignore[union-attr]
        if inner is not None and inner.is_initializer():
            raise Refusal("its weight is transposed in the graph")
    return _walk(analysis, value, atoms, window)


def _either(
    analysis: Analysis, node: ir.Node, atoms: set[Atom], window: tuple[int, int] | None
) -> list[_Found]:
    """The factor of a product that can take the scale; constants before activations."""
    reasons = []
    order = sorted((0, 1), key=lambda index: not _is_constant(node.inputs[index]))
    for index in order:
        dims = analysis.input_dims(node, index) or []
        if not any(atoms & set(leaves(dim)) for dim in dims):
            continue
        try:
            return _operand(analysis, node, index, atoms, window)
        except Refusal as refusal:
            reasons.append(str(refusal))
    raise Refusal(reasons[0] if reasons else f"no factor of {label(node)} tells the columns apart")


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _split_window(node: ir.Node, value: ir.Value, atoms: set[Atom], analysis: Analysis) -> tuple[int, int]:
    """The range of the split axis that one output holds."""
    dims = analysis.values.get(value)
    if not dims:
        raise Refusal(f"the axes of {value.name} are not known")
    axis = node.attributes.get_int("axis", 0) % len(dims)
    sizes = []
    for output in node.outputs:
        size = size_of((analysis.values.get(output) or dims)[axis])
        if not isinstance(size, int):
            raise Refusal(f"the parts of {label(node)} have no fixed size")
        sizes.append(size)
    number = list(node.outputs).index(value)
    if not atoms & set(leaves(dims[axis])):
        raise Refusal(f"{label(node)} splits another axis")
    start = sum(sizes[:number])
    return start, start + sizes[number]
