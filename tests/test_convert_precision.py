"""What of a graph stays in float32 when it is converted to 16 bits, and that the numbers are right."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model
from precision_helpers import TYPES, converted, noise, reasons, scalar, types

from onnx_autoglm import UserError
from onnx_autoglm.passes.convert_precision import ConvertPrecision, convert_precision

# --- norms

RMS = """
g (float[b,s,16] x) => (float[b,s,16] y) <float[16,16] a, float[16,16] w, float gain_two, float eps, float[16] gain>
{
  h = MatMul(x, a)  sq = Pow(h, gain_two)  mean = ReduceMean<keepdims=1>(sq, axes)  me = Add(mean, eps)
  root = Sqrt(me)  inv = Reciprocal(root)  n = Mul(h, inv)  g = Mul(n, gain)  y = MatMul(g, w)
}
"""


def rms(**weights: np.ndarray) -> ir.Model:
    text = RMS.replace("float[16] gain>", "float[16] gain, int64[1] axes>")
    own = {"gain_two": scalar(2), "eps": scalar(1e-6), "axes": np.array([-1])}
    return model(text, weights={**own, **weights}, opset=20)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_statistics_of_a_norm_stay_in_float32(precision: Any) -> None:
    source = rms(a=noise(16, 16, scale=100))  # squares of some 1e5
    result, report = converted(source, {"x": noise(2, 3, 16)}, precision)
    low = TYPES[precision].name
    kinds = types(result)
    assert {kinds[name] for name in ("sq", "mean", "me", "root", "inv", "n", "eps")} == {"FLOAT"}
    assert {kinds[name] for name in (f"a/{low.lower()}", f"w/{low.lower()}", "h", "g")} == {low}
    # In, into the norm (one for both readers), out of it, out.
    assert report.casts.all == 4 and report.low == 3  # both products and the gain between them


def test_a_norm_without_a_pow() -> None:
    text = RMS.replace("Pow(h, gain_two)", "Mul(h, h)").replace("float gain_two, ", "")
    text = text.replace("float[16] gain>", "float[16] gain, int64[1] axes>")
    weights = {"eps": scalar(1e-6), "axes": np.array([-1]), "a": noise(16, 16, scale=100)}
    result, _ = converted(model(text, weights=weights), {"x": noise(2, 3, 16)})
    assert types(result)["sq"] == types(result)["n"] == "FLOAT"


def test_a_product_of_two_different_values_is_no_square() -> None:
    text = """
    g (float[b,16] x) => (float[b,1] y) <float[16,16] a, float[16,16] b, int64[1] axes>
    { p = MatMul(x, a) q = MatMul(x, b) m = Mul(p, q) y = ReduceSum(m, axes) }
    """
    result, report = converted(
        model(text, weights={"axes": np.array([1])}), {"x": noise(4, 16)}, tolerance=1e-2
    )
    assert types(result)["m"] == "FLOAT16" and not report.islands


def test_a_decomposed_layer_norm_is_one_island() -> None:
    text = """
    g (float[b,s,16] x) => (float[b,s,16] y) <float[16,16] a, float[16,16] w, float two, float eps, int64[1] axes>
    {
      h = MatMul(x, a)  mean = ReduceMean(h, axes)  d = Sub(h, mean)  sq = Pow(d, two)  var = ReduceMean(sq, axes)
      ve = Add(var, eps)  std = Sqrt(ve)  n = Div(d, std)  y = MatMul(n, w)
    }
    """
    weights = {"two": scalar(2), "eps": scalar(1e-12), "axes": np.array([-1]), "a": noise(16, 16, scale=200)}
    result, report = converted(model(text, weights=weights), {"x": noise(2, 3, 16)})
    kinds = types(result)
    assert {kinds[name] for name in ("mean", "d", "sq", "var", "ve", "std", "n")} == {"FLOAT"}
    assert report.casts.all == 4 and kinds["h"] == "FLOAT16"


def test_what_lies_between_two_norms_only_is_not_cast() -> None:
    text = """
    g (float[b,16] x) => (float[b,16] y) <float[16,16] a, float[16,16] w, float[16] gain, int64[1] axes>
    {
      h = MatMul(x, a)  s = Mul(h, h)  m = ReduceMean(s, axes)  n = Div(h, m)
      g = Mul(n, gain)
      t = Mul(g, g)  k = ReduceMean(t, axes)  o = Div(g, k)  y = MatMul(o, w)
    }
    """
    source = model(text, weights={"axes": np.array([-1])})
    result, report = converted(source, {"x": noise(4, 16)})
    assert types(result)["g"] == types(result)["gain"] == "FLOAT" and report.casts.all == 4
    text = text.replace("y = MatMul(o, w)", "p = MatMul(g, w) q = MatMul(o, w) y = Add(p, q)")
    result, _ = converted(model(text, weights={"axes": np.array([-1])}), {"x": noise(4, 16)})
    assert types(result)["g"] == "FLOAT16"


def test_side_results_of_a_norm_keep_their_type() -> None:
    text = """
    g (float[b,16] x) => (float[b,16] y, float[b,1] m) <float[16,16] a, float[16] gain>
    { h = MatMul(x, a) y, m = LayerNormalization<axis=-1>(h, gain) }
    """
    result, _ = converted(model(text), {"x": noise(4, 16)})
    assert types(result)["m"] == "FLOAT"


# --- softmax and masks


def test_scores_that_overflow_stay_in_float32_until_they_fit() -> None:
    text = """
    g (float[b,s,16] x) => (float[b,s,16] y) <float[16,16] q, float[16,16] k, float[16,16] v, float root>
    {
      qs = MatMul(x, q) ks = MatMul(x, k) vs = MatMul(x, v) kt = Transpose<perm=[0,2,1]>(ks)
      scores = MatMul(qs, kt) scaled = Mul(scores, root) p = Softmax(scaled) y = MatMul(p, vs)
    }
    """
    weights = {"q": noise(16, 16, scale=60), "k": noise(16, 16, scale=60, seed=2), "root": scalar(1e-4)}
    feed = {"x": noise(2, 5, 16)}
    result, report = converted(model(text, weights=weights), feed, tolerance=2e-2)
    kinds = types(result)
    assert kinds["scores"] == "FLOAT" and kinds["scaled"] == "FLOAT"
    assert kinds["qs"] == kinds["p"] == kinds["vs"] == "FLOAT16"
    assert "value 'scores' reaches" in reasons(report)
    small = {**weights, "q": noise(16, 16), "k": noise(16, 16, seed=2), "root": scalar(0.25)}
    result, report = converted(model(text, weights=small), feed)
    assert types(result)["scores"] == "FLOAT16" and not report.islands


MASKED = """
g (float[b,s,16] x, bool[s,s] keep) => (float[b,s,16] y) <float[16,16] k, float never, float zero>
{
  ks = MatMul(x, k) kt = Transpose<perm=[0,2,1]>(ks) scores = MatMul(x, kt)
  mask = Where(keep, zero, never) masked = Add(scores, mask) p = Softmax(masked) y = MatMul(p, x)
}
"""


def masked(never: float) -> ir.Model:
    return model(MASKED, weights={"k": noise(16, 16, scale=0.1), "never": scalar(never), "zero": scalar(0)})


LOWEST = float(np.finfo(np.float32).min)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("never", [LOWEST, -1e9, -np.inf])
def test_a_mask_stays_a_mask(never: float, precision: Any) -> None:
    feed = {"x": noise(2, 5, 16), "keep": np.tril(np.ones((5, 5), bool))}
    result, report = converted(masked(never), feed, precision)
    fits = np.isinf(never) or (precision == "bf16" and never > -1e30)
    assert report.masks == ([] if fits else ["never"])
    assert types(result)["masked"] == TYPES[precision].name and not report.islands
    if not fits:
        (constant,) = (v.const_value for v in result.graph.initializers.values() if "never" in (v.name or ""))
        assert constant is not None and np.isfinite(constant.numpy().astype(np.float32)).all()


def test_a_mask_whose_value_counts_is_not_moved() -> None:
    """Where a row has nothing to see, the lowest float32 makes all scores equal; a smaller number does not."""
    keep = np.tril(np.ones((5, 5), bool))
    keep[2] = False
    result, report = converted(masked(LOWEST), {"x": noise(2, 5, 16), "keep": keep})
    assert not report.masks and types(result)["masked"] == "FLOAT" and types(result)["scores"] == "FLOAT16"


def test_infinities_in_a_mask_stay() -> None:
    text = MASKED.replace("float never", "float[5] never")
    never = np.array([LOWEST, -np.inf, LOWEST, LOWEST, -np.inf], np.float32)
    source = model(text, weights={"k": noise(16, 16, scale=0.1), "never": never, "zero": scalar(0)})
    keep = np.tril(np.ones((5, 5), bool))
    result, report = converted(source, {"x": noise(2, 5, 16), "keep": keep})
    assert report.masks == ["never"]
    moved = result.graph.initializers["never/float16"].const_value
    assert moved is not None and moved.numpy().tolist() == [-49120, -np.inf, -49120, -49120, -np.inf]


def test_a_mask_in_range_beside_which_scores_would_vanish_stays_in_float32() -> None:
    """In bfloat16 65,504 swallows what float32 keeps."""
    keep = np.zeros((5, 5), bool)
    result, report = converted(masked(-65504.0), {"x": noise(2, 5, 16, scale=3), "keep": keep}, "bf16")
    assert types(result)["masked"] == "FLOAT" and types(result)["scores"] == "BFLOAT16"
    assert "masks, beside which" in reasons(report)


def test_a_large_constant_that_is_no_mask_is_an_island() -> None:
    text = "g (float[b,16] x) => (float[b,16] y) <float[16,16] a, float big> { h = MatMul(x, a) y = Mul(h, big) }"
    source = model(text, weights={"big": scalar(-1e6)})
    result, report = converted(source, {"x": noise(4, 16)})
    assert not report.masks and "constant 'big' reaches 1e+06" in reasons(report)
    assert types(result)["y"] == "FLOAT" and types(result)["h"] == "FLOAT16"


def test_a_constant_that_reaches_a_softmax_but_counts_is_not_moved() -> None:
    text = """
    g (float[b,16] x) => (float[b,16] y) <float[16,16] a, float tiny, float big>
    { h = MatMul(x, a) t = Mul(h, tiny) s = Mul(t, big) y = Softmax(s) }
    """
    source = model(text, weights={"tiny": scalar(1e-4), "big": scalar(1e5)})
    result, report = converted(source, {"x": noise(4, 16, scale=0.1)})
    assert not report.masks and types(result)["s"] == "FLOAT"


# --- what does not fit


def test_a_weight_that_overflows_is_named() -> None:
    a = noise(16, 16)
    a[3, 4] = 70000.0
    text = "g (float[b,16] x) => (float[b,16] y) <float[16,16] a, float[16,16] w> { h = MatMul(x, a) y = MatMul(h, w) }"
    result, report = converted(
        model(text, weights={"a": a, "w": noise(16, 16, scale=1e-4)}), {"x": noise(4, 16, scale=0.01)}
    )
    assert "weight 'a' reaches 7e+04" in reasons(report)
    assert types(result)["a"] == "FLOAT" and "w/float16" in types(result)


def test_small_constants_keep_their_value_and_small_biases_do_not_matter() -> None:
    text = """
    g (float[b,16] x) => (float[b,16] y) <float[16,16] a, float eps, float[16] bias, float[16,16] w>
    { h = MatMul(x, a) r = Relu(h) e = Add(r, eps) i = Reciprocal(e) t = Mul(h, i) b = Add(t, bias) y = MatMul(b, w) }
    """
    weights = {"eps": scalar(1e-5), "bias": noise(16, scale=1e-6)}
    a = np.abs(noise(16, 16)) + 0.1
    result, report = converted(model(text, weights={**weights, "a": a}), {"x": np.abs(noise(4, 16)) + 0.1})
    kinds = types(result)
    assert kinds["e"] == "FLOAT" and "constant 'eps'" in reasons(report)
    assert kinds["b"] == kinds["h"] == "FLOAT16"


def test_float16_is_not_converted_without_measuring() -> None:
    with pytest.raises(UserError, match="pass data with --calib"):
        convert_precision(rms(), ConvertPrecision("fp16"), None)
    assert convert_precision(rms(), ConvertPrecision("bf16"), None)[1].low == 3


def test_an_operator_without_the_type_stays() -> None:
    text = """
    g (float[b,16] x) => (float[b,16] y) <float[16,16] a, float[16,16] w>
    { h = MatMul(x, a) t = Sinh(h) y = MatMul(t, w) }
    """
    source = model(text, opset=20)
    _, report = converted(source, {"x": noise(4, 16, scale=0.1)}, "bf16")
    assert "Sinh has no bfloat16 in opset 20" in reasons(report)
    _, report = converted(source, {"x": noise(4, 16, scale=0.1)})
    assert not report.islands


def test_nothing_to_convert_is_an_error() -> None:
    source = model("g (int64[n] x) => (int64[n] y) { y = Add(x, x) }")
    with pytest.raises(UserError, match="holds no float32 numbers"):
        convert_precision(source, ConvertPrecision("fp16"), [{"x": np.arange(3)}])


# --- positions


def test_positions_and_angles_stay_in_float32() -> None:
    text = """
    g (float[b,s,16] x, int64[s] positions) => (float[b,s,16] y) <float[1,16] inv_freq, float[16,16] a, int64[1] one>
    {
      h = MatMul(x, a) column = Unsqueeze(positions, one) p = Cast<to=1>(column) angles = MatMul(p, inv_freq)
      c = Cos(angles) s = Sin(angles) hc = Mul(h, c) hs = Mul(h, s) y = Add(hc, hs)
    }
    """
    freq = np.linspace(1, 0.01, 16, dtype=np.float32)[None]
    source = model(text, weights={"inv_freq": freq, "one": np.array([1])}, opset=23)
    feed = {"x": noise(2, 6, 16), "positions": np.array([0, 1, 2047, 2049, 30001, 100003])}
    for precision in ("fp16", "bf16"):
        result, _ = converted(source, feed, precision)
        kinds = types(result)
        assert kinds["angles"] == kinds["c"] == "FLOAT" and kinds["hc"] == TYPES[precision].name


def test_a_sine_of_activations_is_an_operator_like_any_other() -> None:
    text = "g (float[b,16] x) => (float[b,16] y) <float[16,16] a, float[16,16] w> { h = MatMul(x, a) s = Sin(h) y = MatMul(s, w) }"
    result, report = converted(model(text, weights={"a": noise(16, 16, scale=0.1)}), {"x": noise(4, 16)})
    assert types(result)["s"] == "FLOAT16" and not report.islands


def test_a_cast_from_integers_goes_straight_to_the_format() -> None:
    text = "g (float[b,16] x, int64[b,16] n) => (float[b,16] y) <float[16,16] a> { c = Cast<to=1>(n) s = Add(x, c) y = MatMul(s, a) }"
    result, _ = converted(model(text), {"x": noise(4, 16), "n": np.arange(64).reshape(4, 16)})
    casts = [node for node in result.graph if node.op_type == "Cast" and node.inputs[0].name == "n"]
    assert [node.outputs[0].dtype for node in casts] == [ir.DataType.FLOAT16]


def test_router_scores_stay_in_float32() -> None:
    text = """
    g (float[n,16] x) => (float[n,2,16] y) <float[16,4] router, float[4,16] table, int64[1] two, float[16,16] w>
    { h = MatMul(x, w) r = MatMul(h, router) p = Softmax(r) top, index = TopK(p, two) e = Gather(table, index) y = MatMul(e, w) }
    """
    result, _ = converted(model(text, weights={"two": np.array([2])}), {"x": noise(5, 16)})
    kinds = types(result)
    assert kinds["r"] == kinds["router"] == "FLOAT" and kinds["h"] == kinds["y/float16"] == "FLOAT16"
    text = text.replace(
        "e = Gather(table, index) y = MatMul(e, w)", "e = Gather(table, index) y = Identity(e)"
    )
    result, _ = converted(model(text, weights={"two": np.array([2])}), {"x": noise(5, 16)})
    assert "router/float16" in types(result)
