"""The proof: it holds for a right cut, and it fails for every wrong one."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from helpers import assert_prunes, model, prove, prune, replayed

from onnx_autoglm.cut import Cut
from onnx_autoglm.passes.check_masked import check_masked
from onnx_autoglm.sliced_tensor import SlicedTensor

FFN = """
g ({dtype}[N,6] x) => ({dtype}[N,6] y) <{dtype}[6,16] w, {dtype}[16] b, {dtype}[16,6] v>
{{ h0 = MatMul(x, w)  h = Add(h0, b)  r = Relu(h)  y = MatMul(r, v) }}
"""
HIDDEN = """
g (int64[B,S] ids) => (float[B,S,10] y)
  <float[10,8] table, float[8,12] up, float[12,8] down, float[8] s, float[8] t, float[8,10] head>
{ e = Gather(table, ids)  n0 = LayerNormalization(e, t)  u = MatMul(n0, up)  r = Relu(u)  d = MatMul(r, down)
  h = Add(e, d)  n = LayerNormalization(h, s)  y = MatMul(n, head) }
"""
EXPERTS = """
g (float[N,6] x) => (float[N,6] y) <float[6,6] router, float[6,6,8] up, float[6,8,6] down, int64[1] k = {2}, int64[1] one = {1}, int64[1] two = {2}, int64[1] last = {-1}>
{
    logits = MatMul(x, router)  p = SCORE(logits)  best, index = TopK(p, k)
    u = Gather(up, index)  d = Gather(down, index)
    x1 = Unsqueeze(x, one)  x2 = Unsqueeze(x1, one)  h = MatMul(x2, u)  r = Relu(h)  z = MatMul(r, d)
    z1 = Squeeze(z, two)  b = Unsqueeze(best, last)  m = Mul(z1, b)  y = ReduceSum<keepdims=0>(m, one)
}
"""


def corrupt(cut: Cut, name: str, axis: int) -> ir.Model:
    """The pruned model with one kept index of one initializer replaced by one that was removed."""
    wrong = cut.model.clone()
    value = wrong.graph.initializers[name]
    tensor = value.const_value
    assert isinstance(tensor, SlicedTensor)
    kept = {at: indices.copy() for at, indices in tensor.kept.items()}
    size = tensor.source.shape[axis]
    row = kept[axis] if kept[axis].ndim == 1 else kept[axis][0]
    row[0] = next(index for index in range(size) if index not in row)
    row.sort()
    value.const_value = SlicedTensor(tensor.source, kept, tensor.outer, name=name)
    return wrong


@pytest.mark.parametrize(("name", "axis"), [("w", 1), ("b", 0), ("v", 0)])
def test_one_wrong_index_is_seen(name: str, axis: int) -> None:
    source = model(FFN.format(dtype="float"))
    cut = prune(source, {"ffn-channel": 0.5})
    assert prove(source, cut, tolerance=1e-5).holds
    proof = prove(source, dataclasses.replace(cut, model=corrupt(cut, name, axis)), tolerance=1e-5)
    assert not proof.holds
    assert proof.difference.output == "y"
    assert proof.difference.relative > 1e-3


def test_a_plan_that_says_something_else_is_seen() -> None:
    source = model(FFN.format(dtype="float"))
    cut = prune(source, {"ffn-channel": 0.5})
    plan = replayed(cut.plan({}))
    kept = plan.removals[0]["kept"]
    kept[-1] = next(index for index in range(16) if index not in kept)
    assert not check_masked(source.clone(), plan, cut.model, tolerance=1e-5).holds


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16", "double"])
def test_every_float_type_is_proved_and_a_wrong_index_seen(dtype: str) -> None:
    source = model(FFN.format(dtype=dtype))
    cut = prune(source, {"ffn-channel": 0.5})
    proof = prove(source, cut, tolerance=1e-5)
    assert proof.holds
    assert proof.precision == ("float32" if "16" in dtype else "as exported")
    assert not prove(source, dataclasses.replace(cut, model=corrupt(cut, "b", 0)), tolerance=1e-5).holds


def test_the_residual_stream_is_proved_and_a_wrong_index_seen() -> None:
    source = model(HIDDEN)
    cut = prune(source, {"hidden": 0.5})
    assert {(entry["consumer"], entry["how"]) for entry in cut.lossy} == {("n0", "gather"), ("n", "gather")}
    assert prove(source, cut, tolerance=1e-5).holds
    for name, axis in (("s", 0), ("table", 1), ("up", 0), ("down", 1), ("head", 0)):
        wrong = dataclasses.replace(cut, model=corrupt(cut, name, axis))
        assert not prove(source, wrong, tolerance=1e-5).holds, name


def test_the_residual_stream_is_not_equal_without_narrowing() -> None:
    """The change is lossy: plainly zeroed slices leave the norms too wide."""
    source = model(HIDDEN)
    cut = prune(source, {"hidden": 0.5})
    assert not prove(source, dataclasses.replace(cut, lossy=[]), tolerance=1e-5).holds


@pytest.mark.parametrize("score", ["Softmax", "Sigmoid"])
def test_experts_are_proved_with_the_others_at_minus_infinity(score: str) -> None:
    source = model(EXPERTS.replace("SCORE", score))
    feeds = {"x": np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)}
    assert_prunes(source, {"expert": 0.5}, seeds=4, feeds=feeds)
    cut = prune(source, {"expert": 0.5})
    for name, axis in (("router", 1), ("up", 0), ("down", 0)):
        wrong = dataclasses.replace(cut, model=corrupt(cut, name, axis))
        assert not prove(source, wrong, tolerance=1e-5, feeds=feeds).holds, name
    assert not prove(source, dataclasses.replace(cut, lossy=[]), tolerance=1e-5, feeds=feeds).holds


def test_at_least_as_many_experts_as_are_chosen_stay() -> None:
    cut = prune(model(EXPERTS.replace("SCORE", "Softmax")), {"expert": 0.95})
    assert cut.model.graph.initializers["up"].shape[0] == 2  # type: ignore[index]


def test_caches_are_cut_on_both_sides_of_the_comparison() -> None:
    source = model("""
        g (float[B,S,6] x, float[B,4,P,8] past) => (float[B,4,S,T] y, float[B,4,T,8] present)
          <float[6,32] wq, float[6,32] wk, int64[4] shape = {0, 0, 4, 8}>
        { q0 = MatMul(x, wq)  q1 = Reshape(q0, shape)  q = Transpose<perm=[0,2,1,3]>(q1)
          k0 = MatMul(x, wk)  k1 = Reshape(k0, shape)  k = Transpose<perm=[0,2,1,3]>(k1)
          present = Concat<axis=2>(past, k)  t = Transpose<perm=[0,1,3,2]>(present)  y = MatMul(q, t) }
        """)
    cut = assert_prunes(source, {"qk-pair": 0.5})
    assert {entry["name"] for entry in cut.interfaces} == {"past", "present"}
    wrong = dataclasses.replace(cut, model=corrupt(cut, "wk", 1))
    assert not prove(source, wrong, tolerance=1e-5).holds


def test_given_inputs_are_used() -> None:
    source = model(FFN.format(dtype="float"))
    cut = prune(source, {"ffn-channel": 0.5})
    proof = prove(source, cut, tolerance=1e-5, feeds={"x": np.ones((3, 6), np.float32)})
    assert proof.holds
    assert proof.inputs == [{"x": [3, 6]}]


def test_outputs_that_are_all_zero_prove_nothing() -> None:
    source = model(FFN.format(dtype="float").replace("y = MatMul(r, v)", "z = MatMul(r, v)  y = Sub(z, z)"))
    cut = prune(source, {"ffn-channel": 0.5})
    proof = prove(source, cut, tolerance=1e-5)
    assert not proof.holds
    assert proof.difference.inconclusive == "all outputs are zero"


def test_a_cut_that_no_output_shows_has_no_effect() -> None:
    """A saturated output hides everything: equality would be no proof, and the proof says so."""
    text = "g (float[n,4] x) => (float[n,3] y) <float[4,8] a, float[8,3] b, float[3] c> "
    text += "{ h = MatMul(x, a) r = Relu(h) z = MatMul(r, b) s = Add(z, c) y = Tanh(s) }"
    shown = model(text, weights={"c": np.zeros(3, np.float32)})
    hidden = model(text, weights={"c": np.full(3, 1e6, np.float32)})
    for source, visible in ((shown, True), (hidden, False)):
        proof = prove(source, prune(source, {"ffn-channel": 0.5}), tolerance=1e-5)
        assert proof.holds and (proof.effect > 1e-3) == visible
