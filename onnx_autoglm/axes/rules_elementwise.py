"""Rules for operators that work entry by entry, with broadcasting."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_autoglm.axes.dims import UNIT, Dim, resolve
from onnx_autoglm.axes.facts import Role
from onnx_autoglm.axes.op import Op, Rule, Unknown


def broadcast(op: Op, operands: list[list[Dim]]) -> list[Dim]:
    """Axes aligned from the right; those that are not of size 1 are one axis."""
    result: list[Dim] = []
    for axis in range(-max((len(dims) for dims in operands), default=0), 0):
        present = [dims[axis] for dims in operands if len(dims) >= -axis and resolve(dims[axis])]
        for other in present[1:]:
            op.equal(present[0], other)
        result.append(present[0] if present else UNIT)
    return result


def elementwise(op: Op) -> None:
    """All inputs broadcast together; every output has the resulting axes."""
    present = [index for index in range(len(op.node.inputs)) if op.has(index)]
    operands = [op.dims(index) for index in present]
    result = broadcast(op, operands)
    if op.node.op_type in ("Div", "Mod"):
        op.must_not_be_zero(1)
    if op.node.op_type == "Pow" and not _is_positive(op.constant(1)):
        op.must_not_be_zero(0)
    if op.node.op_type in ("Add", "Sum"):
        activations = [op.dims(index) for index in present if not op.is_weight(index)]
        if len(activations) > 1:
            for dim in result:
                op.role(dim, Role.ADDED)
    for index in range(len(op.node.outputs)):
        op.output(result, index)


def _is_positive(exponent: np.ndarray | None) -> bool:
    return exponent is not None and bool((exponent > 0).all())


def unary(op: Op) -> None:
    """The first input's axes pass through; other inputs are scalars (Clip's bounds, Dropout's ratio)."""
    for index in range(1, len(op.node.inputs)):
        if op.has(index) and any(resolve(dim) for dim in op.dims(index)):
            raise Unknown(f"input {index} is not a scalar")
    if op.node.op_type in ("Reciprocal", "Log", "Acosh"):
        op.must_not_be_zero(0)
    for index in range(len(op.node.outputs)):
        op.output(op.dims(0), index)


def cast_like(op: Op) -> None:
    op.output(op.dims(0))


def prelu(op: Op) -> None:
    """The slope broadcasts to x in one direction only."""
    op.output(broadcast(op, [op.dims(0), op.dims(1)]))


def _is_symmetric(zero_point: ir.Value | None) -> bool:
    tensor = None if zero_point is None else zero_point.const_value
    return tensor is not None and not tensor.numpy().astype(np.float32).any()


def quantize(op: Op) -> None:
    """QuantizeLinear and DequantizeLinear: scale and zero point lie on one axis, or on none."""
    dims = op.dims(0)
    if op.attr_int("block_size", 0):
        op.pin_all(dims, "quantized in blocks")
    if op.is_weight(0) and op.has(2) and not _is_symmetric(op.node.inputs[2]):
        # A masked entry is the integer 0, which stands for minus the zero point.
        op.pin_all(dims, "quantized with zero points that are not zero")
    axis = op.axis(len(dims), 1)
    for index in (1, 2):
        if op.has(index) and len(op.dims(index)) == 1 and resolve(op.dims(index)[0]):
            op.equal(dims[axis], op.dims(index)[0])
    op.output(dims)


_NARY = (
    "Add Sub Mul Div Pow Mod Min Max Mean Sum And Or Xor Equal Greater Less GreaterOrEqual LessOrEqual Where "
    "BitShift BitwiseAnd BitwiseOr BitwiseXor"
).split()
_UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor "
    "Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu "
    "Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
).split()

RULES: dict[tuple[str, str], Rule] = {
    **{("", name): elementwise for name in _NARY},
    **{("", name): unary for name in _UNARY},
    ("", "CastLike"): cast_like,
    ("", "PRelu"): prelu,
    ("", "QuantizeLinear"): quantize,
    ("", "DequantizeLinear"): quantize,
    ("com.microsoft", "QuantizeLinear"): quantize,
    ("com.microsoft", "DequantizeLinear"): quantize,
    ("com.microsoft", "Gelu"): unary,
    ("com.microsoft", "QuickGelu"): unary,
    ("com.microsoft", "FastGelu"): elementwise,
    ("com.microsoft", "BiasGelu"): elementwise,
}
