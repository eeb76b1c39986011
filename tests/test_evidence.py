"""Data, statistics, criteria and repair: each formula beside a plain numpy computation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model, structures

from onnx_autoglm import UserError, optimize
from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.consumers import consumers_of, find_consumers, members
from onnx_autoglm.cut import analyse, apply_selection
from onnx_autoglm.passes.repair_weights import repair_weights
from onnx_autoglm.passes.score_activation import score_activation
from onnx_autoglm.passes.score_obs import score_obs
from onnx_autoglm.statistics import Moments, Observed, key_of, observe

MLP = "g (float[n,6] x) => (float[n,4] y) <float[6,12] a, float[12] b, float[12,4] c> "
MLP += "{ h = MatMul(x, a) z = Add(h, b) r = Relu(z) y = MatMul(r, c) }"


def rows(count: int = 200, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((6, 6))
    return [{"x": (rng.standard_normal((count, 6)) @ mixing).astype(np.float32)} for _ in range(10)]


def hidden(source: ir.Model, feeds: list[dict[str, np.ndarray]]) -> np.ndarray:
    a, b = (source.graph.initializers[name].const_value.numpy() for name in ("a", "b"))
    return np.concatenate([np.maximum(feed["x"] @ a + b, 0) for feed in feeds]).astype(np.float64)


def setup(text: str = MLP):
    source = model(text)
    found = analyse(source.clone())
    (structure,) = [s for s in found if s.kind == "ffn-channel" and not s.pins]
    consumers = consumers_of(structure, find_consumers(found))
    return source, found, structure, consumers


def test_moments_are_those_of_numpy() -> None:
    data = np.random.default_rng(0).standard_normal((5000, 7)).astype(np.float32) + 3
    moments = Moments(7)
    moments.add(data[:3000])
    moments.add(data[3000:])
    assert np.allclose(moments.mean, data.mean(0), atol=1e-6)
    assert np.allclose(moments.covariance, np.cov(data.T, bias=True), atol=1e-4)


def test_a_consumer_is_observed_at_its_input() -> None:
    source, _, structure, consumers = setup()
    (consumer,) = consumers
    assert consumer.initializer.name == "c" and consumer.axis == 0
    observed = observe(source, [consumer.contraction], rows())[key_of(consumer.contraction)]
    expected = hidden(source, rows())
    assert observed.fitted.count == 1600 and observed.held_out.count == 400
    assert np.allclose(observed.all.mean, expected.mean(0), rtol=1e-5)
    assert np.allclose(observed.all.covariance, np.cov(expected.T, bias=True), rtol=1e-4, atol=1e-5)
    assert members(structure, consumer).tolist() == list(range(12))


@pytest.mark.parametrize(
    "tail", ["t = Transpose<perm=[1,0]>(c) y = MatMul(r, t)", "y = Gemm<transB=1>(r, c)"]
)
def test_a_transposed_weight_is_the_same_consumer(tail: str) -> None:
    text = MLP.replace("float[12,4] c", "float[4,12] c").replace("y = MatMul(r, c)", tail)
    source, _, _, (consumer,) = setup(text)
    assert consumer.axis == 1
    assert consumer.rows().shape == (12, 4)
    assert np.allclose(consumer.rows(), source.graph.initializers["c"].const_value.numpy().T)


@pytest.mark.parametrize("method", ["wanda", "flap"])
def test_activation_scores(method: str) -> None:
    source, _, structure, consumers = setup()
    observed = observe(source, [c.contraction for c in consumers], rows())
    weight, data = source.graph.initializers["c"].const_value.numpy(), hidden(source, rows())
    expected = {
        "wanda": np.sqrt(np.square(data).mean(0)) * np.abs(weight).sum(1),
        "flap": data.var(0) * np.square(weight).sum(1),
    }[method]
    scores = score_activation([structure], consumers, observed, method)[structure]  # type: ignore[arg-type]
    assert np.allclose(scores, expected, rtol=1e-4)


def best_error(data: np.ndarray, weight: np.ndarray, kept: np.ndarray) -> float:
    """The error of the best affine refit, by plain least squares."""
    inputs = np.hstack([data[:, kept], np.ones((len(data), 1))])
    target = data @ weight
    solution, *_ = np.linalg.lstsq(inputs, target, rcond=None)
    return float(np.square(target - inputs @ solution).sum() / len(data))


def test_the_first_channel_that_obs_removes_is_the_cheapest_after_a_refit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from onnx_autoglm.passes import score_obs as module

    monkeypatch.setattr(module, "_DAMPING", 1e-9)
    source, _, structure, consumers = setup()
    observed = observe(source, [c.contraction for c in consumers], rows())
    weight, data = (
        source.graph.initializers["c"].const_value.numpy().astype(np.float64),
        hidden(source, rows()),
    )
    errors = [best_error(data, weight, np.setdiff1d(np.arange(12), [k])) for k in range(12)]
    scores = score_obs([structure], consumers, observed)[structure]
    assert scores.argmin() == np.argmin(errors)
    variance = np.square((data - data.mean(0)) @ weight).sum() / len(data)
    assert scores.min() == pytest.approx(min(errors) / variance, rel=1e-3)


def test_obs_beats_norms_at_equal_count() -> None:
    source, _, structure, consumers = setup()
    observed = observe(source, [c.contraction for c in consumers], rows())
    weight, data = (
        source.graph.initializers["c"].const_value.numpy().astype(np.float64),
        hidden(source, rows()),
    )
    order = np.argsort(score_obs([structure], consumers, observed)[structure])
    by_norm = np.argsort(np.square(weight).sum(1))
    assert best_error(data, weight, order[6:]) < best_error(data, weight, by_norm[6:])


def cut_half(found, structure):
    selection = Selection()
    selection.keep(structure.atom, structure.outers, np.arange(12) % 2 == 0)
    return apply_selection(found, selection), selection


def repair(source, cut, selection, consumers, feeds, mode):
    pairs = [(feed, feed) for feed in feeds]
    return repair_weights(source, cut.model, selection, consumers, pairs, mode)


def outputs(graph_model: ir.Model, feeds: list[dict[str, np.ndarray]]) -> np.ndarray:
    from onnx_autoglm.runtime import Session

    session = Session(graph_model)
    return np.concatenate([session.run(feed)["y"] for feed in feeds])


@pytest.mark.parametrize(
    "text",
    [MLP, MLP.replace("float[12,4] c", "float[4,12] c").replace("MatMul(r, c)", "Gemm<transB=1>(r, c)")],
)
def test_affine_repair_reaches_the_least_squares_error(text: str) -> None:
    source, found, structure, consumers = setup(text)
    feeds = rows(2000)
    cut, selection = cut_half(found, structure)
    dense, unrepaired = outputs(source, feeds), outputs(cut.model, feeds)
    (entry,) = repair(source, cut, selection, consumers, feeds, "affine")
    repaired = outputs(cut.model, feeds)
    data, weight = hidden(source, feeds), consumers_weight(source)
    best = best_error(data, weight, np.arange(0, 12, 2))
    reached = np.square(dense - repaired).sum() / len(dense)
    assert entry["repaired"] and reached < 1.1 * best + 1e-9
    assert reached < 0.5 * np.square(dense - unrepaired).sum() / len(dense)


def consumers_weight(source: ir.Model) -> np.ndarray:
    array = source.graph.initializers["c"].const_value.numpy().astype(np.float64)
    return array if array.shape[0] == 12 else array.T


def test_bias_repair_keeps_the_mean() -> None:
    source, found, structure, consumers = setup()
    feeds = rows()
    cut, selection = cut_half(found, structure)
    repair(source, cut, selection, consumers, feeds, "bias")
    assert np.allclose(
        outputs(cut.model, feeds).mean(0), outputs(source, feeds).mean(0), rtol=1e-3, atol=1e-3
    )


def test_convolutions_are_repaired() -> None:
    text = (
        "g (float[n,3,8,8] x) => (float[n,4,8,8] y) <float[12,3,1,1] a, float[12] b, float[4,12,3,3] c> "
        "{ h = Conv(x, a, b) r = Relu(h) y = Conv<pads=[1,1,1,1]>(r, c) }"
    )
    source = model(text)
    found = analyse(source.clone())
    (structure,) = [s for s in found if s.kind == "conv-channel" and s.size == 12]
    consumers = consumers_of(structure, find_consumers(found))
    assert [c.axis for c in consumers] == [1]
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((4, 3, 8, 8)).astype(np.float32)} for _ in range(10)]
    cut, selection = cut_half(found, structure)
    dense, before = outputs(source, feeds), outputs(cut.model, feeds)
    repair(source, cut, selection, consumers, feeds, "affine")
    assert np.square(dense - outputs(cut.model, feeds)).sum() < 0.5 * np.square(dense - before).sum()


GEMM = "y = Gemm<alpha=0.25>(r, c)"
LEFT = (
    "g (float[6,n] x) => (float[4,n] y) <float[12,6] a, float[4,12] c> "
    "{ h = MatMul(a, x) r = Relu(h) y = MatMul(c, r) }"
)


def test_alpha_scales_the_constant_too() -> None:
    source, found, structure, consumers = setup(MLP.replace("y = MatMul(r, c)", GEMM))
    feeds = rows()
    cut, selection = cut_half(found, structure)
    repair(source, cut, selection, consumers, feeds, "bias")
    assert np.allclose(
        outputs(cut.model, feeds).mean(0), outputs(source, feeds).mean(0), rtol=1e-3, atol=1e-3
    )


def test_what_has_no_refit_is_left_alone_with_a_reason() -> None:
    source, found, structure, consumers = setup(LEFT)
    feeds = [{"x": feed["x"].T.copy()} for feed in rows()]
    cut, selection = cut_half(found, structure)
    before = outputs(cut.model, feeds[:1])
    (entry,) = repair(source, cut, selection, consumers, feeds, "affine")
    assert not entry["repaired"] and entry["reason"] == "its weight is not a matrix on the right"
    assert np.array_equal(before, outputs(cut.model, feeds[:1]))


def test_a_weight_with_a_second_reader_is_left_alone() -> None:
    text = MLP.replace("(float[n,4] y)", "(float[n,4] y, float[n,4] z2)").replace(
        "float[12,4] c", "float[4,12] c"
    )
    text = text.replace(
        "y = MatMul(r, c)", "t = Transpose<perm=[1,0]>(c) y = MatMul(r, t) q = Tanh(r) z2 = MatMul(q, t)"
    )
    source, found, structure, consumers = setup(text)
    cut, selection = cut_half(found, structure)
    entries = repair(source, cut, selection, consumers, rows(), "affine")
    assert [entry["reason"] for entry in entries] == ["its weight has other consumers"] * 2


def test_a_refit_that_does_not_help_is_not_made() -> None:
    source, found, structure, consumers = setup()
    rng = np.random.default_rng(0)
    # Nothing of what is fitted holds on the held-out rows: every fifth run is of another kind.
    feeds = [
        {
            "x": (rng.standard_normal((50, 6)) * (-40 if i % 5 == 4 else 1) + (i % 5 == 4) * 9).astype(
                np.float32
            )
        }
        for i in range(10)
    ]
    cut, selection = cut_half(found, structure)
    (entry,) = repair(source, cut, selection, consumers, feeds, "affine")
    assert not entry["repaired"] or entry["error"] < entry["unrepaired"]


def test_too_little_data_and_data_that_is_not_finite() -> None:
    source, _, _, consumers = setup()
    contractions = [c.contraction for c in consumers]
    with pytest.raises(UserError, match="at least 5 runs"):
        observe(source, contractions, rows()[:3])
    bad = rows()
    bad[2]["x"][0, 0] = np.nan
    with pytest.raises(UserError, match="is not finite"):
        observe(source, contractions, bad)


# --- the whole way, with arrays and with text


def test_optimize_with_calibration_arrays(tmp_path: Path) -> None:
    ir.save(model(MLP), tmp_path / "model.onnx")
    (tmp_path / "calib").mkdir()
    for index, feed in enumerate(rows()):
        np.savez(tmp_path / "calib" / f"{index}.npz", **feed)
    report = optimize(
        tmp_path / "model.onnx", tmp_path / "out", prune={"ffn-channel": 0.5}, calib=tmp_path / "calib"
    )
    assert report.repair["method"] == "affine" and report.repair["calibration"]["rows"] == 2000
    (entry,) = report.repair["consumers"]
    assert entry["repaired"] and entry["error"] < entry["unrepaired"]
    assert report.check["relative_difference"] <= 1e-4
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert plan["repair"] == "affine"
    repaired = structures(model(MLP))
    assert repaired  # the source is untouched


def test_a_criterion_without_its_data_says_what_it_needs(tmp_path: Path) -> None:
    ir.save(model(MLP), tmp_path / "model.onnx")
    for given in ({"criterion": "obs"}, {"repair": "affine"}):
        with pytest.raises(UserError, match="pass --calib"):
            optimize(tmp_path / "model.onnx", tmp_path / "out", prune={"ffn-channel": 0.5}, **given)


def test_the_same_data_may_not_fit_and_judge(tmp_path: Path) -> None:
    ir.save(model(MLP), tmp_path / "model.onnx")
    np.savez(tmp_path / "d.npz", **rows()[0])
    with pytest.raises(UserError, match="share data"):
        optimize(tmp_path / "model.onnx", tmp_path / "out", calib=tmp_path / "d.npz", eval=tmp_path / "d.npz")


def test_text_wants_a_token_input_and_a_tokenizer(tmp_path: Path) -> None:
    ir.save(model(MLP), tmp_path / "model.onnx")
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(UserError, match="tokenizer"):
        optimize(tmp_path / "model.onnx", tmp_path / "out", calib=tmp_path / "text.txt")


def test_repair_is_observed_by_name_of_the_activation() -> None:
    source, _, _, consumers = setup()
    observed = observe(source, [c.contraction for c in consumers], rows())
    assert list(observed) == [("r", -1)] and isinstance(observed["r", -1], Observed)
