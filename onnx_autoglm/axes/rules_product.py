"""Rules for products of two operands: MatMul, Gemm, Einsum.

These are where roles come from: which axes a weight makes or contracts, and which ones two activations
share, contract or carry. That is all that tells heads, query-key channels, value channels, FFN channels
and experts apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx_autoglm.axes import dims as ax
from onnx_autoglm.axes.dims import UNIT, Dim
from onnx_autoglm.axes.facts import Role
from onnx_autoglm.axes.op import Op, Rule, Unknown
from onnx_autoglm.axes.rules_elementwise import broadcast

COMPUTED = "contracted with a weight that is computed, where a removed entry would not be zero"
CONTRACTION = "summed over in a product of two activations, where a removed channel would not be zero"


def product_roles(
    op: Op,
    operands: tuple[int, int],
    *,
    batch: Sequence[Dim],
    contracted: Sequence[Dim],
    free: tuple[Sequence[Dim], Sequence[Dim]],
    stacked: Sequence[Dim] = (),
) -> None:
    """States the roles of the axes of `left @ right`, given their operand indices.

    `batch` are axes of both operands, `free` those of only one, `stacked` the batch axes as the weight
    (if one operand is a weight) has them.
    """
    op.analysis.products.append((op.node, [*batch, *free[0], *free[1], *contracted]))
    is_weight = [op.is_weight(index) for index in operands]
    if all(is_weight):
        return
    if not any(is_weight):
        for dim in batch:
            op.role(dim, Role.HEAD)
        for dim in contracted:
            op.scores(operands, dim)
            op.must_be_zero(operands, dim, CONTRACTION)
        for dim in (*free[0], *free[1]):
            op.role(dim, Role.CARRIED)
        return
    for dim in contracted:
        op.role(dim, Role.CONTRACTED)
        op.must_be_zero(operands, dim, COMPUTED)
    for dim in free[0] if is_weight[0] else free[1]:
        op.role(dim, Role.MADE)
    for dim in stacked:
        op.role(dim, Role.STACKED)


def multiply(
    op: Op, left: list[Dim], right: list[Dim], *, transposed: tuple[bool, bool] = (False, False)
) -> list[Dim]:
    """The axes of a matrix product of NumPy's kind, and its equations.

    `left` and `right` are the axes as the product uses them; `transposed` says which operand has its last
    two axes the other way round.
    """
    operands = (0, 1)
    if not left or not right:
        raise Unknown("a product with a scalar")
    padded_left = [UNIT, *left] if len(left) == 1 else left
    padded_right = [*right, UNIT] if len(right) == 1 else right
    op.equal(padded_left[-1], padded_right[-2])
    batch = broadcast(op, [padded_left[:-2], padded_right[:-2]])
    product_roles(
        op,
        operands,
        batch=batch,
        contracted=[padded_left[-1]],
        free=([padded_left[-2]], [padded_right[-1]]),
        stacked=padded_left[:-2] if op.is_weight(operands[0]) else padded_right[:-2],
    )
    weights = [op.is_weight(index) for index in operands]
    if weights.count(True) == 1:
        axes = (-2 if transposed[0] else -1, -1 if transposed[1] or len(right) == 1 else -2)
        weight = weights.index(True)
        op.contracts((1 - weight, axes[1 - weight]), (weight, axes[weight]), padded_left[-1])
    result = list(batch)
    if len(left) > 1:
        result.append(padded_left[-2])
    if len(right) > 1:
        result.append(padded_right[-1])
    return result


def matmul(op: Op) -> None:
    op.output(multiply(op, op.dims(0), op.dims(1)))


def fused_matmul(op: Op) -> None:
    """ONNX Runtime's MatMul with transposes folded in."""
    if op.attr_int("transBatchA", 0) or op.attr_int("transBatchB", 0):
        raise Unknown("FusedMatMul with transposed batch axes")
    left, right = list(op.dims(0)), list(op.dims(1))
    if op.attr_int("transA", 0) and len(left) > 1:
        left[-2:] = reversed(left[-2:])
    if op.attr_int("transB", 0) and len(right) > 1:
        right[-2:] = reversed(right[-2:])
    transposed = op.attr_int("transA", 0) != 0, op.attr_int("transB", 0) != 0
    op.output(multiply(op, left, right, transposed=transposed))


def gemm(op: Op) -> None:
    left, right = list(op.dims(0)), list(op.dims(1))
    if op.attr_int("transA", 0):
        left.reverse()
    if op.attr_int("transB", 0):
        right.reverse()
    transposed = op.attr_int("transA", 0) != 0, op.attr_int("transB", 0) != 0
    result = multiply(op, left, right, transposed=transposed)
    if op.has(2):
        result = broadcast(op, [result, op.dims(2)])
    op.output(result)


def einsum(op: Op) -> None:
    """Letters are axes: those in the output of both operands are batch, those in none are contracted."""
    equation = op.attr_text("equation", "").replace(" ", "")
    if "." in equation:
        raise Unknown("an Einsum with an ellipsis")
    inputs, _, output = equation.partition("->")
    terms = inputs.split(",")
    if "->" not in equation:
        output = "".join(sorted(letter for letter in set(inputs) - {","} if inputs.count(letter) == 1))
    if (
        any(len(set(term)) != len(term) for term in terms)
        or len(terms) != len(op.node.inputs)
        or len(terms) > 2
    ):
        raise Unknown(f"an Einsum of this form: {equation}")
    axes: dict[str, Dim] = {}
    for index, term in enumerate(terms):
        for letter, dim in zip(term, op.dims(index), strict=True):
            if letter not in axes or not ax.resolve(axes[letter]):
                axes[letter] = dim
            elif ax.resolve(dim):
                op.equal(axes[letter], dim)
    op.output([axes[letter] for letter in output])
    if len(terms) == 1:
        for letter in set(terms[0]) - set(output):
            op.must_be_zero((0,), axes[letter], "summed over, where a removed channel would not be zero")
        return
    left, right = set(terms[0]), set(terms[1])
    for index, alone in ((0, left - right - set(output)), (1, right - left - set(output))):
        for letter in alone:
            op.must_be_zero((index,), axes[letter], "summed over, where a removed channel would not be zero")
    shared = left & right
    batch = [axes[letter] for letter in sorted(shared & set(output))]
    product_roles(
        op,
        (0, 1),
        batch=batch,
        contracted=[axes[letter] for letter in sorted(shared - set(output))],
        free=(
            [axes[letter] for letter in sorted((left - right) & set(output))],
            [axes[letter] for letter in sorted((right - left) & set(output))],
        ),
        stacked=batch,
    )


def packed_weights(op: Op) -> None:
    """Weights in blocks of a packed format: neither axis can be cut."""
    dims = op.dims(0)
    op.pin(dims[-1], f"contracted with packed weights of {op.node.op_type}")
    size = op.attr_int("N", 0) or op.opaque()
    op.output([*dims[:-1], op.born(size, f"made by packed weights of {op.node.op_type}")])


RULES: dict[tuple[str, str], Rule] = {
    ("", "MatMul"): matmul,
    ("", "Gemm"): gemm,
    ("", "Einsum"): einsum,
    ("com.microsoft", "FusedMatMul"): fused_matmul,
    ("com.microsoft", "MatMulNBits"): packed_weights,
    ("com.microsoft", "MatMulBnb4"): packed_weights,
}
