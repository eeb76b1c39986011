"""Fused attention and rotary embedding, of ONNX and of ONNX Runtime."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from helpers import assert_prunes, model, prune, reasons, structures, summary, the

RNG = np.random.default_rng(0)


def attribute(target: ir.Model, op_type: str, name: str) -> float | int:
    (node,) = [node for node in target.graph if node.op_type == op_type]
    return node.attributes[name].value


# --- Attention of opset 23


FLAT = """
g (float[B,S,12] x) => (float[B,S,12] y)
  <float[12,{q}] wq, float[12,{k}] wk, float[12,{v}] wv, float[{o},12] wo>
{{ q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)  a = Attention<{attributes}>(q, k, v)  y = MatMul(a, wo) }}
"""


def test_flat_attention_with_groups() -> None:
    text = FLAT.format(q=48, k=16, v=12, o=36, attributes="q_num_heads=6, kv_num_heads=2, is_causal=1")
    source = model(text, opset=23)
    assert summary(source) == [("kv-group", 2), ("qk-pair", 8), ("query-head", 3), ("value-channel", 6)]
    group = the(source, "kv-group").atom.size
    assert [outer.size for outer in the(source, "query-head").outers] == [group]
    for kind in ("kv-group", "query-head", "qk-pair", "value-channel"):
        assert_prunes(source, {kind: 0.5})
    cut = assert_prunes(source, {"query-head": 1 / 3, "kv-group": 0.5, "qk-pair": 0.5, "value-channel": 0.5})
    assert attribute(cut.model, "Attention", "q_num_heads") == 2
    assert attribute(cut.model, "Attention", "kv_num_heads") == 1


def test_the_default_scale_stays_that_of_the_source_when_channels_go() -> None:
    source = model(FLAT.format(q=32, k=32, v=32, o=32, attributes="q_num_heads=4, kv_num_heads=4"), opset=23)
    cut = assert_prunes(source, {"qk-pair": 0.5})
    assert attribute(cut.model, "Attention", "scale") == pytest.approx(1 / math.sqrt(8))
    assert (
        "scale"
        not in next(
            n for n in prune(source, {"query-head": 0.5}).model.graph if n.op_type == "Attention"
        ).attributes
    )


def test_a_scale_that_is_given_stays() -> None:
    attributes = "q_num_heads=4, kv_num_heads=4, scale=0.7"
    cut = assert_prunes(
        model(FLAT.format(q=32, k=32, v=32, o=32, attributes=attributes), opset=23), {"qk-pair": 0.5}
    )
    assert attribute(cut.model, "Attention", "scale") == pytest.approx(0.7)


def test_heads_that_do_not_divide_into_groups_are_refused() -> None:
    source = model(FLAT.format(q=24, k=16, v=16, o=24, attributes="q_num_heads=3, kv_num_heads=2"), opset=23)
    assert summary(source) == []
    assert "3 query heads do not divide into 2 groups (Attention a)" in reasons(source)


SPLIT = """
g (float[B,S,12] x, float[B,2,P,8] past_k, float[B,2,P,6] past_v, float[S,T] mask)
  => (float[B,S,12] y, float[B,2,T,8] present_k, float[B,2,T,6] present_v)
  <float[12,48] wq, float[12,16] wk, float[12,12] wv, float[36,12] wo, int64[4] qs = {0,0,6,8}, int64[4] ks = {0,0,2,8},
   int64[4] vs = {0,0,2,6}, int64[3] merge = {0,0,-1}>
{
    q0 = MatMul(x, wq)  q1 = Reshape(q0, qs)  q = Transpose<perm=[0,2,1,3]>(q1)
    k0 = MatMul(x, wk)  k1 = Reshape(k0, ks)  k = Transpose<perm=[0,2,1,3]>(k1)
    v0 = MatMul(x, wv)  v1 = Reshape(v0, vs)  v = Transpose<perm=[0,2,1,3]>(v1)
    a, present_k, present_v = Attention(q, k, v, mask, past_k, past_v)
    t = Transpose<perm=[0,2,1,3]>(a)  r = Reshape(t, merge)  y = MatMul(r, wo)
}
"""


def test_attention_with_a_cache() -> None:
    source = model(SPLIT, opset=23)
    # Channels of keys and values live in the caches; they are state, so they may go on request.
    assert summary(source) == [("kv-group", 2), ("qk-pair", 8), ("query-head", 3), ("value-channel", 6)]
    assert the(source, "kv-group").interface == ["past_k", "past_v", "present_k", "present_v"]
    assert the(source, "query-head").interface == []
    assert the(source, "value-channel").interface == ["past_v", "present_v"]
    rng = np.random.default_rng(3)
    feeds = {
        "x": rng.standard_normal((2, 5, 12)).astype(np.float32),
        "past_k": rng.standard_normal((2, 2, 3, 8)).astype(np.float32),
        "past_v": rng.standard_normal((2, 2, 3, 6)).astype(np.float32),
        "mask": rng.standard_normal((5, 8)).astype(np.float32),
    }
    for kind in ("query-head", "kv-group", "qk-pair", "value-channel"):
        assert_prunes(source, {kind: 0.5}, feeds=feeds)
    cut = assert_prunes(source, {"kv-group": 0.5, "query-head": 1 / 3}, feeds=feeds)
    shapes = {value.name: list(value.shape or []) for value in cut.model.graph.inputs}
    assert shapes["past_k"][1] == 1 and shapes["past_v"][1] == 1


def test_attention_on_an_unknown_number_of_heads_is_refused() -> None:
    source = model("""
        g (float[B,H,S,8] q, float[B,H,S,8] k, float[B,S,12] x) => (float[B,H,S,8] y)
          <float[12,8] w, float[8,8] o, int64[1] one = {1}>
        { h = MatMul(x, w)  v = Unsqueeze(h, one)  a = Attention(q, k, v)  y = MatMul(a, o) }
        """, opset=23)  # fmt: skip
    assert summary(source) == []
    assert "the number of heads is not known (Attention a)" in reasons(source)


# --- RotaryEmbedding


ROTARY = """
g (float[B,S,12] x, int64[B,S] positions) => (float[B,S,12] y)
  <float[12,64] wq, float[12,64] wk, float[12,64] wv, float[64,12] wo, float[20,{pairs}] cos, float[20,{pairs}] sin>
{{
    q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
    qr = {rotary}(q, {order})  kr = {rotary}(k, {order})
    a = Attention<q_num_heads=4, kv_num_heads=4>(qr, kr, v)  y = MatMul(a, wo)
}}
"""
DOMAINS = {"RotaryEmbedding": "cos, sin, positions", "com.microsoft.RotaryEmbedding": "positions, cos, sin"}
POSITIONS = {
    "x": RNG.standard_normal((2, 5, 12)).astype(np.float32),
    "positions": RNG.integers(0, 20, (2, 5)).astype(np.int64),
}


@pytest.mark.parametrize("rotary", DOMAINS)
@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_pairs_go_with_their_columns_of_the_tables(rotary: str, interleaved: int) -> None:
    if rotary == "RotaryEmbedding":
        call, order = f"{rotary}<num_heads=4, interleaved={interleaved}>", DOMAINS[rotary]
    else:
        call, order = f"{rotary}<num_heads=4, interleaved={interleaved}>", DOMAINS[rotary]
    source = model(ROTARY.format(pairs=8, rotary=call, order=order), opset=23)
    assert ("qk-pair", 8) in summary(source)
    names = {place.use.value.name for place in the(source, "qk-pair").places}
    assert names == {"wq", "wk", "cos", "sin"}
    cut = assert_prunes(source, {"qk-pair": 0.5}, feeds=POSITIONS)
    assert cut.model.graph.initializers["cos"].shape == (20, 4)
    assert_prunes(source, {"query-head": 0.5, "value-channel": 0.5}, feeds=POSITIONS)


@pytest.mark.parametrize("rotary", DOMAINS)
def test_a_partial_rotation_leaves_channels_that_are_passed(rotary: str) -> None:
    call = f"{rotary}<num_heads=4, rotary_embedding_dim=8>"
    source = model(ROTARY.format(pairs=4, rotary=call, order=DOMAINS[rotary]), opset=23)
    assert [size for kind, size in summary(source) if kind == "qk-pair"] == [4, 8]
    passed, pairs = (
        next(s for s in structures(source) if s.kind == "qk-pair" and s.size == n) for n in (8, 4)
    )
    assert_prunes(source, {passed.id: 0.5}, feeds=POSITIONS)
    cut = assert_prunes(source, {pairs.id: 0.5}, feeds=POSITIONS)
    rotations = [node for node in cut.model.graph if node.op_type == "RotaryEmbedding"]
    assert [node.attributes["rotary_embedding_dim"].as_int() for node in rotations] == [4, 4]


def test_a_flat_rotation_without_a_head_count_is_refused() -> None:
    source = model(
        ROTARY.format(pairs=8, rotary="com.microsoft.RotaryEmbedding", order="positions, cos, sin"), opset=23
    )
    assert not [kind for kind, _ in summary(source) if kind in ("qk-pair", "query-head")]
    assert "a flat RotaryEmbedding without num_heads (RotaryEmbedding qr)" in reasons(source)


# --- GroupQueryAttention


GQA = """
g (float[B,S,12] x, float[B,2,P,16] past_k, float[B,2,P,16] past_v, int32[B] last, int32 total)
  => (float[B,S,12] y, float[B,2,T,16] present_k, float[B,2,T,16] present_v)
  <{weights}, float[96,12] wo{tables}>
{{
    {projections}
    a, present_k, present_v = com.microsoft.GroupQueryAttention<num_heads=6, kv_num_heads=2{rotary}>
        ({inputs}, past_k, past_v, last, total{caches})
    y = MatMul(a, wo)
}}
"""
SEPARATE = {
    "weights": "float[12,96] wq, float[12,32] wk, float[12,32] wv",
    "projections": "q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)",
    "inputs": "q, k, v",
}
PACKED = {
    "weights": "float[12,160] w, float[160] b",
    "projections": "h = MatMul(x, w)  q = Add(h, b)",
    "inputs": "q, , ",
}
PLAIN = {"tables": "", "rotary": "", "caches": ""}
WITH_ROTARY = {
    "tables": ", float[20,8] cos, float[20,8] sin",
    "rotary": ", do_rotary=1",
    "caches": ", cos, sin",
}
STEP = {
    "x": RNG.standard_normal((2, 1, 12)).astype(np.float32),
    "past_k": RNG.standard_normal((2, 2, 4, 16)).astype(np.float32),
    "past_v": RNG.standard_normal((2, 2, 4, 16)).astype(np.float32),
    "last": np.array([4, 4], np.int32),
    "total": np.array(5, np.int32),
}


@pytest.mark.parametrize("projections", [SEPARATE, PACKED], ids=["separate", "packed"])
@pytest.mark.parametrize("rotary", [PLAIN, WITH_ROTARY], ids=["plain", "rotary"])
def test_group_query_attention(projections: dict[str, str], rotary: dict[str, str]) -> None:
    source = model(GQA.format(**projections, **rotary))
    assert summary(source) == [("kv-group", 2), ("query-head", 3)]
    assert the(source, "kv-group").interface == ["past_k", "past_v", "present_k", "present_v"]
    if projections is SEPARATE:
        assert len(the(source, "query-head").outers) == 1
    assert "the kernel of GroupQueryAttention fixes the head size" in reasons(source)
    cut = assert_prunes(source, {"query-head": 1 / 3}, feeds=STEP)
    assert attribute(cut.model, "GroupQueryAttention", "num_heads") == 4
    assert attribute(cut.model, "GroupQueryAttention", "kv_num_heads") == 2
    cut = assert_prunes(source, {"query-head": 1 / 3, "kv-group": 0.5}, feeds=STEP)
    assert attribute(cut.model, "GroupQueryAttention", "num_heads") == 2
    assert attribute(cut.model, "GroupQueryAttention", "kv_num_heads") == 1


# --- MultiHeadAttention


MHA = """
g (float[B,S,12] x) => (float[B,S,12] y)
  <float[12,32] wq, float[12,32] wk, float[12,24] wv, float[24,12] wo{bias}>
{{
    q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
    a = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v{given})  y = MatMul(a, wo)
}}
"""


@pytest.mark.parametrize(("bias", "given"), [("", ""), (", float[88] b", ", b")])
def test_multi_head_attention(bias: str, given: str) -> None:
    source = model(MHA.format(bias=bias, given=given))
    assert summary(source) == [("qk-pair", 8), ("query-head", 4), ("value-channel", 6)]
    for kind in ("query-head", "qk-pair", "value-channel"):
        assert_prunes(source, {kind: 0.5})
    cut = assert_prunes(source, {"query-head": 0.5, "qk-pair": 0.5, "value-channel": 0.5})
    assert attribute(cut.model, "MultiHeadAttention", "num_heads") == 2
    assert attribute(cut.model, "MultiHeadAttention", "scale") == pytest.approx(1 / math.sqrt(8))
    if bias:
        assert cut.model.graph.initializers["b"].shape == (2 * (4 + 4 + 3),)


def test_multi_head_attention_with_a_cache() -> None:
    source = model("""
        g (float[B,S,12] x, float[B,4,P,8] past_k, float[B,4,P,6] past_v)
          => (float[B,S,12] y, float[B,4,T,8] present_k, float[B,4,T,6] present_v)
          <float[12,32] wq, float[12,32] wk, float[12,24] wv, float[24,12] wo>
        {
            q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
            a, present_k, present_v = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v, , , , past_k, past_v)
            y = MatMul(a, wo)
        }
        """)
    assert the(source, "query-head").interface == ["past_k", "past_v", "present_k", "present_v"]
    assert not [pin for kind in ("query-head", "qk-pair", "value-channel") for pin in the(source, kind).pins]


def test_groups_of_one_weight_that_holds_queries_beside_their_key_and_value() -> None:
    """`kv*(rep+1+1)*d`, the layout of the newer Falcon models: `kv` covers all of it, `rep` a part."""
    source = model("""
        g (float[B,S,12] x) => (float[B,S,12] y)
          <float[12,80] w, float[48,12] wo, int64[5] shape = {0,0,2,5,8}, int64[3] parts = {3,1,1},
           int64[4] flat_q = {0,0,6,8}, int64[5] wide = {1,1,1,3,1}, int64[4] one = {0,0,2,8}, int64[3] out = {0,0,48}>
        {
            h = MatMul(x, w)  split = Reshape(h, shape)  q, k, v = Split<axis=3>(split, parts)
            qf = Reshape(q, flat_q)  kw = Expand(k, wide)  vw = Expand(v, wide)
            kf = Reshape(kw, flat_q)  vf = Reshape(vw, flat_q)
            qt = Transpose<perm=[0,2,1,3]>(qf)  kt = Transpose<perm=[0,2,3,1]>(kf)  vt = Transpose<perm=[0,2,1,3]>(vf)
            s = MatMul(qt, kt)  p = Softmax(s)  c = MatMul(p, vt)  back = Transpose<perm=[0,2,1,3]>(c)
            f = Reshape(back, out)  y = MatMul(f, wo)
        }
        """)
    assert the(source, "kv-group").size == 2
    assert the(source, "query-head").size == 3
    assert_prunes(source, {"kv-group": 0.5, "query-head": 1 / 3})


def test_multi_head_attention_with_packed_inputs_is_refused() -> None:
    source = model("""
        g (float[B,S,12] x) => (float[B,S,12] y) <float[12,96] w, float[32,12] wo, int64[5] shape = {0,0,4,3,8}>
        { h = MatMul(x, w)  q = Reshape(h, shape)  a = com.microsoft.MultiHeadAttention<num_heads=4>(q)  y = MatMul(a, wo) }
        """)
    assert summary(source) == []
    assert "a MultiHeadAttention with packed inputs (MultiHeadAttention a)" in reasons(source)
