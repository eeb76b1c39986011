"""Zeroes in a source model what a plan removes: one half of the proof that nothing else changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_autoglm.axes.analysis import Analysis
from onnx_autoglm.axes.dims import Atom, Dim, leaves, size_of
from onnx_autoglm.axes.facts import PinKind
from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.errors import UserError

# Smaller weights are masked in memory; larger ones by a Mul in the graph, so that they stay on disk.
_IN_MEMORY_BYTES = 1 << 20


def mask(model: ir.Model, removals: Iterable[dict[str, Any]], lossy: Iterable[dict[str, Any]]) -> ir.Model:
    """Zeroes the complement of every `kept` of a plan in a canonical source model, in place.

    Args:
        model: the canonicalized source.
        removals: the entries of `plan.json`.
        lossy: its `lossy` entries, which say where norms and selections see only what was kept.

    Raises:
        UserError: the plan names something that the model does not hold.
    """
    consumers = {output.name: node for node in model.graph for output in node.outputs}
    by_user: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for removal in removals:
        for user in removal["consumers"]:
            by_user[removal["initializer"], user].append(removal)
    # What several nodes read is masked once where it is cut alike for all of them.
    grouped: dict[tuple[str, str], tuple[list[str], list[dict[str, Any]]]] = {}
    for (name, user), cuts in by_user.items():
        grouped.setdefault((name, repr(cuts)), ([], cuts))[0].append(user)
    for (name, _), (users, cuts) in grouped.items():
        source = model.graph.initializers.get(name)
        if source is None or source.const_value is None:
            raise UserError(
                f"the plan cuts {name!r}, which the source does not hold: is it the right source?"
            )
        _check_range(name, source.const_value.shape.numpy(), cuts)
        nodes = [_consumer(consumers, user) for user in users]
        _mask_initializer(model.graph, source, nodes, cuts)
    for entry in lossy:
        _narrow(model.graph, _consumer(consumers, entry["consumer"]), entry)
    return model


def _check_range(name: str, shape: Sequence[int], cuts: list[dict[str, Any]]) -> None:
    for cut in cuts:
        axis, outer = cut["axis"], cut.get("outer_axis", 0)
        try:
            kept = np.asarray(cut["kept"])
        except ValueError:  # rows of different lengths
            kept = np.array([])
        inside = all(isinstance(number, int) and 0 <= number < len(shape) for number in (axis, outer))
        fits = inside and kept.dtype.kind == "i" and kept.size and kept.ndim == 1 + ("outer_axis" in cut)
        if inside and cut["kept"] == []:
            continue  # the last weight of a branch that went
        if not fits or kept.min() < 0 or kept.max() >= shape[axis]:
            raise UserError(f"the plan cuts {name!r} where the source has nothing: is it the right source?")


def _consumer(consumers: dict[str | None, ir.Node], name: str) -> ir.Node:
    if name not in consumers:
        raise UserError(
            f"the plan names {name!r}, which the source does not compute: is it the right source?"
        )
    return consumers[name]


def _mask_initializer(
    graph: ir.Graph, source: ir.Value, nodes: list[ir.Node], cuts: list[dict[str, Any]]
) -> None:
    tensor = source.const_value
    assert tensor is not None
    keep = keep_mask(tensor.shape.numpy(), cuts)
    name = f"{source.name}_masked_{len(graph.initializers)}"
    if tensor.nbytes <= _IN_MEMORY_BYTES or not tensor.dtype.is_floating_point():
        array = np.where(keep, tensor.numpy(), np.zeros((), dtype=tensor.dtype.numpy()))
        masked = ir.Value(name=name, const_value=ir.Tensor(array, dtype=tensor.dtype, name=name))
        masked.shape, masked.dtype = ir.Shape(list(array.shape)), tensor.dtype
        graph.register_initializer(masked)
    else:
        factor = ir.Value(name=name, const_value=ir.Tensor(keep.astype(tensor.dtype.numpy()), name=name))
        factor.shape, factor.dtype = ir.Shape(list(keep.shape)), tensor.dtype
        graph.register_initializer(factor)
        product = ir.node("Mul", [source, factor])
        masked = product.outputs[0]
        masked.dtype, masked.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
        graph.insert_before(min(nodes, key=graph.index) if len(nodes) > 1 else nodes[0], product)
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is source:
                node.replace_input_with(index, masked)


def keep_mask(shape: Sequence[int], cuts: Iterable[dict[str, Any]]) -> np.ndarray:
    """A boolean array that broadcasts to `shape`, True where every cut keeps the entry."""
    keep = np.ones([1] * len(shape), dtype=bool)
    for cut in cuts:
        axis, outer, kept = cut["axis"], cut.get("outer_axis"), cut["kept"]
        layout = [1] * len(shape)
        layout[axis] = shape[axis]
        if outer is None:
            row = np.zeros(shape[axis], dtype=bool)
            row[np.asarray(kept, dtype=np.int64)] = True
        else:
            layout[outer] = shape[outer]
            row = np.zeros((shape[outer], shape[axis]), dtype=bool)
            row[np.arange(shape[outer])[:, None], np.asarray(kept)] = True
            row = row if outer < axis else row.T
        keep = keep & row.reshape(layout)
    return keep


# --- lossy kinds: norms and selections in the source see only what was kept


def lossy_entries(analysis: Analysis, selection: Selection) -> list[dict[str, Any]]:
    """Where a plan narrows norms (`gather`) or selections (`exclude`), for `mask`."""
    entries: list[dict[str, Any]] = []
    for (node, kind), atoms in _narrowed(analysis, selection).items():
        inputs = {index: analysis.input_dims(node, index) for index in range(len(node.inputs))}
        outputs = {index: analysis.values.get(output) for index, output in enumerate(node.outputs)}
        entries.append(
            {
                "consumer": next(output.name for output in node.outputs if output.name),
                "how": "gather" if kind == PinKind.NORM else "exclude",
                "inputs": _axes(selection, atoms, inputs),
                "outputs": _axes(selection, atoms, outputs),
            }
        )
    return entries


def _narrowed(analysis: Analysis, selection: Selection) -> dict[tuple[ir.Node, PinKind], set[Atom]]:
    """Norms and selections with the atoms that were cut of the axes that they run over."""
    found: dict[tuple[ir.Node, PinKind], set[Atom]] = {}
    for dim, pin in analysis.pins:
        node = pin.source
        if node is None or not (
            pin.kind == PinKind.NORM or (pin.kind == PinKind.SELECT and node.op_type in _SELECTING)
        ):
            continue
        cut = {atom for atom in leaves(dim) if atom in selection.kept}
        if cut:
            found.setdefault((node, pin.kind), set()).update(cut)
    return found


_SELECTING = frozenset("Softmax LogSoftmax Hardmax TopK ArgMax ArgMin".split())


def _axes(selection: Selection, atoms: set[Atom], values: dict[int, Any]) -> list[dict[str, Any]]:
    return [
        _place(selection, dims, axis) | {"index": index}
        for index, dims in values.items()
        for axis, dim in enumerate(dims or [])
        if atoms.intersection(leaves(dim))
    ]


def _place(selection: Selection, dims: list[Dim], axis: int) -> dict[str, Any]:
    """An axis of an input or output and what is kept of it; an axis of symbolic size counts as 0."""
    kept, outer = selection.indices(dims, axis)
    sizes = [size_of(dim) for dim in dims]
    shape = [size if isinstance(size, int) else 0 for size in sizes]
    place: dict[str, Any] = {"axis": axis, "kept": kept.tolist(), "shape": shape}
    return place if outer is None else place | {"outer_axis": outer}


def _narrow(graph: ir.Graph, node: ir.Node, entry: dict[str, Any]) -> None:
    if entry["how"] == "gather":
        _narrow_norm(graph, node, entry)
    else:
        _exclude(graph, node, entry)


def _narrow_norm(graph: ir.Graph, node: ir.Node, entry: dict[str, Any]) -> None:
    """The norm runs on the kept channels alone; its outputs are spread out again, with zeros between."""
    for place in entry["inputs"]:
        value = node.inputs[place["index"]]
        assert value is not None
        narrow = _add(graph, node, "Gather", [value, _integers(graph, place["kept"])], axis=place["axis"])
        node.replace_input_with(place["index"], narrow)
    last = node
    for index, output in enumerate(node.outputs):
        users, wide = list(output.uses()), output
        for place in entry["outputs"]:
            if place["index"] == index:
                for created in _spread(graph, wide, place):
                    graph.insert_after(last, created)
                    last, wide = created, created.outputs[0]
        for user, slot in users:
            user.replace_input_with(slot, wide)


def _spread(graph: ir.Graph, narrow: ir.Value, place: dict[str, Any]) -> list[ir.Node]:
    """Nodes that put the kept entries of an axis back in their places."""
    axis, kept = place["axis"], place["kept"]
    first = ir.node("Slice", [narrow, *(_integers(graph, [number]) for number in (0, 1, axis))])
    zero = ir.node("Sub", [first.outputs[0], first.outputs[0]])
    padded = ir.node("Concat", [narrow, zero.outputs[0]], {"axis": axis})
    positions = np.full(place["shape"][axis], len(kept))
    positions[np.asarray(kept)] = np.arange(len(kept))
    spread = ir.node("Gather", [padded.outputs[0], _integers(graph, positions.tolist())], {"axis": axis})
    for created in (first, zero, padded, spread):
        _set_type(created.outputs[0], narrow)
    return [first, zero, padded, spread]


def _exclude(graph: ir.Graph, node: ir.Node, entry: dict[str, Any]) -> None:
    """A selection never picks what was removed: its entries are at minus infinity."""
    lowest = node.op_type == "ArgMin" or (
        node.op_type == "TopK" and "largest" in node.attributes and not node.attributes["largest"].as_int()
    )
    for place in entry["inputs"]:
        if place["index"] != 0:
            continue
        value = node.inputs[0]
        assert value is not None
        keep = keep_mask(place["shape"], [place])
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        fill = _initializer(graph, np.array(np.inf if lowest else -np.inf, dtype=dtype))
        node.replace_input_with(0, _add(graph, node, "Where", [_initializer(graph, keep), value, fill]))


def _integers(graph: ir.Graph, numbers: list[int]) -> ir.Value:
    return _initializer(graph, np.array(numbers, dtype=np.int64))


def _initializer(graph: ir.Graph, array: np.ndarray) -> ir.Value:
    name = f"mask_constant_{len(graph.initializers)}"
    value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(list(array.shape)), ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def _add(
    graph: ir.Graph, before: ir.Node, op_type: str, inputs: list[ir.Value], **attributes: int
) -> ir.Value:
    created = ir.node(op_type, inputs, attributes)
    _set_type(created.outputs[0], inputs[-1] if op_type == "Where" else inputs[0])
    graph.insert_before(before, created)
    return created.outputs[0]


def _set_type(value: ir.Value, like: ir.Value) -> None:
    if like.dtype is not None:
        value.dtype = like.dtype
