"""Multiply-adds, counted by hand beside the program."""

from __future__ import annotations

import pytest
from helpers import model, prune

from onnx_autoglm.cut import analyse
from onnx_autoglm.flops import SEQUENCE, count_flops


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("g (float[2,3] x) => (float[2,5] y) <float[3,5] w> { y = MatMul(x, w) }", 2 * 3 * 5),
        ("g (float[2,3] x) => (float[2,5] y) <float[5,3] w> { y = Gemm<transB=1>(x, w) }", 2 * 3 * 5),
        ('g (float[2,3] x) => (float[2,5] y) <float[3,5] w> { y = Einsum<equation="ab,bc->ac">(x, w) }', 2 * 3 * 5),
        ("g (float[1,4,8,8] x) => (float[1,6,8,8] y) <float[6,4,3,3] w> { y = Conv<pads=[1,1,1,1]>(x, w) }",
         6 * 8 * 8 * 4 * 9),
        ("g (float[1,4,8,8] x) => (float[1,4,8,8] y) <float[4,1,3,3] w> { y = Conv<pads=[1,1,1,1],group=4>(x, w) }",
         4 * 8 * 8 * 9),
        ("g (float[b,s,3] x) => (float[b,s,5] y) <float[3,5] w> { y = MatMul(x, w) }", SEQUENCE * 3 * 5),
    ],
)  # fmt: skip
def test_products_and_convolutions(text: str, expected: int) -> None:
    assert count_flops(analyse(model(text)).analysis) == expected


def test_a_selection_counts_what_is_left() -> None:
    source = model("g (float[2,3] x) => (float[2,3] y) <float[3,8] a, float[8,3] b> "
                   "{ h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }")  # fmt: skip
    cut = prune(source, {"ffn-channel": 0.5})
    assert (
        count_flops(cut.structures.analysis, cut.selection) * 2 == count_flops(analyse(source).analysis) == 96
    )
