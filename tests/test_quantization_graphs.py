"""Smoothing, Q/DQ insertion and the two emissions, on small graphs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import model
from onnx.reference import ReferenceEvaluator

from onnx_autoglm import build
from onnx_autoglm.cut import analyse
from onnx_autoglm.dataset import Dataset
from onnx_autoglm.errors import UserError
from onnx_autoglm.modelfile import save_model
from onnx_autoglm.passes.fold_batchnorm import fold_batchnorm
from onnx_autoglm.passes.insert_qdq import insert_qdq
from onnx_autoglm.passes.smooth import fold
from onnx_autoglm.quantization.absorb import Refusal, find_folding
from onnx_autoglm.quantization.audit import audit
from onnx_autoglm.quantization.calibrate import record
from onnx_autoglm.quantization.chains import find_chains, kept_chains, rounded_values
from onnx_autoglm.quantization.lookups import find_lookups
from onnx_autoglm.quantization.output_error import weight_of
from onnx_autoglm.quantization.places import Place, find_places
from onnx_autoglm.quantization.refuse import refuse_quantized
from onnx_autoglm.quantization.rehearsal import Rehearsal
from onnx_autoglm.quantization.schemes import Decision, Scheme, Target
from onnx_autoglm.quantization.stored import floats_tensor
from onnx_autoglm.quantization.weights import nearest
from onnx_autoglm.runtime import Session

GATED = """
agraph (float[B,S,32] x) => (float[B,S,32] y)
<float[32] gamma, float[32,128] up, float[64,32] down, float eps, float two, int64[1] last>
{
  s = Pow(x, two)
  m = ReduceMean(s, last)
  e = Add(m, eps)
  r = Sqrt(e)
  n = Div(x, r)
  h = Mul(gamma, n)
  both = MatMul(h, up)
  gate, lift = Split<axis=-1, num_outputs=2>(both)
  sigmoid = Sigmoid(gate)
  silu = Mul(gate, sigmoid)
  inner = Mul(lift, silu)
  out = MatMul(inner, down)
  y = Add(x, out)
}
"""
CONSTANTS = {"eps": np.float32(1e-5), "two": np.float32(2), "last": np.array([-1])}

CONV = """
agraph (float[B,16,8,8] x) => (float[B,32] y)
<float[16,16,3,3] w1, float[16] b1, float[16,16,3,3] w2, float[16] b2, float[16,32] w3, float[32] b3>
{
  c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
  r1 = Relu(c1)
  c2 = Conv<pads=[1,1,1,1]>(r1, w2, b2)
  a = Add(c2, r1)
  r2 = Relu(a)
  p = GlobalAveragePool(r2)
  f = Flatten(p)
  y = Gemm(f, w3, b3)
}
"""


TIED = """
agraph (int64[B,S] ids) => (float[B,S,2048] y)
<float[2048,32] table, float[32] g>
{
  x = Gather(table, ids)
  h = Mul(x, g)
  t = Transpose<perm=[1,0]>(table)
  y = MatMul(h, t)
}
"""


def gated() -> ir.Model:
    return model(GATED, weights=CONSTANTS)


def places_of(source: ir.Model) -> list[Place]:
    return find_places(analyse(source.clone()))[0]


def decisions(source: ir.Model, scheme: Scheme = "w8a8") -> list[Decision]:
    return [Decision(place, scheme, nearest(weight_of(source, place))) for place in places_of(source)]


def quantized(
    source: ir.Model, target: Target, scheme: Scheme = "w8a8", opset: int | None = None
) -> ir.Model:
    chosen = decisions(source, scheme)
    chains = find_chains(source.graph, [d.place for d in chosen]) if scheme == "w8a8" else []
    ends = sorted({chain.values[-1] for chain in chains})
    recordings, others = record(source, [d.place for d in chosen], [feed_of(source)], others=ends)
    found = {name: recording.histogram for name, recording in recordings.items()} | others
    result = source.clone()
    thresholds = {name: 0.9 * own.largest for name, own in found.items()}
    insert_qdq(result, chosen, thresholds, target, chains, lookups=find_lookups(source))
    return result


def ops(source: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in source.graph)


def evaluate(source: ir.Model, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    return list(ReferenceEvaluator(ir.to_proto(source)).run(None, feed))


def feed_of(source: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    (value,) = source.graph.inputs
    assert value.shape is not None
    if value.dtype == ir.DataType.INT64:
        return {value.name or "": np.array([[1, 5, 2047]])}
    shape = [size if isinstance(size, int) else 3 for size in value.shape]
    return {value.name or "": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}


# --- places


def test_places_are_products_with_a_weight() -> None:
    found = places_of(gated())
    assert [(p.node, p.activation, p.initializer, p.inputs, p.outputs) for p in found] == [
        ("both", "h", "up", 32, 128),
        ("out", "inner", "down", 64, 32),
    ]


def test_a_narrow_product_and_a_stack_stay() -> None:
    source = model(
        "agraph (float[B,4,8] x) => (float[B,4,8] y) <float[8,32] w, float[4,32,8] v> { a = MatMul(x, w) y = MatMul(a, v) }"
    )
    places, refused = find_places(analyse(source.clone()))
    assert not places
    assert [entry.reason for entry in refused] == [
        "it is narrower than 16: 8 x 32",
        "its weight is a stack of matrices (rank 3)",
    ]


# --- smoothing


def test_a_gain_and_the_half_that_is_not_activated_take_scales_over() -> None:
    source = gated()
    structures = analyse(source.clone())
    rng = np.random.default_rng(0)
    changed = source.clone()
    for place in places_of(source):
        folding = find_folding(structures.analysis, [place])
        assert [(a.node, a.operand) for a in folding.absorbers] == [
            ("h", 0) if place.node == "both" else ("both", 1)
        ]
        fold(changed, folding, np.exp(rng.normal(size=int(folding.groups.max()) + 1)).astype(np.float32))
    feed = feed_of(source)
    expected, found = (Session(one).run(feed)["y"] for one in (source, changed))
    assert np.allclose(expected, found, rtol=1e-4, atol=1e-4)
    up, before = (one.graph.initializers["up"].const_value.numpy() for one in (changed, source))  # type: ignore[union-attr]
    assert not np.allclose(up[:, 64:], before[:, 64:])
    ratio = up[:, :64] / before[:, :64]  # the gate's half is changed by the rows' scales alone
    assert np.allclose(ratio, ratio[:, :1])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("t = Tanh(h) y = MatMul(t, w)", "is not linear"),
        ("y0 = MatMul(h, w) z = Neg(h) z2 = MatMul(z, w) y = Add(y0, z2)", "something else reads it too"),
        ("y = MatMul(x, w)", "graph input"),
    ],
)
def test_what_cannot_take_a_scale_is_refused(text: str, reason: str) -> None:
    source = model(
        f"agraph (float[B,S,32] x) => (float[B,S,32] y) <float[32] g, float[32,32] w> {{ h = Mul(x, g) {text} }}"
    )
    structures = analyse(source.clone())
    with pytest.raises(Refusal, match=reason):
        find_folding(structures.analysis, [find_places(structures)[0][0]])


def test_the_scale_of_value_heads_is_one_per_group() -> None:
    source = model(
        """agraph (float[B,S,32] x, float[B,4,S,S] p) => (float[B,S,32] y)
        <float[32,16] v, float[32,32] o, int64[4] split, int64[5] wide, int64[4] four, int64[3] flat, int64[1] two>
        { a = MatMul(x, v) b = Reshape(a, split) c = Transpose<perm=[0,2,1,3]>(b) d = Unsqueeze(c, two)
          e = Expand(d, wide) f = Reshape(e, four) g = MatMul(p, f) h = Transpose<perm=[0,2,1,3]>(g)
          i = Reshape(h, flat) y = MatMul(i, o) }""",
        weights={
            "split": np.array([0, 0, 2, 8]),
            "wide": np.array([1, 2, 2, 1, 8]),
            "four": np.array([0, 4, -1, 8]),
            "flat": np.array([0, -1, 32]),
            "two": np.array([2]),
        },
    )
    structures = analyse(source.clone())
    place = next(place for place in find_places(structures)[0] if place.node == "y")
    folding = find_folding(structures.analysis, [place])
    assert folding.groups.max() == 15  # two groups of eight channels for four heads
    assert (folding.groups[:8] == folding.groups[8:16]).all() and (folding.groups[16] != folding.groups[0])


# --- insertion


def test_one_pair_feeds_all_its_products_and_norms_stay() -> None:
    source = model(
        """agraph (float[B,S,32] x) => (float[B,S,16] y)
        <float[32] g, float[32,16] q, float[32,16] k, float[32,32] c> {
        h0 = MatMul(x, c) h = Mul(h0, g) a = MatMul(h, q) b = MatMul(h, k) s = Softmax(a) y = Mul(s, b) }"""
    )
    result = quantized(source, "cpu")
    assert ops(result) == Counter(
        {"QuantizeLinear": 2, "DequantizeLinear": 5, "MatMul": 3, "Mul": 2, "Softmax": 1}
    )
    (pair,) = [
        node for node in result.graph if node.op_type == "DequantizeLinear" and node.name == "h/dequantize"
    ]
    assert {user.outputs[0].name for user, _ in pair.outputs[0].uses()} == {"a", "b"}


@pytest.mark.parametrize("text", ["gated", "conv"])
def test_both_emissions_compute_the_same_bit_by_bit(text: str) -> None:
    source = gated() if text == "gated" else model(CONV)
    feed = {name: 1.2 * array for name, array in feed_of(source).items()}  # some numbers are clipped
    one, other = (evaluate(quantized(source, target), feed) for target in ("cpu", "tensorrt"))
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a, b)
    exact = evaluate(source, feed)
    assert not np.array_equal(one[0], exact[0])
    assert np.abs(one[0] - exact[0]).max() < 0.5 * np.abs(exact[0]).max()


def test_zero_points_are_those_of_each_runtime() -> None:
    for target, kind, number in (("cpu", ir.DataType.UINT8, 128), ("tensorrt", ir.DataType.INT8, 0)):
        graph = quantized(gated(), target).graph  # type: ignore[arg-type]
        zeros = [node.inputs[2] for node in graph if node.op_type == "QuantizeLinear"]
        assert {(zero.dtype, int(zero.const_value.numpy())) for zero in zeros} == {(kind, number)}  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["gated", "conv"])
def test_the_cpu_emission_runs_in_integer_kernels(text: str, tmp_path: Path) -> None:
    source = gated() if text == "gated" else model(CONV)
    result = quantized(source, "cpu")
    save_model(result, tmp_path / "model.onnx")
    found = audit(tmp_path / "model.onnx", decisions(source))
    assert found.holds and found.promised == found.integer == len(places_of(source))
    assert (
        sum(found.kernels.get(name, 0) for name in ("MatMulIntegerToFloat", "QLinearConv")) == found.promised
    )
    session = Session(result, optimize=True)
    feed = feed_of(source)
    assert np.allclose(session.run(feed)["y"], evaluate(result, feed)[0], rtol=1e-3, atol=1e-2)


def test_the_audit_finds_what_falls_back(tmp_path: Path) -> None:
    source = model(CONV)
    chosen = decisions(source)
    result = source.clone()
    insert_qdq(result, chosen, {d.place.activation: 3.0 for d in chosen}, "cpu")  # results stay floats
    save_model(result, tmp_path / "model.onnx")
    found = audit(tmp_path / "model.onnx", chosen)
    assert not found.holds and {entry["kernel"] for entry in found.fell_back} <= {"Conv", "FusedConv", "Gemm"}


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_four_bits_per_block(target: Target) -> None:
    source = gated()
    source.graph.opset_imports[""] = 21
    chosen = [Decision(p, "w4", nearest(weight_of(source, p), 4, 16)) for p in places_of(source)]
    result = source.clone()
    insert_qdq(result, chosen, {}, target)
    held = source.clone()
    for decision in chosen:
        assert decision.weight is not None
        held.graph.initializers[decision.place.initializer].const_value = ir.tensor(decision.weight.floats())
    feed = feed_of(source)
    assert ops(result)["MatMulNBits" if target == "cpu" else "DequantizeLinear"] == 2
    found, expected = (Session(one, optimize=False).run(feed)["y"] for one in (result, held))
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_a_tied_table_is_one_table_of_integers() -> None:
    source = model(TIED)
    feed = feed_of(source)
    results = [quantized(source, target) for target in ("cpu", "tensorrt")]  # type: ignore[arg-type]
    for result in results:
        kinds = Counter(
            value.dtype for value in result.graph.initializers.values() if value.const_value.size > 5000
        )  # type: ignore[union-attr]
        assert kinds == Counter({ir.DataType.INT8: 1})
    one, other = (evaluate(result, feed)[0] for result in results)
    assert np.array_equal(one, other)
    assert np.corrcoef(one.ravel(), evaluate(source, feed)[0].ravel())[0, 1] > 0.95


def test_gemm_becomes_a_product_and_a_sum() -> None:
    source = model(
        "agraph (float[B,32] x) => (float[B,16] y) <float[16,32] w, float[16] b> { y = Gemm<transB=1>(x, w, b) }"
    )
    feed = feed_of(source)
    result = quantized(source, "cpu")
    assert ops(result)["Gemm"] == 0 and ops(result)["Sum"] == 1
    assert np.abs(evaluate(result, feed)[0] - evaluate(source, feed)[0]).max() < 1


def test_an_old_opset_is_refused_with_what_is_needed() -> None:
    text = "agraph (float[B,32] x) => (float[B,16] y) <float[32,16] w> { y = MatMul(x, w) }"
    with pytest.raises(UserError, match="opset 12, and scales per channel needs opset 13"):
        quantized(model(text, opset=12), "cpu")


def test_a_quantized_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"quantized already \(.*2 x QuantizeLinear"):
        refuse_quantized(quantized(gated(), "cpu"), "model.onnx")


def test_a_batch_norm_folds_into_its_convolution() -> None:
    source = model(
        """agraph (float[B,4,6,6] x) => (float[B,8,4,4] y)
        <float[8,4,3,3] w, float[8] g, float[8] b, float[8] m, float[8] v>
        { c = Conv(x, w) y = BatchNormalization(c, g, b, m, v) }""",
        weights={"v": np.linspace(0.5, 2, 8).astype(np.float32)},
    )
    folded = source.clone()
    assert fold_batchnorm(folded) == 1 and ops(folded) == Counter({"Conv": 1})
    feed = feed_of(source)
    assert np.allclose(Session(folded).run(feed)["y"], Session(source).run(feed)["y"], rtol=1e-4, atol=1e-4)


def test_a_batch_norm_behind_a_shared_result_stays() -> None:
    source = model(
        """agraph (float[B,4,6,6] x) => (float[B,4,4,4] y)
        <float[4,4,3,3] w, float[4] g, float[4] b, float[4] m, float[4] v>
        { c = Conv(x, w) n = BatchNormalization(c, g, b, m, v) y = Add(n, c) }""",
        weights={"v": np.ones(4, np.float32)},
    )
    assert fold_batchnorm(source) == 0


def test_the_result_passes_the_checker(tmp_path: Path) -> None:
    for target in ("cpu", "tensorrt"):
        save_model(quantized(model(CONV), target), tmp_path / f"{target}.onnx")  # type: ignore[arg-type]
        onnx.checker.check_model(str(tmp_path / f"{target}.onnx"), full_check=True)


def test_a_tied_table_takes_scales_over_and_lookups_undo_them() -> None:
    source = model(TIED)
    structures = analyse(source.clone())
    (place,) = find_places(structures)[0]
    folding = find_folding(structures.analysis, [place])
    assert folding.lookups == ("x",)
    changed = source.clone()
    fold(changed, folding, np.exp(np.random.default_rng(0).normal(size=32)).astype(np.float32))
    feed = feed_of(source)
    expected, found = (Session(one).run(feed)["y"] for one in (source, changed))
    assert np.allclose(expected, found, rtol=1e-4, atol=1e-4)
    assert ops(changed)["Mul"] == 2


def test_a_tied_table_of_weights_alone_runs_in_an_integer_kernel(tmp_path: Path) -> None:
    source = model(TIED)
    result = quantized(source, "cpu", "w8")
    save_model(result, tmp_path / "model.onnx")
    found = audit(tmp_path / "model.onnx", decisions(source, "w8"))
    assert found.holds and found.kernels == {"MatMulNBits": 1}
    feed = feed_of(source)
    other = quantized(source, "tensorrt", "w8")
    assert np.allclose(evaluate(result, feed)[0], evaluate(other, feed)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["gated", "conv", "tied"])
def test_tensorrt_takes_its_emission(text: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    source = {"gated": gated, "conv": lambda: model(CONV), "tied": lambda: model(TIED)}[text]()
    save_model(quantized(source, "tensorrt"), tmp_path / "model.trt.onnx")
    sizes = {"shape": ("S=1:4:8",)} if text == "gated" else {}
    report = build(tmp_path / "model.trt.onnx", tmp_path / "model.engine", backend="rtx", **sizes)
    assert (tmp_path / "model.engine").stat().st_size > 0 and report.backend["name"] == "rtx"


# --- what an attack has found


def test_a_weight_of_two_products_takes_no_scale_over() -> None:
    source = model(
        """agraph (float[B,S,32] x) => (float[B,S,16] y) <float[32,32] w, float[32,16] v> {
        a = MatMul(x, w) n = Tanh(a) b = MatMul(n, w) y = MatMul(b, v) }"""
    )
    structures = analyse(source.clone())
    (last,) = [place for place in find_places(structures)[0] if place.node == "y"]
    with pytest.raises(Refusal, match="w is the weight of several nodes"):
        find_folding(structures.analysis, [last])


def test_a_weight_that_is_read_both_ways_is_quantized_one_way() -> None:
    source = model(
        """agraph (float[B,32] x) => (float[B,32] y) <float[32,32] w> {
        a = MatMul(x, w) t = Transpose<perm=[1,0]>(w) y = MatMul(a, t) }"""
    )
    places, refused = find_places(analyse(source.clone()))
    assert [place.node for place in places] == ["a"]
    assert [entry.reason for entry in refused] == [
        "its weight is read transposed elsewhere, where scales lie along the other axis"
    ]


def test_grouped_convolutions_are_named() -> None:
    source = model(
        "agraph (float[B,32,8,8] x) => (float[B,32,6,6] y) <float[32,16,3,3] w> { y = Conv<group=2>(x, w) }"
    )
    places, refused = find_places(analyse(source.clone()))
    assert not places and [entry.reason for entry in refused] == ["a grouped convolution"]


def test_names_of_the_model_are_no_names_of_ours() -> None:
    text = "agraph (float[B,32] x) => (float[B,16] y) <float[32,16] w, float[16] b> { a = MatMul(x, w) y = Add(a, b) }"
    plain = evaluate(quantized(model(text), "cpu"), FEED)[0]
    source = model(text)
    source.graph.initializers["b"].name = "w/int8/scale"
    assert np.array_equal(evaluate(quantized(source, "cpu"), FEED)[0], plain)


FEED = {"x": np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)}


def test_a_convolution_whose_result_is_an_output_stays() -> None:
    source = model(
        "agraph (float[B,16,8,8] x) => (float[B,16,6,6] y) <float[16,16,3,3] w> { c = Conv(x, w) y = Relu(c) }"
    )
    (place,) = places_of(source)
    (chain,) = find_chains(source.graph, [place])
    assert chain.values == ("c",)
    source = model(
        "agraph (float[B,16,8,8] x) => (float[B,16,6,6] y) <float[16,16,3,3] w> { y = Conv(x, w) }"
    )
    assert not find_chains(source.graph, places_of(source))


@pytest.mark.parametrize("chosen", [(), ("x",), ("r1",), ("f",), ("x", "r1"), ("x", "r1", "f")])
def test_what_is_rehearsed_is_what_is_written(chosen: tuple[str, ...]) -> None:
    source = model(CONV)
    decided = decisions(source)
    places = [d.place for d in decided]
    chains = find_chains(source.graph, places)
    every, rounded = rounded_values(places, chains, chosen)
    ends = sorted({chain.values[-1] for chain in chains})
    feeds = [feed_of(source, seed) for seed in range(3)]
    recordings, others = record(source, places, feeds, others=ends)
    found = {name: recording.histogram for name, recording in recordings.items()} | others
    thresholds = {name: 0.5 * own.largest for name, own in found.items()}
    weights = [d if d.place.activation in rounded else Decision(d.place, "float") for d in decided]
    result = source.clone()
    active = {d.place.node for d in weights if d.scheme == "w8a8"}
    insert_qdq(result, weights, thresholds, "cpu", kept_chains(places, chains, active))
    held = source.clone()
    for d in weights:
        if d.weight is not None:
            tensor = source.graph.initializers[d.place.initializer].const_value
            assert tensor is not None
            held.graph.initializers[d.place.initializer].const_value = floats_tensor(
                d.weight, d.place, tensor
            )
    readers: dict[str, set[str] | None] = {name: None for name in ends}
    for place in places:
        if place.activation not in ends:
            readers.setdefault(place.activation, set()).add(place.node)  # type: ignore[union-attr]
    data = Dataset("", "", 3, feeds)
    loss = Rehearsal(source, held, thresholds, data, range(3), readers).measure(every)
    expected = []
    for feed in feeds:
        a, b = (Session(one).run(feed)["y"].astype(np.float64) for one in (source, result))
        expected.append(np.square(a - b).sum() / np.square(a - a.mean()).sum())
    assert loss.divergence == pytest.approx(np.mean(expected), rel=0.05, abs=1e-7)
    assert bool(chosen) or "QuantizeLinear" not in ops(result)


def test_a_scale_does_not_pass_a_cast_to_integers() -> None:
    source = model(
        """agraph (float[B,S,32] x) => (float[B,S,16] y) <float[32] g, float[32,16] w> {
        h = Mul(x, g) i = Cast<to=6>(h) j = Cast<to=1>(i) y = MatMul(j, w) }"""
    )
    structures = analyse(source.clone())
    with pytest.raises(Refusal, match="rounds what makes its columns"):
        find_folding(structures.analysis, find_places(structures)[0])
