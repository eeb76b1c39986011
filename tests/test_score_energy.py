"""Energy of query and key channels in attention scores, beside its definition computed by numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model, structures

from onnx_autoglm import optimize
from onnx_autoglm.cut import analyse
from onnx_autoglm.passes.score_energy import score_energy
from onnx_autoglm.runtime import Session

FLAT = """
g (float[B,S,12] x) => (float[B,S,12] y)
  <float[12,48] wq, float[12,16] wk, float[12,12] wv, float[36,12] wo>
{ q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
  a = Attention<q_num_heads=6, kv_num_heads=2>(q, k, v)  y = MatMul(a, wo) }
"""
ROTARY = """
g (float[B,S,12] x, int64[B,S] positions) => (float[B,S,12] y)
  <float[12,64] wq, float[12,64] wk, float[12,64] wv, float[64,12] wo, float[20,8] cos, float[20,8] sin>
{{ q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
   qr = RotaryEmbedding<num_heads=4, interleaved={interleaved}>(q, cos, sin, positions)
   kr = RotaryEmbedding<num_heads=4, interleaved={interleaved}>(k, cos, sin, positions)
   a = Attention<q_num_heads=4, kv_num_heads=4>(qr, kr, v)  y = MatMul(a, wo) }}
"""
PLAIN = """
g (float[B,S,12] x) => (float[B,S,12] y)
  <float[12,48] wq, float[12,16] wk, float[12,16] wv, float[48,12] wo, int64[4] qs = {0,0,6,8}, int64[4] ks = {0,0,2,8},
   int64[1] two = {2}, int64[5] wide = {1,1,3,1,1}, int64[4] all = {0,6,-1,8}, int64[3] merge = {0,0,-1}>
{
    q0 = MatMul(x, wq)  q1 = Reshape(q0, qs)  q = Transpose<perm=[0,2,1,3]>(q1)
    k0 = MatMul(x, wk)  k1 = Reshape(k0, ks)  k2 = Transpose<perm=[0,2,1,3]>(k1)
    k3 = Unsqueeze(k2, two)  k4 = Expand(k3, wide)  k5 = Reshape(k4, all)  k = Transpose<perm=[0,1,3,2]>(k5)
    v0 = MatMul(x, wv)  v1 = Reshape(v0, ks)  v2 = Transpose<perm=[0,2,1,3]>(v1)
    v3 = Unsqueeze(v2, two)  v4 = Expand(v3, wide)  v = Reshape(v4, all)
    s = MatMul(q, k)  p = Softmax<axis=-1>(s)  a = MatMul(p, v)
    t = Transpose<perm=[0,2,1,3]>(a)  r = Reshape(t, merge)  y = MatMul(r, wo)
}
"""


def feeds(count: int = 5) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((2, 5, 12)).astype(np.float32)} for _ in range(count)]


def tap(source: ir.Model, names: list[str], runs: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """Inner values over all runs."""
    copy = source.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.extend(values[name] for name in names)
    for name in names:
        values[name].dtype = ir.DataType.FLOAT
    session = Session(copy)
    results = [session.run(run, names) for run in runs]
    return [np.concatenate([result[name] for result in results]) for name in names]


def by_definition(queries: np.ndarray, keys: np.ndarray) -> float:
    """The mean square of `q . k` over all pairs of rows; both `[rows, channels]`."""
    return float(np.square(queries @ keys.T).mean())


def scored(source: ir.Model, runs: list[dict[str, np.ndarray]]):
    found = analyse(source.clone())
    (structure,) = [s for s in found if s.kind == "qk-pair" and not s.pins]
    return structure, score_energy([structure], found.analysis, source, runs)[structure]


def grouped(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Of single channels in two groups of three heads: `[rows, 2, 3, 8]` and `[rows, 2, 8]`."""
    return np.array(
        [
            [
                sum(by_definition(queries[:, g, r, c, None], keys[:, g, c, None]) for r in range(3))
                for c in range(8)
            ]
            for g in range(2)
        ]
    )


def test_heads_of_a_fused_attention_meet_their_group() -> None:
    source = model(FLAT, opset=23)
    structure, scores = scored(source, feeds())
    queries, keys = tap(source, ["q", "k"], feeds())
    expected = grouped(queries.reshape(-1, 2, 3, 8), keys.reshape(-1, 2, 8))
    assert scores.shape == structure.shape == (2, 8)
    assert np.allclose(scores, expected, rtol=1e-4)


def test_operands_of_a_plain_product_are_found_by_their_axes() -> None:
    source = model(PLAIN)
    structure, scores = scored(source, feeds())
    queries, keys = tap(source, ["q1", "k1"], feeds())
    expected = grouped(queries.reshape(-1, 2, 3, 8), keys.reshape(-1, 2, 8))
    assert np.allclose(scores, expected if structure.outers else expected.sum(axis=0), rtol=1e-4)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_both_channels_of_a_rotary_pair_count_together(interleaved: int) -> None:
    source = model(ROTARY.format(interleaved=interleaved), opset=23)
    rng = np.random.default_rng(1)
    runs = [feed | {"positions": rng.integers(0, 20, (2, 5)).astype(np.int64)} for feed in feeds()]
    _, scores = scored(source, runs)
    queries, keys = (array.reshape(-1, 4, 16) for array in tap(source, ["qr", "kr"], runs))
    pairs = [(2 * p, 2 * p + 1) if interleaved else (p, p + 8) for p in range(8)]
    expected = [
        sum(by_definition(queries[:, h][:, list(pair)], keys[:, h][:, list(pair)]) for h in range(4))
        for pair in pairs
    ]
    assert np.allclose(scores, expected, rtol=1e-4)


@pytest.mark.parametrize("criterion", ["obs", "wanda", "minitron"])
def test_with_data_channels_are_chosen_by_energy(tmp_path: Path, criterion: str) -> None:
    source = model(FLAT, opset=23)
    ir.save(source, tmp_path / "model.onnx")
    (tmp_path / "calib").mkdir()
    for number, feed in enumerate(feeds()):
        np.savez(tmp_path / "calib" / f"{number}.npz", **feed)
    report = optimize(
        tmp_path / "model.onnx",
        tmp_path / "out",
        prune={"qk-pair": 0.5},
        criterion=criterion,
        repair="none",
        calib=tmp_path / "calib",
    )
    assert not any("norm" in note for note in report.notes)
    (entry,) = json.loads((tmp_path / "out" / "plan.json").read_text())["structures"]
    _, scores = scored(source, feeds())
    assert entry["kept"] == np.sort(np.argsort(scores)[:, 4:]).tolist()


def test_what_no_product_of_activations_sums_over_has_no_energy() -> None:
    source = model(FLAT, opset=23)
    found = analyse(source.clone())
    others = [s for s in found if s.kind == "value-channel"]
    assert others and not score_energy(others, found.analysis, source, feeds())
    assert structures(source)
