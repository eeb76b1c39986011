"""Re-derives everything in a graph that states the size of an axis, after axes were cut.

Shape inputs (constant or computed), counting attributes, defaults that must keep the source's value, indices
of constant Gathers and declared value shapes. Where a computed shape already follows the cut axis it is left
alone; where it does not, only the entries that are wrong are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from onnx_autoglm.axes.analysis import Analysis
from onnx_autoglm.axes.contents import evaluate
from onnx_autoglm.axes.dims import Dim, resolve, size_of
from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.size import Size
from onnx_autoglm.errors import CheckFailed
from onnx_autoglm.passes.edit_shapes import ShapeEditor


def repair_shapes(analysis: Analysis, selection: Selection) -> int:
    """Repairs the analysed graph in place and returns how many places were changed."""
    return _Repair(analysis, selection).run()


class _Repair:
    def __init__(self, analysis: Analysis, selection: Selection) -> None:
        self.analysis = analysis
        self.graph = analysis.graph
        self.selection = selection
        self.editor = ShapeEditor(analysis, selection)
        self.changed = 0

    def run(self) -> int:
        for node in list(self.graph):
            slots = _SLOTS.get(node.op_type) if not node.domain else None
            handled = slots(self, node) if slots is not None else set()
            self._freeze_data(node, handled)
        self._repair_attributes()
        self._repair_declared()
        common.RemoveUnusedNodesPass()(self.analysis.model)
        return self.changed + self.editor.changed

    # --- sizes

    def dims(self, value: ir.Value | None) -> list[Dim] | None:
        return None if value is None else self.analysis.values.get(value)

    def input_dims(self, node: ir.Node, index: int) -> list[Dim] | None:
        return self.analysis.input_dims(node, index)

    def new(self, dim: Dim) -> Size:
        return self.selection.size(dim)

    def differs(self, dim: Dim) -> bool:
        return self.selection.touches(dim)

    # --- integer values that are used as data keep the source's value

    def _freeze_data(self, node: ir.Node, handled: set[int]) -> None:
        if any(output in self.analysis.contents for output in node.outputs):
            return
        for index, value in enumerate(node.inputs):
            if index in handled or value is None or value not in self.analysis.contents:
                continue
            contents = self.analysis.contents[value]
            before = [evaluate(entry, size_of) for entry in contents.flat]
            after = [evaluate(entry, self.new) for entry in contents.flat]
            if before == after:
                continue
            numbers = [size for size in before if isinstance(size, int)]
            if len(numbers) != len(before):
                raise CheckFailed(f"{value.name} is used as data and follows an axis that was cut")
            self.editor.set_constant(node, index, numbers, shape=contents.shape)

    # --- attributes and declarations

    def _repair_attributes(self) -> None:
        for counted in self.analysis.counted:
            size = self.new(counted.dim)
            if isinstance(size, int) and size != size_of(counted.dim):
                counted.node.attributes[counted.name] = ir.AttrInt64(counted.name, size)
                self.changed += 1
        for defaulted in self.analysis.defaulted:
            if self.differs(defaulted.dim):
                attribute = ir.AttrFloat32(defaulted.name, defaulted.value)
                defaulted.node.attributes[defaulted.name] = attribute
                self.changed += 1

    def _repair_declared(self) -> None:
        """Declared shapes of inputs, outputs and intermediate values."""
        for value, dims in self.analysis.values.items():
            if dims is None or value.shape is None or value.is_initializer():
                continue
            if len(value.shape) != len(dims) or not any(self.differs(dim) for dim in dims):
                continue
            shape = [
                self.new(dim) if self.differs(dim) else size
                for size, dim in zip(value.shape, dims, strict=True)
            ]
            value.shape = ir.Shape(
                [size if isinstance(size, int | ir.SymbolicDim) else None for size in shape]
            )


# --- one function per operator with size-stating inputs; each returns the inputs whose every entry it made right


def _reshape(repair: _Repair, node: ir.Node) -> set[int]:
    if len(node.inputs) < 2:
        return set()
    outputs, inputs = repair.dims(node.outputs[0]), repair.input_dims(node, 0)
    contents = repair.analysis.contents.get(node.inputs[1])  # type: ignore[arg-type]
    if outputs is None or inputs is None or contents is None:
        return set()
    allow = node.attributes.get("allowzero")
    copies = allow is None or allow.as_int() == 0
    wanted: list[Dim | None] = []
    for axis, (entry, dim) in enumerate(zip(contents.flat, outputs, strict=True)):
        is_copy = copies and entry == 0 and axis < len(inputs) and repair.new(inputs[axis]) == repair.new(dim)
        is_marker = isinstance(entry, int) and entry == -1
        wanted.append(None if is_copy or is_marker else dim)
    repair.editor.rewrite(node, 1, wanted, may_infer=True)
    return {1}


def _expand(repair: _Repair, node: ir.Node) -> set[int]:
    outputs = repair.dims(node.outputs[0])
    contents = repair.analysis.contents.get(node.inputs[1])  # type: ignore[arg-type]
    if outputs is None or contents is None:
        return set()
    repair.editor.rewrite(node, 1, outputs[len(outputs) - contents.size :], marker=1)
    return {1}


def _constant_of_shape(repair: _Repair, node: ir.Node) -> set[int]:
    outputs = repair.dims(node.outputs[0])
    if outputs is None or node.inputs[0] not in repair.analysis.contents:
        return set()
    repair.editor.rewrite(node, 0, outputs)
    return {0}


def _tile(repair: _Repair, node: ir.Node) -> set[int]:
    inputs, outputs = repair.input_dims(node, 0), repair.dims(node.outputs[0])
    if inputs is None or outputs is None or node.inputs[1] not in repair.analysis.contents:
        return set()
    repeats = [resolve(b)[: len(resolve(b)) - len(resolve(a))] for a, b in zip(inputs, outputs, strict=True)]
    repair.editor.rewrite(node, 1, repeats)
    return {1}


def _split(repair: _Repair, node: ir.Node) -> set[int]:
    dims = repair.input_dims(node, 0)
    parts = [repair.dims(output) for output in node.outputs]
    if dims is None or any(part is None for part in parts):
        return set()
    axis = node.attributes["axis"].as_int() % len(dims) if "axis" in node.attributes else 0
    cut = [part[axis] for part in parts if part is not None]
    if not any(repair.differs(part) for part in cut):
        return set()
    sizes = [repair.new(part) for part in cut]
    numbers = [size for size in sizes if isinstance(size, int)]
    assert len(numbers) == len(sizes)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        repair.editor.rewrite(node, 1, cut)
    elif "split" in node.attributes:
        node.attributes["split"] = ir.AttrInt64s("split", numbers)
        repair.changed += 1
    elif not _is_implied(node, numbers):
        if repair.analysis.opset("") < 13:
            node.attributes["split"] = ir.AttrInt64s("split", numbers)
        else:
            node.attributes.pop("num_outputs", None)
            repair.editor.set_constant(node, 1, numbers)
        repair.changed += 1
    return {1}


def _is_implied(node: ir.Node, sizes: list[int]) -> bool:
    """Whether a Split without sizes cuts so: in equal parts; only `num_outputs` allows a smaller last one."""
    return (
        sizes == _chunks(sum(sizes), len(sizes)) if "num_outputs" in node.attributes else len(set(sizes)) == 1
    )


def _chunks(total: int, count: int) -> list[int]:
    size = -(-total // count)
    return [min(size, total - size * index) for index in range(count)]


def _split_to_sequence(repair: _Repair, node: ir.Node) -> set[int]:
    parts = repair.analysis.sequences.get(node.outputs[0])
    dims = repair.input_dims(node, 0)
    if parts is None or dims is None or len(node.inputs) < 2:
        return set()
    axis = node.attributes["axis"].as_int() % len(dims) if "axis" in node.attributes else 0
    sizes = [repair.new(part[axis]) for part in parts]
    contents = repair.analysis.contents[node.inputs[1]]  # type: ignore[index]
    if contents.ndim == 1:
        repair.editor.rewrite(node, 1, [part[axis] for part in parts])
        return {1}
    numbers = [size for size in sizes if isinstance(size, int)]
    if not any(repair.differs(part[axis]) for part in parts):
        return set()
    # A scalar chunk size serves parts of one size only; a list serves all.
    if numbers == _chunks(sum(numbers), len(numbers)):
        repair.editor.rewrite(node, 1, [parts[0][axis]])
    else:
        repair.editor.set_constant(node, 1, numbers)
    return {1}


def _slice(repair: _Repair, node: ir.Node) -> set[int]:
    dims, outputs = repair.input_dims(node, 0), repair.dims(node.outputs[0])
    if dims is None or outputs is None or not any(repair.differs(dim) for dim in dims):
        return set()
    bounds = _Bounds.read(repair, node, len(dims))
    if bounds is None:
        return set()
    starts: list[Size | None] = list(bounds.starts)
    ends: list[Size | None] = list(bounds.ends)
    for position, axis in enumerate(bounds.axes):
        if not repair.differs(dims[axis]):
            continue  # the bounds keep the source's values, whatever they were computed from
        begin, end, step = bounds.starts[position], bounds.ends[position], bounds.steps[position]
        size = size_of(dims[axis])
        assert isinstance(size, int) and isinstance(begin, int) and isinstance(end, int)
        first, _, _ = slice(begin, end, step).indices(size)
        kept = _plain_indices(repair.selection, dims, axis)
        block = first - first % step
        start = int(np.searchsorted(kept, block)) + first % step
        count = repair.new(outputs[axis])
        assert isinstance(count, int)
        stop = start + (count - 1) * step + 1
        length = repair.new(dims[axis])
        assert isinstance(length, int)
        # Bounds that still say the same on the shorter axis stay as they are.
        if slice(begin, end, step).indices(length) == slice(start, stop, step).indices(length) or list(
            range(length)[begin:end:step]
        ) == list(range(length)[start:stop:step]):
            continue
        starts[position], ends[position] = start, stop
    bounds.write(repair, node, starts, ends)
    return {1, 2}


class _Bounds:
    """Starts, ends, axes and steps of a Slice, from attributes (opset 9) or inputs."""

    def __init__(
        self, starts: list[Size | None], ends: list[Size | None], axes: list[int], steps: list[int]
    ) -> None:
        self.starts, self.ends, self.axes, self.steps = starts, ends, axes, steps

    @classmethod
    def read(cls, repair: _Repair, node: ir.Node, rank: int) -> _Bounds | None:
        if "starts" in node.attributes:
            starts = list(node.attributes["starts"].as_ints())
            ends = list(node.attributes["ends"].as_ints())
            given = node.attributes.get("axes")
            axes = list(given.as_ints()) if given is not None else list(range(len(starts)))
            return cls(list(starts), list(ends), [axis % rank for axis in axes], [1] * len(starts))
        rows = [_source_numbers(repair, node, index) for index in range(1, 5)]
        if rows[0] is None or rows[1] is None:
            return None
        axes = [axis % rank for axis in rows[2] or range(len(rows[0])) if isinstance(axis, int)]
        steps = [step for step in rows[3] or [1] * len(rows[0]) if isinstance(step, int)]
        return cls(rows[0], rows[1], axes, steps)

    def write(
        self, repair: _Repair, node: ir.Node, starts: list[Size | None], ends: list[Size | None]
    ) -> None:
        if "starts" not in node.attributes:
            for index, old, new in ((1, self.starts, starts), (2, self.ends, ends)):
                pairs = [None if a is None or b is None else (a, b) for a, b in zip(old, new, strict=True)]
                repair.editor.replace_entries(node, index, pairs)
            return
        for name, old, new in (("starts", self.starts, starts), ("ends", self.ends, ends)):
            merged = [b if b is not None else a for a, b in zip(old, new, strict=True)]
            if merged != old:
                node.attributes[name] = ir.AttrInt64s(name, [int(size) for size in merged])  # type: ignore[arg-type]
                repair.changed += 1


def _source_numbers(repair: _Repair, node: ir.Node, index: int) -> list[Size | None] | None:
    if index >= len(node.inputs) or node.inputs[index] is None:
        return None
    contents = repair.analysis.contents.get(node.inputs[index])  # type: ignore[arg-type]
    return None if contents is None else [evaluate(entry, size_of) for entry in contents.flat]


def _plain_indices(selection: Selection, dims: Sequence[Dim], axis: int) -> np.ndarray:
    """Kept indices of an axis; where they vary with another axis, those of its first index.

    Positions of cuts do not depend on which row is taken: counts are equal in every row.
    """
    kept, _ = selection.indices(dims, axis)
    return kept if kept.ndim == 1 else kept[0]


def _gather(repair: _Repair, node: ir.Node) -> set[int]:
    dims, indices = repair.input_dims(node, 0), _source_numbers(repair, node, 1)
    outputs = repair.dims(node.outputs[0])
    if dims is None or outputs is None or indices is None:
        return set()
    axis = node.attributes["axis"].as_int() % len(dims) if "axis" in node.attributes else 0
    if not repair.differs(dims[axis]):
        return set()
    kept = _plain_indices(repair.selection, dims, axis)
    contents = repair.analysis.contents[node.inputs[1]]  # type: ignore[index]
    size = size_of(dims[axis])
    assert isinstance(size, int)
    source = [int(index) % size for index in indices]  # type: ignore[arg-type]
    picked = outputs[axis : axis + contents.ndim]
    stays = np.arange(len(source))
    if any(repair.differs(dim) for dim in picked):
        flat: Dim = tuple(atom for dim in picked for atom in dim)
        stays = _plain_indices(
            repair.selection, [*outputs[:axis], flat, *outputs[axis + contents.ndim :]], axis
        )
    moved = [int(np.searchsorted(kept, source[index])) for index in stays]
    if moved != [int(index) for index in indices]:  # type: ignore[arg-type]
        shape = [repair.new(dim) for dim in picked]
        repair.editor.set_constant(node, 1, moved, shape=[size for size in shape if isinstance(size, int)])
    return {1}


def _resize(repair: _Repair, node: ir.Node) -> set[int]:
    outputs = repair.dims(node.outputs[0])
    sizes = node.inputs[3] if len(node.inputs) > 3 else None
    if outputs is None or sizes not in repair.analysis.contents:
        return set()
    repair.editor.rewrite(node, 3, outputs)
    return {3}


def _squeeze(repair: _Repair, node: ir.Node) -> set[int]:
    """A Squeeze without axes takes every axis of size 1: it must not take one that was cut to 1."""
    dims = repair.input_dims(node, 0)
    given = "axes" in node.attributes or (len(node.inputs) > 1 and node.inputs[1] is not None)
    if dims is None or given or not any(repair.differs(dim) for dim in dims):
        return set()
    axes = [axis for axis, dim in enumerate(dims) if not resolve(dim)]
    if repair.analysis.opset("") < 13:
        node.attributes["axes"] = ir.AttrInt64s("axes", axes)
        repair.changed += 1
    else:
        repair.editor.set_constant(node, 1, axes)
    return {1}


_SLOTS: dict[str, Callable[[_Repair, ir.Node], set[int]]] = {
    "Reshape": _reshape,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Tile": _tile,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "Slice": _slice,
    "Gather": _gather,
    "Resize": _resize,
    "Squeeze": _squeeze,
}
