"""The passes that make a graph ready for an engine: before, after, the same numbers, and what is left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model

from onnx_autoglm.engine_prepare import prepare
from onnx_autoglm.passes.drop_casts import drop_casts, holds
from onnx_autoglm.passes.expand_rotary import expand_rotary
from onnx_autoglm.passes.fold_shapes import fold_shapes
from onnx_autoglm.passes.remove_nan_guard import remove_nan_guard
from onnx_autoglm.passes.split_sequences import split_sequences
from onnx_autoglm.runtime import Session

Arrays = dict[str, np.ndarray]


def run(source: ir.Model, feeds: Arrays) -> Arrays:
    return Session(source).run(feeds)


def ops(source: ir.Model) -> list[str]:
    return [node.op_type for node in source.graph]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_same(before: ir.Model, after: ir.Model, feeds: Arrays) -> None:
    """Exactly the same numbers."""
    expected, actual = run(before, feeds), run(after, feeds)
    assert all(np.abs(array).max() > 0 for array in expected.values())
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array)


# --- folding


def test_fixed_sizes_and_what_follows_become_constants() -> None:
    source = model(
        """
        g (float[b,s,12] x) => (float[b,s,4,3] y) <int64[1] three, int64[1] minus, int64[1] two>
        {
          size = Shape(x) last = Gather<axis=0>(size, two) heads = Div(last, three)
          lead = Shape<start=0, end=2>(x) shape = Concat<axis=0>(lead, heads, minus)
          y = Reshape(x, shape)
        }
        """,
        weights={"three": np.array([3]), "minus": np.array([-1]), "two": np.array([2])},
    )
    after = source.clone()
    assert fold_shapes(after) == 3  # Shape, Gather and Div; the batch and the sequence are not fixed
    assert ops(after) == ["Shape", "Concat", "Reshape"]
    assert_same(source, after, {"x": noise(2, 5, 12)})
    assert fold_shapes(after) == 0


def test_sizes_that_are_not_fixed_stay() -> None:
    source = model(
        "g (float[b,s,12] x) => (int64[1] y) <int64[1] one> { size = Shape(x) y = Gather<axis=0>(size, one) }",
        weights={"one": np.array([1])},
    )
    assert fold_shapes(source) == 0
    assert run(source, {"x": noise(2, 5, 12)})["y"] == [5]


def test_quantized_weights_stay_quantized() -> None:
    source = model(
        """
        g (float[b,4] x) => (float[b,4] y) <int8[4,4] w, float scale>
        { d = DequantizeLinear(w, scale) y = MatMul(x, d) }
        """,
        weights={"w": np.arange(16, dtype=np.int8).reshape(4, 4), "scale": np.array(0.5, np.float32)},
    )
    assert fold_shapes(source) == 0
    assert ops(source) == ["DequantizeLinear", "MatMul"]


def test_a_constant_that_is_an_output_stays_an_output() -> None:
    source = model(
        "g (float[b,4] x) => (float[b,4] y, int64[1] n) <int64[1] one> { y = Relu(x) n = Add(one, one) }",
        weights={"one": np.array([1])},
    )
    fold_shapes(source)
    assert run(source, {"x": noise(2, 4)})["n"] == [2]


# --- casts


def test_casts_that_cancel_go() -> None:
    source = model(
        """
        g (float16[b,4] x, int64[b] i) => (float16[b,4] y, int64[b] j)
        {
          wide = Cast<to=1>(x) back = Cast<to=10>(wide) same = Cast<to=10>(back) y = Relu(same)
          narrow = Cast<to=6>(i) again = Cast<to=7>(narrow) j = Neg(again)
        }
        """
    )
    after = source.clone()
    assert drop_casts(after) == 3
    assert ops(after) == ["Relu", "Cast", "Cast", "Neg"]  # int64 to int32 and back may lose, so it stays
    assert_same(source, after, {"x": noise(2, 4).astype(np.float16), "i": np.array([3, -5])})
    assert drop_casts(after) == 0


def test_a_cast_that_others_read_stays() -> None:
    source = model(
        """
        g (float16[b,4] x) => (float16[b,4] y, float[b,4] z)
        { wide = Cast<to=1>(x) back = Cast<to=10>(wide) y = Relu(back) z = Neg(wide) }
        """
    )
    after = source.clone()
    assert drop_casts(after) == 1
    assert sorted(ops(after)) == ["Cast", "Neg", "Relu"]
    assert_same(source, after, {"x": noise(2, 4).astype(np.float16)})


@pytest.mark.parametrize(
    ("wide", "own", "fits"),
    [
        ("FLOAT", "FLOAT16", True),
        ("FLOAT", "BFLOAT16", True),
        ("FLOAT16", "BFLOAT16", False),
        ("FLOAT16", "FLOAT", False),
        ("INT64", "INT32", True),
        ("INT32", "UINT8", True),
        ("UINT64", "INT32", False),
        ("INT32", "UINT32", False),
        ("FLOAT", "INT64", False),
        ("INT64", "FLOAT", False),
        ("FLOAT", "BOOL", True),
    ],
)
def test_what_holds_what(wide: str, own: str, fits: bool) -> None:
    assert holds(ir.DataType[wide], ir.DataType[own]) is fits


# --- NaN guards

GUARDED = """
g (float[b,4,8] q, float[b,8,s] k, bool[b,4,s] attend, float[b,s,8] v) => (float[b,4,8] y)
<float zero, float low, float scale>
{{
  mask = Where(attend, zero, low) raw = MatMul(q, k) scores = Mul(raw, scale)
  {masked}
  p = Softmax<axis=-1>(masked) bad = IsNaN(p) safe = Where(bad, zero, p) y = MatMul(safe, v)
}}
"""
CONSTANTS = {"zero": np.float32(0), "low": np.float32(-np.inf), "scale": np.float32(0.35)}


def guarded(masked: str = "masked = Add(scores, mask)", **constants: np.float32) -> ir.Model:
    weights = {name: np.array(value) for name, value in {**CONSTANTS, **constants}.items()}
    return model(GUARDED.format(masked=masked), weights=weights)


def attention_feeds(attend: np.ndarray) -> Arrays:
    return {"q": noise(2, 4, 8), "k": noise(2, 8, 6, seed=1), "v": noise(2, 6, 8, seed=2), "attend": attend}


@pytest.mark.parametrize("masked", ["masked = Add(scores, mask)", "masked = Where(attend, scores, low)"])
def test_a_guard_goes_and_rows_that_attend_keep_their_numbers(masked: str) -> None:
    source = guarded(masked)
    after = source.clone()
    assert remove_nan_guard(after).removed == 1
    assert "IsNaN" not in ops(after) and ops(after).count("Where") == 1
    attend = np.random.default_rng(3).random((2, 4, 6)) < 0.5
    attend[:, :, 0] = True
    attend[0, 1] = False  # this row attends to nothing
    before, now = (run(each, attention_feeds(attend))["y"] for each in (source, after))
    rows = attend.any(axis=-1)
    np.testing.assert_array_equal(now[rows], before[rows])
    assert (before[0, 1] == 0).all() and np.isfinite(now).all()


def test_a_guard_in_half_precision_stays_finite() -> None:
    """The sum of a low score and the mask must not overflow to minus infinity again."""
    text = GUARDED.format(masked="masked = Add(scores, mask)").replace("float", "float16")
    source = model(text, weights={name: np.array(value, np.float16) for name, value in CONSTANTS.items()})
    half = np.float16
    feeds = {
        "q": np.full((2, 4, 8), 10, half),
        "k": np.full((2, 8, 6), -10, half),
        "v": np.ones((2, 6, 8), half),
    }
    feeds["attend"] = np.zeros((2, 4, 6), bool)
    assert remove_nan_guard(source).removed == 1
    assert np.isfinite(run(source, feeds)["y"]).all()


def test_a_finite_mask_is_left_as_it_is() -> None:
    source = guarded(low=np.float32(-1e9))
    after = source.clone()
    assert remove_nan_guard(after).removed == 1
    assert_same(source, after, attention_feeds(np.zeros((2, 4, 6), bool)))


@pytest.mark.parametrize(
    "masked",
    [
        "other = Log(scores) masked = Add(other, mask)",
        "masked = Add(scores, scores)",
        "more = Where(attend, zero, low) sum = Add(scores, more) masked = Add(sum, mask)",
    ],
)
def test_a_guard_stays_where_something_else_may_be_infinite(masked: str) -> None:
    source = guarded(masked)
    before = ops(source)
    guards = remove_nan_guard(source)
    assert guards.removed == 0 and "does not read a product" in guards.kept[0]
    assert ops(source) == before


def test_a_guard_stays_where_the_mask_is_read_elsewhere() -> None:
    text = GUARDED.format(masked="top = ReduceMin(mask) masked = Add(scores, mask)")
    source = model(
        text.replace("=> (float[b,4,8] y)", "=> (float[b,4,8] y, float[1,1,1] top)"),
        weights={name: np.array(value) for name, value in CONSTANTS.items()},
    )
    guards = remove_nan_guard(source)
    assert guards.removed == 0 and "read elsewhere" in guards.kept[0]


def test_what_is_no_guard_stays() -> None:
    source = guarded(zero=np.float32(1))  # NaN becomes one
    guards = remove_nan_guard(source)
    assert (guards.removed, guards.kept) == (0, ())
    assert "IsNaN" in ops(source)


# --- rotary tables


def rotary(batch: str) -> ir.Model:
    return model(
        f"""
        g (float[{batch},2,3,8] x, float[1,3,4] cos, float[1,3,4] sin) => (float[{batch},2,3,8] y)
        {{ y = RotaryEmbedding(x, cos, sin) }}
        """,
        opset=23,
    )


def test_tables_get_the_batch_of_what_they_rotate() -> None:
    source = rotary("b")
    after = source.clone()
    assert expand_rotary(after) == 2
    assert ops(after).count("Expand") == 2
    one = {"x": noise(1, 2, 3, 8), "cos": noise(1, 3, 4, seed=1), "sin": noise(1, 3, 4, seed=2)}
    assert_same(source, after, one)
    # Beyond batch 1 each row is what it is alone.
    rows = noise(3, 2, 3, 8, seed=4)
    together = run(after, {**one, "x": rows})["y"]
    alone = [run(source, {**one, "x": row[None]})["y"][0] for row in rows]
    np.testing.assert_array_equal(together, np.stack(alone))
    assert expand_rotary(after) == 0


def test_tables_of_batch_one_stay() -> None:
    source = rotary("1")
    assert expand_rotary(source) == 0
    assert ops(source) == ["RotaryEmbedding"]


# --- sequences


def sequences(index: str = "at", split: str = "size", axis: int = 1, width: int = 8) -> ir.Model:
    return model(
        f"""
        g (float[b,{width}] x, int64 free) => (float[b,n] y) <int64[2] sizes>
        {{
          size = Constant<value_int=4>() at = Constant<value_int=0>() last = Constant<value_int=-1>()
          parts = SplitToSequence<axis={axis}>(x, {split})
          first = SequenceAt(parts, {index}) second = SequenceAt(parts, last) n = Neg(second)
          y = Concat<axis=1>(first, n)
        }}
        """,
        weights={"sizes": np.array([2, 5])},
    )


@pytest.mark.parametrize(("split", "width"), [("size", 8), ("sizes", 7)])
def test_sequences_become_splits(split: str, width: int) -> None:
    source = sequences(split=split, width=width)
    after = source.clone()
    assert split_sequences(after) == 1
    assert ops(after) == ["Split", "Neg", "Concat"]
    assert_same(source, after, {"x": noise(2, width), "free": np.array(0)})


def test_parts_that_do_not_divide_the_axis() -> None:
    source = sequences(width=7)
    assert split_sequences(source) == 1
    y = run(source, {"x": noise(2, 7), "free": np.array(0)})["y"]
    np.testing.assert_array_equal(y, np.concatenate([noise(2, 7)[:, :4], -noise(2, 7)[:, 4:]], axis=1))


@pytest.mark.parametrize("settings", [{"index": "free"}, {"axis": 0}])
def test_sequences_that_are_not_fixed_stay(settings: dict[str, object]) -> None:
    source = sequences(**settings)  # type: ignore[arg-type]
    assert split_sequences(source) == 0
    assert "SplitToSequence" in ops(source)


# --- all of them


def test_preparing_twice_changes_nothing_more() -> None:
    source = guarded()
    assert prepare(source).guards == 1
    before = ops(source)
    again = prepare(source)
    assert (again.folded, again.casts, again.guards, again.sequences, again.rotary_tables) == (0, 0, 0, 0, 0)
    assert ops(source) == before
