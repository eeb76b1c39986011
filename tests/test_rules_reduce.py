"""Reductions and normalisations: a sum may lose zeros, a mean may lose nothing."""

from __future__ import annotations

import pytest
from helpers import assert_prunes, model, prove, prune, reasons, structures, summary, the


def block(norm: str, constants: str = "", *, opset: int = 20) -> object:
    """A residual stream of 8 channels, read through `norm` (from `h` to `n`) by an FFN of 12 channels."""
    return model(
        "g (int64[B,S] ids) => (float[B,S,10] y) <float[10,8] table, float[8,12] up, float[12,8] down, float[8,10] head"
        f"{', ' * bool(constants)}{constants}>"
        f" {{ e = Gather(table, ids)  u0 = MatMul(e, up)  u1 = Relu(u0)  u2 = MatMul(u1, down)  h = Add(e, u2)"
        f"  {norm}  y = MatMul(n, head) }}",
        opset=opset,
    )


NORMS = [
    ("n = LayerNormalization(h, s, b)", "float[8] s, float[8] b", 20),
    ("n = LayerNormalization<axis=2>(h, s)", "float[8] s", 20),
    ("n = RMSNormalization(h, s)", "float[8] s", 23),
    ("k, m, i, n = com.microsoft.SkipSimplifiedLayerNormalization(h, h, s)", "float[8] s", 20),
    ("q = Mul(h, h)  a = ReduceMean<keepdims=1>(q, ax)  c = Sqrt(a)  d = Div(h, c)  n = Mul(d, s)",
     "float[8] s, int64[1] ax = {-1}", 20),
    ("q = Pow(h, two)  a = ReduceMean<axes=[-1]>(q)  c = Sqrt(a)  d = Reciprocal(c)  f = Mul(h, d)  n = Mul(s, f)",
     "float[8] s, float two = {2.0}", 11),
]  # fmt: skip


@pytest.mark.parametrize(("norm", "constants", "opset"), NORMS)
def test_the_residual_stream_is_lossy(norm: str, constants: str, opset: int) -> None:
    """Its norms see fewer channels: proved against a source whose norms see the same ones."""
    source = block(norm, constants, opset=opset)
    assert summary(source) == [("ffn-channel", 12), ("hidden", 8)]
    assert_prunes(source, {"ffn-channel": 0.5})
    if "Skip" not in norm:
        cut = assert_prunes(source, {"hidden": 0.5})
        assert cut.model.graph.initializers["s"].shape == (4,)
        assert cut.lossy, "the proof has to know which norms are narrowed"
        assert_prunes(source, {"hidden": 0.25, "ffn-channel": 0.5})


def test_the_norm_that_only_onnx_runtime_knows() -> None:
    source = block("n = SimplifiedLayerNormalization(h, s)", "float[8] s")
    assert summary(source) == [("ffn-channel", 12), ("hidden", 8)]
    assert prove(source, prune(source, {"hidden": 0.5}), tolerance=1e-5).holds


@pytest.mark.parametrize(
    ("skip", "constants"),
    [
        ("SkipSimplifiedLayerNormalization(e, u2, s, b)", "float[8] s, float[8] b"),
        ("SkipLayerNormalization(e, u2, s, t, b)", "float[8] s, float[8] t, float[8] b"),
    ],
)
def test_add_and_norm_in_one(skip: str, constants: str) -> None:
    source = model(f"""
        g (int64[B,S] ids) => (float[B,S,10] y)
          <float[10,8] table, float[8,12] up, float[12,8] down, float[8,12] up2, float[12,8] down2, float[8,10] head,
           {constants}>
        {{
            e = Gather(table, ids)  u0 = MatMul(e, up)  u1 = Relu(u0)  u2 = MatMul(u1, down)
            n, m, i, h = com.microsoft.{skip}
            w0 = MatMul(n, up2)  w1 = Relu(w0)  w2 = MatMul(w1, down2)  f = Add(h, w2)  y = MatMul(f, head)
        }}
        """)
    assert summary(source) == [("ffn-channel", 12), ("ffn-channel", 12), ("hidden", 8)]
    assert_prunes(source, {"ffn-channel": 0.5})
    assert_prunes(source, {"hidden": 0.5})


def test_a_norm_over_ffn_channels_is_refused() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y) <float[6,16] w, float[16] s, float[16,6] v>
        { h = MatMul(x, w)  r = LayerNormalization(h, s)  y = MatMul(r, v) }
        """)
    assert summary(source) == []
    assert [str(pin) for pin in the(source, "ffn-channel").pins] == [
        "normalised over by LayerNormalization (LayerNormalization r)"
    ]


def ffn(body: str, constants: str = "", *, opset: int = 20) -> object:
    return model(
        f"g (float[N,6] x) => (float[N,M] y) <float[6,16] w, float[16] b, float[16,6] v{', ' * bool(constants)}{constants}>"
        f" {{ h0 = MatMul(x, w)  h = Add(h0, b)  {body} }}",
        opset=opset,
    )


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"])
def test_a_sum_over_channels_that_are_zero_when_masked(op: str) -> None:
    body = "z = Tanh(h)  s = {op}(z, a)  c = MatMul(z, v)  y = Mul(c, s)"
    source = ffn(body.format(op=op), "int64[1] a = {1}", opset=18)
    assert summary(source) == [("ffn-channel", 16)]
    assert_prunes(source, {"ffn-channel": 0.5})


def test_a_sum_over_channels_that_emit_a_constant_is_refused() -> None:
    source = ffn("z = Sigmoid(h)  s = ReduceSum(z, a)  c = MatMul(z, v)  y = Mul(c, s)", "int64[1] a = {-1}")
    assert summary(source) == []
    pins = [str(pin) for pin in the(source, "ffn-channel").pins]
    assert pins == ["summed over, where a removed channel would not be zero (ReduceSum s)"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("s = ReduceMax(h, a)  c = MatMul(h, v)  y = Mul(c, s)", "reduced by ReduceMax (ReduceMax s)"),
        ("s = ReduceMean(h, a)  c = MatMul(h, v)  y = Mul(c, s)", "averaged over (ReduceMean s)"),
        ("s = Softmax(h)  y = MatMul(s, v)", "normalised over by Softmax (Softmax s)"),
        ("s = LogSoftmax<axis=1>(h)  y = MatMul(s, v)", "normalised over by LogSoftmax (LogSoftmax s)"),
        (
            "s = ReduceLogSumExp(h, a)  c = MatMul(h, v)  y = Mul(c, s)",
            "reduced by ReduceLogSumExp (ReduceLogSumExp s)",
        ),
    ],
)
def test_reductions_that_change_their_value_are_refused(body: str, reason: str) -> None:
    source = ffn(body, "int64[1] a = {1}")
    assert summary(source) == []
    assert [str(pin) for pin in the(source, "ffn-channel").pins] == [reason]


def test_reductions_beside_the_channels_leave_them_free() -> None:
    source = model("""
        g (float[N,S,6] x) => (float[N,6] y) <float[6,16] w, float[16,6] v, int64[1] a = {1}>
        { h = MatMul(x, w)  m = ReduceMean<keepdims=0>(h, a)  k = ReduceMax<keepdims=0>(h, a)  s = Softmax<axis=1>(h)
          t = ReduceSum<keepdims=0>(s, a)  u = Sum(m, k, t)  y = MatMul(u, v) }
        """)
    assert summary(source) == [("ffn-channel", 16)]
    assert_prunes(source, {"ffn-channel": 0.5})


def test_softmax_of_old_opsets_normalises_all_axes_from_its_axis_on() -> None:
    text = """
        g (float[N,4,6] x) => (float[N,4,6] y) <float[6,16] w, float[16,6] v>
        { h = MatMul(x, w)  s = Softmax<axis=1>(h)  y = MatMul(s, v) }
        """
    assert summary(model(text, opset=11)) == []
    assert "normalised over by Softmax" in reasons(model(text, opset=11))
    new = model(text, opset=13)
    assert summary(new) == [("ffn-channel", 16)]
    assert_prunes(new, {"ffn-channel": 0.5})


def test_group_norm_may_lose_whole_groups() -> None:
    source = model("""
        g (float[N,3,6,6] x) => (float[N,5,6,6] y) <float[12,3,1,1] w, float[12] s, float[12] b, float[5,12,1,1] v>
        { h = Conv(x, w)  n = GroupNormalization<num_groups=4>(h, s, b)  y = Conv(n, v) }
        """, opset=21)  # fmt: skip
    assert summary(source) == [("conv-channel", 4)]
    assert "normalised over by GroupNormalization" in reasons(source)
    cut = assert_prunes(source, {"conv-channel": 0.5})
    (node,) = [node for node in cut.model.graph if node.op_type == "GroupNormalization"]
    assert node.attributes["num_groups"].as_int() == 2


def test_norms_per_channel_leave_channels_free() -> None:
    source = model("""
        g (float[N,3,6,6] x) => (float[N,5,6,6] y) <float[12,3,1,1] w, float[12] s, float[12] b, float[5,12,1,1] v>
        { h = Conv(x, w)  n = InstanceNormalization(h, s, b)  r = Relu(n)  y = Conv(r, v) }
        """)
    assert summary(source) == [("conv-channel", 12)]
    assert_prunes(source, {"conv-channel": 0.5}, tolerance=1e-4)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        ("LRN<size=3>(h)", "normalised with its neighbours by LRN (LRN n)"),
        ("LpNormalization<axis=1>(r0)", "summed over, where a removed channel would not be zero (LpNormalization n)"),
        ("MeanVarianceNormalization<axes=[1]>(h)",
         "normalised over by MeanVarianceNormalization (MeanVarianceNormalization n)"),
        ("BatchNormalization<training_mode=1>(h, s, s, s, s)",
         "BatchNormalization in training mode (BatchNormalization n)"),
    ],
)  # fmt: skip
def test_refused_norms_over_channels(norm: str, reason: str) -> None:
    source = model(f"""
        g (float[N,3,6,6] x) => (float[N,5,6,6] y) <float[12,3,1,1] w, float[12] s, float[5,12,1,1] v>
        {{ h = Conv(x, w)  r0 = Sigmoid(h)  n = {norm}  y = Conv(n, v) }}
        """)
    assert summary(source) == []
    assert reason in reasons(source)


def test_lp_normalization_may_lose_zeros() -> None:
    source = ffn("n = LpNormalization<axis=-1>(h)  y = MatMul(n, v)")
    assert summary(source) == [("ffn-channel", 16)]
    assert_prunes(source, {"ffn-channel": 0.5})
    assert not [structure for structure in structures(source) if structure.kind == "hidden"]
