"""Rules for convolutions, pooling and resizing. Spatial axes are made out of data and never cut."""

from __future__ import annotations

from onnx_autoglm.axes import dims as ax
from onnx_autoglm.axes.dims import UNIT, Dim
from onnx_autoglm.axes.facts import Role
from onnx_autoglm.axes.op import Op, Rule, Unknown
from onnx_autoglm.axes.size import Size, add, exact_div

SPATIAL = "a spatial axis"
COMPUTED = "convolved with a weight that is computed, where a removed entry would not be zero"


def convolution(op: Op) -> None:
    """x [N, g*i, ...] * w [g*o, i, ...] -> y [N, g*o, ...]; depthwise is the case where i is 1."""
    dims, weight = op.dims(0), op.dims(1)
    groups = ax.fresh(op.attr_int("group", 1))
    op.equal(dims[1], groups + weight[1])
    outer, inner = op.divide(weight[0], exact_div(ax.size_of(weight[0]), ax.size_of(groups)) or 1)
    op.equal(outer, groups)
    op.counts("group", groups)
    for dim in (dims[1], weight[0]):
        op.role(dim, Role.CONVOLVED)
    op.must_be_zero((0, 1), weight[1], COMPUTED)
    if op.is_weight(1) and op.attr_int("group", 1) == 1:
        op.contracts((0, 1 - len(dims)), (1, 1 - len(weight)), dims[1])
    if op.has(2):
        op.equal(weight[0], op.dims(2)[0])
    _spatial(op, dims[2:], weight[2:])
    kernel = [ax.size_of(dim) for dim in weight[2:]]
    op.output([dims[0], groups + inner, *_shrink(op, dims[2:], kernel)])


def transposed_convolution(op: Op) -> None:
    """x [N, g*i, ...] with w [g*i, o, ...] -> y [N, g*o, ...]."""
    dims, weight = op.dims(0), op.dims(1)
    groups = ax.fresh(op.attr_int("group", 1))
    op.equal(dims[1], weight[0])
    outer, _ = op.divide(weight[0], exact_div(ax.size_of(weight[0]), ax.size_of(groups)) or 1)
    op.equal(outer, groups)
    op.counts("group", groups)
    channels = groups + weight[1]
    for dim in (dims[1], channels):
        op.role(dim, Role.CONVOLVED)
    op.must_be_zero((0, 1), dims[1], COMPUTED)
    if op.has(2):
        op.equal(channels, op.dims(2)[0])
    _spatial(op, dims[2:], weight[2:])
    op.output([dims[0], channels, *_declared_spatial(op)])


def _spatial(op: Op, *groups: list[Dim]) -> None:
    for dims in groups:
        op.pin_all(dims, SPATIAL)


def _shrink(op: Op, spatial: list[Dim], kernel: list[Size]) -> list[Dim]:
    """Output sizes of a sliding window, after the ONNX definition of Conv and the pools."""
    count = len(spatial)
    strides, dilations = op.attr_ints("strides") or [1] * count, op.attr_ints("dilations") or [1] * count
    pads, auto = op.attr_ints("pads") or [0] * (2 * count), op.attr_text("auto_pad", "NOTSET")
    sizes: list[Dim] = []
    for axis, dim in enumerate(spatial):
        size, width, stride = ax.size_of(dim), kernel[axis], strides[axis]
        if not isinstance(width, int) or not (isinstance(size, int) or stride == 1):
            sizes.append(op.born(op.opaque(), SPATIAL))
            continue
        if auto.startswith("SAME"):
            sizes.append(op.born(-(-size // stride) if isinstance(size, int) else size, SPATIAL))
            continue
        padding = 0 if auto == "VALID" else pads[axis] + pads[axis + count]
        spread = dilations[axis] * (width - 1)
        if not isinstance(size, int):
            sizes.append(op.born(add(size, padding - spread), SPATIAL))
            continue
        room = size + padding - spread - 1
        steps = -(-room // stride) if op.attr_int("ceil_mode", 0) else room // stride
        if op.attr_int("ceil_mode", 0) and steps * stride >= size + pads[axis]:
            steps -= 1  # a window may not start in the padding behind
        sizes.append(op.born(steps + 1, SPATIAL))
    return sizes


def _declared_spatial(op: Op) -> list[Dim]:
    rank = len(op.dims(0))
    declared = op.node.outputs[0].shape
    sizes: list[Size] = [op.opaque() for _ in range(rank - 2)]
    if declared is not None and len(declared) == rank and op.analysis.is_static:
        sizes = [size if isinstance(size, int) else op.opaque() for size in list(declared)[2:]]
    return [op.born(size, SPATIAL) for size in sizes]


def pool(op: Op) -> None:
    dims = op.dims(0)
    _spatial(op, dims[2:])
    kernel: list[Size] = list(op.attr_ints("kernel_shape") or [])
    result = [*dims[:2], *_shrink(op, dims[2:], kernel)]
    op.output(result)
    if len(op.node.outputs) > 1 and (op.node.outputs[1].uses() or op.node.outputs[1].is_graph_output()):
        op.pin(dims[1], "counted by the flat indices of MaxPool")
    op.output(result, 1)


def global_pool(op: Op) -> None:
    dims = op.dims(0)
    _spatial(op, dims[2:])
    op.output([*dims[:2], *[UNIT] * (len(dims) - 2)])


def resize(op: Op) -> None:
    """Axes whose size or scale says that they stay are the same; the others are new spatial axes."""
    dims = op.dims(0)
    sizes = op.numbers(3) if op.has(3) else None
    scales = op.constant(2 if op.version > 10 else 1) if sizes is None else None
    if op.attr_ints("axes") is not None or (sizes is None and (scales is None or scales.size != len(dims))):
        raise Unknown("the new size is computed at run time")
    outputs: list[Dim] = []
    for axis, dim in enumerate(dims):
        size = ax.size_of(dim)
        if sizes is not None:
            grown = sizes[axis]
        else:
            assert scales is not None
            grown = size if scales[axis] == 1 else int(size * scales[axis]) if isinstance(size, int) else None
        if grown == size:
            outputs.append(dim)
            continue
        op.pin(dim, "resized")
        outputs.append(op.born(op.opaque() if grown is None else grown, "resized"))
    op.output(outputs)


RULES: dict[tuple[str, str], Rule] = {
    ("", "Conv"): convolution,
    ("", "ConvTranspose"): transposed_convolution,
    ("", "MaxPool"): pool,
    ("", "AveragePool"): pool,
    ("", "LpPool"): pool,
    ("", "GlobalAveragePool"): global_pool,
    ("", "GlobalMaxPool"): global_pool,
    ("", "GlobalLpPool"): global_pool,
    ("", "Resize"): resize,
    ("", "Upsample"): resize,
}
