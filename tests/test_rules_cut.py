"""Operators that join, cut and select along an axis."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_prunes, input_of, model, reasons, structures, summary, the

from onnx_autoglm.cut import analyse


def ffn(body: str, constants: str = "", *, hidden: int = 16, opset: int = 20, extra: str = "") -> object:
    """`h`, 16 channels made by a weight, to `r`, which a weight contracts."""
    return model(
        f"g (float[N,6] x{extra}) => (float[N,6] y) <float[6,16] w, float[{hidden},6] v{', ' * bool(constants)}{constants}>"
        f" {{ h = MatMul(x, w)  {body}  y = MatMul(r, v) }}",
        opset=opset,
    )


# --- fused gate and up: three ways to cut an axis in two


@pytest.mark.parametrize(
    ("body", "constants", "opset"),
    [
        ("a, b = Split<axis=1, num_outputs=2>(h)  r = Mul(a, b)", "", 20),
        ("a, b = Split<axis=-1>(h, s)  r = Mul(a, b)", "int64[2] s = {8, 8}", 13),
        ("a, b = Split<axis=1>(h)  r = Mul(a, b)", "", 13),
        ("a, b = Split<axis=1, split=[8, 8]>(h)  r = Mul(a, b)", "", 11),
        ("a = Slice(h, o, e, d)  b = Slice(h, e, m, d)  r = Mul(a, b)",
         "int64[1] o={0}, int64[1] e={8}, int64[1] m={9223372036854775807}, int64[1] d={1}", 20),
        ("a = Slice(h, o, e, d)  b = Slice(h, e, o2, d)  r = Mul(a, b)",
         "int64[1] o={-16}, int64[1] e={-8}, int64[1] o2={2147483647}, int64[1] d={-1}", 20),
        (("a = Slice<axes=[1], starts=[0], ends=[8]>(h)  b = Slice<axes=[1], starts=[8], ends=[2147483647]>(h)"
         "  r = Mul(a, b)"), "", 9),
        ("a = Gather<axis=1>(h, i)  b = Gather<axis=1>(h, j)  r = Mul(a, b)",
         "int64[8] i = {0,1,2,3,4,5,6,7}, int64[8] j = {-8,-7,-6,-5,-4,-3,-2,-1}", 20),
        ("a = Slice(h, o, n, d, t)  b = Slice(h, p, n, d, t)  r = Mul(a, b)",
         "int64[1] o={0}, int64[1] p={1}, int64[1] n={16}, int64[1] d={1}, int64[1] t={2}", 20),
        ("a = Gather<axis=1>(h, i)  b = Gather<axis=1>(h, j)  r = Mul(a, b)",
         "int64[8] i = {0,2,4,6,8,10,12,14}, int64[8] j = {1,3,5,7,9,11,13,15}", 20),
    ],
)  # fmt: skip
def test_gate_and_up_are_cut_together(body: str, constants: str, opset: int) -> None:
    source = ffn(body, constants, hidden=8, opset=opset)
    assert summary(source) == [("ffn-channel", 8)]
    cut = assert_prunes(source, {"ffn-channel": 0.5})
    assert cut.model.graph.initializers["w"].shape == (6, 8)
    assert_prunes(source, {"ffn-channel": 0.625})


def test_unequal_parts_are_cut_apart() -> None:
    source = ffn(
        "a, b, c = Split<axis=1>(h, s)  d = Concat<axis=1>(c, b, a)  r = Relu(d)", "int64[3] s = {4, 10, 2}"
    )
    assert summary(source) == [("ffn-channel", 2), ("ffn-channel", 4), ("ffn-channel", 10)]
    four = next(s.id for s in structures(source) if s.size == 4)
    cut = assert_prunes(source, {four: 0.5})
    assert input_of(cut.model, "Split", 1).tolist() == [2, 10, 2]
    assert_prunes(source, {"ffn-channel": 0.5})


def test_parts_that_become_unequal_state_their_sizes() -> None:
    source = ffn("a, b = Split<axis=1, num_outputs=2>(h)  d = Concat<axis=1>(b, a)  r = Relu(d)")
    first = structures(source)[0].id
    cut = assert_prunes(source, {first: 0.5})
    assert input_of(cut.model, "Split", 1).tolist() in ([4, 8], [8, 4])
    old = ffn("a, b = Split<axis=1>(h)  d = Concat<axis=1>(b, a)  r = Relu(d)", opset=11)
    assert_prunes(old, {structures(old)[0].id: 0.5})


def test_split_at_sizes_from_data_is_refused() -> None:
    source = ffn("a, b = Split<axis=1>(h, s)  r = Concat<axis=1>(a, b)", extra=", int64[2] s")
    assert summary(source) == []
    assert "the sizes of the parts are computed at run time (Split a)" in reasons(source)


def test_slice_at_a_bound_from_data_is_refused() -> None:
    source = ffn("r = Slice(h, o, e, d)", "int64[1] o = {0}, int64[1] d = {1}", extra=", int64[1] e")
    assert summary(source) == []
    assert "cut at a bound that is computed at run time (Slice r)" in reasons(source)


def test_slice_backwards_is_refused() -> None:
    source = ffn(
        "r = Slice(h, o, e, d, t)",
        "int64[1] o = {-1}, int64[1] e = {-9223372036854775808}, int64[1] d = {1}, int64[1] t = {-1}",
    )
    assert summary(source) == []
    assert "read backwards (Slice r)" in reasons(source)


def test_a_stride_that_does_not_divide_is_refused() -> None:
    source = ffn(
        "r = Slice(h, o, e, d, t)",
        "int64[1] o={0}, int64[1] e={16}, int64[1] d={1}, int64[1] t={3}",
        hidden=6,
    )
    assert summary(source) == []
    assert "read with a stride of 3 that does not divide it (Slice r)" in reasons(source)


def test_channels_that_a_slice_drops_are_found_but_lead_nowhere() -> None:
    source = ffn("r = Slice(h, o, e, d)", "int64[1] o={4}, int64[1] e={12}, int64[1] d={1}", hidden=8)
    assert summary(source) == [("ffn-channel", 8)]
    cut = assert_prunes(source, {"ffn-channel": 0.5})
    assert cut.model.graph.initializers["w"].shape == (6, 12)


def test_concat_joins_channels() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y) <float[6,8] w1, float[6,4] w2, float[12,6] v>
        { a = MatMul(x, w1)  b = MatMul(x, w2)  c = Concat<axis=-1>(a, b)  r = Relu(c)  y = MatMul(r, v) }
        """)
    assert summary(source) == [("ffn-channel", 4), ("ffn-channel", 8)]
    assert_prunes(source, {"ffn-channel": 0.5})


def test_gather_of_one_index_takes_a_part_of_a_stack() -> None:
    """`[q|k|v]` reshaped to `3*heads*d` and taken apart by Gather."""
    source = model("""
        g (float[B,S,12] x) => (float[B,S,12] y)
          <float[12,96] w, float[96] b, float[32,12] wo, int64[5] shape = {0, 0, 3, 4, 8}, int64[3] merge = {0, 0, 32},
           int64 zero = {0}, int64 one = {1}, int64 two = {2}>
        {
            h0 = MatMul(x, w)  h1 = Add(h0, b)  h2 = Reshape(h1, shape)  h = Transpose<perm=[2,0,3,1,4]>(h2)
            q = Gather(h, zero)  k = Gather(h, one)  v = Gather(h, two)
            kt = Transpose<perm=[0,1,3,2]>(k)  a = MatMul(q, kt)  p = Softmax(a)  o = MatMul(p, v)
            o1 = Transpose<perm=[0,2,1,3]>(o)  o2 = Reshape(o1, merge)  y = MatMul(o2, wo)
        }
        """)
    # One channel axis serves q, k and v: they were never cut apart, so they are one structure.
    assert [kind for kind, _ in summary(source)] == ["qk-pair", "query-head"]
    assert_prunes(source, {"query-head": 0.5})
    assert_prunes(source, {"qk-pair": 0.5})


def test_gather_in_no_regular_order_is_refused() -> None:
    source = ffn("r = Gather<axis=1>(h, i)", "int64[4] i = {0, 1, 5, 2}", hidden=4)
    assert summary(source) == []
    assert "selected by constant indices in no regular order (Gather r)" in reasons(source)


def test_gather_at_data_is_refused_along_the_axis_and_allowed_beside_it() -> None:
    source = model("""
        g (int64[N,S] ids) => (float[N,S,6] y) <float[20,8] table, float[8,6] v>
        { h = Gather(table, ids)  r = Relu(h)  y = MatMul(r, v) }
        """)
    assert summary(source) == [("ffn-channel", 8)]
    assert_prunes(source, {"ffn-channel": 0.5})
    source = ffn("r = Gather<axis=1>(h, i)", extra=", int64[16] i")
    assert summary(source) == []
    assert "looked up by an index from data (Gather r)" in reasons(source)


def test_an_embedding_that_feeds_a_product_directly_is_an_activation() -> None:
    source = model("""
        g (int64[N,S] ids) => (float[N,S,6] y) <float[20,8] table, float[8,12] w, float[12,6] v>
        { e = Gather(table, ids)  h = MatMul(e, w)  r = Relu(h)  y = MatMul(r, v) }
        """)
    assert summary(source) == [("ffn-channel", 8), ("ffn-channel", 12)]
    assert_prunes(source, {"ffn-channel": 0.5})


def test_a_gather_of_nothing_is_no_accident() -> None:
    source = model(
        "g (float[N,6] x) => (float[N,6] y) <float[6,8] w, float[8,6] v, int64[0] i>"
        " { h = MatMul(x, w) n = Gather<axis=1>(h, i) r = Concat<axis=1>(h, n) y = MatMul(r, v) }",
        weights={"i": np.zeros(0, np.int64)},
    )
    assert analyse(source.clone()).found


def test_gather_elements_pins_the_axis_that_it_reads() -> None:
    source = ffn("i = Cast<to=7>(h)  r = GatherElements<axis=1>(h, i)")
    assert summary(source) == []
    assert "looked up by an index from data (GatherElements r)" in reasons(source)


def test_scatter_nd_and_scatter_elements_pin_what_they_write() -> None:
    source = ffn("r = ScatterND(h, i, u)", "int64[1,2] i = {0, 3}, float[1] u = {1.0}")
    assert summary(source) == []
    assert "written at an index from data (ScatterND r)" in reasons(source)
    source = ffn("r = ScatterElements<axis=1>(h, i, h)", extra=", int64[N,16] i")
    assert summary(source) == []
    assert "looked up by an index from data (ScatterElements r)" in reasons(source)


def test_scatter_nd_along_the_batch_leaves_channels_free() -> None:
    source = ffn("u = Gather(h, z)  r = ScatterND(h, i, u)", "int64[1,1] i = {1}, int64[1] z = {0}")
    assert summary(source) == [("ffn-channel", 16)]
    assert_prunes(source, {"ffn-channel": 0.5})


def test_top_k_is_refused_along_channels() -> None:
    source = ffn("r, i = TopK<axis=1>(h, k)", "int64[1] k = {4}", hidden=4)
    assert summary(source) == []
    assert "selected along by TopK (TopK r)" in reasons(source)


def test_arg_max_is_refused_and_its_index_used_as_a_number_too() -> None:
    source = ffn("i = ArgMax<axis=1>(h)  f = Cast<to=1>(i)  r = Mul(h, f)")
    assert summary(source) == []
    assert "selected along by ArgMax (ArgMax i)" in reasons(source)
    assert "an index selected along it is used as a number (Mul r)" in reasons(source)


@pytest.mark.parametrize(
    ("body", "constants", "reason"),
    [
        ("r = CumSum(h, a)", "int64 a = {1}", "summed up along (CumSum r)"),
        ("r = Trilu(h)", "", "cut to a triangle (Trilu r)"),
        ("p = Pad<mode=\"reflect\">(h, s)  r = Identity(p)", "int64[4] s = {0, 1, 0, 1}", "padded (reflect) (Pad p)"),
    ],
)  # fmt: skip
def test_refused_along_channels(body: str, constants: str, reason: str) -> None:
    source = ffn(body, constants, hidden=18 if "Pad" in body else 16)
    assert summary(source) == []
    assert reason in reasons(source)


def test_cumsum_along_positions_leaves_channels_free() -> None:
    source = ffn("r = CumSum(h, a)", "int64 a = {0}")
    assert_prunes(source, {"ffn-channel": 0.5})


def test_padding_adds_parts_that_stay() -> None:
    source = ffn("p = Pad(h, s, c)  r = Relu(p)", "int64[4] s = {0, 3, 0, 2}, float c = {0.5}", hidden=21)
    assert summary(source) == [("ffn-channel", 16)]
    cut = assert_prunes(source, {"ffn-channel": 0.5})
    assert cut.model.graph.initializers["v"].shape == (13, 6)
    old = ffn("p = Pad<pads=[0, 3, 0, 2]>(h)  r = Relu(p)", hidden=21, opset=8)
    assert_prunes(old, {"ffn-channel": 0.5})


def test_a_sequence_is_taken_apart_again() -> None:
    source = ffn(
        "q = SplitToSequence<axis=1>(h, s)  a = SequenceAt(q, o)  b = SequenceAt(q, i)  r = Mul(a, b)",
        "int64 s = {8}, int64 o = {0}, int64 i = {1}",
        hidden=8,
    )
    assert summary(source) == [("ffn-channel", 8)]
    assert_prunes(source, {"ffn-channel": 0.5})


def test_a_partial_rotation_cuts_channels_in_two() -> None:
    """Slice 16 into 8+8, rotate the first half in pairs of stride 2, join again."""
    source = model("""
        g (float[B,S,12] x) => (float[B,S,S2] y)
          <float[12,64] wq, float[12,64] wk, float[4] cos, float[4] sin, int64[4] shape = {0, 0, 4, 16},
           int64[1] o = {0}, int64[1] i = {1}, int64[1] half = {8}, int64[1] all = {16}, int64[1] last = {3},
           int64[1] two = {2}, int64[1] four = {-1}, int64[4] flat = {0, 0, 4, 8}, int64[1] red = {1}>
        {
            q0 = MatMul(x, wq)  q = Reshape(q0, shape)  k0 = MatMul(x, wk)  k = Reshape(k0, shape)
            qr = Slice(q, o, half, last)  qp = Slice(q, half, all, last)
            kr = Slice(k, o, half, last)  kp = Slice(k, half, all, last)
            q1 = Slice(qr, o, half, last, two)  q2 = Slice(qr, i, half, last, two)
            k1 = Slice(kr, o, half, last, two)  k2 = Slice(kr, i, half, last, two)
            a1 = Mul(q1, cos)  a2 = Mul(q2, sin)  a = Sub(a1, a2)  b1 = Mul(q1, sin)  b2 = Mul(q2, cos)  b = Add(b1, b2)
            c1 = Mul(k1, cos)  c2 = Mul(k2, sin)  c = Sub(c1, c2)  d1 = Mul(k1, sin)  d2 = Mul(k2, cos)  d = Add(d1, d2)
            au = Unsqueeze(a, four)  bu = Unsqueeze(b, four)  ab = Concat<axis=-1>(au, bu)  abf = Reshape(ab, flat)
            cu = Unsqueeze(c, four)  du = Unsqueeze(d, four)  cd = Concat<axis=-1>(cu, du)  cdf = Reshape(cd, flat)
            qq = Concat<axis=-1>(abf, qp)  kk = Concat<axis=-1>(cdf, kp)
            qt = Transpose<perm=[0,2,1,3]>(qq)  kt = Transpose<perm=[0,2,3,1]>(kk)
            s = MatMul(qt, kt)  y = ReduceSum<keepdims=0>(s, red)
        }
        """)
    assert ("qk-pair", 4) in summary(source) and ("qk-pair", 8) in summary(source)
    pairs = next(s for s in structures(source) if s.size == 4 and s.kind == "qk-pair")
    assert {place.use.value.name for place in pairs.places} == {"wq", "wk", "cos", "sin"}
    cut = assert_prunes(source, {"qk-pair": 0.5})
    assert cut.model.graph.initializers["cos"].shape == (2,)
    assert cut.model.graph.initializers["wq"].shape == (12, 32)


def test_the_structure_of_a_stack_of_experts_varies_with_the_expert() -> None:
    source = model("""
        g (float[N,6] x) => (float[E,N,6] y) <float[4,6,8] up, float[4,8,6] down>
        { h = MatMul(x, up)  r = Relu(h)  y = MatMul(r, down) }
        """)
    channels = the(source, "expert-channel")
    assert [outer.size for outer in channels.outers] == [4]
    assert_prunes(source, {"expert-channel": 0.5})


def test_the_inner_factor_of_a_stride_is_never_cut() -> None:
    """Every second channel is read by one weight and all of them by another: pairs may go, halves may not."""
    source = model("""
        g (float[N,6] x) => (float[N,6] y)
          <float[6,16] w, float[8,6] v, float[16,6] u, int64[1] o = {0}, int64[1] e = {16}, int64[1] d = {1},
           int64[1] t = {2}>
        { h = MatMul(x, w)  s = Slice(h, o, e, d, t)  a = MatMul(s, v)  b = MatMul(h, u)  y = Add(a, b) }
        """)
    assert summary(source) == [("ffn-channel", 8)]
    assert_prunes(source, {"ffn-channel": 0.5})
