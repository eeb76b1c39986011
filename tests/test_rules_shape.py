"""Operators that rearrange axes: what they keep apart, what they join, and what they cannot follow."""

from __future__ import annotations

import pytest
from helpers import assert_prunes, input_of, model, reasons, summary, the

HEADS = """
g (float[B,S,12] x) => (float[B,S,12] y)
  <float[12,32] wq, float[12,32] wk, float[12,32] wv, float[32,12] wo, {shapes}>
{{
    q0 = MatMul(x, wq)  q1 = Reshape(q0, split)  q = Transpose<perm=[0,2,1,3]>(q1)
    k0 = MatMul(x, wk)  k1 = Reshape(k0, split)  k = Transpose<perm=[0,2,3,1]>(k1)
    v0 = MatMul(x, wv)  v1 = Reshape(v0, split)  v = Transpose<perm=[0,2,1,3]>(v1)
    a = MatMul(q, k)  p = Softmax(a)  o = MatMul(p, v)
    o1 = Transpose<perm=[0,2,1,3]>(o)  o2 = Reshape(o1, merge)  y = MatMul(o2, wo)
}}
"""


@pytest.mark.parametrize(
    "shapes",
    [
        "int64[4] split = {0, 0, 4, 8}, int64[3] merge = {0, 0, 32}",
        "int64[4] split = {0, 0, -1, 8}, int64[3] merge = {0, 0, -1}",
        "int64[4] split = {0, -1, 4, 8}, int64[3] merge = {0, -1, 32}",
        "int64[4] split = {0, 0, 4, -1}, int64[3] merge = {0, 0, 32}",
    ],
)
def test_reshape_splits_heads_from_channels(shapes: str) -> None:
    source = model(HEADS.format(shapes=shapes))
    assert summary(source) == [("qk-pair", 8), ("query-head", 4), ("value-channel", 8)]
    assert len(the(source, "qk-pair").outers) == 1
    for kind in ("query-head", "qk-pair", "value-channel"):
        assert_prunes(source, {kind: 0.5})
    assert_prunes(source, {"query-head": 0.25, "qk-pair": 0.5, "value-channel": 0.75})


def test_reshape_across_the_structure_is_refused() -> None:
    source = model("""
        g (float[N,12] x) => (float[N,12] y)
          <float[12,12] w, float[12,12] v, int64[3] first = {-1, 4, 3}, int64[3] second = {-1, 3, 4},
           int64[2] flat = {-1, 12}>
        { h = MatMul(x, w)  a = Reshape(h, first)  r = Relu(a)  b = Reshape(r, second)  c = Relu(b)
          f = Reshape(c, flat)  y = MatMul(f, v) }
        """)
    assert summary(source) == []
    assert "reshaped across its structure: factors of size" in reasons(source)


def test_reshape_to_a_shape_from_data_is_refused() -> None:
    source = model("""
        g (float[4,12] x, int64[2] shape) => (float[N,M] y) <float[12,12] w, float[12,12] v>
        { h = MatMul(x, w)  a = Reshape(h, shape)  r = Relu(a)  y = MatMul(r, v) }
        """)
    assert summary(source) == []
    assert "the target shape is computed from data (Reshape a)" in reasons(source)


def test_batch_is_not_mistaken_for_heads_of_equal_number() -> None:
    source = model(
        HEADS.format(shapes="int64[4] split = {4, 4, 4, 8}, int64[3] merge = {4, 4, 32}").replace(
            "B,S", "4,4"
        )
    )
    assert summary(source) == [("qk-pair", 8), ("query-head", 4), ("value-channel", 8)]
    assert_prunes(source, {"query-head": 0.5, "qk-pair": 0.5})


def test_flatten_keeps_channels_apart_from_space() -> None:
    source = model("""
        g (float[N,3,4,4] x) => (float[N,5] y) <float[8,3,3,3] w, float[128,5] v>
        { h = Conv<pads=[1,1,1,1]>(x, w)  r = Relu(h)  f = Flatten(r)  y = MatMul(f, v) }
        """)
    assert summary(source) == [("conv-channel", 8)]
    cut = assert_prunes(source, {"conv-channel": 0.5})
    assert cut.model.graph.initializers["v"].shape == (64, 5)


def test_unsqueeze_and_squeeze_in_both_forms() -> None:
    new = "int64[2] axes = {1, -1}"
    body = "h = MatMul(x, w) u = Unsqueeze(h, axes) r = Relu(u) s = Squeeze(r, axes) y = MatMul(s, v)"
    source = model(f"g (float[N,6] x) => (float[N,6] y) <float[6,8] w, float[8,6] v, {new}> {{ {body} }}")
    assert_prunes(source, {"ffn-channel": 0.5})
    old = body.replace("Unsqueeze(h, axes)", "Unsqueeze<axes=[1,3]>(h)").replace(
        "Squeeze(r, axes)", "Squeeze<axes=[1,-1]>(r)"
    )
    source = model(f"g (float[N,6] x) => (float[N,6] y) <float[6,8] w, float[8,6] v> {{ {old} }}", opset=11)
    assert_prunes(source, {"ffn-channel": 0.5})


def test_expand_repeats_kv_heads() -> None:
    """The factor that Expand makes is born there: it holds weights on the query side only."""
    source = model("""
        g (float[B,S,12] x) => (float[B,S,12] y)
          <float[12,48] wq, float[12,16] wk, float[12,16] wv, float[48,12] wo, int64[4] q_shape = {0, 0, 6, 8},
           int64[4] kv_shape = {0, 0, 2, 8}, int64[1] two = {2}, int64[5] repeat = {1, 1, 3, 1, 1},
           int64[4] all = {0, 6, -1, 8}, int64[3] merge = {0, 0, 48}>
        {
            q0 = MatMul(x, wq)  q1 = Reshape(q0, q_shape)  q = Transpose<perm=[0,2,1,3]>(q1)
            k0 = MatMul(x, wk)  k1 = Reshape(k0, kv_shape)  k2 = Transpose<perm=[0,2,1,3]>(k1)
            v0 = MatMul(x, wv)  v1 = Reshape(v0, kv_shape)  v2 = Transpose<perm=[0,2,1,3]>(v1)
            k3 = Unsqueeze(k2, two)  k4 = Expand(k3, repeat)  k = Reshape(k4, all)
            v3 = Unsqueeze(v2, two)  v4 = Expand(v3, repeat)  v = Reshape(v4, all)
            kt = Transpose<perm=[0,1,3,2]>(k)  a = MatMul(q, kt)  p = Softmax(a)  o = MatMul(p, v)
            o1 = Transpose<perm=[0,2,1,3]>(o)  o2 = Reshape(o1, merge)  y = MatMul(o2, wo)
        }
        """)
    assert summary(source) == [("kv-group", 2), ("qk-pair", 8), ("query-head", 3), ("value-channel", 8)]
    assert len(the(source, "query-head").outers) == 1
    cut = assert_prunes(source, {"query-head": 1 / 3})
    assert input_of(cut.model, "Expand", 1).tolist() == [1, 1, 2, 1, 1]
    assert cut.model.graph.initializers["wk"].shape == (12, 16)
    assert_prunes(source, {"kv-group": 0.5})
    assert_prunes(source, {"kv-group": 0.5, "query-head": 1 / 3, "qk-pair": 0.5, "value-channel": 0.5})


def test_expand_to_a_shape_from_data_is_refused() -> None:
    source = model("""
        g (float[4,6] x, int64[2] shape) => (float[N,M] y) <float[6,8] w, float[8,6] v>
        { h = MatMul(x, w)  e = Expand(h, shape)  y = MatMul(e, v) }
        """)
    assert summary(source) == []
    assert "the target shape is computed from data (Expand e)" in reasons(source)


def test_tile_makes_a_new_outer_factor() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y) <float[6,8] w, float[24,6] v, int64[2] repeats = {1, 3}>
        { h = MatMul(x, w)  t = Tile(h, repeats)  r = Relu(t)  y = MatMul(r, v) }
        """)
    assert ("ffn-channel", 8) in summary(source)
    cut = assert_prunes(source, {the(source, "ffn-channel").id: 0.5})
    assert cut.model.graph.initializers["v"].shape == (12, 6)


def test_tile_by_data_is_refused() -> None:
    source = model("""
        g (float[N,6] x, int64[2] repeats) => (float[N,M] y) <float[6,8] w, float[8,6] v>
        { h = MatMul(x, w)  t = Tile(h, repeats)  y = MatMul(t, v) }
        """)
    assert summary(source) == []
    assert "the repeats are computed at run time (Tile t)" in reasons(source)


def test_constant_of_shape_takes_part_in_what_it_meets() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y) <float[6,8] w, float[8,6] v, int64[1] n = {8}>
        { h = MatMul(x, w)  c = ConstantOfShape<value = float[1] {0.5}>(n)  s = Add(h, c)  y = MatMul(s, v) }
        """)
    cut = assert_prunes(source, {"ffn-channel": 0.5})
    assert input_of(cut.model, "ConstantOfShape", 0).tolist() == [4]


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space_keeps_the_channels_that_are_left(mode: str) -> None:
    source = model(f"""
        g (float[N,3,4,4] x) => (float[N,2,8,8] y) <float[24,3,1,1] w, float[2,6,1,1] v>
        {{ h = Conv(x, w)  r = Relu(h)  d = DepthToSpace<blocksize=2, mode="{mode}">(r)  y = Conv(d, v) }}
        """)
    assert summary(source) == [("conv-channel", 6)]
    assert reasons(source).count("rearranged into space") > 0
    assert_prunes(source, {"conv-channel": 0.5})


def test_space_to_depth_multiplies_channels() -> None:
    source = model("""
        g (float[N,3,4,4] x) => (float[N,2,2,2] y) <float[6,3,1,1] w, float[2,24,1,1] v>
        { h = Conv(x, w)  r = Relu(h)  d = SpaceToDepth<blocksize=2>(r)  y = Conv(d, v) }
        """)
    assert summary(source) == [("conv-channel", 6)]
    assert_prunes(source, {"conv-channel": 0.5})
