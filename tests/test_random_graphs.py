"""Random graphs, pruned at random: masked equals pruned or the refusal has a reason, and nothing raises."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import onnx
import pytest
from helpers import assert_prunes, input_of, maker, model, prove, prune, reasons, structures, summary, the
from random_graphs import random_graph

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from property import TOLERANCE, Case, run_case

from onnx_autoglm.kinds import KINDS

SOME = range(200)
MANY = range(200, 1000)
CHUNK = 100


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [run_case(seed) for seed in SOME]


def assert_hold(cases: list[Case]) -> None:
    failures = [f"seed {case.seed} ({case.built}): {case.failure}" for case in cases if case.failure]
    assert not failures, f"{len(failures)} of {len(cases)} cases:\n" + "\n\n".join(failures)
    assert all(case.difference <= TOLERANCE for case in cases if case.difference is not None)


def test_masked_equals_pruned_or_the_refusal_has_a_reason(cases: list[Case]) -> None:
    assert_hold(cases)


def test_the_cases_mean_something(cases: list[Case]) -> None:
    """Most graphs are cut, every kind of structure is, selections vary, and some structures are refused."""
    assert sum(case.is_proved for case in cases) >= 0.75 * len(cases)
    assert sum(case.doubt is not None for case in cases) <= 0.02 * len(cases)
    cut = sum((case.cut for case in cases), Counter())
    assert set(cut) == set(KINDS)
    assert cut.total() >= 2 * len(cases)
    assert sum(case.varied > 0 for case in cases) >= 0.1 * len(cases)
    assert len(sum((case.reasons for case in cases), Counter())) >= 10


def test_graphs_are_random_and_can_be_repeated() -> None:
    graphs = [random_graph(seed) for seed in range(30)]
    assert graphs[7].SerializeToString() == random_graph(7).SerializeToString()
    assert len({graph.SerializeToString() for graph in graphs}) == len(graphs)
    assert len({graph.opset_import[0].version for graph in graphs}) >= 8
    assert len({node.op_type for graph in graphs for node in graph.graph.node}) >= 50
    for graph in graphs:
        onnx.checker.check_model(graph, full_check=True)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(MANY.start, MANY.stop, CHUNK))
def test_many_more(first: int) -> None:
    assert_hold([run_case(seed) for seed in range(first, first + CHUNK)])


# --- what random graphs found, in the smallest form


def test_a_product_with_its_own_transpose_takes_no_selection_per_row() -> None:
    """`h` is contracted over its channels with `h` of every other row, so all rows must keep the same ones."""
    source = model(
        "g (float[N,5] x) => (float[N,3] y)"
        " <float[5,12] w, float[16,3] v, int64[3] rows = {0, 4, 3}, int64[2] flat = {0, 16}> {"
        " h0 = MatMul(x, w)  h = Reshape(h0, rows)  t0 = Transpose<perm=[0,2,1]>(h)  t = Softsign(t0)"
        " s = MatMul(h, t)  r = Reshape(s, flat)  y = MatMul(r, v) }"
    )
    (inner,) = [structure for structure in structures(source) if structure.size == 3]
    assert not inner.pins and not inner.outers
    assert_prunes(source, {inner.id: 0.34})


def test_a_gram_matrix_is_zero_only_if_both_its_factors_are() -> None:
    """`s` is zero in a masked row but not in a masked column, over which the next product sums."""
    text = (
        "g (float[N,5] x) => (float[N,3] y)"
        " <float[5,4] w, float[16,3] v, int64[1] last = {2}, int64[2] flat = {0, 16}, float low = {0.1}> {"
        " h0 = MatMul(x, w)  h = Unsqueeze(h0, last)  t0 = Transpose<perm=[0,2,1]>(h)  t = KEEP(t0)"
        " s = MatMul(h, t)  q = MatMul(s, s)  r = Reshape(q, flat)  y = MatMul(r, v) }"
    )
    assert not summary(model(text.replace("KEEP(t0)", "Clip(t0, low)")))
    assert "where a removed channel would not be zero (MatMul q)" in reasons(
        model(text.replace("KEEP(t0)", "Clip(t0, low)"))
    )
    free = model(text.replace("KEEP(t0)", "Tanh(t0)"))
    assert_prunes(free, {maker(free, "w"): 0.5})


def test_a_split_without_sizes_gets_them_when_its_parts_become_unequal() -> None:
    source = model(
        "g (float[N,5] x) => (float[N,3] y) <float[5,6] w, float[6,3] v> {"
        " h = MatMul(x, w)  a, b = Split<axis=1>(h)  t = Tanh(b)  c = Concat<axis=1>(t, a)  y = MatMul(c, v) }",
        opset=13,
    )
    sizes = []
    for half in structures(source):
        cut = assert_prunes(source, {half.id: 0.34})
        sizes.append(input_of(cut.model, "Split", 1).tolist())
    assert sorted(sizes) == [[2, 3], [3, 2]]


def test_an_expand_by_a_size_that_became_one_is_repaired() -> None:
    """The number of repeats is measured, by chance, on an axis of that size, which is cut to 1."""
    source = model(
        "g (float[N,5] x) => (float[N,3] y)"
        " <float[5,2] w, float[4,3] v, int64[1] last = {2}, int64[1] n = {1}, int64[2] flat = {0, -1}> {"
        " h = MatMul(x, w)  u = Unsqueeze(h, last)  s = Shape(h)  c = Gather(s, n)  b = Shape<end=1>(h)"
        " e = Concat<axis=0>(b, c, c)  r0 = Expand(u, e)  r1 = Tanh(r0)  r = Reshape(r1, flat)  y = MatMul(r, v) }"
    )
    assert_prunes(source, {maker(source, "w"): 0.5})


NORMS = [
    "n = LayerNormalization<axis=-1>(s, g)",
    "q = Mul(s, s)  m = ReduceMean<keepdims=1>(q, last)  e = Add(m, one)  d = Sqrt(e)  n0 = Div(s, d)  n = Mul(n0, g)",
    "n, none0, none1, more = com.microsoft.SkipSimplifiedLayerNormalization(s, s, g)",
]


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_is_narrowed_on_its_own_axis_alone(norm: str) -> None:
    """Another axis of the norm's input is cut as well; the proof must leave that one wide."""
    source = model(
        "g (float[N,5] x) => (float[N,3] y) <float[5,24] w, float[6,6] u, float[6] g, float[24,3] v,"
        " int64[3] rows = {0, 4, 6}, int64[2] flat = {0, 24}, int64[1] last = {-1}, float one = {1.0}> {"
        f" h0 = MatMul(x, w)  h = Reshape(h0, rows)  k = MatMul(h, u)  s = Add(h, k)  {norm}"
        " r = Reshape(n, flat)  y = MatMul(r, v) }"
    )
    free = {s.id: 0.5 for s in structures(source) if not s.pins and s.kind != "block"}
    assert {structure.size for structure in structures(source) if structure.id in free} == {4, 6}
    assert prove(source, prune(source, free), tolerance=1e-5).holds


def test_the_residual_stream_is_chosen_alike_in_every_row() -> None:
    source = model(
        "g (float[N,5] x) => (float[N,3] y) <float[5,24] w, float[5,24] u, float[24,3] v,"
        " int64[3] rows = {0, 4, 6}, int64[2] flat = {0, 24}, int64[1] last = {2}> {"
        " h0 = MatMul(x, w)  h = Reshape(h0, rows)  k0 = MatMul(x, u)  k = Reshape(k0, rows)  s = Add(h, k)"
        " m = ReduceMean(s, last)  n = Sub(s, m)  r = Reshape(n, flat)  y = MatMul(r, v) }"
    )
    assert not the(source, "hidden").outers
    assert_prunes(source, {"hidden": 0.5})


def test_experts_may_be_chosen_in_each_group() -> None:
    """Two groups of four experts, the best one of each is used; the router must not see another group's choice."""
    source = model(
        "g (float[N,6] x) => (float[N,5] y) <float[6,8] router, float[8,6,5] w, int64[3] split = {0, 2, 4},"
        " int64[2] merge = {0, 8}, int64[1] one = {1}, int64[1] two = {2}, int64[1] first = {0}, float none = {0.0}> {"
        " l = MatMul(x, router)  s = Sigmoid(l)  p = Reshape(s, split)  best, at = TopK<axis=2>(p, one)"
        " z = Mul(p, none)  chosen = ScatterElements<axis=2>(z, at, best)  c = Reshape(chosen, merge)"
        " t = Transpose<perm=[1,0]>(c)  f = Unsqueeze(t, two)  e = MatMul(x, w)  m = Mul(e, f)"
        " y = ReduceSum<keepdims=0>(m, first) }"
    )
    (inner,) = [structure for structure in structures(source) if structure.size == 4]
    assert inner.kind == "expert" and inner.groups == 2
    assert_prunes(source, {inner.id: 0.5}, seeds=4)


def test_a_convolution_of_stride_one_keeps_the_length_of_a_symbolic_axis() -> None:
    """`[B, S, heads*d]` is merged after a convolution over the sequence: the sizes must be seen to agree."""
    source = model(
        "g (float[B,S,6] x) => (float[B,S,3] y) <float[8,6,3] w, float[8,3] v, int64[4] split = {0, 0, 4, 2},"
        " int64[1] n = {1}, int64[1] m = {8}> {"
        " t = Transpose<perm=[0,2,1]>(x)  c = Conv<pads=[1,1]>(t, w)  h = Transpose<perm=[0,2,1]>(c)"
        " p = Reshape(h, split)  a = Tanh(p)  b = Shape<end=2>(x)  q = Concat<axis=0>(b, m)  r = Reshape(a, q)"
        " y = MatMul(r, v) }"
    )
    assert summary(source) == [("conv-channel", 2), ("conv-channel", 4)]
    assert_prunes(source, {"conv-channel": 0.5})
