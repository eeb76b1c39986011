"""Rules for reductions and normalisations.

A sum over an axis can lose entries that are zero. A mean, a norm or a softmax changes its value when
entries go: that pins the axis, softly (`PinKind.NORM`), since the residual stream may still be cut when the
user asks for that lossy change.
"""

from __future__ import annotations

from onnx_autoglm.axes import dims as ax
from onnx_autoglm.axes.dims import UNIT, Dim
from onnx_autoglm.axes.facts import PinKind, Role
from onnx_autoglm.axes.op import Op, Rule, Unknown
from onnx_autoglm.axes.rules_elementwise import broadcast
from onnx_autoglm.axes.size import exact_div

SUM = "summed over, where a removed channel would not be zero"


def _reduced(op: Op) -> tuple[list[Dim], set[int]]:
    dims = op.dims(0)
    axes = op.axes("axes", 1)
    if not axes:
        axes = [] if op.attr_int("noop_with_empty_axes", 0) else list(range(len(dims)))
    return dims, {axis % len(dims) for axis in axes}


def _collapse(op: Op, dims: list[Dim], axes: set[int]) -> None:
    keep = op.attr_int("keepdims", 1)
    op.output([UNIT if axis in axes else dim for axis, dim in enumerate(dims) if keep or axis not in axes])


def reduce_sum(op: Op) -> None:
    dims, axes = _reduced(op)
    for axis in axes:
        op.must_be_zero((0,), dims[axis], SUM)
    _collapse(op, dims, axes)


def reduce_mean(op: Op) -> None:
    dims, axes = _reduced(op)
    for axis in axes:
        op.pin(dims[axis], "averaged over", PinKind.NORM)
    _collapse(op, dims, axes)


def reduce_other(op: Op) -> None:
    dims, axes = _reduced(op)
    for axis in axes:
        op.pin(dims[axis], f"reduced by {op.node.op_type}")
    _collapse(op, dims, axes)


def softmax(op: Op) -> None:
    dims = op.dims(0)
    if op.version < 13:
        axes = list(range(op.attr_int("axis", 1) % max(len(dims), 1), len(dims)))
    else:
        axes = [op.axis(len(dims), -1)]
    op.mixes(dims, axes)
    for axis in axes:
        op.pin(dims[axis], f"normalised over by {op.node.op_type}", PinKind.SELECT)
    op.output(dims)


def layer_norm(op: Op) -> None:
    """LayerNormalization, RMSNormalization and their kin: normalise the axes from `axis` on."""
    dims = op.dims(0)
    start = op.axis(len(dims), -1)
    op.mixes(dims, range(start, len(dims)))
    _normalise(op, dims, dims[start:])
    for index in (1, 2):
        if op.has(index):
            broadcast(op, [dims, op.dims(index)])
    _norm_outputs(op, dims, start)


def _normalise(op: Op, dims: list[Dim], axes: list[Dim]) -> None:
    for dim in axes:
        op.pin(dim, f"normalised over by {op.node.op_type}", PinKind.NORM)


def _norm_outputs(op: Op, dims: list[Dim], start: int) -> None:
    op.output(dims)
    statistics = dims[:start] + [UNIT] * (len(dims) - start)
    for index in range(1, len(op.node.outputs)):
        op.output(statistics, index)


def skip_layer_norm(op: Op) -> None:
    """ONNX Runtime's residual add and norm in one; the last output is the sum before the norm."""
    has_beta = op.node.op_type == "SkipLayerNormalization"
    dims = broadcast(op, [op.dims(0), op.dims(1)])
    for dim in dims:
        op.role(dim, Role.ADDED)
    op.mixes(dims, [-1])
    _normalise(op, dims, dims[-1:])
    for index in range(2, 5 if has_beta else 4):
        if op.has(index):
            broadcast(op, [dims, op.dims(index)])
    _norm_outputs(op, dims, len(dims) - 1)
    op.output(dims, 3)


def batch_norm(op: Op) -> None:
    """Per channel, with running statistics: nothing is shared between channels."""
    if op.attr_int("training_mode", 0):
        raise Unknown("BatchNormalization in training mode")
    dims = op.dims(0)
    for index in range(1, 5):
        op.equal(dims[1], op.dims(index)[0])
    op.output(dims)


def instance_norm(op: Op) -> None:
    dims = op.dims(0)
    op.mixes(dims, range(2, len(dims)))
    op.pin_all(dims[2:], "normalised over by InstanceNormalization")
    for index in (1, 2):
        op.equal(dims[1], op.dims(index)[0])
    op.output(dims)


def group_norm(op: Op) -> None:
    """Channels are `groups * inner`: whole groups may go, the inner ones are normalised together."""
    dims = op.dims(0)
    groups = ax.fresh(op.attr_int("num_groups", 1))
    inner = exact_div(ax.size_of(dims[1]), ax.size_of(groups))
    if inner is None:
        raise Unknown("the number of channels is not known")
    outer, members = op.divide(dims[1], inner)
    op.equal(outer, groups)
    op.counts("num_groups", groups)
    op.pin(members, "normalised over by GroupNormalization")
    op.pin_all(dims[2:], "normalised over by GroupNormalization")
    for index in (1, 2):
        scale = op.dims(index)[0]
        op.equal(groups if ax.size_of(scale) == ax.size_of(groups) else dims[1], scale)
    op.output(dims)


def local_response_norm(op: Op) -> None:
    dims = op.dims(0)
    op.mixes(dims, [1])
    op.pin(dims[1], "normalised with its neighbours by LRN")
    op.output(dims)


def lp_norm(op: Op) -> None:
    """Divides by a norm over one axis, to which a channel that is zero adds nothing."""
    dims = op.dims(0)
    axis = op.axis(len(dims), -1)
    op.mixes(dims, [axis])
    op.must_be_zero((0,), dims[axis], SUM)
    op.output(dims)


def mean_variance_norm(op: Op) -> None:
    dims = op.dims(0)
    op.mixes(dims, op.attr_ints("axes") or [0, 2, 3])
    for axis in op.attr_ints("axes") or [0, 2, 3]:
        op.pin(dims[axis], "normalised over by MeanVarianceNormalization", PinKind.NORM)
    op.output(dims)


_SUMS = "ReduceSum ReduceSumSquare ReduceL1 ReduceL2".split()
_OTHERS = "ReduceMax ReduceMin ReduceProd ReduceLogSum ReduceLogSumExp".split()
_SOFTMAXES = "Softmax LogSoftmax Hardmax".split()

RULES: dict[tuple[str, str], Rule] = {
    **{("", name): reduce_sum for name in _SUMS},
    ("", "ReduceMean"): reduce_mean,
    **{("", name): reduce_other for name in _OTHERS},
    **{("", name): softmax for name in _SOFTMAXES},
    ("", "LayerNormalization"): layer_norm,
    ("", "RMSNormalization"): layer_norm,
    ("", "SimplifiedLayerNormalization"): layer_norm,
    ("com.microsoft", "SimplifiedLayerNormalization"): layer_norm,
    ("com.microsoft", "SkipLayerNormalization"): skip_layer_norm,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): skip_layer_norm,
    ("", "BatchNormalization"): batch_norm,
    ("", "InstanceNormalization"): instance_norm,
    ("", "GroupNormalization"): group_norm,
    ("", "LRN"): local_response_norm,
    ("", "LpNormalization"): lp_norm,
    ("", "MeanVarianceNormalization"): mean_variance_norm,
}
