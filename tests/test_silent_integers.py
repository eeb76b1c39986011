"""Integers that follow the size of an axis which is cut: wrong only at sizes that a proof may not try."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model, prune, structures

from onnx_autoglm.axes.structures import Structure
from onnx_autoglm.passes.mask import mask
from onnx_autoglm.plan import cut_arrays
from onnx_autoglm.runtime import Session, compare

WEIGHTS = "float[8,32] a, float[32,8] b"
MLP = "h = MatMul(x, a) r = Relu(h) z = MatMul(r, b)"


def cuttable(source: ir.Model, kind: str) -> list[Structure]:
    return [s for s in structures(source) if s.kind == kind and not s.pins]


def assert_right_or_refused(source: ir.Model, kind: str, feeds: list[dict[str, np.ndarray]]) -> None:
    """Either the axis is pinned, or the cut computes what the masked source computes on all feeds."""
    if not cuttable(source, kind):
        return
    cut = prune(source, {kind: 0.5})
    plan = cut.plan({})
    masked = Session(mask(source.clone(), plan.removals, plan.lossy))
    pruned = Session(cut.model)
    for feed in feeds:
        expected = cut_arrays(masked.run(feed), plan.interfaces)
        assert compare(expected, pruned.run(cut_arrays(feed, plan.interfaces))).relative < 1e-5


def of_lengths(*lengths: int, width: int = 8) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((2, n, width), dtype=np.float32)} for n in lengths]


@pytest.mark.parametrize(
    "body",
    [
        "k = Shape<start=2,end=3>(h) y = Slice(z, zero, k, one)",
        "k = Shape<start=2,end=3>(h) half = Div(k, two) y = Slice(z, zero, half, one)",
        "k = Shape<start=2,end=3>(h) back = Sub(zero, k) y = Slice(z, back, big, one)",
        "k = Shape<start=2,end=3>(h) fold = Div(k, sixteen) y, i = TopK<axis=1>(z, fold)",
    ],
)
def test_a_bound_of_another_axis_keeps_the_value_of_the_source(body: str) -> None:
    constants = "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] sixteen = {16}, int64[1] big = {100000}"
    source = model(f"g (float[n,s,8] x) => (float[n,t,8] y) <{WEIGHTS}, {constants}> {{ {MLP} {body} }}")
    assert_right_or_refused(source, "ffn-channel", of_lengths(3, 20, 30, 40))


def test_a_range_over_a_cut_size_keeps_its_length() -> None:
    source = model(f"""
        g (float[n,s,8] x) => (float[n,s,8] y)
          <{WEIGHTS}, int64 zero = {{0}}, int64 two = {{2}}, int64 one = {{1}}, int64[1] first = {{0}}>
        {{ {MLP} sh = Shape(h) k = Gather(sh, two) m = Range(zero, k, one) f = Cast<to=1>(m)
           top = ReduceMax<keepdims=0>(f, first) w = Mul(z, top) y = Add(w, x) }}
        """)
    assert_right_or_refused(source, "ffn-channel", of_lengths(3, 40))


@pytest.mark.parametrize(
    ("condition", "lengths"), [("Less(sixteen, len)", (3, 20)), ("Equal(len, three)", (2, 3))]
)
def test_a_size_that_depends_on_a_condition_pins_what_it_is_made_of(
    condition: str, lengths: tuple[int, ...]
) -> None:
    source = model(f"""
        g (float[n,s,8] x) => (float[n,s,8] y)
          <{WEIGHTS}, int64[1] sixteen = {{16}}, int64[1] three = {{3}}, int64[1] literal = {{32}}>
        {{ h = MatMul(x, a) r = Relu(h) k = Shape<start=2,end=3>(h) front = Shape<start=0,end=2>(h)
           len = Shape<start=1,end=2>(x) c = {condition} e = Where(c, literal, k) t = Concat<axis=0>(front, e)
           q = Reshape(r, t) y = MatMul(q, b) }}
        """)
    assert_right_or_refused(source, "ffn-channel", of_lengths(*lengths))


def test_an_empty_cache_is_a_size_like_any_other() -> None:
    source = model(f"""
        g (float[n,s,8] x, float[n,p,8] past) => (float[n,s,8] y)
          <{WEIGHTS}, int64[1] zero = {{0}}, int64[1] literal = {{32}}>
        {{ h = MatMul(x, a) r = Relu(h) k = Shape<start=2,end=3>(h) front = Shape<start=0,end=2>(h)
           len = Shape<start=1,end=2>(past) c = Equal(len, zero) e = Where(c, literal, k) t = Concat<axis=0>(front, e)
           q = Reshape(r, t) y = MatMul(q, b) }}
        """)
    feeds = [of_lengths(3)[0] | {"past": np.zeros((2, p, 8), np.float32)} for p in (0, 1, 5)]
    assert_right_or_refused(source, "ffn-channel", feeds)


def test_an_expert_index_that_a_body_reads_as_a_number_pins_the_experts() -> None:
    source = model("""
        g (float[n,s,8] x) => (float[n,s,1,8] y)
          <float[8,6] r, float[6,8,8] E, int64[1] k = {2}, int64 lim = {16}, int64 i1 = {1}, int64[1] two = {2}, int64[1] last = {-1}>
        { l = MatMul(x, r) v, idx = TopK(l, k) p = Softmax(v) g1 = Gather(E, idx) x4 = Unsqueeze(x, two)
          x5 = Unsqueeze(x4, two) t = MatMul(x5, g1) p4 = Unsqueeze(p, last) p5 = Unsqueeze(p4, last) w = Mul(t, p5)
          q = ReduceSum<keepdims=0>(w, two) sh = Shape(x) s1 = Gather(sh, i1) c = Less(lim, s1)
          e = If(c) <
            then_branch = tb () => (float o) { f = Cast<to=1>(idx) o = ReduceSum<keepdims=0>(f) },
            else_branch = eb () => (float o) { o = Constant<value = float {0.0}>() }>
          y = Add(q, e) }
        """)
    assert not cuttable(source, "expert")


@pytest.mark.parametrize("is_vector", [True, False])
def test_an_initializer_that_callers_may_replace_is_not_cut(is_vector: bool) -> None:
    source = model(
        f"g (float[n,s,8] x) => (float[n,s,8] y) <{WEIGHTS}, float[32] v> {{ h = MatMul(x, a) i = Add(h, v) j = Mul(i, v) r = Relu(j) y = MatMul(r, b) }}"
    )
    assert cuttable(source, "ffn-channel")
    source.graph.inputs.append(source.graph.initializers["v" if is_vector else "a"])
    assert not cuttable(source, "ffn-channel")
    source.ir_version = 3  # where all initializers are inputs, and none can be replaced
    assert cuttable(source, "ffn-channel")


def test_an_output_that_is_never_finite_is_named() -> None:
    whole = np.ones((2, 3))
    found = compare({"y": whole, "z": whole * np.nan}, {"y": whole, "z": whole * np.nan})
    assert found.relative == 0 and found.unseen == ("z",)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"g (float[n,s,8] x) => (float[n,s,8] y) <{WEIGHTS}, int64[0] none> {{ h = MatMul(x, a) r = Relu(h) m = ReduceMean(r, none) q = Mul(r, m) y = MatMul(q, b) }}", "ffn-channel"),
        ("g (float[n,4,8,8] x) => (float[n,4,8,8] y) <float[16,4,1,1] w, float[16,4,1,1] v> { h = Conv(x, w) s = Sigmoid(h) e = Exp(v) y = ConvTranspose(s, e) }", "conv-channel"),
        (f"g (float[n,s,8] x) => (float[n,s,8] y) <{WEIGHTS}, float sc = {{0.02}}, uint8 zp = {{128}}> {{ h = MatMul(x, a) q = QuantizeLinear(h, sc, zp) f = Cast<to=1>(q) o = Sigmoid(b) y = MatMul(f, o) }}", "ffn-channel"),
        ("g (float[n,4,8,8] x) => (float[n,4,4,4] y) <float[16,4,1,1] w, float[4,16,1,1] v> { h = Conv(x, w) p, i = MaxPool<kernel_shape=[2,2],strides=[2,2]>(h) f = Cast<to=1>(i) s = Add(p, f) y = Conv(s, v) }", "conv-channel"),
        ('g (float[n,4,8,8] x) => (float[n,4,6,6] y) <float[16,4,3,3] w, float[16] c, float[16,4,3,3] v, float[4,16,1,1] u> { z = Conv(x, v) h = com.microsoft.FusedConv<activation="Relu">(x, w, c, z) y = Conv(h, u) }', "conv-channel"),
    ],
)  # fmt: skip
def test_what_would_be_wrong_is_pinned(text: str, kind: str) -> None:
    assert not cuttable(model(text, weights={"none": np.zeros(0, np.int64)} if "none" in text else {}), kind)


def test_a_quantized_activation_between_its_pair_is_still_zero() -> None:
    source = model(f"g (float[n,s,8] x) => (float[n,s,8] y) <{WEIGHTS}, float sc = {{0.02}}, uint8 zp = {{128}}> {{ h = MatMul(x, a) q = QuantizeLinear(h, sc, zp) f = DequantizeLinear(q, sc, zp) o = Sigmoid(b) y = MatMul(f, o) }}")  # fmt: skip
    assert cuttable(source, "ffn-channel")
    assert_right_or_refused(source, "ffn-channel", of_lengths(3))


def test_names_of_copies_are_free() -> None:
    text = f"""
    g (float[n,s,8] x) => (float[n,s,8] y)
      <{WEIGHTS}, float[32,8] b2, float[8,32] a2, float[32] v, int64[4] t = {{0,0,4,8}}, int64[3] f = {{0,0,32}}>
    {{ h = MatMul(x, a) i = Add(h, v) v_cut = Relu(i) cut_shape_0 = Reshape(v_cut, t) q = Sigmoid(cut_shape_0)
       w = Reshape(q, f) z = MatMul(w, b) j = MatMul(z, a2) k = Add(j, v) l = Relu(k) y = MatMul(l, b2) }}
    """
    source = model(text)
    cut = prune(source, {"ffn-channel": 0.5})
    names = [value.name for node in cut.model.graph for value in node.outputs] + list(
        cut.model.graph.initializers
    )
    assert len(set(names)) == len(names)
