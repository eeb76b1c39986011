"""Products and elementwise operators: roles, and what a masked channel may become on the way."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_prunes, model, reasons, structures, summary, the


def ffn(body: str, constants: str = "", *, opset: int = 20) -> object:
    return model(
        f"g (float[N,6] x) => (float[N,6] y) <float[6,16] w, float[16,6] v{', ' * bool(constants)}{constants}>"
        f" {{ h = MatMul(x, w)  {body}  y = MatMul(r, v) }}",
        opset=opset,
    )


# --- MatMul, Gemm, Einsum


def test_a_channel_that_weights_make_and_contract_is_an_ffn_channel() -> None:
    source = ffn("r = Relu(h)")
    assert summary(source) == [("ffn-channel", 16)]
    structure = the(source, "ffn-channel")
    assert {(place.use.value.name, place.axis) for place in structure.places} == {("w", 1), ("v", 0)}
    assert structure.parameters == 2 * 6 * 16
    cut = assert_prunes(source, {"ffn-channel": 0.25})
    assert cut.model.graph.initializers["w"].shape == (6, 12)
    assert cut.model.graph.initializers["v"].shape == (12, 6)


@pytest.mark.parametrize(
    ("first", "second", "weights"),
    [
        ("Gemm(x, w, b)", "Gemm(r, v, c)", "float[6,16] w, float[16] b, float[16,6] v, float[6] c"),
        ("Gemm<transB=1>(x, w, b)", "Gemm<transB=1, alpha=0.5>(r, v)", "float[16,6] w, float[1,16] b, float[6,16] v"),
        ("com.microsoft.FusedMatMul<transB=1>(x, w)", "com.microsoft.FusedMatMul<alpha=2.0>(r, v)",
         "float[16,6] w, float[16,6] v"),
        ("Einsum<equation=\"ni,hi->nh\">(x, w)", "Einsum<equation=\"nh,ho\">(r, v)", "float[16,6] w, float[16,6] v"),
        ("MatMul(x, w)", "MatMul(r, v)", "float[6,16] w, float[16,6] v"),
    ],
)  # fmt: skip
def test_all_forms_of_a_product(first: str, second: str, weights: str) -> None:
    source = model(
        f"g (float[N,6] x) => (float[N,6] y) <{weights}> {{ h = {first}  r = Relu(h)  y = {second} }}"
    )
    assert summary(source) == [("ffn-channel", 16)]
    assert_prunes(source, {"ffn-channel": 0.5})


def test_a_transposed_operand_and_a_weight_on_the_left() -> None:
    source = model("""
        g (float[6,N] x) => (float[6,N] y) <float[16,6] w, float[6,16] v>
        { h = MatMul(w, x)  r = Relu(h)  y = MatMul(v, r) }
        """)
    assert summary(source) == [("ffn-channel", 16)]
    assert_prunes(source, {"ffn-channel": 0.5})


def test_a_vector_operand() -> None:
    source = model(
        "g (float[N,6] x) => (float[N] y) <float[6,16] w, float[16] v> { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"
    )
    assert summary(source) == [("ffn-channel", 16)]
    assert_prunes(source, {"ffn-channel": 0.5})


def test_a_product_with_a_stack_of_weights_has_experts() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y) <float[6,4] router, float[4,6,8] up, float[4,8,6] down>
        {
            logits = MatMul(x, router)  p = Softmax(logits)
            h = Einsum<equation="ni,eih->neh">(x, up)  r = Relu(h)  z = Einsum<equation="neh,eho->neo">(r, down)
            y = Einsum<equation="ne,neo->no">(p, z)
        }
        """)
    assert summary(source) == [("expert", 4), ("expert-channel", 8)]
    assert [outer.size for outer in the(source, "expert-channel").outers] == [4]
    assert_prunes(source, {"expert-channel": 0.5})
    assert_prunes(source, {"expert": 0.5})
    cut = assert_prunes(source, {"expert-channel": 0.25, "expert": 0.25})
    assert cut.model.graph.initializers["up"].shape == (3, 6, 6)


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("...i,ih->...h", "an Einsum with an ellipsis (Einsum h)"),
        ("ni,ih,h->nh", "an Einsum of this form: ni,ih,h->nh (Einsum h)"),
    ],
)
def test_refused_forms_of_einsum(equation: str, reason: str) -> None:
    third = ", b" if equation.count(",") == 2 else ""
    source = model(
        "g (float[N,6] x) => (float[N,6] y) <float[6,16] w, float[16] b, float[16,6] v>"
        f' {{ h = Einsum<equation="{equation}">(x, w{third})  r = Relu(h)  y = MatMul(r, v) }}'
    )
    assert summary(source) == []
    assert reason in reasons(source)


def test_packed_weights_pin_what_they_make_and_contract() -> None:
    source = model(
        """
        g (float[N,6] x) => (float[N,32] y) <float[6,16] w, uint8[32,1,8] q, float[32] scale>
        { h = MatMul(x, w)  r = Relu(h)  y = com.microsoft.MatMulNBits<K=16, N=32, bits=4, block_size=16>(r, q, scale) }
        """.replace("uint8[32,1,8] q, ", "").replace(
            ") => (float[N,32] y)", ", uint8[32,1,8] q) => (float[N,32] y)"
        )
    )
    assert summary(source) == []
    assert "contracted with packed weights of MatMulNBits (MatMulNBits y)" in reasons(source)
    assert "made by packed weights of MatMulNBits (MatMulNBits y)" in reasons(source)


# --- products of two activations


def test_a_channel_contracted_between_activations_must_be_zero_when_masked() -> None:
    """A bias is cut with the channel; a constant that the channel emits is not."""
    graph = """
        g (float[B,S,6] x) => (float[B,S,S2] y) <float[6,16] w, float[16] b, float[6,16] v>
        {{ q0 = MatMul(x, w)  q1 = Add(q0, b)  q = {activation}(q1)  k0 = MatMul(x, v)  k1 = {activation}(k0)
          k = Transpose<perm=[0,2,1]>(k1)  y = MatMul(q, k) }}
        """
    source = model(graph.format(activation="Relu"))
    assert summary(source) == [("qk-pair", 16)]
    assert_prunes(source, {"qk-pair": 0.5})
    source = model(graph.format(activation="Sigmoid"))
    assert summary(source) == []
    assert (
        "summed over in a product of two activations, where a removed channel would not be zero"
        in reasons(source)
    )


# --- elementwise


@pytest.mark.parametrize(
    "body",
    [
        "s = Sigmoid(h)  r = Mul(h, s)",
        "r = Gelu(h)",
        "r = HardSwish(h)",
        "r = com.microsoft.QuickGelu(h)",
        "a = Cos(h)  r = Exp(a)",
        "r = LeakyRelu(h)",
        "z = Sub(h, h)  g = Greater(h, z)  r = Where(g, h, z)",
        "c = Cast<to=11>(h)  d = Tanh(c)  r = Cast<to=1>(d)",
        "a = Max(h, one)  b = Min(a, one)  r = Sum(a, b, h)",
        "r = Clip(h, zero, one)",
        "r, m = Dropout(h)",
    ],
)
def test_elementwise_operators_pass_channels_through(body: str) -> None:
    source = ffn(body, "float one = {1.0}, float zero = {0.0}")
    assert summary(source) == [("ffn-channel", 16)]
    assert_prunes(source, {"ffn-channel": 0.5})


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("a = Add(h, b)  r = Sigmoid(a)", "float[16] b"),
        ("a = Mul(h, b)  r = Add(c, a)", "float[1,16] b, float[16] c"),
        ("r = PRelu(h, b)", "float[16] b"),
        ("r = com.microsoft.BiasGelu(h, b)", "float[16] b"),
        ("r = com.microsoft.FastGelu(h, b)", "float[16] b"),
    ],
)
def test_vectors_are_cut_with_the_channel(body: str, constants: str) -> None:
    source = ffn(body, constants)
    assert summary(source) == [("ffn-channel", 16)]
    cut = assert_prunes(source, {"ffn-channel": 0.5})
    assert cut.model.graph.initializers["b"].shape[-1] == 8


def test_a_broadcast_axis_of_size_one_unifies_with_nothing() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,5,6] y) <float[6,16] w, float[5,1] u, float[16,6] v, int64[1] one = {1}>
        { h = MatMul(x, w)  e = Unsqueeze(h, one)  r = Mul(e, u)  y = MatMul(r, v) }
        """)
    assert summary(source) == [("ffn-channel", 16)]
    assert_prunes(source, {"ffn-channel": 0.5})


def test_axes_that_do_not_line_up_are_refused() -> None:
    source = model("""
        g (float[N,12] x) => (float[N,12] y)
          <float[12,12] w, float[12,12] u, float[12,12] v, int64[3] a = {-1, 4, 3}, int64[3] b = {-1, 3, 4},
           int64[3] c = {-1, 4, 3}, int64[2] f = {-1, 12}>
        {
            h = MatMul(x, w)  h1 = Reshape(h, a)  h2 = Relu(h1)  h3 = Reshape(h2, f)
            k = MatMul(x, u)  k1 = Reshape(k, b)  k2 = Relu(k1)  k3 = Reshape(k2, f)
            r = Add(h3, k3)  y = MatMul(r, v)
        }
        """)
    assert summary(source) == []
    assert "axes that do not line up: factors of size" in reasons(source)


def test_bounds_per_channel_are_refused() -> None:
    source = ffn("r = Clip(h, b)", "float[16] b")
    assert summary(source) == []
    assert "input 1 is not a scalar (Clip r)" in reasons(source)


def test_quantized_weights_with_scales_per_channel() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y) <float[6,16] w, float[16] s, float[16,6] v, float t = {0.1}, int8 z = {0}>
        {
            q = QuantizeLinear<axis=1>(w, s)  d = DequantizeLinear<axis=1>(q, s)  h = MatMul(x, d)
            r = Relu(h)  rq = QuantizeLinear(r, t, z)  rd = DequantizeLinear(rq, t, z)  y = MatMul(rd, v)
        }
        """, opset=19, weights={"s": np.full(16, 0.02, np.float32)})  # fmt: skip
    assert [structure.kind for structure in structures(source) if not structure.pins] == ["ffn-channel"]
    cut = assert_prunes(source, {"ffn-channel": 0.5})
    assert cut.model.graph.initializers["s"].shape == (8,)


def test_tokens_of_a_weight_before_those_of_the_input_are_activations() -> None:
    """The class token of a vision transformer: joining it makes no weight of the whole sequence."""
    source = model(
        """
        g (float[N,S,6] x) => (float[N,T,6] y) <float[1,1,6] token, float[6,16] w, float[16,6] v, int64[3] first = {1,1,6}>
        {
            s = Shape<start=0, end=1>(x)  r = Slice(first, one, three, zero)  target = Concat<axis=0>(s, r)
            c = Expand(token, target)  t = Concat<axis=1>(c, x)  h = MatMul(t, w)  g0 = Relu(h)  y = MatMul(g0, v)
        }
        """.replace("{1,1,6}>", "{1,1,6}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] three = {3}>")
    )
    assert summary(source) == [("ffn-channel", 16)]
    assert_prunes(source, {"ffn-channel": 0.5})
