"""All rules: one per operator type, an explicit table."""

from __future__ import annotations

from onnx_autoglm.axes import (
    rules_attention,
    rules_conv,
    rules_cut,
    rules_elementwise,
    rules_product,
    rules_reduce,
    rules_shape,
)
from onnx_autoglm.axes.op import Rule

RULES: dict[tuple[str, str], Rule] = {
    **rules_elementwise.RULES,
    **rules_shape.RULES,
    **rules_cut.RULES,
    **rules_product.RULES,
    **rules_conv.RULES,
    **rules_reduce.RULES,
    **rules_attention.RULES,
}
