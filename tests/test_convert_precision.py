"""Graphs in 16 bits: what stays in float32, where the casts are, and that the numbers are right."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import model

from onnx_autoglm import UserError
from onnx_autoglm.cast_tensor import CastTensor, cast_tensor, largest
from onnx_autoglm.emulate import emulate
from onnx_autoglm.passes.convert_precision import ConvertPrecision, PrecisionReport, convert_precision
from onnx_autoglm.precision_casts import count_casts
from onnx_autoglm.runtime import Session, compare
from onnx_autoglm.value_types import complete_types

Arrays = dict[str, np.ndarray]
TOLERANCE = {"fp16": 4e-3, "bf16": 3e-2}
TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def noise(*shape: int, scale: float = 1.0, seed: int = 1) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def converted(
    source: ir.Model, feed: Arrays, precision: Any = "fp16", tolerance: float | None = None, **options: Any
) -> tuple[ir.Model, PrecisionReport]:
    """The converted model, which passes the ONNX checker, runs, and computes what the source does."""
    before = ir.to_proto(source).SerializeToString()
    result, report = convert_precision(source, ConvertPrecision(precision, **options), [feed])
    assert ir.to_proto(source).SerializeToString() == before
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    expected = Session(source).run(feed)
    types = {value.name: value.dtype.numpy() for value in result.graph.inputs if value.dtype is not None}
    inputs = {name: array.astype(types[name]) for name, array in feed.items()}
    if precision == "bf16":
        actual = Session(emulate(result)).run(feed)
    else:
        actual = Session(result, optimize=True).run(inputs)
    difference = compare(expected, actual)
    assert difference.within(tolerance or TOLERANCE[precision]), difference
    assert report.casts.cancelling == report.casts.repeated == 0
    return result, report


def types(result: ir.Model) -> dict[str, str]:
    """The type of each value by its name."""
    values = [value for node in result.graph.all_nodes() for value in node.outputs]
    values += [value for graph in result.graphs() for value in graph.initializers.values()]
    return {value.name or "": value.dtype.name for value in values if value.dtype is not None}


def reasons(report: PrecisionReport) -> str:
    return "\n".join(entry["reason"] for entry in report.islands)


def scalar(number: float) -> np.ndarray:
    return np.array(number, np.float32)


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
    result, _ = converted(model(text, weights={"axes": np.array([1])}), {"x": noise(4, 16)}, tolerance=1e-2)
    assert types(result)["m"] == "FLOAT16"


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


# --- constants


def test_a_shared_initializer_is_stored_in_the_type_of_each_reader() -> None:
    text = """
    g (float[b,16] x) => (float[b,16] y) <float[16] gain, float[16,16] a, float two, int64[1] axes>
    { g = Mul(x, gain) h = MatMul(g, a) sq = Pow(h, two) m = ReduceMean(sq, axes) gm = Mul(m, gain) t = MatMul(gm, a) y = Add(h, t) }
    """
    result, _ = converted(
        model(text, weights={"two": scalar(2), "axes": np.array([-1])}), {"x": noise(4, 16)}
    )
    kinds = types(result)
    assert kinds["gain"] == "FLOAT" and kinds["gain/float16"] == "FLOAT16" and "a" not in kinds
    gain = result.graph.initializers["gain"].const_value
    half = result.graph.initializers["gain/float16"].const_value
    assert gain is not None and half is not None and (gain.numpy().astype(np.float16) == half.numpy()).all()


def test_tables_and_constants_made_by_nodes() -> None:
    text = """
    g (int64[b,s] ids, float[b,s,16] x) => (float[b,s,16] y) <float[50,16] table, float[16,16] a>
    {
      e = Gather(table, ids) shape = Shape(e) ones = ConstantOfShape<value=float[1] {1.0}>(shape) s = Add(e, ones)
      zeros = ConstantOfShape(shape) z = Add(s, zeros) again = Cast<to=1>(z) like = CastLike(again, x) h = MatMul(like, a) y = Add(h, x)
    }
    """
    result, report = converted(model(text), {"ids": np.arange(10).reshape(2, 5), "x": noise(2, 5, 16)})
    assert not report.islands and report.casts.all == 2
    kinds = types(result)
    assert kinds["ones"] == kinds["zeros"] == "FLOAT16" and "table/float16" in kinds
    assert not any(node.op_type == "CastLike" for node in result.graph)


def test_convolutions_with_batch_normalization() -> None:
    text = """
    g (float[n,3,8,8] x) => (float[n,4,8,8] y) <float[4,3,3,3] w, float[4] g1, float[4] b1, float[4] m, float[4] v>
    { c = Conv<pads=[1,1,1,1]>(x, w) n = BatchNormalization<epsilon=1e-9>(c, g1, b1, m, v) y = Relu(n) }
    """
    variance = np.array([0.5, 1, 2, 3], np.float32)
    result, report = converted(model(text, weights={"v": variance}), {"x": noise(2, 3, 8, 8)})
    assert not report.islands and types(result)["n"] == "FLOAT16"
    variance = np.array([0.5, 1e-5, 1e-7, 3], np.float32)
    _, report = converted(
        model(text, weights={"v": variance, "w": noise(4, 3, 3, 3, scale=1e-2)}), {"x": noise(2, 3, 8, 8)}
    )
    assert "variances that the format rounds to nothing" in reasons(report)


def test_an_old_operator_set_is_raised_for_bfloat16() -> None:
    text = "g (float[n,3,8,8] x) => (float[n,4,8,8] y) <float[4,3,3,3] w> { c = Conv<pads=[1,1,1,1]>(x, w) y = Relu(c) }"
    _, report = converted(model(text, opset=11), {"x": noise(2, 3, 8, 8)}, "bf16")
    assert report.opset == 22 and not report.islands
    assert converted(model(text, opset=11), {"x": noise(2, 3, 8, 8)})[1].opset == 11


# --- interface and scores

PLAIN = "g (float[b,16] x) => (float[b,8] y) <float[16,16] a, float[16,8] head> { h = MatMul(x, a) y = MatMul(h, head) }"


def test_the_interface_keeps_its_type_unless_told() -> None:
    feed = {"x": noise(4, 16)}
    result, report = converted(model(PLAIN), feed)
    assert [v.dtype for v in (*result.graph.inputs, *result.graph.outputs)] == [ir.DataType.FLOAT] * 2
    assert [v.name for v in (*result.graph.inputs, *result.graph.outputs)] == [
        "x",
        "y",
    ] and report.casts.all == 2
    result, report = converted(model(PLAIN), feed, io="fp16")
    assert [v.dtype for v in (*result.graph.inputs, *result.graph.outputs)] == [ir.DataType.FLOAT16] * 2
    assert [v.name for v in (*result.graph.inputs, *result.graph.outputs)] == [
        "x",
        "y",
    ] and not report.casts.all


def test_scores_in_float32_on_request() -> None:
    result, _ = converted(model(PLAIN), {"x": noise(4, 16)}, keep_logits=True, io="fp16")
    kinds = types(result)
    assert kinds["head"] == "FLOAT" and "a/float16" in kinds
    assert (
        result.graph.outputs[0].dtype == ir.DataType.FLOAT
        and result.graph.inputs[0].dtype == ir.DataType.FLOAT16
    )


def test_a_cache_is_cast_once() -> None:
    text = """
    g (float[b,1,16] x, float[b,p,16] past) => (float[b,1,16] y, float[b,t,16] present) <float[16,16] k>
    { n = MatMul(x, k) present = Concat<axis=1>(past, n) kt = Transpose<perm=[0,2,1]>(present) s = MatMul(n, kt) p = Softmax(s) y = MatMul(p, present) }
    """
    feed = {"x": noise(2, 1, 16), "past": noise(2, 3, 16)}
    result, report = converted(model(text), feed)
    assert types(result)["present"] == "FLOAT" and report.casts.detours == 0
    result, report = converted(model(text), feed, io="fp16")
    assert types(result)["present"] == "FLOAT16" and not report.casts.all


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_a_16_bit_source_keeps_its_bits(kind: str) -> None:
    text = PLAIN.replace("float[", f"{kind}[")
    precision: Any = {"float16": "fp16", "bfloat16": "bf16"}[kind]
    source = model(text)
    feed = {"x": noise(4, 16)}
    result, report = convert_precision(source, ConvertPrecision(precision), [feed])
    assert report.casts.all == 0
    (weight,) = (v.const_value for v in result.graph.initializers.values() if v.name.startswith("head"))
    assert weight is source.graph.initializers["head"].const_value


# --- bodies

BRANCHES = """
g (float[b,16] x, bool flag) => (float[b,16] y) <float[16,16] a, float[16,16] w>
{
  h = MatMul(x, a)
  i = If (flag) <
    then_branch = t () => (float[b,16] th) { tm = MatMul(h, w) th = Relu(tm) },
    else_branch = e () => (float[b,16] eh) { eh = Identity(h) }
  >
  y = MatMul(i, w)
}
"""


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("flag", [True, False])
def test_branches(precision: Any, flag: bool) -> None:
    feed = {"x": noise(4, 16), "flag": np.array(flag)}
    result, report = converted(model(BRANCHES), feed, precision)
    kinds = types(result)
    assert kinds["i"] == TYPES[precision].name
    inner = "FLOAT" if precision == "fp16" else "BFLOAT16"  # what cannot be measured stays
    assert kinds["tm"] == inner and report.casts.cancelling == 0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_loops(precision: Any) -> None:
    text = """
    g (float[b,16] x, int64 n, bool go) => (float[b,16] y) <float[16,16] a>
    {
      h = MatMul(x, a)
      last = Loop (n, go, h) <
        body = body (int64 i, bool on, float[b,16] state) => (bool still, float[b,16] next)
        { still = Identity(on) p = MatMul(state, a) next = Tanh(p) }
      >
      y = MatMul(last, a)
    }
    """
    feed = {"x": noise(4, 16), "n": np.array(3), "go": np.array(True)}
    result, report = converted(model(text, weights={"a": noise(16, 16, scale=0.3)}), feed, precision)
    assert types(result)["h"] == TYPES[precision].name and "values carried by Loop" in reasons(report)


def test_functions_are_inlined() -> None:
    text = """
    <ir_version: 10, opset_import: ["": 20, "local": 1]>
    g (float[b,16] x, float[16,16] a) => (float[b,16] y) { y = local.block(x, a) }
    <domain: "local", opset_import: ["": 20]> block (x, w) => (y) { h = MatMul(x, w) y = Relu(h) }
    """
    source = ir.from_proto(onnx.parser.parse_model(text))
    result, _ = converted(source, {"x": noise(4, 16), "a": noise(16, 16)})
    assert not result.functions


def test_sequences() -> None:
    text = """
    g (float[b,s,16] x) => (float[b,s,16] y) <float[16,16] b, float[16,32] a, int64[2] size>
    {
      zero = Constant<value_int=0>() one = Constant<value_int=1>() t = MatMul(x, b)
      h = MatMul(t, a) parts = SplitToSequence<axis=-1>(h, size) p = SequenceAt(parts, zero) q = SequenceAt(parts, one)
      y = Mul(p, q)
    }
    """
    weights = {"size": np.array([16, 16])}
    feed = {"x": noise(2, 3, 16)}
    result, report = converted(model(text, weights=weights), feed)
    assert types(result)["p"] == "FLOAT16" and not report.islands
    a = noise(16, 32)
    a[:, 20:] *= 4000  # the second part does not fit, and a sequence has one type
    result, report = converted(model(text, weights={**weights, "a": a}), feed)
    assert types(result)["p"] == types(result)["parts"] == "FLOAT" and types(result)["t"] == "FLOAT16"


# --- tensors


def test_a_cast_tensor_is_written_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_autoglm.cast_tensor as module

    monkeypatch.setattr(module, "CHUNK_BYTES", 40)
    array = noise(7, 5)
    array[2, 3] = -np.inf
    tensor = CastTensor(ir.tensor(array), ir.DataType.BFLOAT16)
    file = io.BytesIO()
    tensor.tofile(file)
    expected = array.astype(ir.DataType.BFLOAT16.numpy())
    assert file.getvalue() == expected.tobytes() == tensor.tobytes() and tensor.nbytes == 70
    assert largest(ir.tensor(array)) == np.abs(array[np.isfinite(array)]).max()
    assert cast_tensor(tensor, ir.DataType.BFLOAT16) is tensor


def test_casts_are_counted() -> None:
    text = """
    g (float[n] x) => (float[n] y, float[n] z, float16[n] h2) <int64[1] shape>
    {
      h = Cast<to=10>(x) y = Cast<to=1>(h) r = Reshape(h, shape) z = Cast<to=1>(r) h2 = Cast<to=10>(x)
    }
    """
    source = model(text, weights={"shape": np.array([-1])})
    complete_types(source)
    counts = count_casts(source)
    assert (counts.all, counts.cancelling, counts.detours, counts.repeated) == (4, 1, 1, 1)


def test_emulation_rounds_what_nodes_make() -> None:
    text = "g (bfloat16[n,16] x) => (bfloat16[n,16] y) <bfloat16[16,16] a> { h = MatMul(x, a) y = Mul(h, h) }"
    source = model(text)
    complete_types(source)
    x = noise(4, 16).astype(ir.DataType.BFLOAT16.numpy())
    half = ir.DataType.BFLOAT16.numpy()
    a: Mapping[str, Any] = source.graph.initializers
    product = (
        (x.astype(np.float32) @ a["a"].const_value.numpy().astype(np.float32)).astype(half).astype(np.float32)
    )
    expected = np.square(product).astype(half).astype(np.float32)
    actual = Session(emulate(source)).run({"x": x.astype(np.float32)})["y"]
    assert (expected == actual).mean() > 0.95  # sums in another order may round otherwise
