"""What a structure is called, what it may vary with, what it costs, and what it changes outside."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    assert_equivalent,
    assert_prunes,
    initializer,
    model,
    prune,
    reasons,
    structures,
    summary,
    the,
)

from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.cut import cut_model

FUSED = """
g (float[B,S,12] x) => (float[B,S,12] y)
  <float[12,80] w, float[80] b, float[48,12] wo, int64[3] parts = {48, 16, 16}, int64[4] qs = {0, 0, 6, 8},
   int64[4] ks = {0, 0, 2, 8}, int64[1] two = {2}, int64[5] repeat = {1, 1, 3, 1, 1}, int64[4] all = {0, 6, -1, 8},
   int64[3] merge = {0, 0, 48}>
{
    h0 = MatMul(x, w)  h = Add(h0, b)  q0, k0, v0 = Split<axis=2>(h, parts)
    q1 = Reshape(q0, qs)  q = Transpose<perm=[0,2,1,3]>(q1)
    k1 = Reshape(k0, ks)  k2 = Transpose<perm=[0,2,1,3]>(k1)  k3 = Unsqueeze(k2, two)  k4 = Expand(k3, repeat)
    v1 = Reshape(v0, ks)  v2 = Transpose<perm=[0,2,1,3]>(v1)  v3 = Unsqueeze(v2, two)  v4 = Expand(v3, repeat)
    k = Reshape(k4, all)  v = Reshape(v4, all)
    kt = Transpose<perm=[0,1,3,2]>(k)  a = MatMul(q, kt)  p = Softmax(a)  o = MatMul(p, v)
    o1 = Transpose<perm=[0,2,1,3]>(o)  o2 = Reshape(o1, merge)  y = MatMul(o2, wo)
}
"""


def test_a_fused_projection_tells_groups_from_query_heads() -> None:
    source = model(FUSED)
    assert summary(source) == [("kv-group", 2), ("qk-pair", 8), ("query-head", 3), ("value-channel", 8)]
    for kind in ("kv-group", "qk-pair", "query-head", "value-channel"):
        assert_prunes(source, {kind: 1 / 3 if kind == "query-head" else 0.5})


def test_heads_interleaved_with_their_parts() -> None:
    """`heads*(q+k+v)`, the projection of ChatGLM-6B."""
    source = model("""
        g (float[B,S,12] x) => (float[B,S,12] y)
          <float[12,96] w, float[32,12] wo, int64[4] shape = {0, 0, 4, 24}, int64[3] merge = {0, 0, -1}>
        {
            h0 = MatMul(x, w)  h1 = Reshape(h0, shape)  h = Transpose<perm=[0,2,1,3]>(h1)
            q, k, v = Split<axis=-1, num_outputs=3>(h)  kt = Transpose<perm=[0,1,3,2]>(k)  a = MatMul(q, kt)
            p = Softmax(a)  o = MatMul(p, v)  o1 = Transpose<perm=[0,2,1,3]>(o)  o2 = Reshape(o1, merge)
            y = MatMul(o2, wo)
        }
        """)
    assert summary(source) == [("qk-pair", 8), ("query-head", 4), ("value-channel", 8)]
    assert [outer.size for outer in the(source, "value-channel").outers] == [4]
    for kind in ("query-head", "qk-pair", "value-channel"):
        assert_prunes(source, {kind: 0.5})


CACHED = """
g (float[B,S,12] x, float[B,4,P,8] past_k, float[B,4,P,8] past_v)
  => (float[B,S,12] y, float[B,4,T,8] present_k, float[B,4,T,8] present_v{more})
  <float[12,32] wq, float[12,32] wk, float[12,32] wv, float[32,12] wo, int64[4] shape = {{0, 0, 4, 8}},
   int64[3] merge = {{0, 0, 32}}>
{{
    q0 = MatMul(x, wq)  q1 = Reshape(q0, shape)  q = Transpose<perm=[0,2,1,3]>(q1)
    k0 = MatMul(x, wk)  k1 = Reshape(k0, shape)  k = Transpose<perm=[0,2,1,3]>(k1)
    v0 = MatMul(x, wv)  v1 = Reshape(v0, shape)  v = Transpose<perm=[0,2,1,3]>(v1)
    present_k = Concat<axis=2>(past_k, k)  present_v = Concat<axis=2>(past_v, v)
    kt = Transpose<perm=[0,1,3,2]>(present_k)  a = MatMul(q, kt)  p = Softmax(a)  o = MatMul(p, present_v)
    o1 = Transpose<perm=[0,2,1,3]>(o)  o2 = Reshape(o1, merge)  y = MatMul(o2, wo){extra}
}}
"""


def test_a_cache_is_state_that_may_change_its_shape() -> None:
    source = model(CACHED.format(more="", extra=""))
    heads = the(source, "query-head")
    assert heads.interface == ["past_k", "past_v", "present_k", "present_v"]
    assert not heads.pins
    cut = assert_prunes(source, {heads.id: 0.5})
    assert [list(value.shape or [])[1] for value in cut.model.graph.inputs][1:] == [2, 2]
    assert {entry["name"] for entry in cut.interfaces} == set(heads.interface)
    (described,) = cut.plan({}).structures
    assert described["interface"] == heads.interface


def test_an_output_that_is_no_cache_pins() -> None:
    source = model(CACHED.format(more=", float[B,4,S,8] heads", extra="  heads = Identity(o)"))
    assert not [kind for kind, _ in summary(source) if kind == "query-head"]
    pins = [str(pin) for pin in the(source, "query-head").pins]
    assert "axis 1 of the graph output heads" in pins


def test_a_graph_interface_pins() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y, float[N,16] r) <float[6,16] w, float[16,6] v>
        { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }
        """)
    assert [str(pin) for pin in the(source, "ffn-channel").pins] == ["axis 1 of the graph output r"]


def test_parameters_are_shared_out_exactly() -> None:
    """The value channels, heads and groups of a fused projection each hold their entries, once."""
    sizes = {s.kind: s.parameters for s in structures(model(FUSED))}
    assert sizes["query-head"] == 12 * 48 + 48 + 48 * 12
    assert sizes["kv-group"] == 12 * 80 + 80 + 48 * 12
    assert sizes["qk-pair"] == (12 + 1) * (48 + 16)
    assert sizes["value-channel"] == (12 + 1) * 16 + 48 * 12


def test_a_choice_among_experts_sets_their_floor() -> None:
    source = model(EXPERTS)
    experts = the(source, "expert")
    assert (experts.size, experts.floor) == (5, 2)


EXPERTS = """
g (float[N,6] x) => (float[N,6] y)
  <float[6,5] router, float[5,6,8] up, float[5,8,6] down, int64[1] k = {2}, int64[1] one = {1}, int64[1] two = {2},
   int64[1] last = {-1}>
{
    logits = MatMul(x, router)  p = Softmax(logits)  best, index = TopK(p, k)
    u = Gather(up, index)  d = Gather(down, index)
    x1 = Unsqueeze(x, one)  x2 = Unsqueeze(x1, one)  h = MatMul(x2, u)  r = Relu(h)  z = MatMul(r, d)
    z1 = Squeeze(z, two)  b = Unsqueeze(best, last)  m = Mul(z1, b)  y = ReduceSum<keepdims=0>(m, one)
}
"""


def test_experts_are_lossy_and_their_channels_are_not() -> None:
    source = model(EXPERTS)
    assert_prunes(source, {"expert-channel": 0.5})
    cut = assert_prunes(source, {"expert": 0.4})
    assert {entry["how"] for entry in cut.lossy} == {"exclude"}
    assert {entry["consumer"] for entry in cut.lossy} == {"p", "best"}
    assert initializer(cut.model, "up").shape == (3, 6, 8)
    assert_prunes(source, {"expert": 0.6, "expert-channel": 0.25})


def test_names_come_from_scopes_and_are_unique() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y)
          <float[6,8] w0, float[8,6] v0, float[6,8] w1, float[8,6] v1>
        { h0 = MatMul(x, w0)  r0 = Relu(h0)  a = MatMul(r0, v0)  h1 = MatMul(a, w1)  r1 = Relu(h1)  y = MatMul(r1, v1) }
        """)
    for layer in (0, 1):
        for name, role in (("w", "up"), ("v", "down")):
            source.graph.initializers[f"{name}{layer}"].name = f"model.layers.{layer}.mlp.{role}.weight"
    ids = [structure.id for structure in structures(source)]
    assert len(set(ids)) == len(ids)
    assert {"0.mlp", "1.mlp"} <= {name.removeprefix("layers.") for name in ids}


def test_no_decision_depends_on_a_name() -> None:
    """The same graph with every name replaced has the same structures."""
    source = model(FUSED)
    renamed = source.clone()
    for index, value in enumerate(list(renamed.graph.initializers.values())):
        value.name = f"n{index}"
    for index, node in enumerate(renamed.graph):
        node.name = f"q{index}"
        for position, output in enumerate(node.outputs):
            if not output.is_graph_output():
                output.name = f"t{index}_{position}"
    assert summary(renamed) == summary(source)


# --- what is not understood


def test_an_unknown_operator_pins_what_it_touches() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y) <float[6,16] w, float[16,6] v, float[6,8] u, float[8,6] t, float[N,16] r>
        { h = MatMul(x, w)  r = test.Mystery(h)  z = MatMul(r, v)  a = MatMul(z, u)  b = Relu(a)  y = MatMul(b, t) }
        """)
    assert summary(source) == [("ffn-channel", 6), ("ffn-channel", 8)]
    assert "no rule for the operator test::Mystery (Mystery r)" in reasons(source)


def test_an_unknown_operator_of_onnx() -> None:
    source = model("""
        g (float[S,B,6] x) => (float[S,B,6] y) <float[6,16] w, float[1,32,16] i, float[1,32,8] r, float[8,6] v, int64[1] one = {1}>
        { h = MatMul(x, w)  a = RNN<hidden_size=32>(h, i, r)  b = Squeeze(a, one)  y = MatMul(b, v) }
        """)
    assert summary(source) == []
    assert "no rule for the operator RNN (RNN a)" in reasons(source)


CONDITION = """
g (float[N,6] x, bool c) => (float[N,6] y) <float[6,16] w, float[16] b, float[16,6] v, float[6,8] u, float[8,6] t,
   float[N,16] r>
{
    h = MatMul(x, w)
    r = If (c) <then_branch = yes () => (float[N,16] p) { p = Add(h, b) },
                else_branch = no () => (float[N,16] q) { q = Relu(h) }>
    z = MatMul(r, v)  a = MatMul(z, u)  d = Relu(a)  y = MatMul(d, t)
}
"""


def test_control_flow_pins_at_its_boundary() -> None:
    source = model(CONDITION)
    assert summary(source) == [("ffn-channel", 6), ("ffn-channel", 8)]
    text = reasons(source)
    assert "captured by the body of If (If r)" in text
    assert "a boundary of control flow (If) (If r)" in text
    feeds = {"x": np.ones((2, 6), np.float32), "c": np.array(True)}
    assert_prunes(source, {"ffn-channel": 0.5}, feeds=feeds)


def test_a_loop_pins_what_it_carries() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y) <float[6,16] w, float[16,6] v, int64 n = {3}, bool c = {1}>
        {
            h = MatMul(x, w)
            r = Loop (n, c, h) <body = step (int64 i, bool go, float[N,16] a) => (bool on, float[N,16] z)
                                { on = Identity(go)  z = Relu(a) }>
            y = MatMul(r, v)
        }
        """)
    assert summary(source) == []
    assert "a boundary of control flow (Loop) (Loop r)" in reasons(source)


def test_a_vector_that_a_body_shares_is_cloned_for_the_graph() -> None:
    source = model(CONDITION.replace("d = Relu(a)", "e = Concat<axis=1>(a, a)  f = Add(e, b)  d0 = Relu(f)  d = Relu(d0)")
                   .replace("float[8,6] t", "float[16,6] t"))  # fmt: skip
    feeds = {"x": np.ones((2, 6), np.float32), "c": np.array(True)}
    free = [s for s in structures(source) if not s.pins]
    cut = prune(source, {s.id: 0.5 for s in free})
    assert_equivalent(source, cut, tolerance=1e-5, feeds=feeds)
    assert initializer(cut.model, "b").shape == (16,)


def test_local_functions_are_inlined() -> None:
    source = model("""
        <ir_version: 10, opset_import: ["": 20, "local": 1]>
        g (float[N,6] x) => (float[N,6] y) <float[6,16] w, float[16,6] v>
        { h = MatMul(x, w)  r = local.silu(h)  y = MatMul(r, v) }
        <opset_import: ["": 20], domain: "local">
        silu (a) => (b) { s = Sigmoid(a)  b = Mul(a, s) }
        """)
    assert not source.functions
    assert summary(source) == [("ffn-channel", 16)]
    assert_prunes(source, {"ffn-channel": 0.5})


# --- selections


def test_rows_of_unequal_counts_are_refused() -> None:
    source = model(FUSED)

    def ragged(found: object) -> Selection:
        selection = Selection()
        channels = next(s for s in found if s.kind == "value-channel")  # type: ignore[attr-defined]
        rows = np.tile(np.arange(8) < 4, (2, 1))
        rows[1, 0] = False
        selection.keep(channels.atom, channels.outers, rows)
        return selection

    with pytest.raises(ValueError, match="the same count, at least one, for every outer index"):
        cut_model(source, ragged)


def test_query_heads_differ_from_group_to_group() -> None:
    source = model(
        FUSED.replace("float[12,80] w, float[80] b,", "float[12,48] wq, float[12,16] wk, float[12,16] wv,")
        .replace("int64[3] parts = {48, 16, 16}, ", "")
        .replace("h0 = MatMul(x, w)  h = Add(h0, b)  q0, k0, v0 = Split<axis=2>(h, parts)",
                 "q0 = MatMul(x, wq)  k0 = MatMul(x, wk)  v0 = MatMul(x, wv)")
    )  # fmt: skip

    def choose(found: object) -> Selection:
        selection = Selection()
        heads = next(s for s in found if s.kind == "query-head")  # type: ignore[attr-defined]
        selection.keep(heads.atom, heads.outers, np.array([[True, False, False], [False, False, True]]))
        return selection

    cut = cut_model(source, choose)
    assert_equivalent(source, cut, tolerance=1e-5)
    whole, kept = initializer(source, "wo"), initializer(cut.model, "wo")
    np.testing.assert_array_equal(kept, np.concatenate([whole[8 * head : 8 * head + 8] for head in (0, 5)]))


def test_selections_vary_with_the_group_in_a_fused_projection() -> None:
    source = model(FUSED)
    for kind in ("query-head", "qk-pair", "value-channel"):
        assert [outer.size for outer in the(source, kind).outers] == [2], kind
        assert_prunes(source, {kind: 1 / 3 if kind == "query-head" else 0.5}, seeds=3)
