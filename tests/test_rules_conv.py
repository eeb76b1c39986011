"""Convolutions, pools and resizing."""

from __future__ import annotations

import pytest
from helpers import assert_prunes, model, reasons, structures, summary, the


def test_channels_between_convolutions() -> None:
    source = model("""
        g (float[N,3,6,6] x) => (float[N,5,3,3] y)
          <float[8,3,3,3] w, float[8] b, float[8] s, float[8] t, float[8] m, float[8] var, float[5,8,3,3] v>
        { h = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w, b)  a = Abs(var)  n = BatchNormalization(h, s, t, m, a)
          r = Relu(n)  y = Conv<pads=[1,1,1,1]>(r, v) }
        """)
    assert summary(source) == [("conv-channel", 8)]
    names = {(place.use.value.name, place.axis) for place in the(source, "conv-channel").places}
    assert names == {("w", 0), ("b", 0), ("s", 0), ("t", 0), ("m", 0), ("var", 0), ("v", 1)}
    assert_prunes(source, {"conv-channel": 0.5})
    kept = [structure for structure in structures(source) if structure.pins]
    assert {str(pin) for structure in kept for pin in structure.pins} == {
        "axis 1 of the graph input x",
        "axis 1 of the graph output y",
    }


def test_a_dead_channel_that_emits_its_shift_is_masked_where_it_is_read() -> None:
    source = model("""
        g (float[N,3,6,6] x) => (float[N,5,6,6] y) <float[8,3,1,1] w, float[8] b, float[5,8,1,1] v>
        { h = Conv(x, w, b)  r = Sigmoid(h)  y = Conv(r, v) }
        """)
    assert_prunes(source, {"conv-channel": 0.5})


def test_a_residual_stream_of_convolutions() -> None:
    source = model("""
        g (float[N,3,6,6] x) => (float[N,5] y)
          <float[8,3,1,1] w0, float[4,8,3,3] w1, float[8,4,1,1] w2, float[6,8,1,1] w3, float[8,6,1,1] w4, float[8,5] v>
        {
            a = Conv(x, w0)  b = Conv<pads=[1,1,1,1]>(a, w1)  c = Relu(b)  d = Conv(c, w2)  e = Add(a, d)
            f = Conv(e, w3)  g0 = Relu(f)  h = Conv(g0, w4)  i = Add(e, h)
            j = GlobalAveragePool(i)  k = Flatten(j)  y = MatMul(k, v)
        }
        """)
    assert summary(source) == [("conv-channel", 4), ("conv-channel", 6), ("conv-channel", 8)]
    stream = next(s for s in structures(source) if s.size == 8 and not s.pins)
    assert {place.use.value.name for place in stream.places} == {"w0", "w1", "w2", "w3", "w4", "v"}
    assert_prunes(source, {"conv-channel": 0.5})
    assert_prunes(source, {stream.id: 0.5})


def test_depthwise_convolutions_keep_one_filter_per_channel() -> None:
    source = model("""
        g (float[N,3,6,6] x) => (float[N,5,6,6] y) <float[8,3,1,1] w, float[8,1,3,3] d, float[8] b, float[5,8,1,1] v>
        { h = Conv(x, w)  a = Conv<group=8, pads=[1,1,1,1]>(h, d, b)  r = Relu(a)  y = Conv(r, v) }
        """)
    assert summary(source) == [("conv-channel", 8)]
    cut = assert_prunes(source, {"conv-channel": 0.625})
    assert [node.attributes["group"].as_int() for node in cut.model.graph if "group" in node.attributes] == [
        3
    ]


def test_a_depthwise_multiplier_follows_its_channel() -> None:
    source = model("""
        g (float[N,3,6,6] x) => (float[N,5,6,6] y) <float[4,3,1,1] w, float[8,1,3,3] d, float[5,8,1,1] v>
        { h = Conv(x, w)  a = Conv<group=4, pads=[1,1,1,1]>(h, d)  r = Relu(a)  y = Conv(r, v) }
        """)
    assert summary(source) == [("conv-channel", 2), ("conv-channel", 4)]
    assert_prunes(source, {"conv-channel": 0.5})


def test_a_grouped_convolution_chooses_channels_in_each_group() -> None:
    source = model("""
        g (float[N,3,6,6] x) => (float[N,5,6,6] y) <float[12,3,1,1] w, float[12,4,3,3] d, float[12] b, float[5,12,1,1] v>
        { h = Conv(x, w)  a = Conv<group=3, pads=[1,1,1,1]>(h, d, b)  r = Relu(a)  y = Conv(r, v) }
        """)
    assert summary(source) == [("conv-channel", 3), ("conv-channel", 4), ("conv-channel", 4)]
    free = [structure for structure in structures(source) if not structure.pins]
    assert sorted(len(structure.outers) for structure in free) == [0, 1, 1]
    for structure in free:
        assert_prunes(source, {structure.id: 0.5})
    assert_prunes(source, {"conv-channel": 0.5})


def test_channels_shuffled_between_groups() -> None:
    source = model("""
        g (float[N,3,6,6] x) => (float[N,5,6,6] y)
          <float[12,3,1,1] w, float[12,4,1,1] d, float[12,4,1,1] e, float[5,12,1,1] v, int64[5] a={0,3,4,6,6},
           int64[4] b={0,12,6,6}>
        {
            h = Conv(x, w)  c = Conv<group=3>(h, d)  c1 = Reshape(c, a)  c2 = Transpose<perm=[0,2,1,3,4]>(c1)
            c3 = Reshape(c2, b)  r = Relu(c3)  y = Conv(r, v)
        }
        """)
    for structure in structures(source):
        if not structure.pins:
            assert_prunes(source, {structure.id: 0.5})


def test_groups_that_do_not_nest_in_a_concat_are_refused() -> None:
    """ShuffleNet: 20 and 4 channels read by a convolution of 3 groups."""
    source = model("""
        g (float[N,3,6,6] x) => (float[N,6,6,6] y) <float[20,3,1,1] w, float[4,3,1,1] u, float[6,8,1,1] v>
        { a = Conv(x, w)  b = Conv(x, u)  c = Concat<axis=1>(a, b)  r = Relu(c)  y = Conv<group=3>(r, v) }
        """)
    assert summary(source) == []
    assert "axes that do not line up: parts 20+4 are not all multiples of 8 (Conv y)" in reasons(source)


@pytest.mark.parametrize("group", [1, 2, 8])
def test_transposed_convolutions(group: int) -> None:
    source = model(f"""
        g (float[N,3,6,6] x) => (float[N,5,H,W] y) <float[8,3,1,1] w, float[8,{8 // group},2,2] t, float[8] b, float[5,8,1,1] v>
        {{ h = Conv(x, w)  a = ConvTranspose<group={group}, strides=[2,2]>(h, t, b)  r = Relu(a)  y = Conv(r, v) }}
        """)
    for structure in structures(source):
        if not structure.pins:
            assert_prunes(source, {structure.id: 0.5})
    assert_prunes(source, {"conv-channel": 0.5})


@pytest.mark.parametrize(
    "pool",
    [
        "MaxPool<kernel_shape=[2,2], strides=[2,2]>",
        "MaxPool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>",
        "MaxPool<kernel_shape=[3,3], auto_pad=\"SAME_UPPER\", strides=[2,2]>",
        "AveragePool<kernel_shape=[2,2], pads=[1,1,1,1], strides=[3,3], count_include_pad=1>",
        "LpPool<kernel_shape=[2,2], p=2>",
        "GlobalAveragePool",
        "GlobalMaxPool",
    ],
)  # fmt: skip
def test_pools_pass_channels_through_and_flatten_never_offers_space(pool: str) -> None:
    sizes = {"GlobalA": 1, "GlobalM": 1, "LpPool<": 49}
    spatial = next((size for start, size in sizes.items() if pool.startswith(start)), None)
    if spatial is None:
        spatial = 9 if "Average" in pool else 16
    source = model(f"""
        g (float[N,3,8,8] x) => (float[N,5] y) <float[8,3,1,1] w, float[{8 * spatial},5] v>
        {{ h = Conv(x, w)  p = {pool}(h)  f = Flatten(p)  y = MatMul(f, v) }}
        """)
    assert summary(source) == [("conv-channel", 8)]
    assert_prunes(source, {"conv-channel": 0.5})
    assert "a spatial axis" in reasons(source)


def test_resize_by_scales() -> None:
    source = model("""
        g (float[N,3,8,8] x) => (float[N,4,16,16] y) <float[8,3,1,1] w, float[4,8,1,1] v, float[4] s = {1.0,1.0,2.0,2.0}>
        { h = Conv(x, w)  r = Resize<mode="nearest">(h, , s)  y = Conv(r, v) }
        """)
    assert summary(source) == [("conv-channel", 8)]
    assert_prunes(source, {"conv-channel": 0.5})
    old = model("""
        g (float[N,3,8,8] x) => (float[N,4,16,16] y) <float[8,3,1,1] w, float[4,8,1,1] v, float[4] s = {1.0,1.0,2.0,2.0}>
        { h = Conv(x, w)  r = Resize<mode="nearest">(h, s)  y = Conv(r, v) }
        """, opset=10)  # fmt: skip
    assert_prunes(old, {"conv-channel": 0.5})


def test_resized_channels_are_refused() -> None:
    source = model("""
        g (float[N,3,8,8] x) => (float[N,4,8,8] y) <float[8,3,1,1] w, float[4,16,1,1] v, float[4] s = {1.0,2.0,1.0,1.0}>
        { h = Conv(x, w)  r = Resize<mode="nearest">(h, , s)  y = Conv(r, v) }
        """)
    assert summary(source) == []
    assert "resized (Resize r)" in reasons(source)


def test_resize_to_a_size_from_data_is_refused() -> None:
    source = model("""
        g (float[N,3,8,8] x, float[4] s) => (float[N,4,H,W] y) <float[8,3,1,1] w, float[4,8,1,1] v>
        { h = Conv(x, w)  r = Resize<mode="nearest">(h, , s)  y = Conv(r, v) }
        """)
    assert summary(source) == []
    assert "the new size is computed at run time (Resize r)" in reasons(source)


def test_convolutions_of_one_dimension_and_over_tokens() -> None:
    source = model("""
        g (float[N,S,6] x) => (float[N,S,6] y) <float[6,16] w, float[16,1,3] d, float[16,6] v>
        { h = MatMul(x, w)  t = Transpose<perm=[0,2,1]>(h)  c = Conv<group=16, pads=[2,0]>(t, d)
          r = Transpose<perm=[0,2,1]>(c)  y = MatMul(r, v) }
        """)
    assert [size for _, size in summary(source)] == [16]
    structure = next(s for s in structures(source) if not s.pins)
    assert_prunes(source, {structure.id: 0.5})
