"""Whole branches: which are found, which are refused and why, the proof from the plan, and the choice by influence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from helpers import assert_equivalent, model, prove, structures

from onnx_autoglm import UserError, check, optimize
from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.cut import Cut, analyse, cut_model
from onnx_autoglm.passes.score_blocks import score_blocks

# Three branches: a product, one that ends in a bias and a number, and one that ends in a scaled norm.
STREAM = """
g (float[b,s,8] x) => (float[b,s,8] y)
<float[8,8] a0, float[8,12] a1, float[12,8] b1, float[8] c1, float half = {0.5}, float[8,8] a2, float[8] s2>
{
  h0 = MatMul(x, a0) t0 = Tanh(h0) d0 = MatMul(t0, a0) r0 = Add(x, d0)
  n1 = MatMul(r0, a1) t1 = Relu(n1) e1 = MatMul(t1, b1) f1 = Add(c1, e1) d1 = Mul(f1, half) r1 = Add(d1, r0)
  h2 = MatMul(r1, a2) t2 = Tanh(h2) d2 = LayerNormalization(t2, s2) y = Add(r1, d2)
}
"""
CONV = """
g (float[b,4,6,6] x) => (float[b,4,6,6] y)
<float[4,4,3,3] w0, float[4] b0, float[4] s0, float[4] o0, float[4] m0, float[4] v0 = {1.0, 2.0, 1.0, 2.0},
 float[4,4,1,1] w1, float[4] b1>
{
  c0 = Conv<pads=[1,1,1,1]>(x, w0) d0 = BatchNormalization(c0, s0, o0, m0, v0) r0 = Add(d0, x) h0 = Relu(r0)
  d1 = Conv(h0, w1, b1) r1 = Add(h0, d1) y = Relu(r1)
}
"""


def blocks(source: ir.Model):
    return [s for s in structures(source) if s.kind == "block"]


def without(source: ir.Model, *gone: int) -> Cut:
    def choose(found):
        selection = Selection()
        (structure,) = [s for s in found if s.kind == "block" and not s.pins]
        selection.keep(structure.atom, (), ~np.isin(np.arange(structure.size), gone))
        return selection

    return cut_model(source, choose)


@pytest.mark.parametrize("gone", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_masked_equals_pruned(gone: tuple[int, ...]) -> None:
    source = model(STREAM)
    (structure,) = blocks(source)
    assert (structure.size, structure.cost) == (3, (64 + 8 * 12 + 12 * 8 + 8 + 64 + 8 + 1) / 3)
    cut = without(source, *gone)
    assert_equivalent(source, cut, tolerance=1e-6)
    left = sum(node.op_type == "MatMul" for node in cut.model.graph)
    assert left == 5 - sum([2, 2, 1][number] for number in gone)


def test_the_plan_masks_the_last_weights_alone() -> None:
    cut = without(model(STREAM), 1)
    assert [r.as_json() for r in cut.removals] == [
        {"initializer": "c1", "axis": 0, "kept": [], "consumers": ["f1"]},
        {"initializer": "b1", "axis": 0, "kept": [], "consumers": ["e1"]},
    ]
    (entry,) = cut.plan({}).structures
    assert entry["kept"] == [0, 2] and len(entry["names"]) == 3


@pytest.mark.parametrize("gone", [(0,), (1,)])
def test_residual_convolutions(gone: tuple[int, ...]) -> None:
    assert_equivalent(model(CONV), without(model(CONV), *gone), tolerance=1e-6)


def test_a_stream_may_be_scaled_and_summed() -> None:
    text = STREAM.replace("r0 = Add(x, d0)", "z0 = Mul(half, x) r0 = Sum(z0, d0)")
    (structure,) = blocks(model(text))
    assert structure.size == 3
    assert_equivalent(model(text), without(model(text), 0), tolerance=1e-6)


def test_a_block_goes_together_with_channels_of_all() -> None:
    source = model(STREAM)

    def choose(found):
        selection = Selection()
        for structure in found:
            if structure.kind in ("block", "ffn-channel"):
                mask = np.arange(structure.size) % 3 != 1
                selection.keep(structure.atom, structure.outers, mask)
        return selection

    assert_equivalent(source, cut_model(source, choose), tolerance=1e-6)


def test_a_weight_that_two_blocks_share_is_masked_for_one() -> None:
    text = STREAM.replace("MatMul(r1, a2)", "MatMul(r1, a0)")
    for gone in (0, 2):
        assert prove(model(text), without(model(text), gone), tolerance=1e-6).holds


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "(float[b,s,8] y)",
            "(float[b,s,8] y, float[b,s,12] t1)",
            "a graph output would be lost with it (t1)",
        ),
        ("h2 = MatMul(r1, a2)", "k = Add(r1, e1) h2 = MatMul(k, a2)", "a value inside it is read elsewhere"),
        ("e1 = MatMul(t1, b1)", "g1 = MatMul(t1, b1) e1 = Softmax(g1)", "its last operator is Softmax e1"),
        (
            "d0 = MatMul(t0, a0) r0 = Add(x, d0)",
            "w = Transpose<perm=[1,0]>(a0) d0 = MatMul(t0, w) k = MatMul(d0, w) r0 = Add(x, k)",
            "its last weight is moved for other nodes, too (Transpose w)",
        ),
        (
            "float[8] c1, float half",
            "float c1 = {0.5}, float half",
            "its last weight is computed, or a single number",
        ),
    ],
)
def test_what_cannot_go_says_why(old: str, new: str, reason: str) -> None:
    source = model(STREAM.replace(old, new))
    free, *pinned = sorted(blocks(source), key=lambda s: len(s.pins))
    assert free.size == 2 and not free.pins
    assert reason in " ".join(str(pin) for s in pinned for pin in s.pins)


@pytest.mark.parametrize(
    "branch",
    [
        "q = Mul(x, x) k = Mul(q, x) d = Mul(k, half)",  # a formula of x, as in a GELU: no weight made it
        "z = MatMul(e, a) d = Tanh(z)",  # not computed from the other operand
    ],
)
def test_what_is_no_block(branch: str) -> None:
    source = model(
        "g (float[b,8] x, float[b,8] e) => (float[b,8] y) <float[8,8] a, float half = {0.5}, float[8,8] w> "
        f"{{ {branch} r = Add(x, d) y = MatMul(r, w) }}"
    )
    assert not blocks(source)


def test_influence_is_one_minus_the_cosine() -> None:
    source, rng = model(STREAM), np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((2, 3, 8)).astype(np.float32)} for _ in range(3)]
    found = analyse(source.clone())
    scores = score_blocks(found.blocks, source, feeds)
    a0 = source.graph.initializers["a0"].const_value.numpy()
    x = np.concatenate([feed["x"] for feed in feeds]).reshape(-1, 8)
    after = x + np.tanh(x @ a0) @ a0
    cosines = (x * after).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(after, axis=-1)
    assert scores.shape == (3,) and scores[0] == pytest.approx(1 - cosines.mean(), rel=1e-5)


def test_the_channels_of_a_convolution_are_its_rows() -> None:
    assert [block.axis for block in analyse(model(CONV)).blocks] == [1, 1]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A model whose second branch hardly changes anything, and data."""
    weights = {"b1": np.full((12, 8), 1e-3, np.float32), "c1": np.full(8, 1e-3, np.float32)}
    ir.save(model(STREAM, weights=weights), tmp_path / "model.onnx")
    (tmp_path / "calib").mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        x = rng.standard_normal((2, 3, 8)).astype(np.float32)
        np.savez(tmp_path / "calib" / f"{number}.npz", x=x)
    return tmp_path / "model.onnx", tmp_path / "calib"


def test_the_command_line_removes_the_block_of_least_influence(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    source, calib = files
    words = ["--prune", "block=0.34", "--calib", calib]
    done = subprocess.run(
        [sys.executable, "-m", "onnx_autoglm", "optimize", source, "-o", tmp_path / "out", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "removed whole: " in done.stdout
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert plan["structures"][0]["kept"] == [0, 2] and plan["repair"] == "none"
    assert check(source, tmp_path / "out/plan.json", tmp_path / "out/model.onnx").holds
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["source"]["flops"] - report["result"]["flops"] == 128 * 2 * 8 * 12


@pytest.mark.parametrize("criterion", ["l2", "wanda", "random"])
def test_blocks_are_compared_on_data_whatever_the_criterion(
    files: tuple[Path, Path], tmp_path: Path, criterion: str
) -> None:
    source, calib = files
    optimize(source, tmp_path / "out", prune={"block": 0.34}, criterion=criterion, calib=calib, repair="none")
    kept = json.loads((tmp_path / "out/plan.json").read_text())["structures"][0]["kept"]
    assert kept == [0, 2] or criterion == "random"


def test_names_and_places_of_blocks_spare_them(files: tuple[Path, Path], tmp_path: Path) -> None:
    source, calib = files
    given = {"prune": {"block": 0.34}, "calib": calib, "repair": "none"}
    (structure,) = blocks(model(STREAM))
    optimize(source, tmp_path / "out", **given, exclude=structure.names[1])
    assert 1 in json.loads((tmp_path / "out/plan.json").read_text())["structures"][0]["kept"]
    optimize(source, tmp_path / "out", **given, protect_first=1, protect_last=1)
    with pytest.raises(UserError, match="excluded or protected"):
        optimize(source, tmp_path / "out", **given, protect_first=3)
    with pytest.raises(UserError, match="the choice of blocks needs calibration data"):
        optimize(source, tmp_path / "out", prune={"block": 0.34}, criterion="l2", repair="none", calib="none")
    with pytest.raises(UserError, match="use --prune"):
        optimize(source, tmp_path / "out", keep=0.5, kinds="block", calib=calib)
