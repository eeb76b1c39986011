"""Sessions over weights that stay on disk, graphs in float32, and the comparison of two runs."""

import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_autoglm.errors import UserError
from onnx_autoglm.lean import delay_weight_work
from onnx_autoglm.runtime import Session, compare
from onnx_autoglm.upcast import needs_upcast, upcast

X = np.linspace(-1, 1, 2 * 64, dtype=np.float32).reshape(2, 64)


def model_of(text: str, **weights: np.ndarray | ir.TensorProtocol) -> ir.Model:
    """The textual graph with initializers; a weight may be an array or a tensor."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n{text}')
    for name, weight in weights.items():
        tensor = ir.tensor(weight, name=name) if isinstance(weight, np.ndarray) else weight
        value = next(v for node in model.graph.all_nodes() for v in node.inputs if v and v.name == name)
        value.const_value, value.type = tensor, ir.TensorType(tensor.dtype)
        value.shape = ir.Shape(tensor.shape.numpy())
        model.graph.register_initializer(value)
    return model


def external(folder: Path, name: str, array: np.ndarray, padding: int = 0) -> ir.ExternalTensor:
    """The array in a file of its own, after some bytes of padding."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.bin").write_bytes(b"\1" * padding + array.tobytes())
    dtype = ir.DataType.from_numpy(array.dtype)
    shape = ir.Shape(array.shape)
    return ir.ExternalTensor(
        f"{name}.bin", padding, array.nbytes, dtype, shape=shape, name=name, base_dir=folder
    )


def weight(rows: int = 64, columns: int = 64, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((rows, columns)).astype(dtype)


def rss_anon() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


TWO_LAYERS = "g (float[b, 64] x) => (float[b, 64] y) { h = MatMul(x, w1)  y = MatMul(h, w2) }"


@pytest.mark.parametrize("optimize", [False, True])
def test_weights_in_several_folders_behind_links_at_odd_offsets_and_in_memory(
    tmp_path: Path, optimize: bool
) -> None:
    a, b = weight(), weight().T.copy()
    first = external(tmp_path / "one", "w1", a, padding=3)
    (tmp_path / "two").mkdir()
    os.symlink(tmp_path / "one" / "w1.bin", tmp_path / "two" / "link.bin")
    linked = ir.ExternalTensor(
        "link.bin", 3, a.nbytes, first.dtype, shape=first.shape, name="w1", base_dir=tmp_path / "two"
    )
    lazy = ir.LazyTensor(lambda: ir.tensor(b), ir.DataType.FLOAT, ir.Shape(b.shape), name="w2")
    model = model_of(TWO_LAYERS, w1=linked, w2=lazy)

    result = Session(model, optimize=optimize, scratch=tmp_path / "two").run({"x": X})

    assert list(result) == ["y"]
    np.testing.assert_allclose(result["y"], X @ a @ b, rtol=1e-4, atol=1e-4)


def test_session_leaves_model_and_disk_alone(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    tensor = external(tmp_path / "weights", "w1", weight())
    model = model_of(TWO_LAYERS, w1=tensor, w2=weight())
    before = ir.to_onnx_text(model)

    session = Session(model, scratch=tmp_path / "scratch")

    assert list((tmp_path / "scratch").iterdir()) == []
    assert ir.to_onnx_text(model) == before
    assert model.graph.initializers["w1"].const_value is tensor
    assert session.run({"x": X}, ["y"])["y"].shape == (2, 64)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_masked_weights_live_one_at_a_time(tmp_path: Path) -> None:
    layers, side = 24, 1024
    nodes = "".join(f"m{i} = Mul(w{i}, mask) h{i + 1} = MatMul(h{i}, m{i}) " for i in range(layers))
    text = f"g (float[b, {side}] h0) => (float[b, {side}] h{layers}) {{ {nodes} }}"
    tensors = {f"w{i}": external(tmp_path, f"w{i}", weight(side, side) / 32) for i in range(layers)}
    model = model_of(text, **tensors, mask=np.ones((1, side), np.float32))
    # The masks first: the order in which each product would be kept until its layer comes.
    nodes_in_order = sorted(model.graph, key=lambda node: node.op_type != "Mul")
    model.graph.remove(nodes_in_order)
    model.graph.extend(nodes_in_order)
    feeds = {"h0": np.ones((1, side), np.float32)}
    session = Session(model, threads=1)
    peak, before = 0, rss_anon()

    import threading

    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, rss_anon() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    session.run(feeds)
    done.set()
    watcher.join()

    assert peak < layers * side * side * 4 / 2  # all 24 at once would be 96 MiB


def test_bodies_and_constant_nodes_keep_their_weights(tmp_path: Path) -> None:
    text = """g (float[b, 64] x, bool flag) => (float[b, 64] y) {
        doubled = Mul(w1, two)
        y = If(flag) <then_branch = t () => (float[b, 64] p) { p = MatMul(x, doubled) },
                      else_branch = e () => (float[b, 64] q) { q = MatMul(x, w1) }>
    }"""
    a = weight()
    model = model_of(text, w1=external(tmp_path, "w1", a), two=np.array(2, np.float32))
    constant = ir.node("Constant", [], {"value": external(tmp_path, "c", a)})
    model.graph.insert_before(model.graph[0], constant)
    constant.outputs[0].name = "c"
    added = ir.node("MatMul", [model.graph.inputs[0], constant.outputs[0]])
    added.outputs[0].name, added.outputs[0].type = "z", ir.TensorType(ir.DataType.FLOAT)
    added.outputs[0].shape = ir.Shape(["b", 64])
    model.graph.append(added)
    model.graph.outputs.append(added.outputs[0])
    delay_weight_work(model.graph)
    assert [node.op_type for node in model.graph] == ["Mul", "If", "Constant", "MatMul"]
    session = Session(model)

    for flag, factor in ((True, 2), (False, 1)):
        result = session.run({"x": X, "flag": np.array(flag)})
        np.testing.assert_allclose(result["y"], factor * (X @ a), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(result["z"], X @ a, rtol=1e-4, atol=1e-4)


def test_packed_four_bit_weights_from_file(tmp_path: Path) -> None:
    values = (np.arange(128 * 128) % 16 - 8).reshape(128, 128)
    packed = (values.reshape(-1, 2)[:, 0] & 15 | (values.reshape(-1, 2)[:, 1] & 15) << 4).astype(np.uint8)
    (tmp_path / "w.bin").write_bytes(packed.tobytes())
    tensor = ir.ExternalTensor(
        "w.bin", 0, packed.nbytes, ir.DataType.INT4, shape=ir.Shape([128, 128]), name="w", base_dir=tmp_path
    )
    text = "g (float[128] x) => (float[128, 128] y) { d = DequantizeLinear(w, s) y = Add(d, x) }"
    model = model_of(text, w=tensor, s=np.array(1, np.float32))

    assert (Session(model).run({"x": np.zeros(128, np.float32)})["y"] == values).all()


def test_bfloat16_goes_in_and_comes_out() -> None:
    model = model_of("g (bfloat16[n] x) => (bfloat16[n] y) { y = Identity(x) }")
    x = np.array([1.5, -2, 3], ml_dtypes.bfloat16)
    y = Session(model).run({"x": x})["y"]
    assert y.dtype == x.dtype and (y == x).all()


def test_refusals_are_short() -> None:
    with pytest.raises(UserError, match="ONNX Runtime cannot load the model: .*NoSuchOp") as info:
        Session(model_of("g (float[n] x) => (float[n] y) { y = NoSuchOp(x) }"))
    assert "\n" not in str(info.value) and "[ONNXRuntimeError]" not in str(info.value)

    session = Session(model_of(TWO_LAYERS, w1=weight(), w2=weight()))
    with pytest.raises(UserError, match="ONNX Runtime cannot run the model: .*Got: 3 Expected: 64"):
        session.run({"x": np.ones((2, 3), np.float32)})


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    tensor = external(tmp_path, "w1", weight())
    (tmp_path / "w1.bin").unlink()
    with pytest.raises(UserError, match="cannot load the model: .*w1"):
        Session(model_of(TWO_LAYERS, w1=tensor, w2=weight()))


def test_scratch_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_autoglm.runtime._write", full)
    with pytest.raises(UserError, match="No space left on device.*TMPDIR"):
        Session(model_of(TWO_LAYERS, w1=weight(), w2=weight()), scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


UPCAST = """g (HALF[b, 64] x, int64[1] n) => (HALF[b, 64] y, HALF[k] filled) {
    single = Cast <to = 1> (x)
    half = Cast <to = CODE> (single)
    h = MatMul(half, w)
    clamped = Clip(h, low)
    c = Constant()
    y = Mul(clamped, c)
    filled = ConstantOfShape(n)
}"""


@pytest.mark.parametrize(("half", "dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
@pytest.mark.parametrize("optimize", [False, True])
def test_upcast(tmp_path: Path, half: str, dtype: type, optimize: bool) -> None:
    w = weight(dtype=dtype)
    text = UPCAST.replace("HALF", half).replace("CODE", {"float16": "10", "bfloat16": "16"}[half])
    low: np.ndarray = np.array(-65504, dtype)
    source = model_of(text, w=external(tmp_path, "w", w), low=low)
    for op_type, number in (("Constant", 2), ("ConstantOfShape", 3)):
        node = next(node for node in source.graph if node.op_type == op_type)
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.array([number], dtype)))
    before = ir.to_onnx_text(source)

    result = upcast(source)

    assert ir.to_onnx_text(source) == before and needs_upcast(source)
    assert not needs_upcast(result)
    assert half not in ir.to_onnx_text(result)
    model = ir.to_proto(result)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, strict_mode=True), full_check=True)
    outputs = Session(result, optimize=optimize).run({"x": X, "n": np.array([4])})
    assert outputs["y"].dtype == np.float32
    np.testing.assert_allclose(outputs["y"], 2 * (X @ w.astype(np.float32)), rtol=1e-4, atol=1e-4)
    assert (outputs["filled"] == np.full(4, 3, np.float32)).all()
    clamp = result.graph.initializers["low"].const_value
    assert clamp is not None and clamp.numpy() == np.float32(low)


def test_upcast_weights_of_a_file_are_not_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight is written out")

    monkeypatch.setattr("onnx_autoglm.runtime._append", refuse)
    w = weight(dtype=np.float16)
    text = "g (float16[b, 64] x) => (float16[b, 64] y) { h = MatMul(x, w) y = MatMul(h, w) }"
    model = upcast(model_of(text, w=external(tmp_path, "w", w)))
    y = Session(model).run({"x": X})["y"]
    np.testing.assert_allclose(y, X @ w.astype(np.float32) @ w.astype(np.float32), rtol=1e-4, atol=1e-3)


def test_upcast_of_type_attributes_and_bodies() -> None:
    text = """g (float16[b, 64] x, bool flag) => (float16[b, 64] y) {
        s = Shape(x)
        r = RandomNormal <dtype = 10, shape = [1, 64]> ()
        e = EyeLike <dtype = 10> (x)
        q = If(flag) <then_branch = t () => (float16[b, 64] p) { p = Cast <to = 10> (e) },
                      else_branch = f () => (float16[b, 64] o) { o = Add(r, x) }>
        y = LayerNormalization <stash_type = 16> (q, gamma)
    }"""
    result = upcast(model_of(text, gamma=np.ones(64, np.float16)))
    assert "float16" not in ir.to_onnx_text(result)
    y = Session(result).run({"x": X, "flag": np.array(True)})["y"]
    assert y.dtype == np.float32 and y.shape == (2, 64)


def test_upcast_tensor_is_cast_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_autoglm.upcast.CHUNK_BYTES", 1000)
    w = weight(dtype=np.float16)
    model = upcast(
        model_of(
            "g (float16[b, 64] x) => (float16[b, 64] y) { y = MatMul(x, w) }", w=external(tmp_path, "w", w)
        )
    )
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    with open(tmp_path / "out", "wb") as file:
        tensor.tofile(file)
    assert (tmp_path / "out").read_bytes() == w.astype("<f4").tobytes() == tensor.tobytes()


def test_compare_takes_the_worst_output() -> None:
    expected = {"a": np.array([100.0, 1]), "b": np.array([1.0, -2]), "c": np.array([7])}
    actual = {"a": np.array([101.0, 1]), "b": np.array([1.0, -2.1]), "c": np.array([7])}
    found = compare(expected, actual)
    assert found.output == "b"
    assert found.relative == pytest.approx(0.05) and found.absolute == pytest.approx(0.1)
    assert found.within(0.06) and not found.within(0.04)
    assert compare(expected, expected).relative == 0


def test_compare_of_special_values() -> None:
    nan, inf = math.nan, math.inf
    same = {"y": np.array([1, nan, inf, -inf], np.float32)}
    assert compare(same, same).relative == 0 and compare(same, same).within(0)
    for other in ([1, nan, inf, inf], [1, 0, inf, -inf], [nan, nan, inf, -inf], [1, inf, inf, -inf]):
        found = compare(same, {"y": np.array(other, np.float32)})
        assert math.isinf(found.relative) and "'y'" in (found.reason or "")
    assert "missing" in (compare(same, {}).reason or "")
    assert "shape [3]" in (compare(same, {"y": np.ones(3)}).reason or "")


def test_compare_knows_when_it_proves_nothing() -> None:
    lost = {"y": np.full(3, np.nan), "z": np.array([np.inf])}
    assert compare(lost, lost).inconclusive == "the outputs hold no finite number"
    zero = {"y": np.zeros(3)}
    assert compare(zero, zero).inconclusive == "all outputs are zero"
    assert not compare(zero, zero).within(1)
    assert compare({**zero, "z": np.ones(1)}, {**zero, "z": np.ones(1)}).inconclusive is None
    assert math.isinf(compare(lost, {"y": np.ones(3), "z": np.ones(1)}).relative)
