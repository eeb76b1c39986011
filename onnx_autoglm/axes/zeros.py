"""Whether a removed channel would be zero: what a sum over the channel may rely on.

Masking zeroes the slices of a channel in all initializers. A value is then zero on the channel if it is
made from those slices alone, through operators that keep zero. Anything unknown counts as not zero.
"""

from __future__ import annotations

import onnx_ir as ir

from onnx_autoglm.axes.analysis import Analysis
from onnx_autoglm.axes.dims import Atom, leaves

# f(0) = 0, or an operator that only moves entries of its first input.
_FIRST = frozenset(
    "Abs Asin Asinh Atan Atanh Cast CastLike Ceil Dropout Elu Celu Selu Erf Expand Flatten Floor Gelu Identity "
    "LeakyRelu LpNormalization MaxPool AveragePool GlobalAveragePool GlobalMaxPool Mish Neg PRelu QuickGelu "
    "Relu Reshape Round Sign Sin Sinh Slice Softsign Split Sqrt Squeeze Swish Tan Tanh ThresholdedRelu Tile "
    "Transpose Unsqueeze Gather GatherND GatherElements HardSwish ReduceSum ReduceMean ReduceMax ReduceMin "
    "ReduceL1 ReduceL2 ReduceSumSquare RotaryEmbedding DequantizeLinear QuantizeLinear Trilu CumSum".split()
)
_ANY = frozenset("Mul MatMul And FusedMatMul Einsum".split())
_ALL = frozenset("Add Sub Sum Max Min Mean Or Xor FastGelu BiasGelu".split())
_PER_CHANNEL = frozenset(
    "BatchNormalization InstanceNormalization LayerNormalization RMSNormalization GroupNormalization "
    "SimplifiedLayerNormalization".split()
)


class Zeros:
    """Answers, with memory, whether inputs and values are zero on the masked entries of an atom."""

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self._known: dict[tuple[ir.Value, Atom], bool] = {}

    def input_is_zero(self, node: ir.Node, index: int, atom: Atom) -> bool:
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return False
        if not self._contains(node, index, atom):
            return False
        if value.const_value is not None or value.is_initializer():
            return True
        return self._value_is_zero(value, atom)

    def _contains(self, node: ir.Node, index: int, atom: Atom) -> bool:
        dims = self._analysis.input_dims(node, index) or []
        return any(atom in leaves(dim) for dim in dims)

    def _value_is_zero(self, value: ir.Value, atom: Atom) -> bool:
        key = (value, atom)
        if key not in self._known:
            self._known[key] = False  # a cycle cannot occur; this guards the recursion all the same
            node = value.producer()
            self._known[key] = node is not None and self._made_zero(node, atom)
        return self._known[key]

    def _made_zero(self, node: ir.Node, atom: Atom) -> bool:
        def zero(index: int) -> bool:
            return self.input_is_zero(node, index, atom)

        inputs = [index for index, value in enumerate(node.inputs) if value is not None]
        kind = node.op_type
        if kind in _FIRST:
            return zero(0)
        if kind in _ANY:
            return any(zero(index) for index in inputs)
        if kind in _ALL:
            return all(zero(index) for index in inputs)
        if kind == "Div":
            return zero(0) and not zero(1)  # 0/0 is not a number
        if kind == "Where":
            return zero(1) and zero(2)
        if kind == "Concat":
            return all(zero(index) for index in inputs if self._contains(node, index, atom))
        if kind in ("Gemm", "Conv", "ConvTranspose", "FusedConv"):
            return (zero(0) or zero(1)) and (2 not in inputs or zero(2))
        if kind in _PER_CHANNEL:
            return zero(1) and (2 not in inputs or zero(2))
        if kind == "Pow":
            return zero(0) and _is_positive(node.inputs[1])
        return False


def _is_positive(exponent: ir.Value | None) -> bool:
    if exponent is None or exponent.const_value is None or exponent.const_value.size != 1:
        return False
    return bool(exponent.const_value.numpy().reshape(-1)[0] > 0)
