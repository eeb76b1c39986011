"""Removal: kept entries, copies on write of what is shared, and lazy weights."""

from __future__ import annotations

import numpy as np
from helpers import assert_equivalent, assert_prunes, initializer, maker, model, prune, structures, summary

from onnx_autoglm.sliced_tensor import SlicedTensor

TWO_LAYERS = """
g (float[N,6] x) => (float[N,6] y)
  <float[6,16] w0, float[6,16] w1, float[16] zeros, float[16,6] v0, float[16,6] v1{more}>
{{
    a0 = MatMul(x, w0)  b0 = Add(a0, zeros)  c0 = Relu(b0)  d = MatMul(c0, v0)
    a1 = MatMul(d, w1)  b1 = Add(a1, zeros)  c1 = Relu(b1)  y = MatMul(c1, v1){extra}
}}
"""


def test_removals_say_exactly_what_stays() -> None:
    source = model(TWO_LAYERS.format(more="", extra=""))
    cut = prune(source, {maker(source, "w0"): 0.5})
    removals = {(removal.initializer, removal.axis): removal for removal in cut.removals}
    assert set(removals) == {("w0", 1), ("zeros", 0), ("v0", 0)}
    kept = removals["w0", 1].kept
    assert sorted(kept) == kept.tolist() and len(set(kept)) == 8
    assert removals["v0", 0].consumers == ("d",)
    np.testing.assert_array_equal(initializer(cut.model, "w0"), initializer(source, "w0")[:, kept])
    np.testing.assert_array_equal(initializer(cut.model, "v0"), initializer(source, "v0")[kept])


def test_a_bias_shared_between_layers_is_copied_on_write() -> None:
    source = model(TWO_LAYERS.format(more="", extra=""))
    assert [structure.size for structure in structures(source) if not structure.pins].count(16) == 2
    cut = prune(source, {maker(source, "w0"): 0.5, maker(source, "w1"): 0.25})
    assert_equivalent(source, cut, tolerance=1e-5)
    sizes = sorted(value.shape[0] for name, value in cut.model.graph.initializers.items() if "zeros" in name)
    assert sizes == [8, 12]


def test_a_layer_that_stays_whole_keeps_the_original() -> None:
    source = model(TWO_LAYERS.format(more="", extra=""))
    cut = prune(source, {maker(source, "w1"): 0.5})
    assert_equivalent(source, cut, tolerance=1e-5)
    np.testing.assert_array_equal(initializer(cut.model, "zeros"), initializer(source, "zeros"))
    assert initializer(cut.model, "zeros_cut").shape == (8,)


def test_equal_cuts_of_a_shared_vector_share_one_copy() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y) <float[6,16] w, float[16] b, float[16,6] v>
        { a = MatMul(x, w)  c = Add(a, b)  d = Relu(c)  e = Mul(d, b)  y = MatMul(e, v) }
        """)
    cut = assert_prunes(source, {"ffn-channel": 0.5})
    assert [name for name in cut.model.graph.initializers if name.startswith("b")] == ["b"]


def test_a_vector_that_is_a_graph_output_too_stays_whole_there() -> None:
    source = model(
        TWO_LAYERS.format(more="", extra="  z = Identity(zeros)").replace(
            "float[N,6] y)", "float[N,6] y, float[16] z)"
        )
    )
    cut = prune(source, {maker(source, "w0"): 0.5, maker(source, "w1"): 0.5})
    assert_equivalent(source, cut, tolerance=1e-5)
    assert initializer(cut.model, "zeros").shape == (16,)


def test_tied_matrices_stay_one() -> None:
    """An embedding that is also the output projection is cut once, in both."""
    source = model("""
        g (int64[B,S] ids) => (float[B,S,10] y)
          <float[10,8] table, float[8,12] up, float[12,8] down, float[8] s>
        { e = Gather(table, ids)  u = MatMul(e, up)  r = Relu(u)  d = MatMul(r, down)  h = Add(e, d)
          n = LayerNormalization(h, s)  t = Transpose<perm=[1,0]>(table)  y = MatMul(n, t) }
        """)
    assert summary(source) == [("ffn-channel", 12), ("hidden", 8)]
    cut = assert_prunes(source, {"hidden": 0.5})
    assert [name for name in cut.model.graph.initializers if name.startswith("table")] == ["table"]
    assert initializer(cut.model, "table").shape == (10, 4)


def test_a_matrix_shared_between_layers_is_cut_alike_in_both() -> None:
    """ALBERT: the same weights in every layer."""
    source = model("""
        g (float[N,6] x) => (float[N,6] y) <float[6,16] w, float[16,6] v>
        { a = MatMul(x, w)  b = Relu(a)  c = MatMul(b, v)  d = MatMul(c, w)  e = Relu(d)  y = MatMul(e, v) }
        """)
    assert [
        structure.size
        for structure in structures(source)
        if structure.kind == "ffn-channel" and not structure.pins
    ] == [16]
    cut = assert_prunes(source, {"ffn-channel": 0.5})
    assert sorted(cut.model.graph.initializers) == ["v", "w"]


def test_the_source_is_untouched_and_weights_are_cut_lazily() -> None:
    source = model(TWO_LAYERS.format(more="", extra=""))
    before = {name: initializer(source, name).copy() for name in source.graph.initializers}
    cut = prune(source, {"ffn-channel": 0.5})
    for name, array in before.items():
        np.testing.assert_array_equal(initializer(source, name), array)
    assert isinstance(cut.model.graph.initializers["w0"].const_value, SlicedTensor)


def test_names_that_are_taken_are_not_taken_again() -> None:
    source = model(
        TWO_LAYERS.format(more=", float[6] zeros_cut", extra="  z = Add(y, zeros_cut)").replace(
            "float[N,6] y)", "float[N,6] y, float[N,6] z)"
        )
    )
    cut = prune(source, {maker(source, "w1"): 0.5})
    assert_equivalent(source, cut, tolerance=1e-5)
    assert initializer(cut.model, "zeros_cut").shape == (6,)
    assert initializer(cut.model, "zeros_cut_1").shape == (8,)


def test_channels_of_each_expert_are_chosen_apart() -> None:
    source = model("""
        g (float[N,6] x) => (float[E,N,6] y) <float[3,6,8] up, float[3,8,6] down>
        { h = MatMul(x, up)  r = Relu(h)  y = MatMul(r, down) }
        """)
    cut = assert_prunes(source, {"expert-channel": 0.5}, seeds=3)
    up = next(removal for removal in cut.removals if removal.initializer == "up")
    assert (up.axis, up.outer_axis, up.kept.shape) == (2, 0, (3, 4))
    assert len({tuple(row) for row in up.kept.tolist()}) > 1
    assert up.as_json()["outer_axis"] == 0
    for expert in range(3):
        whole, kept = initializer(source, "up")[expert], initializer(cut.model, "up")[expert]
        np.testing.assert_array_equal(kept, whole[:, up.kept[expert]])
