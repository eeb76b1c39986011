"""Inputs generated from a graph's signature and the operators behind it, and inputs from a file."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_files import load_feeds
from onnx_autoglm.feeds import candidate_feeds, first_run, first_working, generate_feeds
from onnx_autoglm.runtime import Session


def graph(text: str, **constants: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n{text}')
    for node in list(model.graph.all_nodes()):
        for value in node.inputs:
            if value is not None and value.name in constants and value.name not in model.graph.initializers:
                tensor = ir.tensor(constants[value.name], name=value.name)
                value.const_value, value.type = tensor, ir.TensorType(tensor.dtype)
                value.shape = ir.Shape(tensor.shape.numpy())
                model.graph.register_initializer(value)
    return model


def shapes(model: ir.Model, **options: object) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in generate_feeds(model, **options).items()}  # type: ignore[arg-type]


def with_shapes(**inputs: list[int | str | None]) -> ir.Model:
    """A graph of float inputs and nothing else."""
    values = [
        ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.FLOAT))
        for name, dims in inputs.items()
    ]
    return ir.Model(ir.Graph(values, [], nodes=[], opset_imports={"": 21}, name="g"), ir_version=10)


def test_sizes_of_symbols() -> None:
    model = with_shapes(
        a=["n", "s", 16],
        b=["n", 2, "p", 8],
        c=["n", "p + s"],
        d=[4, "n*s"],
        e=["n", "odd name?"],
        f=["Max(1, p)"],
    )
    found = shapes(model)
    n, s, p = found["a"][0], found["a"][1], found["b"][2]
    assert n == 2 and len({n, s, p, found["e"][1]}) == 4
    assert found["a"][2] == 16
    assert found["c"] == (n, p + s) and found["d"] == (4, n * s) and found["f"] == (p,)
    assert shapes(model, batch=1, sizes={"s": 3})["c"] == (1, p + 3)


def test_unnamed_axis_zero_is_the_batch_and_other_unnamed_axes_differ() -> None:
    found = shapes(with_shapes(a=[None, None], b=[None, None, 8]))
    assert found["a"][0] == found["b"][0] == 2
    assert found["a"][1] != found["b"][1]


def test_nonsense_expression_still_has_a_size() -> None:
    assert min(shapes(with_shapes(a=["n", "n-seq"]))["a"]) > 0


def test_inputs_with_a_default_are_not_fed() -> None:
    model = with_shapes(a=[2], b=[2])
    default = model.graph.inputs[1]
    default.const_value = ir.tensor(np.ones(2, np.float32), name="b")
    model.graph.register_initializer(default)
    assert list(generate_feeds(model)) == ["a"]


def test_floats_are_noise_that_the_seed_repeats() -> None:
    model = graph(
        "g (float16[n, 99] a, bfloat16[n, 99] b, double[n, 99] c, bool[n] d) => (float16[n, 99] y) {}"
    )
    feeds = generate_feeds(model)
    assert feeds["a"].dtype == np.float16 and feeds["b"].dtype == ml_dtypes.bfloat16
    for name in "abc":
        assert 0.8 < feeds[name].astype(float).std() < 1.2
    assert feeds["d"].dtype == bool and feeds["d"].all()
    assert (generate_feeds(model)["c"] == feeds["c"]).all()
    assert (generate_feeds(model, seed=1)["c"] != feeds["c"]).any()


def test_an_index_stays_in_its_table() -> None:
    text = """g (int32[n, s] x) => (float[k, 4] y) {
        wide = Cast <to = 7> (x)
        moved = Add(wide, two)
        flat = Reshape(moved, minus_one)
        y = Gather(table, flat)
    }"""
    constants = {"two": np.array(2), "minus_one": np.array([-1])}
    model = graph(text, **constants, table=np.zeros((9, 4), np.float32))
    drawn = np.concatenate([generate_feeds(model, seed=seed)["x"] for seed in range(9)])
    assert drawn.dtype == np.int32 and drawn.min() == 0 and drawn.max() == 6
    axis_one = graph("g (int64[n, s] x) => (float[5, n, s] y) { y = Gather <axis = 1> (table, x) }")
    axis_one.graph[0].inputs[0].shape = ir.Shape([5, 300])  # type: ignore[union-attr]
    many = [generate_feeds(axis_one, seed=seed)["x"] for seed in range(9)]
    assert 200 < np.max(many) < 300


def test_negative_offset_raises_the_lower_bound() -> None:
    text = "g (int64[n, s] x) => (float[n, s, 4] y) { low = Sub(x, five) y = Gather(table, low) }"
    model = graph(text, five=np.array(5), table=np.zeros((9, 4), np.float32))
    drawn = np.concatenate([generate_feeds(model, seed=seed)["x"] for seed in range(9)])
    assert drawn.min() == 5 and drawn.max() < 14
    first_working(Session(model), [generate_feeds(model)])


def test_masks_are_ones_and_positions_count() -> None:
    text = """g (int64[n, s] cast, int64[n, s] summed, int64[n, s] inverted, int64[n, s] position, int64[m] other)
        => (bool[n, s] a, int64[n, 1] b, float[n, s] c, float[n, s, 8] d, int64[m] e, bool[n, s] i) {
        a = Cast <to = 9> (cast)
        b = ReduceSum(summed, minus_one)
        f = Cast <to = 1> (inverted)  c = Sub(one, f)
        g = Cast <to = 1> (position)  h = Unsqueeze(g, minus_one)  d = MatMul(h, frequencies)
        e = Neg(other)  i = Less(position, minus_one)
    }"""
    model = graph(
        text,
        minus_one=np.array([-1]),
        one=np.array(1, np.float32),
        frequencies=np.ones((1, 8), np.float32),
    )
    feeds = generate_feeds(model)
    for name in ("cast", "summed", "inverted"):
        assert (feeds[name] == 1).all(), name
    for name in ("position", "other"):
        assert (feeds[name] == 1 + np.arange(feeds[name].shape[-1])).all(), name
    first_working(Session(model), [feeds])


GQA = """g (float[b, s, 64] q, float[b, s, 32] k, float[b, s, 32] v, float[b, 2, p, 16] pk, float[b, 2, p, 16] pv,
           int32[b] lens, int32 total) => (float[b, s, 64] y, float[b, 2, t, 16] nk, float[b, 2, t, 16] nv) {
    y, nk, nv = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (q, k, v, pk, pv, lens, total)
}"""


def test_group_query_attention_gets_its_lengths() -> None:
    model = graph(GQA)
    feeds = generate_feeds(model)
    total = feeds["q"].shape[1] + feeds["pk"].shape[2]
    assert feeds["total"].shape == () and feeds["total"] == total
    assert (feeds["lens"] == total - 1).all() and feeds["lens"].dtype == np.int32
    # ONNX Runtime takes a past and several new tokens at batch 1 only.
    feeds, outputs = first_run(Session(model), candidate_feeds(model))
    assert feeds["q"].shape == (1, 7, 64) and outputs["nk"].shape[2] == total


HIDDEN_SUM = """g (int64[b, s] ids, int64[b, t] mask, float[b, p, 4] past) => (float[b, t, 4] y) {
    new = Gather(table, ids)
    all = Concat <axis = 1> (past, new)
    float_mask = Cast <to = 1> (mask)
    column = Unsqueeze(float_mask, minus_one)
    y = Mul(all, column)
}"""


def test_candidates_find_a_hidden_sum() -> None:
    model = graph(HIDDEN_SUM, table=np.ones((9, 4), np.float32), minus_one=np.array([-1]))
    session = Session(model)
    with pytest.raises(UserError):
        session.run(generate_feeds(model))
    feeds = first_working(session, list(candidate_feeds(model))[:2])
    s, t, p = feeds["ids"].shape[1], feeds["mask"].shape[1], feeds["past"].shape[1]
    assert t == s + p and s != p and feeds["ids"].shape[0] == 2


def test_candidates_find_a_hidden_sum_behind_many_cache_symbols() -> None:
    caches = ", ".join(f"float[b{i}, p{i}, 4] past{i}" for i in range(8))
    sums = "".join(f"a{i} = Concat <axis = 1> (past{i}, new) y{i} = Mul(a{i}, column) " for i in range(8))
    outputs = ", ".join(f"float[n, m, 4] y{i}" for i in range(8))
    text = f"""g (int64[b, s] ids, int64[b, t] mask, {caches}) => ({outputs}) {{
        new = Gather(table, ids)
        float_mask = Cast <to = 1> (mask)
        column = Unsqueeze(float_mask, minus_one)
        {sums}
    }}"""
    model = graph(text, table=np.ones((9, 4), np.float32), minus_one=np.array([-1]))
    feeds = first_working(Session(model), candidate_feeds(model))
    assert feeds["mask"].shape[1] == feeds["ids"].shape[1] + feeds["past7"].shape[1]


def test_candidates_find_equal_sizes_and_batch_one() -> None:
    equal = graph("g (float[n, a] x, float[m, b] y) => (float[n, a] z) { z = Add(x, y) }")
    feeds = first_working(Session(equal), candidate_feeds(equal))
    assert feeds["x"].shape == feeds["y"].shape and feeds["x"].shape[0] == 2
    single = graph("g (float[n, a] x) => (float[1, c] z) { z = Reshape(x, s) }", s=np.array([1, 7]))
    assert first_working(Session(single), candidate_feeds(single))["x"].shape == (1, 7)


def test_candidates_are_distinct_and_end() -> None:
    model = graph(HIDDEN_SUM, table=np.ones((9, 4), np.float32), minus_one=np.array([-1]))
    found = [tuple(array.shape for array in feeds.values()) for feeds in candidate_feeds(model)]
    assert 5 < len(found) == len(set(found)) < 60


def test_images_are_large_enough_for_convolutions() -> None:
    text = """g (float[n, 3, h, w] x, float[n, 2, p, 4] cache) => (float[n, 3, a, c] y, float[n, 2, p, 4] z) {
        shifted = Sub(x, mean)  y = Conv <kernel_shape = [3, 3]> (shifted, k)  z = Neg(cache)
    }"""
    model = graph(text, mean=np.array(0.5, np.float32), k=np.ones((3, 3, 3, 3), np.float32))
    found = shapes(model)
    assert found["x"] == (2, 3, 64, 64) and found["cache"][2] < 20
    assert (2, 3, 224, 224) in [feeds["x"].shape for feeds in candidate_feeds(model)]


def test_nothing_works() -> None:
    text = "g (float[n, a] x) => (float[c, d] z) { z = Reshape(x, target) }"
    model = graph(text, target=np.array([13, 17]))
    session = Session(model)
    with pytest.raises(UserError, match=r"(?s)pass sample inputs as an \.npz.*\{2,7\}") as info:
        first_working(session, candidate_feeds(model))
    assert len(str(info.value).splitlines()) <= 2


def test_input_without_rank_is_refused() -> None:
    model = with_shapes(a=[1])
    model.graph.inputs[0].shape = None
    with pytest.raises(UserError, match="'a' declares no shape.*npz"):
        generate_feeds(model)


def save(folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / "inputs.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


SIGNATURE = "g (int64[n, s] ids, float[n, 4] x, bfloat16[n] half) => (float[n, 4] y) {}"


def test_load_feeds(tmp_path: Path) -> None:
    half = np.array([1.5, -2], ml_dtypes.bfloat16)
    model = graph(SIGNATURE)
    given: dict[str, np.ndarray] = {"ids": np.ones((2, 3), np.int64), "x": np.zeros((2, 4), np.float32)}
    for stored in (half, half.view(np.uint16), half.astype(np.float32)):
        feeds = load_feeds(save(tmp_path, **given, half=stored), model)
        assert feeds.keys() == {"ids", "x", "half"}
        assert feeds["half"].dtype == ml_dtypes.bfloat16 and (feeds["half"] == half).all()
    generated = generate_feeds(model)
    again = load_feeds(save(tmp_path, **generated), model)
    assert all((again[name] == array).all() for name, array in generated.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "no array for input 'x'. The model needs: ids, x, half"),
        ({"more": np.ones(1)}, "an array 'more', which is no input. Remove it"),
        ({"ids": np.ones((2, 3), np.int32)}, r"'ids' is int32, the model wants int64: .*astype\('int64'\)"),
        ({"ids": np.ones(3, np.int64)}, r"'ids' has shape \[3\], the model wants \[n, s\]: reshape"),
        ({"x": np.ones((2, 5), np.float32)}, r"'x' has shape \[2, 5\], .* \[n, 4\]: axis 1 must be 4"),
        ({"half": np.ones(2)}, "'half' is float64, the model wants bfloat16"),
    ],
)
def test_load_feeds_that_do_not_fit(
    tmp_path: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    arrays: dict[str, np.ndarray | None] = {**generate_feeds(graph(SIGNATURE)), **change}
    kept = {name: array for name, array in arrays.items() if array is not None}
    path = save(tmp_path, **kept)
    with pytest.raises(UserError, match=message):
        load_feeds(path, graph(SIGNATURE))


def test_load_feeds_from_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_feeds(tmp_path / "none.npz", graph(SIGNATURE))
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(UserError, match=r"not a readable \.npz"):
        load_feeds(tmp_path / "text.npz", graph(SIGNATURE))
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(UserError, match="single array"):
        load_feeds(tmp_path / "one.npy", graph(SIGNATURE))
