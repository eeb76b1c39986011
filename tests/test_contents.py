"""Integer values are followed through the operators that compute shapes."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from helpers import model

from onnx_autoglm.axes import contents as known
from onnx_autoglm.axes.analysis import Analysis
from onnx_autoglm.axes.contents import Arithmetic, Extent, apply, evaluate
from onnx_autoglm.axes.dims import fresh, size_of
from onnx_autoglm.axes.size import add, mul, symbol

B, S = symbol("B"), symbol("S")


def followed(body: str, constants: str = "", opset: int = 20) -> list[object] | None:
    """What is known of `r` in a graph over `x`, a float[B,S,8,4], for the sizes of the source."""
    source = model(
        f"g (float[B,S,8,4] x, int64[2] data) => (int64[n] r) <{constants}> {{ {body} }}", opset=opset
    )
    analysis = Analysis(source)
    contents = analysis.contents.get(source.graph.outputs[0])
    return None if contents is None else [evaluate(entry, size_of) for entry in contents.flat]


@pytest.mark.parametrize(
    ("body", "constants", "expected"),
    [
        ("r = Shape(x)", "", [B, S, 8, 4]),
        ("r = Shape<start=1, end=-1>(x)", "", [S, 8]),
        ("r = Shape<start=-1>(x)", "", [4]),
        ("r = Size(x)", "", [mul(mul(B, S), 32)]),
        ("s = Shape(x) r = Gather(s, i)", "int64[2] i = {-2, 0}", [8, B]),
        ("s = Shape(x) r = Gather(s, i)", "int64 i = {1}", [S]),
        ("s = Shape(x) r = Slice(s, a, b)", "int64[1] a = {1}, int64[1] b = {9223372036854775807}", [S, 8, 4]),
        ("s = Shape(x) r = Slice(s, a, b, c, d)", "int64[1] a={-1}, int64[1] b={-9}, int64[1] c={0}, int64[1] d={-1}",
         [4, 8, S, B]),
        ("s = Shape(x) r = Slice(s, a, b,, d)", "int64[1] a={0}, int64[1] b={4}, int64[1] d={2}", [B, 8]),
        ("s = Shape(x) r = Concat<axis=0>(s, c)", "int64[1] c = {-1}", [B, S, 8, 4, -1]),
        ("s = Shape(x) p, r = Split<num_outputs=2>(s)", "", [8, 4]),
        ("s = Shape(x) p, r = Split(s, c)", "int64[2] c = {3, 1}", [4]),
        ("s = Shape(x) r = Mul(s, c)", "int64 c = {2}", [mul(2, B), mul(2, S), 16, 8]),
        ("s = Shape(x) r = ReduceProd<keepdims=0>(s)", "", [mul(mul(B, S), 32)]),
        ("s = Shape(x) t = Slice(s, a, b) r = ReduceSum(t)", "int64[1] a={2}, int64[1] b={4}", [12]),
        ("s = Shape<start=2>(x) r = Div(s, c)", "int64 c = {3}", [2, 1]),
        ("s = Shape<start=2>(x) r = Div(s, c)", "int64 c = {-3}", [-2, -1]),
        ("s = Shape(x) c = Add(s, s) r = Div(c, s)", "", [2, 2, 2, 2]),
        ("s = Shape<start=2>(x) r = Mod(s, c)", "int64 c = {-3}", [-1, -2]),
        ("s = Shape(x) u = Unsqueeze(s, a) r = Squeeze(u, a)", "int64[1] a = {0}", [B, S, 8, 4]),
        ("s = Shape(x) u = Reshape(s, t) v = Transpose(u) r = Reshape(v, w)",
         "int64[2] t = {2, -1}, int64[1] w = {-1}", [B, 8, S, 4]),
        ("s = Shape<start=3>(x) r = Expand(s, t)", "int64[1] t = {3}", [4, 4, 4]),
        ("s = Shape<start=2>(x) r = Min(s, c)", "int64 c = {5}", [5, 4]),
        ("s = Shape<start=2>(x) r = Max(s, c, s)", "int64 c = {5}", [8, 5]),
        ("s = Shape(x) k = Cast<to=6>(s) r = Cast<to=7>(k)", "", [B, S, 8, 4]),
        ("r = ConstantOfShape<value = int64[1] {5}>(n)", "int64[1] n = {3}", [5, 5, 5]),
        ("r = Range(a, b, c)", "int64 a = {1}, int64 b = {9}, int64 c = {3}", [1, 4, 7]),
        # PyTorch's Expand: a size of -1 stands for the size of the input, seen as Where(Equal(t, -1), 1, t).
        ("q = Equal(t, m) r = Where(q, o, t)", "int64[3] t = {-1, 4, -1}, int64 m = {-1}, int64[3] o = {1,1,1}",
         [1, 4, 1]),
        ("s = Shape(x) q = Equal(s, m) r = Where(q, o, s)", "int64 m = {-1}, int64[4] o = {1, 1, 1, 1}", [B, S, 8, 4]),
        ("s = Shape(x) q = Greater(s, z) r = Where(q, s, z)", "int64 z = {-1}", [B, S, 8, 4]),
        ("s = Shape<start=2>(x) q = LessOrEqual(s, c) n = Not(q) r = Where(n, s, c)", "int64 c = {5}", [8, 5]),
        ("s = Shape<start=2>(x) k = Cast<to=9>(s) r = Where(k, s, c)", "int64 c = {5}", [8, 4]),
        ("n = Neg(c) r = Abs(n)", "int64[2] c = {3, -4}", [3, 4]),
    ],
)  # fmt: skip
def test_followed(body: str, constants: str, expected: list[object]) -> None:
    assert followed(body, constants) == expected


def test_attribute_forms_of_opset_11() -> None:
    body = "s = Shape(x) p, q = Split<axis=0, split=[1, 3]>(s) u = Unsqueeze<axes=[0]>(q) r = Squeeze<axes=[0]>(u)"
    assert followed(body, opset=11) == [S, 8, 4]


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("r = Mul(data, c)", "int64[2] c = {2, 2}"),
        ("s = Shape(x) r = Gather(s, data)", ""),
        ("s = Shape(x) f = Cast<to=1>(s) q = Sqrt(f) r = Cast<to=7>(q)", ""),
    ],
)
def test_what_depends_on_data_is_not_known(body: str, constants: str) -> None:
    assert followed(body, constants) is None


def test_an_undecided_comparison_is_unknown_entry_by_entry() -> None:
    body, constants = "s = Shape(x) q = Greater(s, c) r = Where(q, s, c)", "int64 c = {5}"
    assert followed(body, constants) == [None, None, 8, 5]


def test_long_integer_arrays_are_data() -> None:
    entries = ", ".join(["1"] * (known.MAX_ENTRIES + 1))
    assert followed("r = Identity(c)", f"int64[{known.MAX_ENTRIES + 1}] c = {{{entries}}}") is None


def test_entries_are_evaluated_again_for_new_sizes() -> None:
    heads = fresh(8)
    entry = Arithmetic("mul", (Extent(heads), 16))
    assert evaluate(entry, size_of) == 128
    assert evaluate(entry, lambda dim: 6) == 96


def test_numbers_are_folded_at_once() -> None:
    two = known.array([2])
    assert apply("add", two, two).tolist() == [4]
    (entry,) = apply("add", two, known.array([Extent(fresh(8))])).tolist()
    assert isinstance(entry, Arithmetic)


def test_large_numbers_divide_exactly() -> None:
    largest = 2**63 - 1
    assert apply("div", known.array([largest]), known.array([2])).tolist() == [largest // 2]
    assert apply("div", known.array([-largest]), known.array([2])).tolist() == [-(largest // 2)]


def test_shape_pins_nothing() -> None:
    """Shape observes an axis, it does not use it."""
    source = model(
        "g (float[B,8] x) => (float[B,8] y) <float[8,6] w, float[6,8] v> "
        "{ h = MatMul(x, w) s = Shape(h) r = Reshape(h, s) y = MatMul(r, v) }"
    )
    analysis = Analysis(source)
    hidden = analysis.values[value(source, "h")]
    assert hidden is not None
    assert not [pin for dim, pin in analysis.pins if dim == hidden[1]]


def value(source: ir.Model, name: str) -> ir.Value:
    return next(output for node in source.graph for output in node.outputs if output.name == name)


def test_an_entry_times_a_symbol() -> None:
    assert evaluate(Arithmetic("add", (Extent(fresh(B)), 1)), size_of) == add(B, 1)
