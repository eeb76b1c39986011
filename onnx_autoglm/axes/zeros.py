"""Whether a removed channel would be zero: what a sum over the channel may rely on.

Masking zeroes the slices of a channel in all initializers. A value is then zero on the channel if it is
made from those slices alone, through operators that keep zero. Anything unknown counts as not zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import onnx_ir as ir

from onnx_autoglm.axes.analysis import Analysis
from onnx_autoglm.axes.dims import Atom, Dim, Sum, parts_of, resolve

# f(0) = 0, or an operator that only moves entries of its first input.
_FIRST = frozenset(
    "Abs Asin Asinh Atan Atanh Cast CastLike Ceil Dropout Elu Celu Selu Erf Expand Flatten Floor Gelu Identity "
    "LeakyRelu LpNormalization MaxPool AveragePool GlobalAveragePool GlobalMaxPool Mish Neg PRelu QuickGelu "
    "Relu Reshape Round Sign Sin Sinh Slice Softsign Split Sqrt Squeeze Swish Tan Tanh ThresholdedRelu Tile "
    "Transpose Unsqueeze Gather GatherND GatherElements HardSwish ReduceSum ReduceMean ReduceMax ReduceMin "
    "ReduceL1 ReduceL2 ReduceSumSquare RotaryEmbedding DequantizeLinear QuantizeLinear Trilu CumSum".split()
)
_PRODUCTS = frozenset("Mul And MatMul FusedMatMul Einsum Gemm Conv ConvTranspose".split())
# Through these a stored zero point stays one.
_MOVES = frozenset(
    "DequantizeLinear Identity Reshape Transpose Squeeze Unsqueeze Flatten Slice Split Expand Gather Tile".split()
)
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
        if not self._places(node, index, atom):
            return False
        if node.op_type not in _MOVES and _is_offset(value):
            return False  # what was zero is stored as the zero point
        if value.const_value is not None or value.is_initializer():
            return True
        return self._value_is_zero(value, atom)

    def _places(self, node: ir.Node, index: int, atom: Atom) -> int:
        return _places(self._analysis.input_dims(node, index) or [], atom)

    def _value_is_zero(self, value: ir.Value, atom: Atom) -> bool:
        """Ancestors first, with a stack of our own: graphs are deeper than Python's."""
        stack = [value]
        while stack:
            current = stack[-1]
            node = current.producer()
            if (current, atom) in self._known:
                stack.pop()
                continue
            missing = [] if node is None else [given for given in node.inputs if self._is_open(given, atom)]
            if missing:
                stack.extend(missing)
                continue
            self._known[current, atom] = node is not None and self._made_zero(node, current, atom)
            stack.pop()
        return self._known[value, atom]

    def _is_open(self, value: ir.Value | None, atom: Atom) -> TypeGuard[ir.Value]:
        """Whether a computed value that holds the atom has not been decided yet."""
        if value is None or value.producer() is None or (value, atom) in self._known:
            return False
        return bool(_places(self._analysis.values.get(value) or [], atom))

    def _made_zero(self, node: ir.Node, value: ir.Value, atom: Atom) -> bool:
        # An array that holds the atom in two axes must be zero at a masked index of either.
        places = _places(self._analysis.values.get(value) or [], atom)

        def zero(index: int) -> bool:
            return self.input_is_zero(node, index, atom) and self._places(node, index, atom) >= places

        inputs = [index for index, given in enumerate(node.inputs) if given is not None]
        kind = node.op_type
        if kind in _FIRST:
            return zero(0)
        if kind in _PRODUCTS:
            factors = [index for index in inputs[:2] if self.input_is_zero(node, index, atom)]
            carried = sum(_places(self._carried(node, index), atom) for index in factors)
            return carried >= max(places, 1) and (2 not in inputs or zero(2))
        if kind in _ALL:
            return all(zero(index) for index in inputs)
        if kind == "Div":
            return zero(0) and not self.input_is_zero(node, 1, atom)  # 0/0 is not a number
        if kind == "Where":
            return zero(1) and zero(2)
        if kind == "Concat":
            return all(
                self.input_is_zero(node, index, atom) for index in inputs if self._places(node, index, atom)
            )
        if kind in _PER_CHANNEL:
            return zero(1) and (2 not in inputs or zero(2))
        if kind == "Pow":
            return zero(0) and _is_positive(node.inputs[1])
        return False

    def _carried(self, node: ir.Node, index: int) -> list[Dim]:
        """The axes of a factor that its product has too, those that are not summed over."""
        dims = list(self._analysis.input_dims(node, index) or [])
        if node.op_type in ("Mul", "And"):
            return dims
        if node.op_type == "Einsum":
            terms, _, output = node.attributes["equation"].as_string().replace(" ", "").partition("->")
            letters = terms.split(",")[index]
            return [dim for letter, dim in zip(letters, dims, strict=False) if letter in output]
        if node.op_type in ("MatMul", "FusedMatMul", "Gemm"):
            turned = node.attributes.get_int("transB" if index else "transA", 0)
            summed = -1 if bool(turned) == bool(index) else -2
            return [dim for axis, dim in enumerate(dims, -len(dims)) if axis != summed and len(dims) > 1]
        return dims[:1] if index == 0 or node.op_type != "ConvTranspose" else dims


def _places(dims: Iterable[Dim], atom: Atom) -> int:
    """How many indices of the atom one entry of an array has; places in parts of a sum exclude each other."""
    found = 0
    for dim in dims:
        for factor in resolve(dim):
            if isinstance(factor.bound, Sum):
                found += max(_places([part], atom) for part in parts_of(factor))
            else:
                found += factor is atom
    return found


def _is_offset(value: ir.Value) -> bool:
    """Whether a value was quantized with a zero point that is not zero, or not known."""
    producer = value.producer()
    while producer is not None and producer.op_type in _MOVES - {"DequantizeLinear"}:
        given = producer.inputs[0]
        producer = None if given is None else given.producer()
    if producer is None or producer.op_type != "QuantizeLinear" or len(producer.inputs) < 3:
        return False
    zero = producer.inputs[2]
    return zero is not None and (zero.const_value is None or bool(zero.const_value.numpy().any()))


def _is_positive(exponent: ir.Value | None) -> bool:
    if exponent is None or exponent.const_value is None or exponent.const_value.size != 1:
        return False
    return bool(exponent.const_value.numpy().reshape(-1)[0] > 0)
