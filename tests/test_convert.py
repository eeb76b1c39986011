"""`convert` as users run it: a subprocess, files and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import model

from onnx_autoglm import UserError, check, convert, optimize

TEXT = """
g (float[b,16] x) => (float[b,8] y) <float[16,64] a, float[64,8] head>
{ h = MatMul(x, a) r = Relu(h) y = MatMul(r, head) }
"""


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onnx_autoglm", "convert", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    ir.save(model(TEXT), path)
    return path


def refused(done: subprocess.CompletedProcess[str], out: Path, *words: str, code: int = 1) -> None:
    """A clear error, and nothing written or left behind."""
    assert done.returncode == code, done.stderr
    assert all(word in done.stderr for word in words) and "Traceback" not in done.stderr, done.stderr
    assert not out.exists() and not list(out.parent.glob(".*"))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_model_and_its_report(source: Path, tmp_path: Path, precision: str) -> None:
    before, out = source.read_bytes(), tmp_path / "out"
    done = run(source, "-o", out, "--precision", precision)
    assert done.returncode == 0, done.stderr
    assert source.read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == ["model.onnx", "report.json"]
    written = onnx.load(out / "model.onnx")
    kind = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    assert {tensor.data_type for tensor in written.graph.initializer} == {kind}
    assert [value.type.tensor_type.elem_type for value in written.graph.output] == [onnx.TensorProto.FLOAT]
    report = json.loads((out / "report.json").read_text())
    assert (
        report["format"] == "onnx-autoglm/conversion"
        and report["options"]["precision"]["precision"] == precision
    )
    assert 2 * report["result"]["bytes"] == report["source"]["bytes"]
    assert 0 < report["difference"]["rms"] < report["difference"]["expected"]
    assert report["conversion"]["casts"] == {"all": 2, "cancelling": 0, "detours": 0, "repeated": 0}
    assert "3 of 3 nodes" in done.stdout and ("--calib" in done.stdout) == (precision == "fp16")


def test_ranges_come_from_the_data(source: Path, tmp_path: Path) -> None:
    """The same model overflows on the data and not on generated inputs."""
    samples = tmp_path / "samples.npz"
    np.savez(
        samples,
        x=np.full((3, 16), 3000, np.float32)
        * np.sign(model(TEXT).graph.initializers["a"].const_value.numpy()[:, 0]),
    )
    done = run(source, "-o", tmp_path / "out", "--precision", "fp16", "--calib", samples)
    assert done.returncode == 1 or "reaches" in done.stdout, (done.stdout, done.stderr)
    report = convert(source, tmp_path / "plain", precision="fp16", calib="none")
    assert not report.conversion.islands


def test_quality_on_samples(source: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = tmp_path / "samples.npz"
    np.savez(samples, x=rng.standard_normal((20, 16)).astype(np.float32), labels=rng.integers(0, 8, 20))
    for precision in ("fp16", "bf16"):
        report = convert(
            source, tmp_path / precision, precision=precision, eval=samples, io_precision=precision
        )
        assert report.quality["metric"] == "top-1" and report.quality["agreement"] >= 0.9
        assert 0 < report.quality["kl"] < 1e-2


def test_scores_in_float32(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(source, "-o", out, "--precision", "fp16", "--io-precision", "fp16", "--keep-logits-fp32", "-q")
    assert done.returncode == 0 and not done.stdout, done.stderr
    written = onnx.load(out / "model.onnx")
    ends = [value.type.tensor_type.elem_type for value in (*written.graph.input, *written.graph.output)]
    assert ends == [onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT]


def test_weights_stay_beside_the_model(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(source, "-o", out, "--precision", "fp16", "--external-data").returncode == 0
    assert (out / "model.onnx.data").is_file()
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)


def test_an_older_result_is_replaced_whole(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "plan.json").write_text("{}")  # of another model
    assert run(source, "-o", out, "--precision", "fp16").returncode == 0
    assert not (out / "plan.json").exists() and (out / "report.json").is_file()


def test_bad_input(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(run(source, "-o", out), out, "--precision fp16 or bf16")
    refused(run(source, "-o", out, "--precision", "fp8"), out, "fp8", code=2)
    refused(run(tmp_path / "none.onnx", "-o", out, "--precision", "fp16"), out, "no such file")
    refused(
        run(source, "-o", out, "--precision", "fp16", "--calib", tmp_path / "none.txt"), out, "does not exist"
    )
    refused(run(source, "-o", out, "--precision", "fp16", "--calib", "self"), out, "--calib self")
    refused(run(source, "-o", source.parent, "--precision", "fp16"), out, "is an input file")
    whole = tmp_path / "integers.onnx"
    ir.save(model("g (int64[n] x) => (int64[n] y) { y = Add(x, x) }"), whole)
    refused(run(whole, "-o", out, "--precision", "fp16"), out, "nothing in this model can be converted")
    with pytest.raises(UserError, match="unknown option 'prune'"):
        convert(source, out, precision="fp16", prune={"hidden": 0.5})


def test_optimize_converts_what_it_pruned(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, seed in (("calib", 1), ("eval", 2)):
        rng = np.random.default_rng(seed)
        np.savez(tmp_path / f"{name}.npz", x=rng.standard_normal((32, 16)).astype(np.float32))
    words = [
        "--prune",
        "ffn-channel=0.25",
        "--calib",
        tmp_path / "calib.npz",
        "--eval",
        tmp_path / "eval.npz",
    ]
    command = [
        sys.executable,
        "-m",
        "onnx_autoglm",
        "optimize",
        str(source),
        "-o",
        str(out),
        "--precision",
        "fp16",
    ]
    done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["model.onnx", "plan.json", "report.json"]
    shapes = {
        tuple(t.dims): t.data_type
        for t in onnx.load(out / "model.onnx").graph.initializer
        if len(t.dims) == 2
    }
    assert shapes == {(16, 48): onnx.TensorProto.FLOAT16, (48, 8): onnx.TensorProto.FLOAT16}
    report = json.loads((out / "report.json").read_text())
    assert (
        report["precision"]["conversion"]["precision"] == "fp16"
        and report["precision"]["difference"]["feeds"] == 4
    )
    assert "nodes compute in fp16" in done.stdout and report["quality"]["agreement"] > 0.7
    with pytest.raises(UserError, match="converted to 16 bits after its proof|repaired after its proof"):
        check(source, out / "plan.json", out / "model.onnx")
    plain = tmp_path / "plain"
    optimize(source, plain, prune={"ffn-channel": 0.25}, criterion="l2", repair="none", precision="bf16")
    with pytest.raises(UserError, match="converted to 16 bits after its proof"):
        check(source, plain / "plan.json", plain / "model.onnx")
