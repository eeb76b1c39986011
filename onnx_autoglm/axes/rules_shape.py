"""Rules for operators that rearrange axes without cutting them."""

from __future__ import annotations

from onnx_autoglm.axes import dims as ax
from onnx_autoglm.axes.dims import UNIT, Clash, Dim
from onnx_autoglm.axes.op import Op, Rule, Unknown
from onnx_autoglm.axes.size import Size, exact_div


def reshape(op: Op) -> None:
    """The flattened factors of input and output are one product, unified from the left.

    An axis given as -1 is what is left between the axes before it and those after it.
    """
    dims = op.dims(0)
    listed: list[Size | None] = [*(op.attr_ints("shape") or [])]
    target = op.numbers(1) if op.has(1) else listed
    if target is None:
        raise Unknown("the target shape is computed from data")
    keeps_zero = op.attr_int("allowzero", 0) == 1
    declared = op.node.outputs[0].shape
    wanted: list[Dim | None] = []
    for index, size in enumerate(target):
        if size == 0 and not keeps_zero:
            wanted.append(dims[index])
        elif size == -1:
            wanted.append(None)
        elif size is not None:
            wanted.append(ax.fresh(size))
        else:
            static = declared[index] if declared is not None and op.analysis.is_static else None
            wanted.append(ax.fresh(static) if isinstance(static, int) else None)
    holes = wanted.count(None)
    if holes > 1:
        raise Unknown("more than one axis of the target shape is computed from data")
    flat = ax.product(dims)
    try:
        if holes == 0:
            outputs = [dim for dim in wanted if dim is not None]
            ax.unify(flat, ax.product(outputs))
        else:
            outputs = _fill_hole(flat, wanted)
    except Clash as clash:
        op.pin(flat, f"reshaped across its structure: {clash}")
        outputs = [ax.fresh(_hole_size(flat, wanted, op)) if dim is None else dim for dim in wanted]
        op.pin_all(outputs, f"reshaped across its structure: {clash}")
    op.output(outputs)


def _fill_hole(flat: Dim, wanted: list[Dim | None]) -> list[Dim]:
    hole = wanted.index(None)
    before = [dim for dim in wanted[:hole] if dim is not None]
    after = [dim for dim in wanted[hole + 1 :] if dim is not None]
    rest = exact_div(ax.size_of(flat), ax.size_of(ax.product(before)))
    if rest is None:
        raise Clash(f"sizes {ax.size_of(flat)} and {ax.size_of(ax.product(before))} do not divide")
    head, tail = ax.split_inner(flat, rest)
    ax.unify(head, ax.product(before))
    middle, end = ax.split_inner(tail, ax.size_of(ax.product(after)))
    ax.unify(end, ax.product(after))
    return [*before, middle, *after]


def _hole_size(flat: Dim, wanted: list[Dim | None], op: Op) -> Size:
    others = ax.size_of(ax.product(dim for dim in wanted if dim is not None))
    return exact_div(ax.size_of(flat), others) or op.opaque()


def flatten(op: Op) -> None:
    dims = op.dims(0)
    axis = op.attr_int("axis", 1)
    axis = axis + len(dims) if axis < 0 else axis
    op.output([ax.product(dims[:axis]), ax.product(dims[axis:])])


def transpose(op: Op) -> None:
    dims = op.dims(0)
    order = op.attr_ints("perm") or list(reversed(range(len(dims))))
    op.output([dims[axis] for axis in order])


def squeeze(op: Op) -> None:
    dims = op.dims(0)
    axes = op.axes("axes", 1)
    if axes is None:
        axes = [axis for axis, dim in enumerate(dims) if ax.size_of(dim) == 1]
    gone = {axis % len(dims) for axis in axes}
    op.output([dim for axis, dim in enumerate(dims) if axis not in gone])


def unsqueeze(op: Op) -> None:
    dims = list(op.dims(0))
    axes = op.axes("axes", 1) or []
    rank = len(dims) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        dims.insert(axis, UNIT)
    op.output(dims)


def expand(op: Op) -> None:
    """An axis of size 1 that is expanded is born here; it may be cut like any other."""
    dims = op.dims(0)
    target = op.numbers(1)
    if target is None:
        raise Unknown("the target shape is computed from data")
    rank = max(len(dims), len(target))
    padded: list[Dim] = [UNIT] * (rank - len(dims)) + dims
    sizes: list[Size | None] = [*([1] * (rank - len(target))), *target]
    outputs: list[Dim] = []
    for dim, size in zip(padded, sizes, strict=True):
        if ax.resolve(dim):
            outputs.append(dim)
            if size is not None and size != 1:
                op.equal(dim, ax.fresh(size))
        elif size is None:
            outputs.append(op.born(op.opaque(), "expanded to a size computed from data"))
        else:
            outputs.append(ax.fresh(size))
    op.output(outputs)


def tile(op: Op) -> None:
    """Tiling makes a new outer factor, born here."""
    dims = op.dims(0)
    repeats = op.integers(1)
    if repeats is None:
        raise Unknown("the repeats are computed at run time")
    op.output([ax.fresh(count) + dim for dim, count in zip(dims, repeats, strict=True)])


def constant_of_shape(op: Op) -> None:
    """A uniform array: its axes take part in whatever they meet."""
    sizes = op.numbers(0)
    if sizes is None:
        raise Unknown("the shape is computed from data")
    op.output([ax.fresh(op.opaque() if size is None else size) for size in sizes])


def depth_to_space(op: Op) -> None:
    """Channels are `block*block*c` (DCR) or `c*block*block` (CRD); only `c` stays free."""
    batch, channels, height, width = op.dims(0)
    block = op.attr_int("blocksize", 1)
    if op.attr_text("mode", "DCR") == "DCR":
        blocks, kept = op.divide(channels, exact_div(ax.size_of(channels), block * block) or op.opaque())
    else:
        kept, blocks = op.divide(channels, block * block)
    high, wide = op.divide(blocks, block)
    op.pin_all([high, wide, height, width], "rearranged into space")
    op.output([batch, kept, height + high, width + wide])


def space_to_depth(op: Op) -> None:
    batch, channels, height, width = op.dims(0)
    block = op.attr_int("blocksize", 1)
    rows, high = op.divide(height, block)
    columns, wide = op.divide(width, block)
    op.pin_all([high, wide, rows, columns], "rearranged out of space")
    op.output([batch, high + wide + channels, rows, columns])


RULES: dict[tuple[str, str], Rule] = {
    ("", "Reshape"): reshape,
    ("", "Flatten"): flatten,
    ("", "Transpose"): transpose,
    ("", "Squeeze"): squeeze,
    ("", "Unsqueeze"): unsqueeze,
    ("", "Expand"): expand,
    ("", "Tile"): tile,
    ("", "ConstantOfShape"): constant_of_shape,
    ("", "DepthToSpace"): depth_to_space,
    ("", "SpaceToDepth"): space_to_depth,
}
