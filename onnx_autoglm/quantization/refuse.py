"""What cannot be quantized again."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from onnx_autoglm.errors import UserError

_INTEGER_OPS = frozenset(
    "QuantizeLinear DequantizeLinear DynamicQuantizeLinear QLinearMatMul QLinearConv QGemm QLinearAdd MatMulInteger "
    "MatMulIntegerToFloat DynamicQuantizeMatMul ConvInteger MatMulNBits GatherBlockQuantized".split()
)


def refuse_quantized(model: ir.Model, name: str) -> None:
    """Raises UserError for a model with quantized operators, saying which."""
    found = Counter(node.op_type for node in model.graph.all_nodes() if node.op_type in _INTEGER_OPS)
    if found:
        listed = ", ".join(f"{count} x {kind}" for kind, count in found.most_common(4))
        raise UserError(
            f"{name} is quantized already ({listed}): pass the model in floating point that it was made from"
        )
