"""Exchanges after a greedy choice: never worse, as good as trying all choices on small problems."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model

from onnx_autoglm import UserError, optimize
from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.consumers import consumers_of, find_consumers
from onnx_autoglm.cut import analyse
from onnx_autoglm.passes.ladder import keep_best
from onnx_autoglm.passes.score_obs import damped, score_obs
from onnx_autoglm.passes.swap_choice import Problem, swap_choice
from onnx_autoglm.statistics import Moments, Observed, key_of

MLP = "g (float[n,6] x) => (float[n,4] y) <float[6,10] a, float[10,4] c> "
MLP += "{ h = MatMul(x, a) r = Relu(h) y = MatMul(r, c) }"
HEADS = """
g (float[B,S,12] x) => (float[B,S,12] y) <float[12,32] wq, float[12,16] wk, float[12,16] wv, float[32,12] wo>
{ q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
  a = Attention<q_num_heads=8, kv_num_heads=4>(q, k, v)  y = MatMul(a, wo) }
"""


def error(covariance: np.ndarray, weight: np.ndarray, kept: np.ndarray) -> float:
    """Of the best weight on the kept rows, by the Schur complement."""
    gone = np.setdiff1d(np.arange(len(weight)), kept)
    cross = covariance[np.ix_(gone, kept)]
    inner = covariance[np.ix_(kept, kept)]
    rest = covariance[np.ix_(gone, gone)] - cross @ np.linalg.solve(inner, cross.T)
    return float(np.einsum("ko,kl,lo->", weight[gone], rest, weight[gone]))


def problem(seed: int, text: str, kind: str):
    """A structure with observed moments of strongly correlated inputs."""
    source = model(text, seed=seed, opset=23)
    found = analyse(source)
    (structure,) = [s for s in found if s.kind == kind and not s.pins]
    consumers = consumers_of(structure, find_consumers(found))
    (consumer,) = consumers
    width = len(consumer.rows())
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((max(width // 2, 3), width))
    parts = []
    for _ in range(2):
        part = Moments(width)
        rows = rng.standard_normal((400, len(mixing))) @ mixing + 0.3 * rng.standard_normal((400, width))
        part.add(rows.astype(np.float32))
        parts.append(part)
    observed = {key_of(consumer.contraction): Observed(*parts)}
    return structure, consumers, observed


def test_on_most_small_problems_no_choice_is_better() -> None:
    best = better = 0
    for seed in range(40):
        structure, consumers, observed = problem(seed, MLP, "ffn-channel")
        (seen,) = observed.values()
        covariance, weight = damped(seen.all.covariance), consumers[0].rows()
        scores = score_obs([structure], consumers, observed)
        selection = Selection()
        keep_best(selection, structure, scores[structure], 5)
        before = error(covariance, weight, np.flatnonzero(selection.kept[structure.atom]))
        swap_choice(selection, [structure], consumers, observed, 50)
        kept = np.flatnonzero(selection.kept[structure.atom])
        after = error(covariance, weight, kept)
        least = min(
            error(covariance, weight, np.array(rows)) for rows in itertools.combinations(range(10), 5)
        )
        assert len(kept) == 5 and after <= before * (1 + 1e-9)
        best += after <= least * (1 + 1e-6)
        better += after < before * (1 - 1e-6)
    assert best >= 34 and better >= 5, (best, better)


def test_from_a_bad_choice_the_search_gets_far() -> None:
    for seed in range(10):
        structure, consumers, observed = problem(seed, MLP, "ffn-channel")
        (seen,) = observed.values()
        covariance, weight = damped(seen.all.covariance), consumers[0].rows()
        errors = []
        for swaps in (0, 1, 2, 50):
            selection = Selection()
            keep_best(selection, structure, -score_obs([structure], consumers, observed)[structure], 5)
            done = swap_choice(selection, [structure], consumers, observed, swaps)
            assert done <= swaps
            errors.append(error(covariance, weight, np.flatnonzero(selection.kept[structure.atom])))
        assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


def test_effects_are_exact_for_heads_of_several_channels() -> None:
    rng = np.random.default_rng(0)
    index = np.repeat(np.arange(6), 3)
    weight, rows = rng.standard_normal((18, 5)), rng.standard_normal((200, 18))
    covariance = damped(np.cov(rows.T))
    kept = np.array([True, True, True, True, False, False])
    own = Problem(index, weight, covariance, kept)

    def of(units: list[int]) -> float:
        return error(covariance, weight, np.flatnonzero(np.isin(index, units)))

    assert own.error() == pytest.approx(of([0, 1, 2, 3]))
    assert own.gain(4) == pytest.approx(of([0, 1, 2, 3]) - of([0, 1, 2, 3, 4]))
    expected = [of([1, 2, 3, 4]), of([0, 1, 3, 4])]
    assert own.costs(4, np.array([0, 2])) == pytest.approx(np.array(expected) - of([0, 1, 2, 3, 4]))
    own.exchange(4, 2)
    assert own.error() == pytest.approx(of([0, 1, 3, 4]))


def test_heads_are_exchanged_within_their_group() -> None:
    structure, consumers, observed = problem(1, HEADS, "query-head")
    assert structure.shape == (4, 2)
    selection = Selection()
    keep_best(selection, structure, -score_obs([structure], consumers, observed)[structure], 1)
    assert swap_choice(selection, [structure], consumers, observed, 20) > 0
    assert selection.kept[structure.atom].sum(axis=1).tolist() == [1, 1, 1, 1]


def test_swaps_are_an_option_of_obs(tmp_path: Path) -> None:
    ir.save(model(MLP), tmp_path / "model.onnx")
    (tmp_path / "calib").mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        np.savez(tmp_path / "calib" / f"{number}.npz", x=rng.standard_normal((50, 6)).astype(np.float32))
    given = {"prune": {"ffn-channel": 0.5}, "calib": tmp_path / "calib", "swaps": 20}
    report = optimize(tmp_path / "model.onnx", tmp_path / "out", **given)
    (step,) = [entry for entry in report.passes if entry["name"] == "choose"]
    assert step["swaps"] >= 0
    with pytest.raises(UserError, match="--swaps improves the choice of obs, not of wanda"):
        optimize(tmp_path / "model.onnx", tmp_path / "out", **given, criterion="wanda")
