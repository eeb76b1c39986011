"""Everything in a graph that states the size of an axis follows the cut."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_equivalent, assert_prunes, input_of, model, prune, structures, the

from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.cut import analyse, apply_selection

ATTENTION = """
g (float[B,S,12] x) => (float[B,S,12] y) <float[12,32] w, float[32,12] wo, {constants}>
{{
    h = MatMul(x, w)  {split}  t = Transpose<perm=[0,2,1,3]>(r)  tt = Transpose<perm=[0,1,3,2]>(t)
    a = MatMul(t, tt)  p = Softmax(a)  o = MatMul(p, t)  o1 = Transpose<perm=[0,2,1,3]>(o)  {merge}
    y = MatMul(o2, wo)
}}
"""
COMPUTED = {
    "constants": "int64 zero = {0}, int64 one = {1}, int64[1] axis = {0}, int64[1] four = {4}, int64[1] eight = {8},"
    "int64[1] flat = {32}",
    "split": "s = Shape(x)  b0 = Gather(s, zero)  n0 = Gather(s, one)  b1 = Unsqueeze(b0, axis)  n1 = Unsqueeze(n0, axis)"
    "  target = Concat<axis=0>(b1, n1, four, eight)  r = Reshape(h, target)",
    "merge": "back = Concat<axis=0>(b1, n1, flat)  o2 = Reshape(o1, back)",
}
FOLLOWED = {
    "constants": "int64[1] four = {4}, int64 heads = {4}",
    "split": "s = Shape<start=0, end=2>(x)  c0 = Shape<start=2>(h)  c = Div(c0, four)"
    "  target = Concat<axis=0>(s, four, c)  r = Reshape(h, target)",
    "merge": "f0 = Mul(c, heads)  back = Concat<axis=0>(s, f0)  o2 = Reshape(o1, back)",
}


@pytest.mark.parametrize("forms", [COMPUTED, FOLLOWED], ids=["literal entries", "computed entries"])
def test_reshape_to_a_computed_shape(forms: dict[str, str]) -> None:
    source = model(ATTENTION.format(**forms))
    kinds = {structure.kind for structure in structures(source) if not structure.pins}
    assert kinds == {"query-head", "qk-pair"}
    assert_prunes(source, {"qk-pair": 0.5})
    assert assert_prunes(source, {"query-head": 0.5}).repairs > 0
    assert_prunes(source, {"query-head": 0.5, "qk-pair": 0.25})


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("{0, 0, 4, 8}", [0, 0, 2, 8]),
        ("{0, 0, -1, 8}", [0, 0, -1, 8]),
        ("{0, -1, 4, 8}", [0, -1, 2, 8]),
        ("{0, 0, 4, -1}", [0, 0, 2, -1]),
    ],
)
def test_only_entries_that_are_wrong_change(target: str, expected: list[int]) -> None:
    constants = f"int64[4] shape = {target}, int64[3] back = {{0, 0, -1}}"
    split, merge = "r = Reshape(h, shape)", "o2 = Reshape(o1, back)"
    source = model(ATTENTION.format(constants=constants, split=split, merge=merge))
    cut = assert_prunes(source, {"query-head": 0.5})
    assert input_of(cut.model, "Reshape", 1, 0).tolist() == expected
    assert input_of(cut.model, "Reshape", 1, 1).tolist() == [0, 0, -1]


def test_a_zero_that_copies_another_axis_is_replaced() -> None:
    """With `0` the third entry copies an axis of 4 heads, which the cut leaves at 2 but not as 4 channels."""
    source = model("""
        g (float[2,3,12] x) => (float[2,3,12] y)
          <float[12,16] w, float[16,12] v, int64[4] split = {0, 0, 4, 4}, int64[4] again = {2, 3, 4, 0}, int64[3] flat = {2, 3, 16}>
        { h = MatMul(x, w)  a = Reshape(h, split)  b = Relu(a)  c = Reshape(b, again)  d = Reshape(c, flat)  y = MatMul(d, v) }
        """)
    for structure in structures(source):
        if not structure.pins:
            assert_prunes(source, {structure.id: 0.5})


def test_allowzero_keeps_its_meaning() -> None:
    source = model("""
        g (float[2,12] x) => (float[2,12] y) <float[12,16] w, float[16,12] v, int64[3] split = {2, 4, 4}, int64[2] flat = {2, 16}>
        { h = MatMul(x, w)  a = Reshape<allowzero=1>(h, split)  b = Relu(a)  c = Reshape<allowzero=1>(b, flat)  y = MatMul(c, v) }
        """)
    free = [structure.id for structure in structures(source) if not structure.pins]
    assert len(free) == 2
    for name in free:
        assert_prunes(source, {name: 0.5})


def test_layers_that_share_a_shape_constant_are_cut_differently() -> None:
    layer = """
        q{i} = MatMul(x{i}, w{i})  r{i} = Reshape(q{i}, split)  t{i} = Transpose<perm=[0,2,1,3]>(r{i})
        u{i} = Transpose<perm=[0,1,3,2]>(t{i})  a{i} = MatMul(t{i}, u{i})  p{i} = Softmax(a{i})  o{i} = MatMul(p{i}, t{i})
        v{i} = Transpose<perm=[0,2,1,3]>(o{i})  z{i} = Reshape(v{i}, merge)  {out} = MatMul(z{i}, wo{i})
        """
    body = layer.format(i=0, out="x1") + layer.format(i=1, out="y")
    source = model(f"""
        g (float[B,S,12] x0) => (float[B,S,12] y)
          <float[12,32] w0, float[12,32] w1, float[32,12] wo0, float[32,12] wo1, int64[4] split = {{0, 0, 4, 8}},
           int64[3] merge = {{0, 0, 32}}>
        {{ {body} }}
        """)
    first, second = (s.id for s in structures(source) if s.kind == "query-head")
    cut = assert_prunes(source, {first: 0.5, second: 0.25})
    shapes = [input_of(cut.model, "Reshape", 1, nth).tolist() for nth in range(4)]
    assert shapes == [[0, 0, 2, 8], [0, 0, 16], [0, 0, 3, 8], [0, 0, 24]]
    cut = assert_prunes(source, {second: 0.75})
    shapes = [input_of(cut.model, "Reshape", 1, nth).tolist() for nth in range(4)]
    assert shapes == [[0, 0, 4, 8], [0, 0, 32], [0, 0, 1, 8], [0, 0, 8]]


def test_a_shape_used_as_data_keeps_the_value_of_the_source() -> None:
    """The scale sqrt(head_dim), computed from the shape of a query that loses channels."""
    source = model("""
        g (float[B,S,12] x) => (float[B,S,S2] y) <float[12,16] w, float[12,16] v, int64 last = {-1}>
        {
            q = MatMul(x, w)  k0 = MatMul(x, v)  k = Transpose<perm=[0,2,1]>(k0)
            s = Shape(q)  d = Gather(s, last)  f = Cast<to=1>(d)  r = Sqrt(f)  a = MatMul(q, k)  y = Div(a, r)
        }
        """)
    cut = assert_prunes(source, {"qk-pair": 0.5})
    assert input_of(cut.model, "Cast", 0).tolist() == 16


def test_a_fused_projection_in_one_split() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y) <float[6,24] w, float[24,6] v>
        { h = MatMul(x, w)  a, b, c = Split<axis=1, num_outputs=3>(h)  d = Concat<axis=1>(c, a, b)  r = Relu(d)  y = MatMul(r, v) }
        """)
    ids = [structure.id for structure in structures(source) if not structure.pins]
    cut = assert_prunes(source, {ids[0]: 0.25, ids[1]: 0.5})
    assert input_of(cut.model, "Split", 1).tolist() == [6, 4, 8]
    cut = assert_prunes(source, dict.fromkeys(ids, 0.5))
    (node,) = [node for node in cut.model.graph if node.op_type == "Split"]
    assert len(node.inputs) == 1, "equal parts need no sizes"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("int64[1] a={0}, int64[1] b={4}", "int64[1] c={4}, int64[1] d={2147483647}"),
        ("int64[1] a={-12}, int64[1] b={-8}", "int64[1] c={-8}, int64[1] d={9223372036854775807}"),
        ("int64[1] a={-9223372036854775808}, int64[1] b={4}", "int64[1] c={-8}, int64[1] d={12}"),
    ],
)
def test_slices_at_negative_and_endless_bounds(first: str, second: str) -> None:
    source = model(f"""
        g (float[N,6] x) => (float[N,6] y) <float[6,12] w, float[12,6] v, {first}, {second}, int64[1] axis = {{-1}}>
        {{ h = MatMul(x, w)  p = Slice(h, a, b, axis)  q = Slice(h, c, d, axis)  j = Concat<axis=1>(q, p)  r = Relu(j)
          y = MatMul(r, v) }}
        """)
    short, long = (next(s.id for s in structures(source) if s.size == n and not s.pins) for n in (4, 8))
    for choice in ({short: 0.5}, {long: 0.25}, {short: 0.75, long: 0.5}):
        assert_prunes(source, choice)


def test_a_stepped_slice_moves_by_whole_steps() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y)
          <float[6,16] w, float[10,6] v, int64[1] o={0}, int64[1] four={4}, int64[1] five={5}, int64[1] end={16}, int64[1] axis={1},
           int64[1] two={2}>
        { h = MatMul(x, w)  a = Slice(h, o, four, axis)  b = Slice(h, four, end, axis, two)  c = Slice(h, five, end, axis, two)
          d = Mul(b, c)  j = Concat<axis=1>(a, d)  r = Relu(j)  y = MatMul(r, v) }
        """)
    assert sorted(s.size for s in structures(source) if not s.pins) == [4, 6]
    assert_prunes(source, {"ffn-channel": 0.5})
    six = next(s.id for s in structures(source) if s.size == 6 and not s.pins)
    assert_prunes(source, {six: 0.5})


def test_constant_indices_of_a_gather_move() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y) <float[6,12] w, float[12,6] v, int64[4] i = {8,9,10,11}, int64[8] j = {0,1,2,3,4,5,6,7}>
        { h = MatMul(x, w)  p = Gather<axis=1>(h, i)  q = Gather<axis=1>(h, j)  c = Concat<axis=1>(p, q)  r = Relu(c)  y = MatMul(r, v) }
        """)
    cut = assert_prunes(source, {"ffn-channel": 0.5})
    assert input_of(cut.model, "Gather", 1, 0).tolist() == [4, 5]
    assert input_of(cut.model, "Gather", 1, 1).tolist() == [0, 1, 2, 3]


def test_a_scalar_index_moves() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y)
          <float[6,9] w, float[8,6] v, int64 last = {-1}, int64[1] o = {0}, int64[1] e = {8}, int64[1] axis = {1}>
        { h = MatMul(x, w)  p = Slice(h, o, e, axis)  q = Gather<axis=1>(h, last)  q1 = Unsqueeze(q, axis)  r = Mul(p, q1)
          y = MatMul(r, v) }
        """)
    assert the(source, "ffn-channel").size == 8
    assert_prunes(source, {"ffn-channel": 0.5})


def test_repeats_of_a_tile_follow_the_heads_they_repeat_for() -> None:
    source = model("""
        g (float[B,S,12] x) => (float[B,S,12] y)
          <float[12,32] wq, float[12,8] wk, float[12,8] wv, float[32,12] wo, int64[4] qs = {0,0,4,8}, int64[4] ks = {0,0,1,8},
           int64[4] repeat = {1,4,1,1}, int64[3] merge = {0,0,32}>
        {
            q0 = MatMul(x, wq)  q1 = Reshape(q0, qs)  q = Transpose<perm=[0,2,1,3]>(q1)
            k0 = MatMul(x, wk)  k1 = Reshape(k0, ks)  k2 = Transpose<perm=[0,2,3,1]>(k1)  k = Tile(k2, repeat)
            v0 = MatMul(x, wv)  v1 = Reshape(v0, ks)  v2 = Transpose<perm=[0,2,1,3]>(v1)  v = Tile(v2, repeat)
            a = MatMul(q, k)  p = Softmax(a)  o = MatMul(p, v)  o1 = Transpose<perm=[0,2,1,3]>(o)  o2 = Reshape(o1, merge)
            y = MatMul(o2, wo)
        }
        """)
    cut = assert_prunes(source, {"query-head": 0.5})
    assert input_of(cut.model, "Tile", 1).tolist() == [1, 2, 1, 1]


def test_forms_of_opset_11() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y) <float[6,12] w, float[8,6] v, int64[2] shape = {-1, 8}, float[8] b>
        {
            h = MatMul(x, w)  p, q = Split<axis=1, split=[8, 4]>(h)  a = Slice<axes=[1], starts=[0], ends=[4]>(p)
            u = Unsqueeze<axes=[2]>(p)  s = Squeeze<axes=[2]>(u)  m = Concat<axis=1>(a, q)  z = Add(s, m)
            c = ReduceSum<axes=[0], keepdims=1>(z)  r0 = Add(z, c)  r1 = Reshape(r0, shape)  r = Mul(r1, b)  y = MatMul(r, v)
        }
        """.replace("Slice<axes=[1], starts=[0], ends=[4]>(p)", "Slice(p, o, e, x1)")
        .replace("float[8] b>", "float[8] b, int64[1] o={0}, int64[1] e={4}, int64[1] x1={1}>"), opset=11)  # fmt: skip
    assert [s.size for s in structures(source) if not s.pins]
    assert_prunes(source, {"ffn-channel": 0.5})


def test_a_repair_happens_once() -> None:
    """Cutting a cut model anew finds it consistent: the same choice of everything changes nothing."""
    source = model(ATTENTION.format(**COMPUTED))
    cut = prune(source, {"query-head": 0.5})
    again = apply_selection(analyse(cut.model.clone()), Selection())
    assert again.repairs == 0
    assert again.removals == []


def test_a_pruned_model_can_be_pruned_again() -> None:
    source = model(ATTENTION.format(**COMPUTED))
    once = prune(source, {"query-head": 0.5}).model
    twice = prune(once, {"query-head": 0.5, "qk-pair": 0.5})
    assert_equivalent(once, twice, tolerance=1e-5)


def test_declared_shapes_follow() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y) <float[6,16] w, float[16,6] v, float[N,16] h>
        { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }
        """)
    cut = assert_prunes(source, {"ffn-channel": 0.5})
    (hidden,) = [out for node in cut.model.graph for out in node.outputs if out.name == "h"]
    assert list(hidden.shape or [])[1] == 8
    assert np.prod(cut.model.graph.initializers["w"].shape.numpy()) == 48  # type: ignore[union-attr]


def test_a_batch_that_was_divided_out_of_batch_times_heads() -> None:
    """`Shape[0] / 8` is the batch of `batch*8` rows; with other heads it is not, and no ratio mends it."""
    text = """
    g (float[n,s,8] x) => (float[n,s,8] y)
    <float[8,32] q, float[8,32] k, float[8,32] v, float[32,8] o,
     int64[4] heads = {0,-1,8,4}, int64[1] d = {4}, int64[1] all = {32}, int64[1] eight = {8},
     int64[1] one = {1}, int64[1] zero = {0}, int64 axis = {0}>
    {
      qf = MatMul(x, q) kf = MatMul(x, k) vf = MatMul(x, v)
      qh = Reshape(qf, heads) kh = Reshape(kf, heads) vh = Reshape(vf, heads)
      qt = Transpose<perm=[0,2,1,3]>(qh) kt = Transpose<perm=[0,2,3,1]>(kh) vt = Transpose<perm=[0,2,1,3]>(vh)
      size = Shape(x) n = Gather(size, zero) s = Gather(size, one) rows = Mul(n, eight)
      rq = Concat<axis=0>(rows, s, d) rk = Concat<axis=0>(rows, d, s)
      qr = Reshape(qt, rq) kr = Reshape(kt, rk) vr = Reshape(vt, rq)
      scores = MatMul(qr, kr) p = Softmax(scores) c = MatMul(p, vr)
      made = Shape(c) first = Gather(made, zero) batch = Div(first, eight)
      shape = Concat<axis=0>(batch, eight, s, d)
      split = Reshape(c, shape) back = Transpose<perm=[0,2,1,3]>(split)
      flat = Concat<axis=0>(n, s, all) f = Reshape(back, flat) y = MatMul(f, o)
    }
    """
    assert_prunes(model(text), {"query-head": 0.5, "value-channel": 0.5})
