"""Metrics beside plain numpy, and the comparison of two models in one pass."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model

from onnx_autoglm import UserError, optimize
from onnx_autoglm.dataset import Dataset
from onnx_autoglm.quality import ClassQuality, TextQuality, compare, measure
from onnx_autoglm.scores import class_scores, token_scores

LANGUAGE = (
    "g (int64[b,s] ids) => (float[b,s,8] hidden, float[b,s,32] logits) "
    "<float[32,8] table, float[8,24] up, float[24,8] down, float[8,32] head> "
    "{ e = Gather(table, ids) h = MatMul(e, up) r = Relu(h) d = MatMul(r, down) hidden = Add(e, d) "
    "logits = MatMul(hidden, head) }"
)
CLASSIFIER = (
    "g (float[n,6] x) => (float[n,7] y) <float[6,12] a, float[12,7] c> "
    "{ h = MatMul(x, a) r = Relu(h) y = MatMul(r, c) }"
)


def tokens(count: int = 3, window: int = 9) -> list[np.ndarray]:
    return list(np.random.default_rng(3).integers(0, 32, (count, 1, window)))


def text(rows: list[np.ndarray]) -> Dataset:
    return Dataset("text", "", sum(row.size for row in rows), [{"ids": row} for row in rows], "ids")


def labelled(count: int = 40, width: int = 6) -> Dataset:
    rng = np.random.default_rng(5)
    feeds = [{"x": rng.standard_normal((count, width)).astype(np.float32)} for _ in range(2)]
    return Dataset("set", "", 2 * count, feeds, labels=tuple(rng.integers(0, 7, count) for _ in range(2)))


def run(source: ir.Model, feeds: list[dict[str, np.ndarray]], name: str) -> list[np.ndarray]:
    from onnx_autoglm.runtime import Session

    session = Session(source)
    return [session.run(feed)[name].astype(np.float64) for feed in feeds]


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_perplexity_and_accuracy_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnx_autoglm import quality as module

    monkeypatch.setattr(module, "_ENTRIES", 100)  # several pieces in each window
    source, data = model(LANGUAGE), text(tokens())
    found = measure(source, data)
    scores = np.concatenate([out[0, :-1] for out in run(source, list(data), "logits")])
    right = np.concatenate([row[0, 1:] for row in tokens()])
    loss = -np.log(softmax(scores)[np.arange(len(right)), right]).mean()
    assert isinstance(found, TextQuality) and found.tokens == len(right) == 24
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.accuracy == (scores.argmax(-1) == right).mean()


def test_agreement_and_divergence_are_those_of_numpy() -> None:
    before, after, data = model(LANGUAGE), model(LANGUAGE, seed=1), text(tokens())
    found = compare(before, after, data)
    old, new = (
        np.concatenate([out[0, :-1] for out in run(one, list(data), "logits")]) for one in (before, after)
    )
    p, q = softmax(old), softmax(new)
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-4)
    assert found.agreement == (old.argmax(-1) == new.argmax(-1)).mean()
    assert found.positions == 24 and found.metric == "perplexity"
    assert (found.reference, found.model) == (measure(before, data), measure(after, data))
    assert found.ratio == measure(after, data).perplexity / measure(before, data).perplexity  # type: ignore[union-attr]


def test_a_model_agrees_with_itself() -> None:
    found = compare(model(LANGUAGE), model(LANGUAGE), text(tokens()))
    assert found.agreement == 1 and found.kl == 0 and found.ratio == 1


def test_top_1_and_top_5_are_those_of_numpy() -> None:
    source, data = model(CLASSIFIER), labelled()
    found = measure(source, data)
    scores = np.concatenate(run(source, list(data), "y"))
    assert data.labels is not None
    right = np.concatenate(data.labels)
    order = np.argsort(-scores, axis=-1, kind="stable")
    assert isinstance(found, ClassQuality)
    assert found.top1 == (order[:, 0] == right).mean()
    assert found.top5 == (order[:, :5] == right[:, None]).any(-1).mean()
    assert 0 < found.top1 < found.top5 < 1 and found.samples == 80


def test_a_model_that_scores_all_classes_alike_gains_nothing() -> None:
    constant = model(CLASSIFIER, weights={"c": np.zeros((12, 7), np.float32)})
    data = labelled()
    assert data.labels is not None
    assert measure(constant, data).top1 == (np.concatenate(data.labels) == 0).mean()  # type: ignore[union-attr]


def test_padding_is_not_counted() -> None:
    data = labelled()
    assert data.labels is not None
    half = tuple(np.where(np.arange(40) < 20, row, -1) for row in data.labels)
    short = Dataset(
        "set", "", 40, [{"x": feed["x"][:20]} for feed in data], labels=tuple(r[:20] for r in half)
    )
    padded = Dataset("set", "", 40, data.feeds, labels=half)
    one, other = model(CLASSIFIER), model(CLASSIFIER, seed=1)
    first, second = compare(one, other, padded), compare(one, other, short)
    assert first.positions == second.positions == 40 and first.agreement == second.agreement
    assert first.kl == pytest.approx(second.kl) and first.model == second.model


def test_probabilities_are_not_taken_for_logits() -> None:
    """A Softmax at the end of both graphs changes neither order nor divergence."""
    ends = CLASSIFIER.replace("y = MatMul(r, c)", "z = MatMul(r, c) p = Softmax(z) y = Identity(p)")
    plain = compare(model(CLASSIFIER), model(CLASSIFIER, seed=1), labelled())
    ended = compare(model(ends), model(ends, seed=1), labelled())
    mixed = compare(model(CLASSIFIER), model(ends, seed=1), labelled())
    assert ended.kl == pytest.approx(plain.kl, rel=1e-3) and mixed.kl == pytest.approx(plain.kl, rel=1e-3)
    assert plain.kl > 1


def test_classes_that_the_reference_excludes_add_nothing() -> None:
    low = np.array([0, 0, 0, 0, 0, 0, -np.inf], np.float32)
    masked = CLASSIFIER.replace("y = MatMul(r, c)", "z = MatMul(r, c) y = Add(z, low)").replace(
        "float[12,7] c>", "float[12,7] c, float[7] low>"
    )
    found = compare(model(masked, weights={"low": low}), model(CLASSIFIER, seed=1), labelled())
    assert math.isfinite(found.kl)
    assert compare(model(CLASSIFIER), model(masked, weights={"low": low}), labelled()).kl == math.inf


def test_the_output_of_scores_is_found_beside_others() -> None:
    found = token_scores(model(LANGUAGE))
    assert found is not None and found.name == "logits"
    assert class_scores(model(LANGUAGE)) is None
    end = CLASSIFIER.replace("float[n,7] y", "float[n,7,1,1] y").replace(
        "y = MatMul(r, c)", "z = MatMul(r, c) p = Softmax(z) y = Unsqueeze(p, axes)"
    )
    end = end.replace("float[12,7] c>", "float[12,7] c, int64[2] axes = {2,3}>")
    found = class_scores(model(end))
    assert found is not None and found.normalised and measure(model(end), labelled()).samples == 80  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"labels": (np.array([7] * 40), np.array([0] * 40))}, "has label 7, the model 7 classes"),
        ({"classes": 3}, "has 3 folders of classes, the model 7 classes"),
        ({"labels": None}, "add an array 'labels'"),
        ({"labels": (np.array([0]), np.array([0]))}, "1 labels for 40 rows"),
    ],
)
def test_data_that_does_not_fit(change: dict[str, object], expected: str) -> None:
    import dataclasses

    with pytest.raises(UserError, match=expected):
        measure(model(CLASSIFIER), dataclasses.replace(labelled(), **change))  # type: ignore[arg-type]


def test_models_that_do_not_fit() -> None:
    wider = CLASSIFIER.replace("7]", "9]")
    with pytest.raises(UserError, match=r"\[40, 7\] \(reference\) and \[40, 9\] \(model\)"):
        compare(model(CLASSIFIER), model(wider), labelled())
    with pytest.raises(UserError, match="no output of class scores"):
        measure(
            model(
                CLASSIFIER.replace("float[n,7] y", "float[n,7,2] y")
                .replace(
                    "y = MatMul(r, c)", "z = MatMul(r, c) u = Unsqueeze(z, last) y = Concat<axis=2>(u, u)"
                )
                .replace("float[12,7] c>", "float[12,7] c, int64[1] last = {2}>")
            ),
            labelled(),
        )
    broken = model(CLASSIFIER, weights={"c": np.full((12, 7), np.nan, np.float32)})
    with pytest.raises(UserError, match=r"the model computes scores that are not numbers \(NaN\) in run 1"):
        compare(model(CLASSIFIER), broken, labelled())


# --- in `optimize`


def test_a_model_without_scores_is_refused_before_it_is_pruned(tmp_path: Path) -> None:
    ends = CLASSIFIER.replace("float[n,7] y", "int64[n] y").replace(
        "y = MatMul(r, c)", "z = MatMul(r, c) y = ArgMax<axis=1, keepdims=0>(z)"
    )
    ir.save(model(ends), tmp_path / "model.onnx")
    np.savez(tmp_path / "set.npz", x=np.ones((4, 6), np.float32), labels=np.arange(4))
    steps: list[str] = []
    with pytest.raises(UserError, match=r"no output of class scores .* on set\.npz cannot be measured"):
        optimize(tmp_path / "model.onnx", tmp_path / "out", eval=tmp_path / "set.npz", progress=steps.append)
    assert steps == ["open"]


def test_the_report_has_top_1_agreement_and_divergence(tmp_path: Path) -> None:
    ir.save(model(CLASSIFIER), tmp_path / "model.onnx")
    data = labelled(100)
    assert data.labels is not None
    np.savez(tmp_path / "set.npz", x=data.feeds[0]["x"], labels=data.labels[0] % 7)
    report = optimize(
        tmp_path / "model.onnx", tmp_path / "out", prune={"ffn-channel": 0.5}, eval=tmp_path / "set.npz"
    )
    quality = report.quality
    assert quality["metric"] == "top-1" and quality["source"]["samples"] == 100
    assert quality["ratio"] == quality["result"]["top1"] / quality["source"]["top1"]
    assert 0 < quality["agreement"] < 1 and quality["kl"] > 0 and quality["data"]["name"] == "set.npz"
    (tmp_path / "plain").mkdir()
    np.savez(tmp_path / "plain/0.npz", x=data.feeds[0]["x"])
    report = optimize(
        tmp_path / "model.onnx", tmp_path / "out", prune={"ffn-channel": 0.5}, eval=tmp_path / "plain"
    )
    assert report.quality["metric"] == "agreement" and report.quality["source"] is None
    assert report.quality["agreement"] == quality["agreement"]
