"""Counts multiply-adds of a graph from its axes, before and after a selection."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from onnx_autoglm.axes.analysis import Analysis
from onnx_autoglm.axes.dims import Dim, size_of
from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.size import Poly, Size

SEQUENCE = 128


def count_flops(analysis: Analysis, selection: Selection | None = None) -> int:
    """Multiply-adds of all products and convolutions, one multiply-add counted as one.

    Symbolic axes count as 1 where they are the first axis of a graph input (the batch) and as
    `SEQUENCE` otherwise. Elementwise work is left out, as is usual.
    """
    size = size_of if selection is None else selection.size
    batch = {
        str(value.shape[0].value)
        for value in analysis.graph.inputs
        if value.shape is not None and len(value.shape) and isinstance(value.shape[0], ir.SymbolicDim)
    }

    def number(dim: Dim) -> int:
        return _evaluate(size(dim), batch)

    return sum(_node_flops(analysis, node, number) for node in analysis.graph)


def _evaluate(size: Size, batch: set[str]) -> int:
    if not isinstance(size, Poly):
        return size
    total = 0
    for monomial, factor in size.terms:
        for name in monomial:
            factor *= 1 if name in batch else SEQUENCE
        total += factor
    return total


def _node_flops(analysis: Analysis, node: ir.Node, number: Callable[[Dim], int]) -> int:
    counted = node.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose", "FusedConv", "FusedMatMul")
    output = analysis.values.get(node.outputs[0])
    if node.op_type in ("Attention", "MultiHeadAttention", "GroupQueryAttention"):
        return _attention_flops(analysis, node, number)
    if not counted or output is None or analysis.input_dims(node, 1) is None:
        return 0
    total = 1
    for dim in output:
        total *= number(dim)
    return total * _contracted(analysis, node, number)


def _contracted(analysis: Analysis, node: ir.Node, number: Callable[[Dim], int]) -> int:
    """Multiply-adds per output entry."""
    left, right = analysis.input_dims(node, 0) or [], analysis.input_dims(node, 1) or []
    if node.op_type in ("Conv", "FusedConv"):
        return _times(number, right[1:])
    if node.op_type == "ConvTranspose":
        # Each input entry meets every output channel and kernel position; per output entry on average.
        return number(right[0]) * _times(number, right[2:])
    flipped = "transA" in node.attributes and node.attributes["transA"].as_int() != 0
    return number(left[-2] if flipped and len(left) > 1 else left[-1])


def _times(number: Callable[[Dim], int], dims: list[Dim]) -> int:
    total = 1
    for dim in dims:
        total *= number(dim)
    return total


def _attention_flops(analysis: Analysis, node: ir.Node, number: Callable[[Dim], int]) -> int:
    """Scores and weighted values: about queries * keys * (query channels + value channels)."""
    query = analysis.input_dims(node, 0)
    if query is None:
        return 0
    total = _times(number, query)
    keys = SEQUENCE
    key = analysis.input_dims(node, 1) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if key is not None:
        keys = number(key[-2])
    return 2 * total * keys
