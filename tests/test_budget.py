"""One budget over kinds and layers: measured losses, allocation, targets and their refusal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model, structures

from onnx_autoglm import UserError, optimize
from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.consumers import find_consumers
from onnx_autoglm.cut import analyse, apply_selection
from onnx_autoglm.dataset import Dataset
from onnx_autoglm.latency import Latency
from onnx_autoglm.latency_table import Stopwatch, workload
from onnx_autoglm.modelfile import open_model
from onnx_autoglm.options import PruningOptions
from onnx_autoglm.passes.allocate import allocate
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.passes.ladder import Ladder, keep_best
from onnx_autoglm.passes.price import LossCurve, price
from onnx_autoglm.refit import Fit, refit
from onnx_autoglm.resources import resource_of, unit_costs
from onnx_autoglm.runtime import Session
from onnx_autoglm.sliced_tensor import SlicedTensor
from onnx_autoglm.statistics import observe
from onnx_autoglm.trial import Trial

WIDTH, VOCABULARY = 12, 26


def language_model(layers: int = 2, seed: int = 0) -> ir.Model:
    """Residual MLP blocks on embeddings; the second block's output is ten times as large."""
    lines, declared, stream = [], [], "e"
    weights: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(seed)
    for number in range(layers):
        declared += [
            f"float[{WIDTH},32] a{number}",
            f"float[32,{WIDTH}] b{number}",
            f"float[{WIDTH}] g{number}",
        ]
        lines.append(
            f"n{number} = LayerNormalization<axis=-1>({stream}, g{number}) h{number} = MatMul(n{number}, a{number}) r{number} = Relu(h{number}) "
            f"m{number} = MatMul(r{number}, b{number}) s{number} = Add({stream}, m{number})"
        )
        weights[f"b{number}"] = (rng.standard_normal((32, WIDTH)) * (0.02 if number else 0.4)).astype(
            np.float32
        )
        stream = f"s{number}"
    text = f"""
    g (int64[n,s] ids) => (float[n,s,{VOCABULARY}] scores)
    <float[{VOCABULARY},{WIDTH}] table, float[{WIDTH},{VOCABULARY}] head, {", ".join(declared)}>
    {{ e = Gather(table, ids) {" ".join(lines)} scores = MatMul({stream}, head) }}
    """
    return model(text, weights=weights)


def tokens(runs: int = 10, length: int = 64, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    feeds = tuple({"ids": rng.integers(0, VOCABULARY, (1, length))} for _ in range(runs))
    return Dataset("tokens", f"{seed}", runs * length, feeds, "ids")


class Scene:
    """A source with observed consumers and a trial of it."""

    def __init__(self, repair: str = "affine") -> None:
        self.source = language_model()
        self.found = analyse(self.source.clone())
        self.structures = [s for s in self.found if s.kind == "ffn-channel" and not s.pins]
        self.consumers = [c for c in find_consumers(self.found) if c.initializer.name in ("b0", "b1")]
        self.data = tokens()
        self.observed = observe(self.source, [c.contraction for c in self.consumers], self.data.feeds)
        self.trial = Trial(
            self.source, self.consumers, self.observed, self.data, numbers=range(6, 10), repair=repair
        )  # type: ignore[arg-type]
        rng = np.random.default_rng(1)
        self.scores = {s: rng.random(s.size) for s in self.structures}

    def selection(self, *counts: int) -> Selection:
        selection = Selection()
        for structure, keep in zip(self.structures, counts, strict=True):
            keep_best(selection, structure, self.scores[structure], keep)
        return selection


def divergence(expected: np.ndarray, actual: np.ndarray) -> float:
    def logs(scores: np.ndarray) -> np.ndarray:
        scores = scores.astype(np.float64)[:, :-1]
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))

    p, q = logs(expected), logs(actual)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("repair", ["affine", "bias", "none"])
def test_a_trial_is_the_pruned_and_repaired_model(repair: str) -> None:
    scene = Scene(repair)
    selection = scene.selection(20, 9)
    found = scene.trial.measure(selection)
    cut = apply_selection(scene.found, selection)
    for consumer in scene.consumers if repair != "none" else ():
        kept, _ = selection.indices([consumer.contraction.dim], 0)
        tensor = consumer.initializer.const_value
        assert isinstance(tensor, SlicedTensor)
        fit = refit(consumer, tensor.source, kept, scene.observed, repair)  # type: ignore[arg-type]
        assert isinstance(fit, Fit)
        consumer.initializer.const_value = ir.tensor(fit.rows.astype(np.float32))
        shift = ir.Value(name="shift", const_value=ir.tensor(fit.shift.astype(np.float32)))
        shift.name = f"shift_{consumer.initializer.name}"
        cut.model.graph.register_initializer(shift)
        output = consumer.contraction.node.outputs[0]
        added = ir.node("Add", [output, shift])
        ir.convenience.replace_all_uses_with(output, added.outputs[0])
        added.replace_input_with(0, output)
        cut.model.graph.insert_after(consumer.contraction.node, added)
    before, after = Session(scene.source), Session(cut.model)
    losses = [
        divergence(before.run(feed)["scores"], after.run(feed)["scores"]) for feed in scene.data.feeds[-4:]
    ]
    assert found.divergence == pytest.approx(np.mean(losses), rel=1e-3)
    assert found.divergence > 1e-3
    assert scene.trial.measure(Selection()).divergence == pytest.approx(0, abs=1e-6)


def test_a_trial_without_tokens_measures_the_outputs() -> None:
    source = model("g (float[n,6] x) => (float[n,4] y) <float[6,12] a, float[12,4] c> { h = MatMul(x, a) r = Relu(h) y = MatMul(r, c) }")  # fmt: skip
    found = analyse(source.clone())
    (structure,) = [s for s in found if s.kind == "ffn-channel"]
    feeds = tuple(
        {"x": np.random.default_rng(n).standard_normal((50, 6)).astype(np.float32)} for n in range(5)
    )
    trial = Trial(
        source, find_consumers(found), {}, Dataset("x", "", 250, feeds), numbers=[3, 4], repair="none"
    )
    selection = Selection()
    keep_best(selection, structure, np.arange(12.0), 6)
    cut = apply_selection(found, selection)
    expected = []
    for feed in feeds[-2:]:
        a, b = Session(source).run(feed)["y"], Session(cut.model).run(feed)["y"]
        expected.append(np.square(a - b).sum() / np.square(a - a.mean()).sum())
    assert trial.measure(selection).divergence == pytest.approx(np.mean(expected), rel=1e-4)


def test_a_curve_runs_through_its_points_and_never_falls() -> None:
    (structure,) = [s for s in structures(model("g (float[n,4] x) => (float[n,4] y) <float[4,8] a, float[8,4] b> { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }")) if s.size == 8]  # fmt: skip
    ladder = Ladder(structure, np.arange(1.0, 9.0), PruningOptions(), how="none")
    curve = LossCurve(ladder, [(6, 0.3), (3, 0.2), (1, 2.0)])
    assert curve.loss(8) == 0 and curve.loss(6) == pytest.approx(0.3) and curve.loss(1) == pytest.approx(2.0)
    assert curve.loss(7) == pytest.approx(0.3 * 1 / 3)  # of the errors 1 and 2, the first
    losses = [curve.loss(keep) for keep in range(8, 0, -1)]
    assert losses == sorted(losses)


def test_what_costs_least_loss_per_saving_goes_first() -> None:
    scene = Scene()
    curves = price(scene.trial, scene.scores, (0.25, 0.5), PruningOptions())
    costs = unit_costs(scene.structures, resource_of("parameters", scene.found))
    assert set(costs.values()) == {2 * WIDTH}

    def saving(structure, keep: int) -> float:
        return (structure.size - keep) * costs[structure]

    counts = allocate(curves, saving, wanted=20 * 2 * WIDTH)
    assert sum(32 - keep for keep in counts.values()) == 20
    loud, quiet = (counts[structure] for structure in scene.structures)
    assert quiet < loud  # the second block hardly moves the scores
    even = allocate(curves, saving, wanted=20 * 2 * WIDTH, uniform=True)
    assert set(even.values()) == {22}


def test_resources_count_what_a_cut_model_holds() -> None:
    scene = Scene()
    selection = scene.selection(20, 9)
    expected = tuple(resource_of(name, scene.found)(selection) for name in ("parameters", "bytes"))
    cut = apply_selection(scene.found, selection)
    tensors = [value.const_value for value in cut.model.graph.initializers.values()]
    assert expected == (sum(t.size for t in tensors), sum(t.nbytes for t in tensors))


# --- the whole run


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    ir.save(language_model(), tmp_path / "model.onnx")
    for name, seed in (("calib", 0), ("eval", 1)):
        (tmp_path / name).mkdir()
        for number, feed in enumerate(tokens(seed=seed).feeds):
            np.savez(tmp_path / name / f"{number}.npz", **feed)
    return {name: tmp_path / name for name in ("model.onnx", "calib", "eval", "out")}


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize(
    ("target", "value", "share"), [("keep", 0.6, 0.4), ("flops", 0.7, 0.3), ("size", 8000, None)]
)
def test_a_budget_is_met(
    files: dict[str, Path], target: str, value: float, share: float | None, calibrated: bool
) -> None:
    report = optimize(
        files["model.onnx"], files["out"], calib=files["calib"] if calibrated else "none", **{target: value}
    )
    written = json.loads((files["out"] / "report.json").read_text())
    assert written["budget"]["target"] == target
    if target == "size":
        assert abs(report.result.bytes - 8000) <= 4 * 2 * WIDTH
    elif target == "flops":
        assert report.result.flops == pytest.approx(0.7 * report.source.flops, rel=0.02)
    else:
        gone = report.source.parameters - report.result.parameters
        assert gone == pytest.approx(0.4 * 2 * 32 * 2 * WIDTH, abs=2 * WIDTH)
    assert any("no calibration data" in note for note in report.notes) == (not calibrated)


def test_uniform_layers_have_a_configuration(files: dict[str, Path]) -> None:
    report = optimize(files["model.onnx"], files["out"], keep=0.5, uniform=True, calib=files["calib"])
    assert {entry.kept for entry in report.structures if entry.kind == "ffn-channel"} == {16}
    assert report.budget["config"] == {"intermediate_size": 16}


def test_no_target_with_data_is_a_joint_quarter(files: dict[str, Path]) -> None:
    report = optimize(files["model.onnx"], files["out"], calib=files["calib"])
    assert report.budget["target"] == "keep" and report.options["budget"]["keep"] == 0.75
    counts = [entry.kept for entry in report.structures if entry.kind == "ffn-channel"]
    assert sum(counts) == 48 and counts[1] < counts[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": 0.01}, "cannot be reached"),
        ({"size": 10**9}, "bytes already"),
        ({"keep": 0.5, "kinds": "conv-channel"}, "has no conv-channel"),
        ({"keep": 0.5, "kinds": "hidden"}, "use --prune"),
        ({"keep": 0.5, "prune": {"ffn-channel": 0.5}}, "give one of them"),
        ({"max_loss": 0.05}, "--max-loss"),
        ({"keep": 0.5, "max_loss": 0.05}, "--max-loss is measured on"),
        ({"speedup": 1.5, "regime": "decode"}, "KV cache"),
    ],
)
def test_what_cannot_be_met_is_an_error(
    files: dict[str, Path], given: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        optimize(files["model.onnx"], files["out"], calib="none", **given)  # type: ignore[arg-type]
    assert not files["out"].exists()


def test_a_loss_limit_is_held_or_refused(files: dict[str, Path]) -> None:
    given = {"calib": "self"}  # which also writes what the loss is measured on
    report = optimize(files["model.onnx"], files["out"], max_loss=0.05, **given)  # type: ignore[arg-type]
    assert 1 < report.quality["ratio"] <= 1.05 and report.budget["target"] == "max_loss"
    assert report.result.parameters < report.source.parameters
    with pytest.raises(UserError, match="--max-loss 1.00% is exceeded"):
        optimize(files["model.onnx"], files["out"], keep=0.3, max_loss=0.01, **given)  # type: ignore[arg-type]


def test_a_promise_is_solved_for_on_the_clock(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that says 0.2 + 0.8 * (share of channels)^2: bent, so that one guess does not do."""
    read: list[float] = []

    def clock(self: Stopwatch, counts: dict[str, int]) -> Latency:
        share = sum(counts.values()) / (2 * 32)
        read.append(1 / (0.2 + 0.8 * share**2))
        return Latency(1.0, 1 / read[-1], read[-1], 1, {})

    monkeypatch.setattr(Stopwatch, "measure", clock)
    report = optimize(files["model.onnx"], files["out"], speedup=1.5, calib=files["calib"])
    assert report.latency["speedup"] == read[-1] == pytest.approx(1.5, rel=0.05)
    with pytest.raises(UserError, match="--speedup 20 cannot be reached"):
        optimize(files["model.onnx"], files["out"], speedup=20, calib=files["calib"])


def test_the_clock_times_source_and_result(files: dict[str, Path]) -> None:
    source = canonicalize(open_model(files["model.onnx"]))
    feed = workload(source, batch=2, sequence=7, regime="prefill")
    assert feed["ids"].shape == (2, 7) and feed["ids"].max() < VOCABULARY
    found = Stopwatch(source, feed).measure({s.id: 5 for s in structures(source) if s.kind == "ffn-channel"})
    assert found.source_ms > 0 and found.result_ms > 0 and found.shapes == {"ids": [2, 7]}
