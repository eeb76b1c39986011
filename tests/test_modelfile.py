"""Opening and saving model files."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_autoglm import modelfile
from onnx_autoglm.errors import UserError
from onnx_autoglm.mapped_tensor import MappedTensor
from onnx_autoglm.modelfile import (
    check_output_path,
    has_external_data,
    open_model,
    parameters,
    save_model,
    source_files,
    weight_bytes,
)
from onnx_autoglm.sliced_tensor import SlicedTensor

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((64, 48), dtype=np.float32)


def _proto(weights: dict[str, np.ndarray] | None = None, **options) -> onnx.ModelProto:
    """x @ w + b, and whatever else is asked for."""
    weights = weights or {"w": WEIGHT, "b": RNG.standard_normal(48, dtype=np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"], name="mm", doc_string="multiplies"),
        helper.make_node("Add", ["xw", "b"], ["y"], name="add"),
    ]
    graph = helper.make_graph(
        nodes + options.get("nodes", []),
        "the graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 48])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
        doc_string="a graph",
    )
    opsets = [helper.make_opsetid("", options.get("opset", 20)), helper.make_opsetid("my.domain", 3)]
    model = helper.make_model(
        graph,
        functions=options.get("functions", []),
        opset_imports=opsets,
        ir_version=10,
        producer_name="tester",
        doc_string="a model",
    )
    helper.set_model_props(model, {"author": "someone"})
    return model


@pytest.fixture
def inline(tmp_path) -> Path:
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(_proto().SerializeToString())
    return path


@pytest.fixture
def external(tmp_path) -> Path:
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    onnx.save(_proto(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def _weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def _without_weights(path: Path) -> onnx.ModelProto:
    model = onnx.load(path, load_external_data=False)
    del model.graph.initializer[:]
    del model.graph.value_info[:]  # onnx-ir adds those of the initializers
    return model


def _files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# --- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inline", "external"])
@pytest.mark.parametrize("to_external", [False, True])
def test_round_trip(request, kind, to_external, tmp_path):
    source = request.getfixturevalue(kind)
    before = _files(source.parent)
    out = tmp_path / "out" / "model.onnx"
    model = open_model(source)
    assert has_external_data(model) == (kind == "external")
    save_model(model, out, external=to_external)
    assert sorted(_files(out.parent)) == ["model.onnx", "model.onnx.data"][: 1 + to_external]
    assert _files(source.parent) == before
    onnx.checker.check_model(out, full_check=True)
    assert _without_weights(out) == _without_weights(source)
    for name, array in _weights(source).items():
        np.testing.assert_array_equal(_weights(out)[name], array, strict=True)
    # Saving leaves the opened model as it was.
    save_model(model, tmp_path / "again.onnx", external=to_external)
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), WEIGHT)


@pytest.mark.parametrize("kind", ["inline", "external"])
def test_weights_are_mapped_not_read(request, kind):
    source = request.getfixturevalue(kind)
    weight = open_model(source).graph.initializers["w"].const_value
    assert isinstance(weight, MappedTensor)
    assert weight.file.name == {"inline": "model.onnx", "external": "weights.bin"}[kind]
    assert not weight.numpy().flags.owndata and not weight.numpy().flags.writeable
    assert weight.tobytes() == WEIGHT.tobytes()
    np.testing.assert_array_equal(np.asarray(weight), WEIGHT)


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.float8_e4m3fn, np.bool_]
)
@pytest.mark.parametrize("to_external", [False, True])
def test_every_type_survives(tmp_path, dtype, to_external):
    extra = RNG.integers(-8, 8, size=(61, 67)).astype(dtype)
    source, out = tmp_path / "a.onnx", tmp_path / "b.onnx"
    model = ir.serde.deserialize_model(_proto())
    value = ir.Value(name="extra", const_value=ir.Tensor(extra, name="extra"))
    model.graph.register_initializer(value)
    save_model(model, source, external=to_external)
    save_model(open_model(source), out, external=not to_external)
    found = open_model(out).graph.initializers["extra"].const_value
    assert isinstance(found, MappedTensor)
    np.testing.assert_array_equal(found.numpy(), extra, strict=True)


def test_packed_float_data_is_mapped_and_other_typed_data_survives(tmp_path):
    proto = _proto()
    proto.graph.initializer[0].CopyFrom(
        helper.make_tensor("w", TensorProto.FLOAT, WEIGHT.shape, WEIGHT.ravel())
    )
    numbers = list(range(-1000, 1000))
    proto.graph.initializer.append(helper.make_tensor("n", TensorProto.INT64, [2000], numbers))
    proto.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [2], [b"a" * 2000, b"b"]))
    source, out = tmp_path / "a.onnx", tmp_path / "b.onnx"
    source.write_bytes(proto.SerializeToString())
    model = open_model(source)
    assert isinstance(model.graph.initializers["w"].const_value, MappedTensor)
    save_model(model, out)
    saved = _weights(out)
    np.testing.assert_array_equal(saved["w"], WEIGHT)
    assert saved["n"].tolist() == numbers and saved["s"].tolist() == ["a" * 2000, "b"]


def test_tensors_in_attributes_subgraphs_and_functions(tmp_path):
    big = numpy_helper.from_array(WEIGHT, "big")
    inner = helper.make_graph(
        [helper.make_node("Identity", ["deep"], ["out"])],
        "branch",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [64, 48])],
        [numpy_helper.from_array(WEIGHT + 1, "deep")],
    )
    condition = numpy_helper.from_array(np.array(True), "condition")
    nodes = [
        helper.make_node("Constant", [], ["k"], value=big),
        helper.make_node("Constant", [], ["c"], value=condition),
        helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner),
        helper.make_node("F", ["x"], ["f"], domain="my.domain"),
    ]
    body = [helper.make_node("Constant", [], ["o"], value=numpy_helper.from_array(WEIGHT + 2))]
    function = helper.make_function("my.domain", "F", ["i"], ["o"], body, [helper.make_opsetid("", 20)])
    source, out = tmp_path / "a.onnx", tmp_path / "b.onnx"
    source.write_bytes(_proto(nodes=nodes, functions=[function]).SerializeToString())
    model = open_model(source)
    constants = [node for node in model.graph if node.op_type == "Constant"]
    assert isinstance(constants[0].attributes["value"].as_tensor(), MappedTensor)
    save_model(model, out, external=True)
    onnx.checker.check_model(out)
    saved = onnx.load(out)
    attributes = [node.attribute[0] for node in saved.graph.node[2:5]]
    np.testing.assert_array_equal(numpy_helper.to_array(attributes[0].t), WEIGHT)
    branch = saved.graph.node[4].attribute[0].g
    np.testing.assert_array_equal(numpy_helper.to_array(branch.initializer[0]), WEIGHT + 1)
    np.testing.assert_array_equal(
        numpy_helper.to_array(saved.functions[0].node[0].attribute[0].t), WEIGHT + 2
    )


def test_a_pruned_tensor_is_saved(inline, tmp_path):
    model = open_model(inline)
    value = model.graph.initializers["w"]
    value.const_value = SlicedTensor(value.const_value, {0: np.arange(0, 64, 2)})
    for to_external in (False, True):
        save_model(model, tmp_path / "o.onnx", external=to_external)
        np.testing.assert_array_equal(_weights(tmp_path / "o.onnx")["w"], WEIGHT[::2])


def test_shared_bytes_are_stored_and_counted_once(tmp_path):
    model = ir.serde.deserialize_model(_proto())
    shared = ir.Tensor(np.ones((512, 1024), np.float32))
    for name in ("one", "two"):
        model.graph.register_initializer(ir.Value(name=name, const_value=shared))
    save_model(model, tmp_path / "a.onnx", external=True)
    opened = open_model(tmp_path / "a.onnx")
    save_model(opened, tmp_path / "b.onnx", external=True)
    assert parameters(opened) == WEIGHT.size + 48 + 512 * 1024
    assert weight_bytes(opened) == 4 * parameters(opened)
    for name in ("a", "b"):
        assert (tmp_path / f"{name}.onnx.data").stat().st_size < 1.1 * weight_bytes(opened)
        np.testing.assert_array_equal(_weights(tmp_path / f"{name}.onnx")["two"], shared.numpy())


def test_offsets_are_aligned_and_small_tensors_stay_inside(tmp_path):
    model = ir.serde.deserialize_model(_proto())
    large = ir.Tensor(np.ones((1024, 1024), np.float32))
    model.graph.register_initializer(ir.Value(name="large", const_value=large))
    save_model(model, tmp_path / "a.onnx", external=True)
    proto = onnx.load(tmp_path / "a.onnx", load_external_data=False)
    entries = {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer}
    assert entries["b"] == {} and int(entries["w"]["offset"]) % 64 == 0
    assert int(entries["large"]["offset"]) == 4096 * 3  # after the 12288 bytes of w
    assert entries["large"]["location"] == "a.onnx.data"


def test_runtime_loads_it(external, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    x = np.ones((2, 64), np.float32)
    results = []
    for to_external in (False, True):
        save_model(open_model(external), tmp_path / "o.onnx", external=to_external)
        session = onnxruntime.InferenceSession(tmp_path / "o.onnx", providers=["CPUExecutionProvider"])
        results.append(session.run(None, {"x": x})[0])
    np.testing.assert_allclose(results[0], x @ WEIGHT + _weights(external)["b"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(results[0], results[1])


def test_large_models_get_a_data_file_by_default(inline, tmp_path, monkeypatch):
    monkeypatch.setattr(modelfile, "EXTERNAL_BYTES", WEIGHT.nbytes)
    save_model(open_model(inline), tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx.data").exists()


def test_progress_ends_at_the_total(inline, tmp_path):
    seen = []
    save_model(
        open_model(inline), tmp_path / "o.onnx", external=True, progress=lambda *step: seen.append(step)
    )
    assert seen == sorted(seen) and seen[-1][0] <= seen[-1][1]


# --- bad input ---------------------------------------------------------------------------------------------


PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is not a model\n" * 100, "not an ONNX file"),
        (PNG, "not an ONNX file"),
        (np.random.default_rng(1).bytes(5000), "not an ONNX file"),
        (b"\0" * 5000, "not an ONNX file"),
        (b"version https://git-lfs.invalid/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (onnx.ModelProto(ir_version=10).SerializeToString(), "holds no graph"),
    ],
)
def test_not_a_model(tmp_path, content, message):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_model(path)
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) <= 2


def test_random_bytes_never_crash(tmp_path):
    path = tmp_path / "model.onnx"
    for seed in range(300):
        path.write_bytes(np.random.default_rng(seed).bytes(seed + 1))
        with pytest.raises(UserError):
            open_model(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_model(tmp_path / "none.onnx")
    with pytest.raises(UserError, match="is a folder"):
        open_model(tmp_path)


def test_truncated_anywhere(inline, tmp_path):
    whole = inline.read_bytes()
    path = tmp_path / "cut.onnx"
    for length in [3, 20, 100, 1000, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="truncated|no graph"):
            open_model(path)


@pytest.mark.filterwarnings("ignore:Ignoring unknown external data")
@pytest.mark.parametrize("kind", ["inline", "external"])
def test_damaged_anywhere_is_a_user_error_or_opens(request, kind):
    source = request.getfixturevalue(kind)
    whole = bytearray(source.read_bytes())
    path = source.with_name("damaged.onnx")
    for position in {*range(min(400, len(whole))), *range(max(0, len(whole) - 400), len(whole))}:
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            open_model(path)
        except UserError as error:
            assert len(str(error).splitlines()) <= 2


def test_missing_external_data_is_named(external):
    (external.parent / "weights.bin").unlink()
    with pytest.raises(UserError, match="weights.bin is missing"):
        open_model(external)


@pytest.mark.parametrize("keep", [0, 100])
def test_short_external_data_is_named(external, keep):
    os.truncate(external.parent / "weights.bin", keep)
    with pytest.raises(UserError, match=r"weights\.bin.*(too short|is empty)"):
        open_model(external)


def _relocate(path: Path, location: str, **entries: str) -> None:
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        values = {e.key: e.value for e in tensor.external_data} | {"location": location, **entries}
        del tensor.external_data[:]
        for key, value in values.items():
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    "location", ["../weights.bin", "sub/../../weights.bin", "{folder}/weights.bin", "link.bin"]
)
def test_external_data_outside_the_folder(external, tmp_path, location):
    outside = tmp_path / "weights.bin"
    (external.parent / "weights.bin").rename(outside)
    (external.parent / "link.bin").symlink_to(outside)
    _relocate(external, location.format(folder=tmp_path))
    with pytest.raises(UserError, match="outside its folder"):
        open_model(external)


def test_links_inside_the_folder_and_into_a_store_are_fine(external, tmp_path):
    store = tmp_path / "store"
    external.parent.rename(store)
    view = tmp_path / "view"
    view.mkdir()
    for name in ("model.onnx", "weights.bin"):
        (view / name).symlink_to(store / name)
    os.link(store / "weights.bin", tmp_path / "hard")  # a hard link is no reason to refuse
    np.testing.assert_array_equal(
        open_model(view / "model.onnx").graph.initializers["w"].const_value.numpy(), WEIGHT
    )


@pytest.mark.parametrize("entries", [{"offset": "-1"}, {"offset": "a"}, {"length": "8"}, {"location": ""}])
def test_nonsense_in_external_data(external, entries):
    _relocate(external, "weights.bin", **{k: v for k, v in entries.items() if k != "location"})
    if "location" in entries:
        _relocate(external, "")
    with pytest.raises(UserError):
        open_model(external)


def test_a_weight_of_the_wrong_size_is_named(tmp_path):
    proto = _proto()
    proto.graph.initializer[0].dims[0] = 65
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="weight 'w' of .* needs 12480 bytes but has 12288"):
        open_model(path)


def test_old_opsets_are_opened_with_a_warning(tmp_path, caplog):
    path = tmp_path / "model.onnx"
    path.write_bytes(_proto(opset=9).SerializeToString())
    open_model(path)
    assert "opset 9 is older than 11" in caplog.text


# --- output paths ------------------------------------------------------------------------------------------


def test_an_input_is_never_overwritten(external, tmp_path):
    alias = tmp_path / "alias.onnx"
    alias.symlink_to(external)
    hard = tmp_path / "hard.onnx"
    os.link(external.parent / "weights.bin", hard)
    (tmp_path / "new.onnx.data").symlink_to(external.parent / "weights.bin")
    weights = external.parent / "weights.bin"
    roundabout = external.parent / ".." / "in" / "model.onnx"
    before = _files(external.parent)
    for out in (external, weights, alias, hard, roundabout, tmp_path / "new.onnx"):
        for source in (external, open_model(external)):
            with pytest.raises(UserError, match="is an input file"):
                check_output_path(source, out)
        with pytest.raises(UserError, match="is an input file"):
            save_model(open_model(external), out)
    assert _files(external.parent) == before
    assert source_files(open_model(external)) == [external, weights]


def test_output_paths_that_cannot_be_written(inline, tmp_path, monkeypatch):
    check_output_path(inline, tmp_path / "new" / "folders" / "model.onnx")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="is a folder"):
        check_output_path(inline, tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        check_output_path(inline, inline / "model.onnx")
    with pytest.raises(UserError, match="cannot create the folder"):
        save_model(open_model(inline), inline / "sub" / "model.onnx")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="no permission"):
        check_output_path(inline, tmp_path / "model.onnx")


# --- whole or not at all -----------------------------------------------------------------------------------


@pytest.mark.parametrize("to_external", [False, True])
@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), OSError(errno.EIO, "broken"), OSError(errno.ENOSPC, "full")]
)
def test_a_failed_save_leaves_everything_as_it_was(inline, tmp_path, monkeypatch, to_external, failure):
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    (out.parent / "model.onnx").write_bytes(b"old model")
    (out.parent / "model.onnx.data").write_bytes(b"old data")
    before = _files(tmp_path)

    def fail(tensor, file, meter):
        file.write(b"half of it")
        file.flush()
        raise failure

    monkeypatch.setattr(modelfile, "_write_tensor", fail)
    full = isinstance(failure, OSError) and failure.errno == errno.ENOSPC
    with pytest.raises(UserError if full else type(failure)) as error:
        save_model(open_model(inline), out, external=to_external)
    if full:
        assert str(out.parent) in str(error.value) and "needs" in str(error.value)
    assert _files(tmp_path) == before
    with pytest.raises((UserError, type(failure))):
        save_model(open_model(inline), tmp_path / "new" / "folder" / "model.onnx", external=to_external)
    assert not (tmp_path / "new").exists()


def test_a_tensor_that_writes_too_little_is_a_bug(inline, tmp_path):
    model = open_model(inline)
    short = ir.LazyTensor(lambda: ir.Tensor(WEIGHT[1:]), ir.DataType.FLOAT, ir.Shape([64, 48]), name="w")
    model.graph.initializers["w"].const_value = short
    with pytest.raises(RuntimeError, match="'w' has 12288 bytes, but wrote 12096"):
        save_model(model, tmp_path / "o.onnx")
    assert not list(tmp_path.glob("*.onnx*"))


# --- memory ------------------------------------------------------------------------------------------------

_MEMORY_PROBE = """
import re, sys, threading, time
from pathlib import Path
import numpy as np
from onnx_autoglm.modelfile import open_model, save_model
from onnx_autoglm.sliced_tensor import SlicedTensor

source, out, external = sys.argv[1], sys.argv[2], sys.argv[3] == "external"
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
start = peak = anonymous()
def sample():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=sample, daemon=True).start()
model = open_model(source)
for axis, value in enumerate(model.graph.initializers.values()):
    value.const_value = SlicedTensor(value.const_value, {axis % 2: np.flatnonzero(np.arange(5000) % 4)})
save_model(model, out, external=external)
print(peak - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory counters of Linux")
@pytest.mark.parametrize("kind", ["inline", "external"])
def test_memory_stays_far_below_the_model(tmp_path, kind):
    weights = {name: np.full((5000, 5000), i, np.float32) for i, name in enumerate(["w", "b", "c"])}
    source = tmp_path / "model.onnx"
    model = ir.serde.deserialize_model(_proto(weights))  # 300 MB
    model.graph.name = "odd"  # a header that leaves the weights unaligned
    save_model(model, source, external=kind == "external")
    del weights, model
    command = [sys.executable, "-c", _MEMORY_PROBE, source, tmp_path / "out.onnx", kind]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(result.stdout) < 80 << 20
    assert _weights(tmp_path / "out.onnx")["w"].shape == (3750, 5000)
