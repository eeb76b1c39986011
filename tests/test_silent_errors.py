"""Results that would be wrong and look right: each of these passed a weaker proof or a weaker rule once."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_prunes, model, prove, prune, structures, the

from onnx_autoglm.runtime import Session, compare

MLP = "h = MatMul(x, a) r = Relu(h) z = MatMul(r, b)"
WEIGHTS = "float[8,32] a, float[32,8] b"


def test_a_constant_that_fills_an_output_hides_no_error() -> None:
    """Masked vocabulary rows hold the lowest float; the error of the other columns counts all the same."""
    text = f"g (float[n,8] x) => (float[n,8] y) <{WEIGHTS}, bool[8] pad, float low> {{ {MLP} y = Where(pad, low, z) }}"
    weights = {"pad": np.arange(8) >= 6, "low": np.float32(np.finfo(np.float32).min)}
    source = model(text, weights=weights)  # type: ignore[arg-type]
    cut = prune(source, {"ffn-channel": 0.5})
    assert prove(source, cut, tolerance=1e-5).holds
    weight = cut.model.graph.initializers["b"]
    broken = weight.const_value.numpy().copy()  # type: ignore[union-attr]
    broken[0] *= 1.5
    import onnx_ir as ir

    weight.const_value = ir.tensor(broken, name="b")
    assert not prove(source, cut, tolerance=1e-4).holds


def test_a_large_column_hides_no_error_in_a_small_one() -> None:
    rng = np.random.default_rng(0)
    source = rng.standard_normal((6, 4)) * [1e9, 1, 1, 1]
    masked = source * 0.5
    wrong = masked.copy()
    wrong[:, 2] += 0.3
    assert compare({"y": masked}, {"y": wrong}).relative < 1e-6
    assert compare({"y": masked}, {"y": wrong}, {"y": source}).relative > 0.1
    assert compare({"y": masked}, {"y": masked * (1 + 1e-7)}, {"y": source}).relative < 1e-6


@pytest.mark.parametrize(
    ("op", "extra"),
    [
        ("Softmax<axis=2>", ""),
        ("LogSoftmax<axis=2>", ""),
        ("Hardmax<axis=2>", ""),
        ("LpNormalization<axis=2>", ""),
        ("CumSum", ", two"),
    ],
)
def test_nothing_varies_along_an_axis_that_is_mixed(op: str, extra: str) -> None:
    text = f"""
    g (float[n,s,8] x) => (float[n,s,8] y)
    <{WEIGHTS}, int64[4] heads = {{0,0,4,8}}, int64[3] flat = {{0,0,32}}, int64 two = {{2}}>
    {{ h = MatMul(x, a) p = Reshape(h, heads) q = {op}(p{extra}) r = Mul(p, q) f = Reshape(r, flat) y = MatMul(f, b) }}
    """
    source = model(text)
    inner = [s for s in structures(source) if s.size == 8 and not s.interface]
    assert inner and all(not structure.outers for structure in inner)
    free = {structure.id: 0.5 for structure in inner if not structure.pins}
    if free:
        assert_prunes(source, free)


def run_at(source, cut, feeds) -> float:
    """The pruned model against the masked source, on inputs that the proof did not choose."""
    from helpers import replayed

    from onnx_autoglm.passes.mask import mask

    plan = replayed(cut.plan({}))
    masked = mask(source.clone(), plan.removals, plan.lossy)
    return compare(Session(masked).run(feeds), Session(cut.model).run(feeds)).relative


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_a_window_of_a_short_sequence_is_short(length: int) -> None:
    text = f"""
    g (float[n,s,8] x) => (float[m,t,8] y)
    <{WEIGHTS}, int64[1] from = {{-4}}, int64[1] to = {{9223372036854775807}}, int64[1] one = {{1}},
     int64[1] i1 = {{1}}, int64[1] i2 = {{2}}, int64[1] rest = {{-1}}>
    {{ h = MatMul(x, a) w = Slice(h, from, to, one) s = Shape(w) n1 = Gather(s, i1) n2 = Gather(s, i2)
       k = Mul(n1, n2) t = Concat<axis=0>(rest, k) f = Reshape(w, t) back = Concat<axis=0>(rest, n1, n2)
       u = Reshape(f, back) y = MatMul(u, b) }}
    """
    source = model(text)
    structure = next(s for s in structures(source) if s.size == 32)
    if structure.pins:
        assert all(str(pin) for pin in structure.pins)
        return
    cut = prune(source, {structure.id: 0.5})
    feeds = {"x": np.random.default_rng(0).standard_normal((2, length, 8)).astype(np.float32)}
    assert run_at(source, cut, feeds) < 1e-5


def test_a_window_of_a_symbolic_axis_has_no_known_size() -> None:
    from onnx_autoglm.cut import analyse

    for bounds in ("{-4}, int64[1] to = {9223372036854775807}", "{0}, int64[1] to = {5}"):
        text = (
            f"g (float[n,s,8] x) => (float[n,t,8] y) <int64[1] from = {bounds}, int64[1] one = {{1}}> "
            "{ y = Slice(x, from, to, one) }"
        )
        found = analyse(model(text)).analysis
        (output,) = found.graph.outputs
        assert not [atom for atom in (found.values[output] or [])[1] if isinstance(atom.size, int)]


def test_a_declared_size_behind_an_unknown_op_is_not_trusted() -> None:
    """Sizes of the traced sample are not those of every run."""
    text = f"""
    g (float[n,s,8] x) => (float[n,s,8] y) <{WEIGHTS}, float[2,7,8] v>
    {{ v = Mystery(x) h = MatMul(v, a) r = Relu(h) y = MatMul(r, b) }}
    """.replace("Mystery", "test.Mystery").replace(", float[2,7,8] v>", ", float[2,7,8] v>")
    from onnx_autoglm.cut import analyse

    found = analyse(model(text)).analysis
    value = next(v for v in found.values if v.name == "v")
    sizes = [atom.size for dim in found.values[value] or [] for atom in dim]
    assert not [size for size in sizes if isinstance(size, int)]


def test_an_image_that_is_joined_to_its_features_is_no_cache() -> None:
    text = (
        "g (float[n,4,8,8] x) => (float[n,20,8,8] y) <float[16,4,1,1] w> "
        "{ h = Conv(x, w) r = Relu(h) y = Concat<axis=1>(x, r) }"
    )
    found = structures(model(text))
    assert found and all(structure.pins for structure in found)


def test_a_learned_prefix_makes_no_cache_of_an_input() -> None:
    text = (
        (
            f"g (float[n,s,8] x) => (float[n,t,8] y) <{WEIGHTS}, float[1,4,8] prefix, int64[3] wide = {{1,1,1}}> "
            f"{{ {MLP} u = Add(x, z) y = Concat<axis=1>(prefix, u) }}"
        )
        .replace("float[n,s,8] x", "float[1,s,8] x")
        .replace("float[n,t,8] y", "float[1,t,8] y")
    )
    features = [s for s in structures(model(text)) if s.size == 8]
    assert features and all(structure.pins for structure in features)


def test_the_proof_uses_several_sizes_and_holes_in_masks() -> None:
    text = f"""
    g (float[n,s,8] x, int64[n,s] mask) => (float[n,s,8] y) <{WEIGHTS}, int64[1] last = {{-1}}>
    {{ {MLP} keep = Cast<to=9>(mask) k = Unsqueeze(keep, last) c = Cast<to=1>(k) y = Mul(z, c) }}
    """
    source = model(text)
    the(source, "ffn-channel")
    proof = prove(source, prune(source, {"ffn-channel": 0.5}), tolerance=1e-5)
    assert proof.holds and len({tuple(shapes["x"]) for shapes in proof.inputs}) == 3
    assert {shapes["x"][1] for shapes in proof.inputs} >= {2, 7}
