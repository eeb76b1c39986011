"""Operators by what they do to numbers: move them, compute each by itself, or sum products of them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

# Move numbers about and change none of them.
LAYOUT = frozenset(
    "Identity Reshape Transpose Squeeze Unsqueeze Flatten Slice Split Concat Expand Tile Gather GatherElements GatherND "
    "Pad DepthToSpace SpaceToDepth SplitToSequence SequenceConstruct SequenceAt SequenceInsert SequenceErase "
    "SequenceEmpty ConcatFromSequence Trilu ScatterElements ScatterND ReverseSequence Compress".split()
)
ELEMENTWISE = frozenset(
    "Add Sub Mul Div Pow Sqrt Reciprocal Exp Log Neg Abs Max Min Clip Where Cast Sum Mean Floor Ceil Round Sign Sin Cos "
    "Tan Tanh Sigmoid Relu LeakyRelu PRelu Elu Selu Celu Gelu Softplus Softsign HardSigmoid HardSwish Mish Swish Erf "
    "ThresholdedRelu Dropout Equal Less LessOrEqual Greater GreaterOrEqual IsNaN IsInf Mod".split()
)
PRODUCTS = frozenset(
    "MatMul Gemm Conv ConvTranspose Einsum Attention LSTM GRU RNN FusedMatMul MultiHeadAttention GroupQueryAttention "
    "DeformConv Det".split()
)


def is_pointwise(node: ir.Node) -> bool:
    """Whether a node moves numbers or computes each by itself, and sums none."""
    return node.domain == "" and (node.op_type in LAYOUT or node.op_type in ELEMENTWISE)


def bodies(node: ir.Node) -> list[ir.Graph]:
    """The graphs inside a control-flow node."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found


def inputs_of(node: ir.Node) -> Iterator[ir.Value]:
    """The inputs of a node that are there."""
    return (value for value in node.inputs if value is not None)


def is_float(value: ir.Value | None) -> bool:
    """Whether a value holds float32 numbers (alone, or in a sequence)."""
    return value is not None and value.dtype == ir.DataType.FLOAT


def is_constant(value: ir.Value) -> bool:
    """Whether a value is an initializer that no feed can replace."""
    return value.const_value is not None and value.is_initializer() and not value.is_graph_input()


def node_name(node: ir.Node) -> str:
    """What to call a node in a report: operator and first output."""
    return f"{node.op_type} {node.outputs[0].name!r}" if node.outputs else node.op_type
