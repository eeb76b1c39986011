"""Sequential repair: each formula beside a plain least-squares solution, on explicit windows and sums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model

from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.consumers import consumers_of, find_consumers, normed_values
from onnx_autoglm.cut import Cut, analyse, apply_selection
from onnx_autoglm.data import load_dataset
from onnx_autoglm.passes import repair_weights as module
from onnx_autoglm.passes.repair_weights import RepairWeights
from onnx_autoglm.patches import patches
from onnx_autoglm.regression import Sums, error, ridge
from onnx_autoglm.runtime import Session
from onnx_autoglm.statistics import Moments, relative
from onnx_autoglm.targets import find_target
from onnx_autoglm.walk import Walk

Feeds = list[dict[str, np.ndarray]]

IMAGES = "g (float[n,3,8,8] x) => (float[n,4,m,k] y) "
PADDED = IMAGES + (
    "<float[12,3,1,1] a, float[12] b, float[4,12,3,3] c, float[4] d> "
    "{ h = Conv(x, a, b) r = Relu(h) y = Conv<pads=[1,1,1,1], strides=[2,2]>(r, c, d) }"
)
NORMED = IMAGES + (
    "<float[12,3,1,1] a, float[12] b, float[4,12,3,3] c, float[4] scale, float[4] mean, float[4] shift, float[4] var, "
    "float[4,3,3,3] e> "
    "{ s = Conv<pads=[1,1,1,1]>(x, e) h = Conv(x, a, b) r = Relu(h) z = Conv<pads=[1,1,1,1]>(r, c) "
    "n1 = BatchNormalization(z, scale, shift, mean, var) y = Add(n1, s) }"
)
POSITIVE = {"var": np.array([0.3, 1, 2, 5], np.float32), "scale": np.array([-2, 0.5, 1, 3], np.float32)}
TWO = (
    "g (float[n,6] x) => (float[n,4] y) <float[6,12] a, float[12] b, float[12,10] c, float[10] d, float[10,4] e> "
    "{ h = MatMul(x, a) z = Add(h, b) r = Relu(z) v = MatMul(r, c) w = Add(v, d) q = Relu(w) y = MatMul(q, e) }"
)
STREAM = (
    "g (float[n,6] x) => (float[n,6] y) <float[6,12] a, float[12] b, float[12,6] c, "
    "float[6,12] d, float[12] e, float[12,6] f> "
    "{ h = MatMul(x, a) z = Add(h, b) r = Relu(z) v = MatMul(r, c) s = Add(x, v) "
    "i = MatMul(s, d) j = Add(i, e) k = Relu(j) l = MatMul(k, f) y = Add(s, l) }"
)


def images(count: int = 10) -> Feeds:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((6, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def rows(count: int = 10) -> Feeds:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((6, 6))
    return [{"x": (rng.standard_normal((200, 6)) @ mixing).astype(np.float32)} for _ in range(count)]


def repaired(source: ir.Model, feeds: Feeds, mode: str = "affine", every: int = 2) -> tuple[Cut, list[dict]]:
    """Every second channel of all inner layers is cut, and their consumers are repaired."""
    found = analyse(source.clone())
    selection, consumers = Selection(), find_consumers(found)
    for structure in found:
        if not structure.pins and consumers_of(structure, consumers):
            selection.keep(structure.atom, structure.outers, np.arange(structure.size) % every == 0)
    cut = apply_selection(found, selection)
    pairs = [(feed, feed) for feed in feeds]
    repair = RepairWeights(mode)  # type: ignore[arg-type]
    return cut, repair(source, cut.model, selection, consumers, pairs)


def values(graph_model: ir.Model, feeds: Feeds, *names: str) -> list[np.ndarray]:
    with Walk(graph_model, feeds) as walk:
        found = list(walk.values(names))
    return [np.concatenate([arrays[name] for arrays in found]).astype(np.float64) for name in names]


def channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])


def windows(array: np.ndarray, stride: int) -> np.ndarray:
    """All 3 x 3 windows of an image padded by one, one by one."""
    padded = np.pad(array, [(0, 0), (0, 0), (1, 1), (1, 1)])
    steps = range(0, array.shape[2], stride)
    found = [[padded[:, :, i : i + 3, j : j + 3] for j in steps] for i in steps]
    stacked = np.stack([np.stack(row, 1) for row in found], 1)  # [batch, row, column, channel, 3, 3]
    return stacked.reshape(-1, array.shape[1] * 9)


def least_squares(inputs: np.ndarray, target: np.ndarray) -> float:
    """The mean squared error of the best affine map."""
    affine = np.hstack([inputs, np.ones((len(inputs), 1))])
    solution, *_ = np.linalg.lstsq(affine, target, rcond=None)
    return mean_square(target - affine @ solution)


def mean_square(miss: np.ndarray) -> float:
    return float(np.square(miss).sum() / len(miss))


# --- the parts


@pytest.mark.parametrize(
    "attributes",
    [
        "",
        "pads=[1,0,2,1]",
        "strides=[2,3], pads=[1,1,1,1]",
        "dilations=[2,1], strides=[1,2]",
        'auto_pad="SAME_UPPER", strides=[2,2]',
        'auto_pad="SAME_LOWER", strides=[3,3]',
        'auto_pad="VALID"',
    ],
)
def test_a_convolution_is_the_product_of_its_windows(attributes: str) -> None:
    text = IMAGES + f"<float[4,3,3,2] a> {{ y = Conv<{attributes or 'group=1'}>(x, a) }}"
    source = model(text)
    (node,) = source.graph
    (feed,) = images(1)
    expected = channels_last(Session(source).run(feed)["y"])
    weight = source.graph.initializers["a"].const_value.numpy().reshape(4, -1)
    found, chosen = patches(feed["x"], node, (3, 2), 10**6)
    assert np.allclose(found @ weight.T, expected, atol=1e-4)
    some, chosen = patches(feed["x"], node, (3, 2), 7)
    assert len(set(chosen)) == 7 and np.allclose(some @ weight.T, expected[chosen], atol=1e-4)


def test_ridge_and_its_error_are_those_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    x, e = rng.standard_normal((500, 5)) + 2, rng.standard_normal((500, 3)) - 1
    sums = Sums(5, 3)
    for start in (0, 200):
        sums.add(
            x[start : start + 300 - start].astype(np.float32),
            e[start : start + 300 - start].astype(np.float32),
        )
    used = np.r_[0:300, 200:300]
    x, e = x[used], e[used]
    line = ridge(sums, 1e-9)
    assert error(sums, line) == pytest.approx(least_squares(x, e), rel=1e-4)
    drawn = ridge(sums, 0.5)
    centred = x - x.mean(0)
    damped = np.vstack([centred, np.sqrt(0.5 * x.var(0).mean() * len(x)) * np.eye(5)])
    expected, *_ = np.linalg.lstsq(damped, np.vstack([e - e.mean(0), np.zeros((5, 3))]), rcond=None)
    assert np.allclose(drawn.slope, expected, atol=1e-4)
    assert error(sums, drawn) == pytest.approx(mean_square(e - x @ drawn.slope - drawn.shift), rel=1e-4)
    assert np.allclose(ridge(sums, None).shift, e.mean(0), atol=1e-5) and not ridge(sums, None).slope.any()


def test_sums_beyond_float32() -> None:
    x, e = np.full((4, 1), 2e19, np.float32), np.full((4, 1), 3.0, np.float32)
    sums = Sums(1, 1)
    sums.add(x, e)
    assert sums.xx == pytest.approx(1.6e39) and sums.xe == pytest.approx(2.4e20)


def test_a_walk_computes_what_a_run_does_and_holds_what_is_read_later() -> None:
    source, feeds = model(STREAM), rows(3)
    with Walk(source, feeds) as walk:
        folder = Path(walk._folder.name)
        walk.reach(["s"])
        assert len(list(folder.iterdir())) == 3  # s alone, of three feeds: x is read by nobody any more
        walk.reach(["k"], keep=["j"])
        assert len(list(folder.iterdir())) == 9
        found = list(walk.values(["y", "j"]))
    expected = [Session(source).run(feed) for feed in feeds]
    for arrays, whole in zip(found, expected, strict=True):
        assert np.allclose(arrays["y"], whole["y"], atol=1e-4)
    assert not folder.exists()


def test_weights_may_change_behind_the_place_reached() -> None:
    source, feeds = model(TWO), rows(2)
    with Walk(source, feeds) as walk:
        walk.reach(["r"])
        weight = source.graph.initializers["c"]
        weight.const_value = ir.tensor(np.zeros((12, 10), np.float32), name="c")
        (first, _) = walk.values(["v"])
    assert not first["v"].any()


def test_targets() -> None:
    def target(text: str, output: str, **weights: np.ndarray) -> tuple[str, int]:
        graph = model(text, weights=POSITIVE | weights).graph
        (node,) = (node for node in graph if node.outputs[0].name == output)
        found = find_target(graph, node)
        return found.value, len(found.norms)

    assert target(NORMED, "z") == ("y", 1)
    assert target(NORMED, "s") == ("s", 0)  # the other side of its sum is not repaired yet
    dead = np.array([-2, 0, 1, 3], np.float32)
    assert target(NORMED, "z", scale=dead) == ("z", 0), "nothing shows behind a channel that is switched off"
    assert target(STREAM, "v") == ("s", 0) and target(STREAM, "l") == ("y", 0)
    assert target(TWO, "v") == ("v", 0)


# --- the whole


@pytest.mark.parametrize("stride", [1, 2])
def test_a_padded_convolution_reaches_the_least_squares_error_over_its_windows(stride: int) -> None:
    source, feeds = model(PADDED.replace("strides=[2,2]", f"strides=[{stride},{stride}]")), images()
    cut, (entry,) = repaired(source, feeds)
    assert entry["repaired"] and len(cut.model.graph) == len(source.graph), "the shift belongs into the bias"
    (target,), (read, reached) = values(source, feeds, "y"), values(cut.model, feeds, "r", "y")
    best = least_squares(windows(read, stride), channels_last(target))
    assert mean_square(channels_last(target - reached)) == pytest.approx(best, rel=1e-3)


def test_a_later_layer_is_fitted_on_what_earlier_ones_became() -> None:
    source, feeds = model(TWO), rows()
    cut, entries = repaired(source, feeds)
    assert [entry["repaired"] for entry in entries] == [True, True]
    (target,), (read, reached) = values(source, feeds, "y"), values(cut.model, feeds, "q", "y")
    assert mean_square(target - reached) == pytest.approx(least_squares(read, target), rel=1e-3)


def test_a_branch_makes_up_for_its_stream() -> None:
    rng = np.random.default_rng(1)
    weights = {"c": 10 * rng.standard_normal((12, 6)), "f": rng.standard_normal((12, 6)) / 50}
    source = model(STREAM, weights={name: array.astype(np.float32) for name, array in weights.items()})
    feeds = rows()
    cut, _ = repaired(source, feeds)
    (target, intact), (read, stream, reached) = (
        values(source, feeds, "y", "s"),
        values(cut.model, feeds, "k", "s", "y"),
    )
    best = least_squares(read, target - stream)
    assert best < 0.97 * (least_squares(read, target - intact) + mean_square(intact - stream))
    assert mean_square(target - reached) == pytest.approx(best, rel=1e-3)


def test_a_normalisation_on_the_way_to_the_sum_scales_the_error() -> None:
    source, feeds = model(NORMED, weights=POSITIVE), images()
    cut, (entry,) = repaired(source, feeds)
    (target, beside), (read, reached) = values(source, feeds, "y", "s"), values(cut.model, feeds, "r", "y")
    best = least_squares(windows(read, 1), channels_last(target - beside))
    assert entry["repaired"]
    assert mean_square(channels_last(target - reached)) == pytest.approx(best, rel=1e-3)


def test_bias_repair_of_a_padded_convolution_keeps_the_mean() -> None:
    source, feeds = model(PADDED), images()
    cut, _ = repaired(source, feeds, "bias")
    (target,), (reached,) = values(source, feeds, "y"), values(cut.model, feeds, "y")
    assert np.allclose(target.mean((0, 2, 3)), reached.mean((0, 2, 3)), atol=1e-4)


def test_a_sample_of_the_rows_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    source, feeds = model(PADDED), images(20)
    (target,) = values(source, feeds, "y")
    errors = []
    for limit in (10**6, 1000):
        monkeypatch.setattr(module, "ROWS", limit)
        (reached,) = values(repaired(source, feeds)[0].model, feeds, "y")
        errors.append(mean_square(target - reached))
    assert errors[0] < errors[1] < 1.2 * errors[0]


# --- data


def test_a_large_batch_is_several_runs(tmp_path: Path) -> None:
    source, (feed,) = model(TWO), rows(1)
    np.savez(tmp_path / "all.npz", **feed)
    data = load_dataset(tmp_path / "all.npz", source)
    assert len(data.feeds) == 20 and data.rows == 200
    assert np.array_equal(np.concatenate([part["x"] for part in data]), feed["x"])
    fixed = model(TWO.replace("float[n,6]", "float[200,6]"))
    assert len(load_dataset(tmp_path / "all.npz", fixed).feeds) == 1


# --- rows of very different size before a norm


def test_rows_weigh_by_one_over_their_size() -> None:
    rows = np.array([[1.0, 1.0], [2.0, 2.0], [100.0, 100.0]], np.float32)
    assert np.allclose(relative(rows), [1, 1, 4 / 10_000])


def test_weighted_sums_are_those_of_repeated_rows() -> None:
    rng = np.random.default_rng(0)
    x, e = (rng.standard_normal((5, n)).astype(np.float32) for n in (3, 2))
    weights = np.array([1, 2, 3, 1, 2], np.float32)
    heavy, repeated = Sums(3, 2), Sums(3, 2)
    heavy.add(x, e, weights)
    times = weights.astype(int)
    repeated.add(np.repeat(x, times, axis=0), np.repeat(e, times, axis=0))
    for strength in (None, 0.1):
        one, other = ridge(heavy, strength), ridge(repeated, strength)
        assert np.allclose(one.slope, other.slope, atol=1e-5) and np.allclose(
            one.shift, other.shift, atol=1e-5
        )
        assert np.isclose(error(heavy, one), error(repeated, other), rtol=1e-4)
    moments, again = Moments(3), Moments(3)
    moments.add(x, weights)
    again.add(np.repeat(x, times, axis=0))
    assert np.allclose(moments.covariance, again.covariance, atol=1e-5)


def test_only_what_a_norm_reads_is_normed() -> None:
    source = model("""
        g (float[n,s,8] x) => (float[n,s,8] y) <float[8,16] a, float[16,8] b, float[8] g1, float[8,8] head>
        { h = MatMul(x, a) r = Relu(h) m = MatMul(r, b) s1 = Add(x, m) n1 = LayerNormalization<axis=-1>(s1, g1)
          y = MatMul(n1, head) }
        """)
    names = normed_values(analyse(source.clone()).analysis)
    assert {"s1", "m", "n1"} <= names and not names & {"h", "r", "y"}


def test_what_a_branch_is_fitted_to_is_decided_on_held_out_rows() -> None:
    """What the stream has lost is learnt where x tells it, and left alone where it is noise to x."""
    rng = np.random.default_rng(0)
    slope, drift = rng.standard_normal((20, 3)), rng.standard_normal((20, 3))

    def sums(count: int, share: float) -> Sums:
        result = Sums(20, 6)
        x = rng.standard_normal((count, 20)).astype(np.float32)
        own = x @ slope
        lost = share * (x @ drift) + (1 - share) * 30 * rng.standard_normal((count, 3))
        result.add(x, np.hstack([own + lost, own]).astype(np.float32))
        return result

    def fitted_to(share: float) -> module._Fit:
        parts = [sums(count, share) for count in (60, 5000)]
        fitted, held_out = ({"sum": part.of_outputs(0, 3), "output": part.of_outputs(3, 6)} for part in parts)
        return module._fit(module._Evidence(fitted, held_out, 1.0), "affine")

    assert fitted_to(1.0).target == "sum"
    noisy = fitted_to(0.0)
    assert noisy.target == "output" and noisy.line is not None
    assert np.allclose(noisy.line.slope, slope, rtol=0.05, atol=1e-2)


def test_the_report_says_what_each_consumer_was_fitted_to() -> None:
    _, entries = repaired(model(STREAM), rows())
    assert all(entry["target"] in ("sum", "output") for entry in entries)
    assert entries[0]["target"] == "sum"  # nothing is lost yet, so both are one
    _, entries = repaired(model(TWO), rows())
    assert [entry["target"] for entry in entries] == ["output", "output"]
