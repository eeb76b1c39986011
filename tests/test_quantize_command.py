"""`quantize`, from the command line and from Python, and as a stage of `optimize`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import model

import onnx_autoglm
from onnx_autoglm.errors import CheckFailed, UserError
from onnx_autoglm.modelfile import save_model
from onnx_autoglm.runtime import Session

TEXT = """
agraph (float[B,32] x) => (float[B,20] y)
<float[32,64] a, float[64] b, float[64,64] c, float[64] d, float[64,20] e>
{
  p = MatMul(x, a)
  q = Add(p, b)
  r = Relu(q)
  s = MatMul(r, c)
  t = Add(s, d)
  u = Relu(t)
  y = MatMul(u, e)
}
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A classifier, calibration samples, and labelled ones that it classifies as it does itself."""
    source = model(TEXT)
    save_model(source, tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    for name in ("calib", "eval"):
        x = rng.normal(size=(400, 32)).astype(np.float32)
        arrays = {"x": x}
        if name == "eval":
            arrays["labels"] = Session(source).run({"x": x})["y"].argmax(axis=1)
        np.savez(tmp_path / f"{name}.npz", **arrays)
    return tmp_path / "model.onnx", tmp_path / "calib.npz", tmp_path / "eval.npz"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onnx_autoglm", *map(str, words)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_writes_both_emissions_and_a_report(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    source, calib, evaluation = files
    before = source.read_bytes()
    done = run(
        "quantize", source, "-o", tmp_path / "out", "--quantize", "w8a8", "--calib", calib, "--eval", evaluation,
        "--max-loss", "20%", "--strict",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 w8a8 (100.0% of the multiply-adds)" in done.stdout
    assert "3 of 3 promised products compute in integers" in done.stdout
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {
        "model.onnx", "model.cpu.onnx", "model.trt.onnx", "quantization.json",
    }  # fmt: skip
    assert source.read_bytes() == before
    report = json.loads((out / "quantization.json").read_text())
    assert report["audit"]["integer"] == 3 and report["quality"]["ratio"] > 0.8
    assert {entry["calibrator"] for entry in report["products"]} and all(
        entry["error_db"] < -20 for entry in report["products"]
    )
    sizes = [(out / name).stat().st_size for name in ("model.cpu.onnx", "model.onnx")]
    assert sizes[0] < 0.5 * sizes[1]
    for name in ("model.cpu.onnx", "model.trt.onnx"):
        onnx.checker.check_model(str(out / name), full_check=True)


def test_a_model_in_its_own_output_folder_stays(files: tuple[Path, Path, Path]) -> None:
    source, calib, _ = files
    (source.parent / "plan.json").write_text("{}")
    before = source.stat().st_mtime_ns
    onnx_autoglm.quantize(source, source.parent, quantize="w8a8", calib=calib, target="cpu", max_loss=1.0)
    assert source.stat().st_mtime_ns == before and (source.parent / "plan.json").exists()
    assert (source.parent / "model.cpu.onnx").exists() and not (source.parent / "model.trt.onnx").exists()


def test_what_is_too_sensitive_falls_back_and_says_so(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, calib, _ = files
    report = onnx_autoglm.quantize(source, tmp_path / "out", quantize="w8a8", calib=calib, max_loss=1e-9)
    assert {entry["scheme"] for entry in report.products} <= {"w8", "float"}
    assert all("8-bit activations alone add" in entry["reason"] for entry in report.products)


def test_optimize_quantizes_what_it_pruned(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, calib, evaluation = files
    done = run(
        "optimize", source, "-o", tmp_path / "out", "--prune", "ffn-channel=0.25", "--calib", calib, "--eval",
        evaluation, "--quantize", "w8a8", "--quantize-loss", "50%",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["quantization"]["share"] == {"w8a8": 1.0}
    shapes = [(entry["inputs"], entry["outputs"]) for entry in report["quantization"]["products"]]
    assert shapes == [(32, 48), (48, 48), (48, 20)]
    assert (tmp_path / "out" / "model.cpu.onnx").exists() and (
        tmp_path / "out" / "quantization.json"
    ).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quantize", "w8a8"], "8-bit activations need calibration data: pass --calib PATH"),
        (["--quantize", "none"], "--quantize none leaves nothing to do"),
        (["--quantize", "w8", "--keep-float", "*"], "nothing can be quantized"),
        (["--block", "17"], "block"),
    ],
)
def test_bad_input_is_one_line(
    files: tuple[Path, Path, Path], tmp_path: Path, words: list[str], message: str
) -> None:
    done = run("quantize", files[0], "-o", tmp_path / "out", *words)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_quantized_again(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, calib, _ = files
    onnx_autoglm.quantize(source, tmp_path / "out", quantize="w8a8", calib=calib, max_loss=1.0)
    with pytest.raises(UserError, match="quantized already"):
        onnx_autoglm.quantize(tmp_path / "out" / "model.trt.onnx", tmp_path / "again", quantize="w8")


def test_activations_that_overflow_are_named(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "huge.npz", x=np.full((10, 32), 3e38, np.float32))
    with pytest.raises(UserError, match=r"r, which MatMul s reads, is not finite"):
        onnx_autoglm.quantize(files[0], tmp_path / "out", quantize="w8a8", calib=tmp_path / "huge.npz")


def test_strict_fails_where_a_promise_is_broken(tmp_path: Path) -> None:
    source = model(TEXT.replace("float[", "float16["))
    save_model(source, tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", x=np.random.default_rng(0).normal(size=(50, 32)).astype(np.float16))
    given = {"quantize": "w8a8", "calib": tmp_path / "calib.npz", "max_loss": 1.0}
    with pytest.raises(CheckFailed, match="run in floating point in ONNX Runtime although"):
        onnx_autoglm.quantize(tmp_path / "model.onnx", tmp_path / "out", strict=True, **given)
    report = onnx_autoglm.quantize(tmp_path / "model.onnx", tmp_path / "out", **given)
    assert any(note.startswith("WARNING: ") for note in report.notes)
