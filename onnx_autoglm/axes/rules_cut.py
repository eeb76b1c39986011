"""Rules for operators that join, cut or select along an axis."""

from __future__ import annotations

import itertools

from onnx_autoglm.axes import dims as ax
from onnx_autoglm.axes.dims import UNIT, Dim
from onnx_autoglm.axes.facts import PinKind, Role
from onnx_autoglm.axes.op import Op, Rule, Unknown
from onnx_autoglm.axes.size import Size, sub


def concat(op: Op) -> None:
    operands = [op.dims(index) for index in range(len(op.node.inputs))]
    rank = len(operands[0])
    axis = op.axis(rank, 1)
    outputs: list[Dim] = []
    for position in range(rank):
        column = [dims[position] for dims in operands]
        if position == axis:
            outputs.append(ax.join(column))
            continue
        for other in column[1:]:
            op.equal(column[0], other)
        outputs.append(column[0])
    op.output(outputs)


def split(op: Op) -> None:
    dims = op.dims(0)
    axis = op.axis(len(dims), 0)
    count = len(op.node.outputs)
    sizes = op.integers(1) if op.has(1) else op.attr_ints("split")
    if sizes is None:
        if op.has(1):
            raise Unknown("the sizes of the parts are computed at run time")
        total = ax.size_of(dims[axis])
        if not isinstance(total, int):
            raise Unknown("an axis of unknown size is split in equal parts")
        chunk = -(-total // op.attr_int("num_outputs", count))
        sizes = [min(chunk, total - chunk * index) for index in range(count)]
    rest = dims[axis]
    for index, size in enumerate(sizes):
        part, rest = op.cut(rest, size) if index < count - 1 else (rest, UNIT)
        op.output([*dims[:axis], part, *dims[axis + 1 :]], index)


def split_to_sequence(op: Op) -> None:
    """Parts of one size, or of listed sizes, kept as a sequence until SequenceAt takes one."""
    dims = op.dims(0)
    axis = op.axis(len(dims), 0)
    sizes, total = op.integers(1), ax.size_of(dims[axis])
    if sizes is None or not isinstance(total, int) or not op.attr_int("keepdims", 1):
        raise Unknown("the sizes of the parts are computed at run time")
    if not op.dims(1):
        sizes = [min(sizes[0], total - start) for start in range(0, total, sizes[0])]
    parts, rest = [], dims[axis]
    for size in sizes:
        part, rest = op.cut(rest, size)
        parts.append([*dims[:axis], part, *dims[axis + 1 :]])
    op.analysis.sequences[op.node.outputs[0]] = parts
    op.analysis.values[op.node.outputs[0]] = None


def sequence_at(op: Op) -> None:
    parts, index = op.analysis.sequences.get(op.value(0)), op.integers(1)
    if parts is None or index is None:
        raise Unknown("a sequence that is not known")
    op.output(parts[index[0]])


def window(op: Op, dim: Dim, start: Size | None, end: Size | None, step: int) -> Dim:
    """The axis that `start:end:step` selects, by cutting the axis at both ends."""
    total = ax.size_of(dim)
    if not isinstance(total, int) or not isinstance(start, int) or not isinstance(end, int):
        return _symbolic_window(op, dim, total, start, end, step)
    if step < 0:
        low, high = (start + total if start < 0 else start), (end + total if end < 0 else end)
        count = max(0, -(-(min(low, total - 1) - max(high, -1)) // -step))
        op.pin(dim, "read backwards")
        return op.born(count, "read backwards")
    start = min(max(start + total if start < 0 else start, 0), total)
    end = min(max(end + total if end < 0 else end, start), total)
    if step > 1:
        return _stride(op, dim, start, end, step)
    _, kept = op.cut(dim, start)
    kept, _ = op.cut(kept, end - start)
    return kept


def _stride(op: Op, dim: Dim, start: int, end: int, step: int) -> Dim:
    """Every `step`-th entry: the axis is `outer*step`, and the inner factor is cut into single entries."""
    total = ax.size_of(dim)
    assert isinstance(total, int)
    phase = start % step
    count = -(-(end - start) // step)
    begin = start - phase
    finish = begin + count * step
    if finish > total:
        op.pin(dim, f"read with a stride of {step} that does not divide it")
        return op.born(count, f"read with a stride of {step} that does not divide it")
    _, kept = op.cut(dim, begin)
    kept, _ = op.cut(kept, finish - begin)
    outer, inner = op.divide(kept, step)
    op.equal(inner, ax.join([UNIT] * step))
    return outer


def _symbolic_window(op: Op, dim: Dim, total: Size, start: Size | None, end: Size | None, step: int) -> Dim:
    reason = "cut at a bound that is computed at run time"
    if start == 0 and step == 1 and end is not None:
        if end == total or (isinstance(end, int) and end >= 2**31 - 1):
            return dim
        op.pin(dim, reason)
        # A window of n entries of an axis whose size is not known may hold fewer than n.
        size = end if not isinstance(end, int) else op.opaque() if end > 0 else sub(total, -end)
        return op.born(size, reason)
    op.pin(dim, reason)
    return op.born(op.opaque(), reason)


def slice_(op: Op) -> None:
    dims = list(op.dims(0))
    starts: list[Size | None]
    ends: list[Size | None]
    if op.attr_ints("starts") is not None:
        starts, ends = list(op.attr_ints("starts") or []), list(op.attr_ints("ends") or [])
        axes, steps = op.attr_ints("axes"), None
    else:
        computed: list[Size | None] = []
        axes = op.integers(3) if op.has(3) else None
        if op.has(3) and axes is None:
            raise Unknown("the sliced axes are computed at run time")
        count = len(axes) if axes is not None else 1
        computed = [None] * count
        starts, ends = op.numbers(1) or computed, op.numbers(2) or computed
        steps = op.integers(4) if op.has(4) else None
        if op.has(4) and steps is None:
            raise Unknown("the step of a slice is computed at run time")
    axes = axes if axes is not None else list(range(len(starts)))
    steps = steps if steps is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        dims[axis] = window(op, dims[axis], start, end, step)
    op.output(dims)


def gather(op: Op) -> None:
    """Constant indices select, as a slice does; indices from data pin the axis."""
    dims = op.dims(0)
    axis = op.axis(len(dims), 0)
    indices = op.integers(1)
    if indices is not None:
        size = ax.size_of(dims[axis])
        scalar = op.contents(1) is not None and not op.dims(1)
        if isinstance(size, int):
            indices = [index + size if index < 0 else index for index in indices]
        picked = _pick(op, dims[axis], indices)
        op.output([*dims[:axis], *([] if scalar else _shaped(op, picked)), *dims[axis + 1 :]])
        return
    _look_up(op, dims[axis])
    if op.is_weight(0):
        op.role(ax.product([*dims[:axis], *dims[axis + 1 :]]), Role.MADE)
    op.output([*dims[:axis], *op.dims(1), *dims[axis + 1 :]])


def _look_up(op: Op, dim: Dim) -> None:
    """An axis read or written at indices from data: pinned, softly if they were selected along it."""
    chosen = op.analysis.index_of.get(op.value(1))
    if chosen is None:
        op.pin(dim, "looked up by an index from data")
        return
    op.equal(chosen, dim)
    op.pin(dim, "looked up by an index that was selected along it", PinKind.SELECT)
    if op.is_weight(0):
        op.role(dim, Role.STACKED)


def _shaped(op: Op, picked: Dim) -> list[Dim]:
    """The picked axis in the shape of the indices (usually one axis)."""
    contents = op.contents(1)
    assert contents is not None
    if contents.ndim == 1:
        return [picked]
    shape = [ax.fresh(size) for size in contents.shape]
    op.equal(ax.product(shape), picked)
    return shape


def _pick(op: Op, dim: Dim, indices: list[int]) -> Dim:
    total = ax.size_of(dim)
    if total == 1 and set(indices) == {0}:
        return op.born(len(indices), "repeated by a Gather")
    steps = {after - before for before, after in itertools.pairwise(indices)}
    if isinstance(total, int) and indices and len(steps) <= 1 and all(index >= 0 for index in indices):
        step = steps.pop() if steps else 1
        if step > 0:
            return window(
                op, dim, indices[0], min(indices[-1] + step, total) if step > 1 else indices[-1] + 1, step
            )
    op.pin(dim, "selected by constant indices in no regular order")
    return op.born(len(indices), "selected by constant indices in no regular order")


def gather_elements(op: Op) -> None:
    dims, indices = op.dims(0), op.dims(1)
    axis = op.axis(len(dims), 0)
    op.mixes(dims, [axis])
    _look_up(op, dims[axis])
    for position, (dim, index) in enumerate(zip(dims, indices, strict=True)):
        if position != axis:
            _same_or_pinned(op, dim, index)
    op.output(indices)


def _same_or_pinned(op: Op, a: Dim, b: Dim) -> None:
    if ax.size_of(a) == ax.size_of(b):
        op.equal(a, b)
    else:
        op.pin_all([a, b], "used in part by an index from data")


def scatter_elements(op: Op) -> None:
    dims = op.dims(0)
    axis = op.axis(len(dims), 0)
    _look_up(op, dims[axis])
    for position, dim in enumerate(dims):
        if position != axis:
            _same_or_pinned(op, dim, op.dims(1)[position])
            _same_or_pinned(op, dim, op.dims(2)[position])
    op.mixes(dims, [axis])
    op.pin(op.dims(1)[axis], "an index from data")
    op.pin(op.dims(2)[axis], "written at an index from data")
    op.output(dims)


def gather_nd(op: Op) -> None:
    dims, indices = op.dims(0), op.dims(1)
    batch = op.attr_int("batch_dims", 0)
    depth = ax.size_of(indices[-1])
    if not isinstance(depth, int):
        raise Unknown("the depth of the index is not known")
    for dim, index in zip(dims[:batch], indices[:batch], strict=True):
        op.equal(dim, index)
    if depth == 1:
        _look_up(op, dims[batch])
    else:
        op.pin_all(dims[batch : batch + depth], "looked up by an index from data")
    if op.is_weight(0):
        op.role(ax.product(dims[batch + depth :]), Role.MADE)
    op.output([*indices[:-1], *dims[batch + depth :]])


def scatter_nd(op: Op) -> None:
    dims, indices, updates = op.dims(0), op.dims(1), op.dims(2)
    depth = ax.size_of(indices[-1])
    if not isinstance(depth, int):
        raise Unknown("the depth of the index is not known")
    op.mixes(dims, range(depth))
    op.pin_all(dims[:depth], "written at an index from data")
    op.pin_all(indices, "an index from data")
    outer = len(indices) - 1
    op.pin_all(updates[:outer], "written at an index from data")
    for dim, update in zip(dims[depth:], updates[outer:], strict=True):
        op.equal(dim, update)
    op.output(dims)


def tensor_scatter(op: Op) -> None:
    """A cache that is written in place: all axes but the written one are shared with the update."""
    dims, update = op.dims(0), op.dims(1)
    axis = op.axis(len(dims), -2)
    for position, (dim, new) in enumerate(zip(dims, update, strict=True)):
        if position == axis:
            op.mixes(dims, [axis])
            op.pin_all([dim, new], "written at an index from data")
        else:
            op.equal(dim, new)
    op.output(dims)


def top_k(op: Op) -> None:
    dims = list(op.dims(0))
    axis = op.axis(len(dims), -1)
    op.mixes(dims, [axis])
    chosen = dims[axis]
    op.pin(chosen, "selected along by TopK", PinKind.SELECT)
    count = op.numbers(1) if op.has(1) else [op.attr_int("k", 1)]
    size = count[0] if count and count[0] is not None else op.opaque()
    if isinstance(size, int):
        op.at_least(chosen, size)
    dims[axis] = op.born(size, "made by TopK")
    op.output(dims, 0)
    op.output(dims, 1)
    if len(op.node.outputs) > 1:
        op.analysis.index_of[op.node.outputs[1]] = chosen


def arg_extreme(op: Op) -> None:
    dims = list(op.dims(0))
    axis = op.axis(len(dims), 0)
    op.pin(dims[axis], f"selected along by {op.node.op_type}", PinKind.SELECT)
    op.analysis.index_of[op.node.outputs[0]] = dims[axis]
    op.output([*dims[:axis], *([UNIT] if op.attr_int("keepdims", 1) else []), *dims[axis + 1 :]])


def one_hot(op: Op) -> None:
    dims = list(op.dims(0))
    depth = op.numbers(1)
    size = depth[0] if depth and depth[0] is not None else op.opaque()
    axis = op.attr_int("axis", -1)
    dims.insert(axis if axis >= 0 else len(dims) + 1 + axis, op.born(size, "made by OneHot"))
    op.output(dims)


def non_zero(op: Op) -> None:
    dims = op.dims(0)
    op.pin_all(dims, "turned into indices")
    op.output([op.born(len(dims), "indices"), op.born(op.opaque(), "indices")])


def cumulative(op: Op) -> None:
    dims = op.dims(0)
    axes = op.integers(1)
    op.mixes(dims, axes if axes is not None else range(len(dims)))
    for axis in axes if axes is not None else range(len(dims)):
        op.pin(dims[axis], "summed up along")
    op.output(dims)


def triangle(op: Op) -> None:
    dims = op.dims(0)
    op.mixes(dims, [-1, -2])
    op.pin_all(dims[-2:], "cut to a triangle")
    op.output(dims)


def range_(op: Op) -> None:
    bounds = [op.numbers(index) for index in range(3)]
    start, limit, delta = (bound[0] if bound else None for bound in bounds)
    size: Size = op.opaque()
    if start is not None and limit is not None and delta == 1:
        size = sub(limit, start)
    op.output([op.born(size, "made by Range")])


def pad(op: Op) -> None:
    """Padding adds parts of its own before and behind; they are never cut."""
    dims = list(op.dims(0))
    pads = op.integers(1) if op.has(1) else op.attr_ints("pads")
    if pads is None:
        raise Unknown("the padding is computed at run time")
    axes = op.integers(3) if op.has(3) else list(range(len(dims)))
    if axes is None:
        raise Unknown("the padded axes are computed at run time")
    reason = f"padded ({op.attr_text('mode', 'constant')})"
    for axis, before, behind in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        if before == behind == 0:
            continue
        if op.attr_text("mode", "constant") != "constant" or before < 0 or behind < 0:
            op.pin(dims[axis], reason)
            size = ax.size_of(dims[axis])
            grown = size + before + behind if isinstance(size, int) else op.opaque()
            dims[axis] = op.born(grown, reason)
        else:
            dims[axis] = ax.join([op.born(before, reason), dims[axis], op.born(behind, reason)])
    op.output(dims)


RULES: dict[tuple[str, str], Rule] = {
    ("", "Concat"): concat,
    ("", "Split"): split,
    ("", "Slice"): slice_,
    ("", "SplitToSequence"): split_to_sequence,
    ("", "SequenceAt"): sequence_at,
    ("", "Gather"): gather,
    ("", "GatherElements"): gather_elements,
    ("", "ScatterElements"): scatter_elements,
    ("", "Scatter"): scatter_elements,
    ("", "GatherND"): gather_nd,
    ("", "ScatterND"): scatter_nd,
    ("", "TensorScatter"): tensor_scatter,
    ("", "TopK"): top_k,
    ("", "ArgMax"): arg_extreme,
    ("", "ArgMin"): arg_extreme,
    ("", "OneHot"): one_hot,
    ("", "NonZero"): non_zero,
    ("", "CumSum"): cumulative,
    ("", "Trilu"): triangle,
    ("", "Range"): range_,
    ("", "Pad"): pad,
}
