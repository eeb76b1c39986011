"""Constants, casts, interfaces and bodies of graphs in 16 bits."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import model
from precision_helpers import TYPES, converted, noise, reasons, scalar, types

from onnx_autoglm.cast_tensor import CastTensor, cast_tensor, largest
from onnx_autoglm.emulate import emulate
from onnx_autoglm.passes.convert_precision import ConvertPrecision, convert_precision
from onnx_autoglm.precision_casts import count_casts
from onnx_autoglm.runtime import Session
from onnx_autoglm.value_types import complete_types

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


def test_a_cast_like_of_integers_becomes_a_cast() -> None:
    text = """
    g (float[b,16] x, int64[b,16] n) => (float[b,16] y) <float[16,16] a>
    { c = CastLike(n, x) s = Add(x, c) y = MatMul(s, a) }
    """
    result, _ = converted(model(text), {"x": noise(4, 16), "n": np.arange(64).reshape(4, 16)})
    assert [node.op_type for node in result.graph].count("CastLike") == 0


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
    g (float[b,s,16] x) => (float[b,s,16] y, float[b,s,16] z) <float[16,16] b, float[16,16] c, float[16,32] a, int64[2] size>
    {
      zero = Constant<value_int=0>() one = Constant<value_int=1>() t = MatMul(x, b)
      h = MatMul(t, a) parts = SplitToSequence<axis=-1>(h, size) p = SequenceAt(parts, zero) q = SequenceAt(parts, one)
      y = Mul(p, q) z = MatMul(p, c)
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


def test_a_value_that_is_cast_inside_nested_bodies() -> None:
    text = """
    g (float[b,16] x, bool flag) => (float[b,16] y) <float[16,16] a>
    {
      h = MatMul(x, a)
      y = If (flag) <
        then_branch = t () => (float[b,16] ty) {
          r = MatMul(h, a)
          ty = If (flag) <
            then_branch = tt () => (float[b,16] tty) { s = Sinh(r) u = Sinh(h) tty = Add(s, u) },
            else_branch = te () => (float[b,16] tey) { tey = Relu(r) }
          >
        },
        else_branch = e () => (float[b,16] ey) { ey = Identity(h) }
      >
    }
    """
    source = model(text, weights={"a": noise(16, 16, scale=0.1)})
    for precision in ("fp16", "bf16"):
        for flag in (True, False):
            converted(source, {"x": noise(4, 16), "flag": np.array(flag)}, precision)
