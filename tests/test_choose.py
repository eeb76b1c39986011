"""How fractions, scores and options turn into counts."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import model, structures

from onnx_autoglm.options import PruningOptions
from onnx_autoglm.passes.choose import Decision, candidates, choose
from onnx_autoglm.passes.score_norm import ScoreNorm, sum_powers
from onnx_autoglm.passes.score_random import ScoreRandom


def mlp(widths: list[int], **weights: np.ndarray):
    """A chain of ReLU layers on 4 features: one ffn-channel structure per width."""
    lines, declared, before, size = [], [], "x", 4
    for index, width in enumerate(widths):
        declared.append(f"float[{size},{width}] w{index}")
        lines.append(f"h{index} = MatMul({before}, w{index}) a{index} = Relu(h{index})")
        before, size = f"a{index}", width
    declared.append(f"float[{size},3] w_last")
    text = f"g (float[n,4] x) => (float[n,3] y) <{', '.join(declared)}> {{ {' '.join(lines)} y = MatMul({before}, w_last) }}"
    return model(text, weights=weights)


def decide(source, fractions=None, scores=None, **options) -> list[Decision]:
    found = structures(source)
    settings = PruningOptions(**options)
    fractions = fractions or {"ffn-channel": 0.5}
    decisions = candidates(found, fractions, settings, asked=True)
    wanted = [decision.structure for decision in decisions if not decision.reason]
    values = ScoreNorm()(wanted) if scores is None else dict(zip(wanted, scores, strict=True))
    selection, decisions = choose(found, values, fractions, settings, decisions)
    for decision in decisions:
        mask = selection.kept.get(decision.structure.atom)
        assert (mask is None) == (decision.keep == decision.structure.size)
        if mask is not None:
            assert mask.sum() == decision.keep
    return decisions


def kept(source, **options) -> list[int]:
    return [decision.keep for decision in decide(source, **options)]


def test_a_fraction_is_what_is_removed_in_every_layer() -> None:
    assert kept(mlp([8, 10]), fractions={"ffn-channel": 0.25}) == [6, 8]  # 2.5 of 10: ties remove less


@pytest.mark.parametrize(
    ("size", "fraction", "expected"), [(3, 0.25, 2), (2, 0.25, 2), (9, 0.5, 5), (4, 0.9, 1)]
)
def test_counts_are_rounded_to_the_nearest(size: int, fraction: float, expected: int) -> None:
    assert kept(mlp([size]), fractions={"ffn-channel": fraction}) == [expected]


def test_a_layer_that_the_fraction_leaves_whole_says_so() -> None:
    (decision,) = decide(mlp([2]), fractions={"ffn-channel": 0.25})
    assert "leaves all 2" in decision.reason


def test_the_highest_scores_stay() -> None:
    source = mlp([4])
    (structure,) = structures(source)
    settings, fractions = PruningOptions(), {"ffn-channel": 0.5}
    selection, _ = choose([structure], {structure: np.array([1.0, 9.0, 2.0, 5.0])}, fractions, settings)
    assert selection.kept[structure.atom].tolist() == [False, True, False, True]


def test_floor_holds() -> None:
    assert kept(mlp([8]), fractions={"ffn-channel": 0.9}, min_keep=5) == [5]


def test_alignment_rounds_up_and_spends_the_rest_elsewhere() -> None:
    # A quarter of 16 keeps 12, aligned to 8: 16 in each of four layers; half of what that leaves is spent again.
    counts = kept(mlp([16, 16, 16, 16]), fractions={"ffn-channel": 0.25}, align=8)
    assert all(count % 8 == 0 for count in counts)
    assert sorted(counts) == [8, 8, 16, 16]


def test_alignment_keeps_at_least_one_tile() -> None:
    assert kept(mlp([16]), fractions={"ffn-channel": 0.99}, align=8) == [8]


def test_global_scope_takes_from_the_weaker_layer() -> None:
    scores = [np.array([1.0, 1.0, 1.0, 1.0]), np.array([5.0, 5.0, 5.0, 5.0])]
    counts = kept(mlp([4, 4]), scores=scores, scope="global", normalize="none")
    assert counts[0] == 1 and counts[1] > 1


def test_normalisation_by_the_mean_makes_layers_alike() -> None:
    scores = [np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 20.0, 30.0, 40.0])]
    assert kept(mlp([4, 4]), scores=scores, scope="global", normalize="mean") == [2, 2]


@pytest.mark.parametrize("how", ["none", "mean", "max", "z-score"])
def test_every_normalisation_spends_the_same_budget(how: str) -> None:
    decisions = decide(mlp([6, 12, 6]), scope="global", normalize=how)
    removed = sum((d.structure.size - d.keep) * d.structure.cost for d in decisions)
    total = sum(d.structure.size * d.structure.cost for d in decisions)
    assert removed == pytest.approx(total / 2, rel=0.15)


def test_protected_layers_stay() -> None:
    decisions = decide(mlp([4, 4, 4]), protect_first=1, protect_last=1)
    assert [d.keep for d in decisions] == [4, 2, 4]
    assert decisions[0].reason == "protected"


def test_include_and_exclude_by_glob() -> None:
    source = mlp([4, 4])
    names = [structure.id for structure in structures(source)]
    assert kept(source, target_layers=(names[0],)) == [2, 4]
    assert kept(source, exclude_layers=(names[0],)) == [4, 2]


# --- scores


@pytest.mark.parametrize("p", [1, 2])
def test_a_score_is_the_norm_of_all_slices(p: int) -> None:
    source = mlp([5])
    (structure,) = structures(source)
    first, last = (source.graph.initializers[name].const_value.numpy() for name in ("w0", "w_last"))
    expected = (np.abs(first) ** p).sum(0) + (np.abs(last) ** p).sum(1)
    assert np.allclose(ScoreNorm(p)([structure])[structure], expected ** (1 / p))


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (2, 0), (1, 0)])
def test_sums_over_all_other_axes(axes: tuple[int, ...]) -> None:
    import onnx_ir as ir

    array = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    others = tuple(axis for axis in range(3) if axis not in axes)
    expected = np.square(array).sum(others)
    expected = expected if tuple(sorted(axes)) == axes else expected.T
    assert np.allclose(sum_powers(ir.tensor(array), axes, 2), expected)


def test_random_scores_depend_on_the_seed_alone() -> None:
    found = structures(mlp([6, 7]))
    one, same, other = (ScoreRandom(seed)(found) for seed in (1, 1, 2))
    assert all(np.array_equal(one[s], same[s]) and not np.array_equal(one[s], other[s]) for s in found)


GROUPED = """
g (float[b,s,16] x) => (float[b,s,16] y)
<float[16,32] wq, float[16,16] wk, float[16,16] wv, float[32,16] wo,
 int64[4] split_q = {0,0,4,8}, int64[4] split_kv = {0,0,2,8}, int64[5] wide = {1,1,2,1,1}, int64[4] joined = {0,4,-1,8},
 int64[1] two = {2}, int64[3] flat = {0,0,32}>
{
  q0 = MatMul(x, wq) q1 = Reshape(q0, split_q) q = Transpose<perm=[0,2,1,3]>(q1)
  k0 = MatMul(x, wk) k1 = Reshape(k0, split_kv) k2 = Transpose<perm=[0,2,1,3]>(k1)
  k3 = Unsqueeze(k2, two) k4 = Expand(k3, wide) k = Reshape(k4, joined)
  v0 = MatMul(x, wv) v1 = Reshape(v0, split_kv) v2 = Transpose<perm=[0,2,1,3]>(v1)
  v3 = Unsqueeze(v2, two) v4 = Expand(v3, wide) v = Reshape(v4, joined)
  kt = Transpose<perm=[0,1,3,2]>(k) s0 = MatMul(q, kt) p = Softmax<axis=-1>(s0)
  o0 = MatMul(p, v) o1 = Transpose<perm=[0,2,1,3]>(o0) o2 = Reshape(o1, flat)
  y = MatMul(o2, wo)
}
"""


def test_heads_are_scored_and_chosen_in_each_group() -> None:
    source = model(GROUPED)
    (structure,) = [s for s in structures(source) if s.kind == "query-head"]
    assert (structure.size, structure.groups) == (2, 2)
    wq, wo = (source.graph.initializers[name].const_value.numpy() for name in ("wq", "wo"))
    heads = np.square(wq).sum(0).reshape(4, 8).sum(1) + np.square(wo).sum(1).reshape(4, 8).sum(1)
    scores = ScoreNorm()([structure])[structure]
    assert np.allclose(scores, np.sqrt(heads.reshape(2, 2)))
    selection, _ = choose([structure], {structure: scores}, {"query-head": 0.5}, PruningOptions())
    best = selection.kept[structure.atom].argmax(axis=1)
    assert best.tolist() == scores.argmax(axis=1).tolist()


@pytest.mark.parametrize("axes", [(0, 1), (1, 0)])
@pytest.mark.parametrize("block", [0, 3])
def test_quantized_weights_are_scored_by_the_numbers_they_stand_for(
    axes: tuple[int, int], block: int
) -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 12), "b": (12, 4)}
    weights, plain, declared, lines = {}, {}, [], []
    for (name, shape), axis in zip(shapes.items(), axes, strict=True):
        count = shape[axis]
        blocks = [-(-n // block) if i == axis else n for i, n in enumerate(shape)] if block else [count]
        scale = (rng.random(blocks) + 0.01).astype(np.float32) ** 3
        zero = rng.integers(-9, 9, blocks).astype(np.int8)
        stored = rng.integers(-99, 99, shape).astype(np.int8)
        form = ",".join(str(n) for n in blocks)
        declared.append(
            f"int8[{shape[0]},{shape[1]}] {name}_q, float[{form}] {name}_s, int8[{form}] {name}_z"
        )
        size = f", block_size={block}" if block else ""
        lines.append(f"{name} = DequantizeLinear<axis={axis}{size}>({name}_q, {name}_s, {name}_z)")
        weights |= {f"{name}_q": stored, f"{name}_s": scale, f"{name}_z": zero}
        full = [
            np.repeat(a, block, axis=axis).take(range(count), axis=axis)
            if block
            else a.reshape([-1 if i == axis else 1 for i in range(2)])
            for a in (scale, zero.astype(np.float32))
        ]
        plain[name] = (stored.astype(np.float32) - full[1]) * full[0]
    text = f"g (float[n,4] x) => (float[n,4] y) <{', '.join(declared)}> {{ {' '.join(lines)} h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }}"
    (quantized,) = (s for s in structures(model(text, opset=21, weights=weights)) if s.size == 12)
    expected = np.sqrt(np.square(plain["a"]).sum(axis=0) + np.square(plain["b"]).sum(axis=1))
    assert np.allclose(ScoreNorm(2)([quantized])[quantized], expected, rtol=1e-4)
