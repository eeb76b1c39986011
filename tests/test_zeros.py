"""A sum over a channel is exact only if the masked channel is zero there."""

from __future__ import annotations

import pytest
from helpers import assert_prunes, model, summary, the

SUMMED = "summed over, where a removed channel would not be zero (ReduceSum s)"


def read_by_a_sum(body: str, constants: str = "") -> object:
    """`h`, made by a weight with a bias, to `r`, which a weight contracts and a ReduceSum sums up."""
    return model(
        "g (float[N,6] x) => (float[N,6] y)"
        f" <float[6,16] w, float[16] b, float[16,6] v, int64[1] axis = {{1}}{', ' * bool(constants)}{constants}>"
        f" {{ h0 = MatMul(x, w)  h = Add(h0, b)  {body}  s = ReduceSum(r, axis)  c = MatMul(r, v)  y = Mul(c, s) }}"
    )


KEEP_ZERO = [
    "r = Relu(h)",
    "r = Gelu(h)",
    "g0 = Sigmoid(h)  r = Mul(h, g0)",
    "g0 = Exp(h)  r = Mul(g0, h)",
    "a = Tanh(h)  r = Sub(a, h)",
    "a = Abs(h)  r = Sqrt(a)",
    "r = Elu(h)",
    "r = Pow(h, two)",
    "r = Div(h, two)",
    "d = Exp(h)  r = Div(h, d)",
    "z = Greater(h, two)  a = Neg(h)  r = Where(z, h, a)",
    "a, c0 = Split<axis=1, num_outputs=2>(h)  r = Concat<axis=1>(c0, a)",
    "r = Add(h, h)",
    "u = Mul(b, b)  e = Sigmoid(h)  r = Mul(e, u)",
]
LOSE_ZERO = [
    "r = Sigmoid(h)",
    "r = Exp(h)",
    "r = Cos(h)",
    "r = Softplus(h)",
    "r = Add(h, two)",
    "a = Elu(h)  r = Add(a, one)",
    "r = Max(h, two)",
    "r = Div(h, h)",
    "z = Greater(h, two)  r = Where(z, h, two)",
    "a = Sigmoid(h)  r = Sub(a, h)",
    "r = Pow(h, none)",
    "r = HardSigmoid(h)",
    "r = Clip(h, one, two)",
]
CONSTANTS = "float two = {2.0}, float one = {1.0}, float none = {0.0}"


@pytest.mark.parametrize("body", KEEP_ZERO)
def test_operators_that_keep_zero_leave_the_channel_free(body: str) -> None:
    source = read_by_a_sum(body, CONSTANTS)
    assert summary(source), "no channel is free"
    assert_prunes(source, {"ffn-channel": 0.5}, tolerance=1e-4)


@pytest.mark.parametrize("body", LOSE_ZERO)
def test_operators_that_lose_zero_pin_the_channel(body: str) -> None:
    source = read_by_a_sum(body, CONSTANTS)
    assert summary(source) == []
    assert SUMMED in [str(pin) for pin in the(source, "ffn-channel").pins]


def test_a_product_forgives_what_a_weight_contracts() -> None:
    """Without the sum nothing pins: the consumer's weight is masked as well."""
    source = model(
        "g (float[N,6] x) => (float[N,6] y) <float[6,16] w, float[16] b, float[16,6] v>"
        " { h0 = MatMul(x, w)  h = Add(h0, b)  r = Sigmoid(h)  y = MatMul(r, v) }"
    )
    assert_prunes(source, {"ffn-channel": 0.5})


LINEAR_ATTENTION = """
g (float[B,S,12] x) => (float[B,S,12] y)
  <float[12,16] wq, float[12,16] wk, float[12,8] wv, float[8,12] wo, float one = {{1.0}}>
{{
    q0 = MatMul(x, wq)  q1 = {activation}(q0)  q = {shift}(q1, one)
    k0 = MatMul(x, wk)  k1 = {activation}(k0)  k2 = {shift}(k1, one)  k = Transpose<perm=[0,2,1]>(k2)
    v = MatMul(x, wv)  kv = MatMul(k, v)  o = MatMul(q, kv)  y = MatMul(o, wo)
}}
"""


def test_linear_attention_with_elu_plus_one_is_pinned() -> None:
    """A masked feature is elu(0)+1 = 1 in both q and k: cutting it would change the sum."""
    source = model(LINEAR_ATTENTION.format(activation="Elu", shift="Add"))
    assert [kind for kind, _ in summary(source)] == ["value-channel"]
    pins = {str(pin) for pin in the(source, "qk-pair").pins}
    assert pins == {
        "summed over in a product of two activations, where a removed channel would not be zero (MatMul o)"
    }


def test_linear_attention_on_features_that_are_zero_is_free() -> None:
    source = model(LINEAR_ATTENTION.format(activation="Relu", shift="Mul"))
    assert ("qk-pair", 16) in summary(source)
    assert_prunes(source, {"qk-pair": 0.5})


def test_one_operand_that_is_zero_is_enough() -> None:
    source = model(
        LINEAR_ATTENTION.format(activation="Elu", shift="Add").replace("q = Add(q1, one)", "q = Mul(q1, one)")
    )
    assert ("qk-pair", 16) in summary(source)
    assert_prunes(source, {"qk-pair": 0.5})


def test_a_norm_per_channel_keeps_zero_through_its_scale_and_shift() -> None:
    graph = """
        g (float[N,3,6,6] x) => (float[N,4,6,6] y)
          <float[8,3,1,1] w, float[8] s, float[8] t, float[8] m, float[8] var, float[4,8,1,1] v, int64[1] axis = {1}>
        { h = Conv(x, w)  a = Abs(var)  n = BatchNormalization(h, s, t, m, a)  r = ACTIVATION(n)  z = ReduceSum(r, axis)
          c = Conv(r, v)  y = Mul(c, z) }
        """
    free = model(graph.replace("ACTIVATION", "Relu"))
    assert summary(free) == [("conv-channel", 8)]
    assert_prunes(free, {"conv-channel": 0.5}, tolerance=1e-4)
    pinned = model(graph.replace("ACTIVATION", "Sigmoid"))
    assert summary(pinned) == []
    assert "(ReduceSum z)" in str(next(pin for pin in structures_pins(pinned) if "summed" in str(pin)))


def structures_pins(source: object) -> list[object]:
    from helpers import structures

    return [pin for structure in structures(source) for pin in structure.pins]  # type: ignore[arg-type]
