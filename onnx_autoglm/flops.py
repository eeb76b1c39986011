"""Counts multiply-adds of a graph from its axes, before and after a selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Container

import onnx_ir as ir

from onnx_autoglm.axes.analysis import Analysis
from onnx_autoglm.axes.dims import Dim, size_of
from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.size import Poly, Size

SEQUENCE = 128


def count_flops(analysis: Analysis, selection: Selection | None = None, gone: Container[ir.Node] = ()) -> int:
    """Multiply-adds of all matrix products, convolutions and fused attentions, each counted as one.

    Symbolic axes count as 1 where they are the first axis of a graph input (the batch) and as
    `SEQUENCE` otherwise. Elementwise work is left out, as is usual; so are products with packed weights, and the
    nodes of `gone`.
    """
    size = size_of if selection is None else selection.size
    batch = {
        str(value.shape[0].value)
        for value in analysis.graph.inputs
        if value.shape is not None and len(value.shape) and isinstance(value.shape[0], ir.SymbolicDim)
    }

    def number(dim: Dim) -> int:
        return _evaluate(size(dim), batch)

    products = sum(math.prod(map(number, dims)) for node, dims in analysis.products if node not in gone)
    return products + sum(_other(analysis, node, number) for node in analysis.graph if node not in gone)


def _evaluate(size: Size, batch: set[str]) -> int:
    if not isinstance(size, Poly):
        return size
    total = 0
    for monomial, factor in size.terms:
        for name in monomial:
            factor *= 1 if name in batch else SEQUENCE
        total += factor
    return total


def _other(analysis: Analysis, node: ir.Node, number: Callable[[Dim], int]) -> int:
    """Multiply-adds of operators that are more than one product."""
    if node.op_type in ("Conv", "FusedConv", "ConvTranspose"):
        output, weight = analysis.values.get(node.outputs[0]), analysis.input_dims(node, 1)
        data = analysis.input_dims(node, 0)
        if output is None or weight is None or data is None:
            return 0
        # A convolution does this work per output entry, a transposed one per input entry.
        places = data if node.op_type == "ConvTranspose" else output
        return math.prod(map(number, places)) * math.prod(map(number, weight[1:]))
    if node.op_type in ("Attention", "MultiHeadAttention", "GroupQueryAttention"):
        return _attention(analysis, node, number)
    return 0


def _attention(analysis: Analysis, node: ir.Node, number: Callable[[Dim], int]) -> int:
    """Scores and weighted values: `queries * heads * channels * keys`, twice."""
    result, key = analysis.values.get(node.outputs[0]), None
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        key = analysis.input_dims(node, 1)
    if result is None:
        return 0
    keys = SEQUENCE if key is None else number(key[-2])
    return 2 * math.prod(map(number, result)) * keys
