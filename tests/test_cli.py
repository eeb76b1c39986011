"""The command line as users run it: a subprocess, files and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import model
from onnx import TensorProto, helper, numpy_helper

GATED = """
g (float[b,s,16] x) => (float[b,s,16] y)
<float[16,48] up0, float[24,16] down0, float[16,48] up1, float[24,16] down1>
{
  gu0 = MatMul(x, up0) g0, u0 = Split<axis=-1, num_outputs=2>(gu0) s0 = Sigmoid(g0) a0 = Mul(g0, s0) h0 = Mul(a0, u0)
  d0 = MatMul(h0, down0) r0 = Add(x, d0)
  gu1 = MatMul(r0, up1) g1, u1 = Split<axis=-1, num_outputs=2>(gu1) s1 = Sigmoid(g1) a1 = Mul(g1, s1) h1 = Mul(a1, u1)
  d1 = MatMul(h1, down1) y = Add(r0, d1)
}
"""


def run(*words: object, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onnx_autoglm", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        **settings,  # type: ignore[call-overload]
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    ir.save(model(GATED), path)
    return path


def wide_model(folder: Path, narrow: int, wide: int) -> Path:
    """Two products around a ReLU, saved as model.onnx."""
    text = f"g (float[n,{narrow}] x) => (float[n,{narrow}] y) <float[{narrow},{wide}] a, float[{wide},{narrow}] b>"
    path = folder / "model.onnx"
    ir.save(model(text + " { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }"), path)
    return path


def refused(done: subprocess.CompletedProcess[str], out: Path, *words: str, code: int = 1) -> None:
    """A clear error of one or two lines, and nothing written or left behind."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert 1 <= len(done.stderr.strip().splitlines()) <= 2, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert not out.exists()
    assert not list(out.parent.glob(".*partial*"))


# --- what it does


def test_optimize_writes_model_plan_and_report(source: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "out", source.read_bytes()
    done = run(
        "optimize", source, "-o", out, "--prune", "ffn-channel=0.25", "--criterion", "l2", "--repair", "none"
    )
    assert done.returncode == 0, done.stderr
    assert source.read_bytes() == before
    assert {path.name for path in out.iterdir()} == {"model.onnx", "plan.json", "report.json"}
    pruned = onnx.load(out / "model.onnx")
    onnx.checker.check_model(pruned, full_check=True)
    shapes = sorted(tuple(tensor.dims) for tensor in pruned.graph.initializer if len(tensor.dims) == 2)
    assert shapes == [(16, 36), (16, 36), (18, 16), (18, 16)]
    assert "ffn-channel" in done.stdout and "18/24" in done.stdout


def test_the_plan_alone_rebuilds_the_proof(source: Path, tmp_path: Path) -> None:
    """Zeroing the complement of every `kept` in the source, by plain numpy, gives the pruned outputs."""
    import onnxruntime

    run("optimize", source, "-o", tmp_path / "out", "--prune", "ffn-channel=0.5")
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert plan["format"] == "onnx-autoglm/plan" and plan["version"] == 1
    assert plan["source"]["file"] == "model.onnx"
    masked = onnx.load(source)
    tensors = {tensor.name: tensor for tensor in masked.graph.initializer}
    for removal in plan["removals"]:
        array = numpy_helper.to_array(tensors[removal["initializer"]]).copy()
        gone = np.setdiff1d(np.arange(array.shape[removal["axis"]]), removal["kept"])
        assert removal["kept"] == sorted(removal["kept"]) and len(gone)
        index = [slice(None)] * array.ndim
        index[removal["axis"]] = gone
        array[tuple(index)] = 0
        tensors[removal["initializer"]].CopyFrom(numpy_helper.from_array(array, removal["initializer"]))
        producers = {output: node for node in masked.graph.node for output in node.output}
        assert all(removal["initializer"] in producers[name].input for name in removal["consumers"])
    x = np.random.default_rng(0).standard_normal((2, 3, 16)).astype(np.float32)
    expected = onnxruntime.InferenceSession(masked.SerializeToString()).run(None, {"x": x})[0]
    actual = onnxruntime.InferenceSession(str(tmp_path / "out/model.onnx")).run(None, {"x": x})[0]
    assert np.abs(expected - actual).max() <= 1e-5 * np.abs(expected).max()
    (first, _) = plan["structures"]
    assert first["kind"] == "ffn-channel" and first["size"] == 24 and len(first["kept"]) == 12


def test_the_report_says_what_was_done(source: Path, tmp_path: Path) -> None:
    run("optimize", source, "-o", tmp_path / "out", "--prune", "ffn-channel=0.5")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["source"]["parameters"] == 2304 and report["result"]["parameters"] == 1152
    assert report["result"]["flops"] * 2 == report["source"]["flops"] == 128 * 2304
    assert report["check"]["relative_difference"] <= report["check"]["tolerance"]
    kept = {entry["id"]: entry["kept"] for entry in report["structures"] if not entry["pins"]}
    assert list(kept.values()) == [12, 12, 2] and kept["blocks"] == 2
    assert {"open", "infer axes", "score", "choose", "write", "check"} <= {
        step["name"] for step in report["passes"]
    }
    assert report["options"]["pruning"]["sparsity_level"] == {"ffn-channel": 0.5}
    assert "onnxruntime" in report["versions"]


def test_no_options_remove_a_quarter_and_say_so(source: Path, tmp_path: Path) -> None:
    done = run("optimize", source, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "a quarter of the ffn-channels" in done.stdout and "18/24" in done.stdout


def test_check_passes_and_fails(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("optimize", source, "-o", out, "--prune", "ffn-channel=0.5")
    done = run("check", source, out / "plan.json", out / "model.onnx")
    assert done.returncode == 0 and "masked == pruned" in done.stdout
    plan = json.loads((out / "plan.json").read_text())
    wrong = plan["removals"][0]["kept"]
    missing = next(index for index in range(24) if index not in wrong)
    for removal in plan["removals"]:
        if removal["initializer"] == "down0":
            removal["kept"][0] = missing
    (out / "plan.json").write_text(json.dumps(plan))
    done = run("check", source, out / "plan.json", out / "model.onnx")
    assert done.returncode == 3 and "differ" in done.stderr and "Traceback" not in done.stderr


def test_check_refuses_another_source(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("optimize", source, "-o", out, "--prune", "ffn-channel=0.5")
    other = tmp_path / "other.onnx"
    ir.save(model(GATED, seed=1), other)
    done = run("check", other, out / "plan.json", out / "model.onnx")
    assert done.returncode == 1 and "is not the source" in done.stderr


def test_inspect_shows_a_table_and_json(source: Path) -> None:
    table = run("inspect", source)
    assert table.returncode == 0 and "ffn-channel" in table.stdout and "50.0 %" in table.stdout
    data = json.loads(run("inspect", source, "--json").stdout)
    found = [(entry["kind"], entry["size"]) for entry in data["structures"] if not entry["pins"]]
    assert found == [("ffn-channel", 24), ("ffn-channel", 24), ("block", 2)]


def test_a_configuration_file_and_the_command_line_on_top(source: Path, tmp_path: Path) -> None:
    config = tmp_path / "prune.yaml"
    config.write_text(
        "pruning: {algorithm: l1, sparsity_level: {ffn-channel: 0.5}, seed: 7}\ncheck: {tolerance: 1e-3}\n"
    )
    out = tmp_path / "out"
    done = run("optimize", source, "-o", out, "--config", config, "--criterion", "random")
    assert done.returncode == 0, done.stderr
    options = json.loads((out / "report.json").read_text())["options"]
    assert options["pruning"]["algorithm"] == "random" and options["pruning"]["seed"] == 7
    assert (
        options["pruning"]["sparsity_level"] == {"ffn-channel": 0.5} and options["check"]["tolerance"] == 1e-3
    )


def test_python_interface(source: Path, tmp_path: Path) -> None:
    import onnx_autoglm

    report = onnx_autoglm.optimize(source, tmp_path / "out", prune={"ffn-channel": 0.5}, criterion="l1")
    assert report.result.parameters * 2 == report.source.parameters
    assert onnx_autoglm.inspect(source).source.parameters == report.source.parameters
    with pytest.raises(onnx_autoglm.UserError, match="sparsity_level"):
        onnx_autoglm.optimize(source, tmp_path / "out", prune={"ffn-channel": 2})
    with pytest.raises(onnx_autoglm.UserError, match="unknown option 'sparsity'"):
        onnx_autoglm.optimize(source, tmp_path / "out", sparsity=0.5)


def test_version_and_help() -> None:
    assert run("--version").stdout.startswith("onnx-autoglm ")
    text = run("optimize", "--help").stdout
    for flag in (
        "--prune",
        "--criterion",
        "--scope",
        "--align",
        "--config",
        "--repair",
        "--quantize",
        "--inputs",
    ):
        assert flag in text
    assert "Exit codes" in run("--help").stdout


def test_sample_inputs_are_used(source: Path, tmp_path: Path) -> None:
    sample = tmp_path / "sample.npz"
    np.savez(sample, x=np.ones((1, 5, 16), np.float32))
    out = tmp_path / "out"
    assert run("optimize", source, "-o", out, "--inputs", sample).returncode == 0
    assert json.loads((out / "report.json").read_text())["check"]["inputs"] == [{"x": [1, 5, 16]}]


# --- bad input: one or two lines, exit code 1, nothing written


def test_not_an_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("this is not a model")
    refused(run("optimize", path, "-o", tmp_path / "out"), tmp_path / "out", "model.onnx")


def test_a_missing_file(tmp_path: Path) -> None:
    refused(run("optimize", tmp_path / "no.onnx", "-o", tmp_path / "out"), tmp_path / "out", "no.onnx")


def test_a_truncated_file(source: Path, tmp_path: Path) -> None:
    source.write_bytes(source.read_bytes()[:-100])
    refused(run("optimize", source, "-o", tmp_path / "out"), tmp_path / "out", "model.onnx")


def test_missing_external_data(source: Path, tmp_path: Path) -> None:
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    refused(run("optimize", source, "-o", tmp_path / "out"), tmp_path / "out", "weights.bin")


def test_external_data_outside_the_folder(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    proto = onnx.load(source)
    onnx.save(
        proto, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    (folder / "weights.bin").rename(tmp_path / "weights.bin")
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.bin"
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    refused(run("optimize", folder / "model.onnx", "-o", tmp_path / "out"), tmp_path / "out", "weights.bin")


def test_external_data_is_kept_external(source: Path, tmp_path: Path) -> None:
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    out = tmp_path / "out"
    assert run("optimize", source, "-o", out).returncode == 0
    assert (out / "model.onnx.data").stat().st_size > 0
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)


def test_a_model_that_the_runtime_cannot_load(source: Path, tmp_path: Path) -> None:
    proto = onnx.load(source)
    proto.opset_import.append(helper.make_opsetid("unknown.domain", 1))
    proto.graph.node.append(helper.make_node("Mystery", ["y"], ["z"], domain="unknown.domain"))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    onnx.save(proto, source)
    refused(
        run("optimize", source, "-o", tmp_path / "out"),
        tmp_path / "out",
        "ONNX Runtime cannot load",
        "Mystery",
    )


def test_nothing_prunable(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    ir.save(model("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }"), path)
    refused(
        run("optimize", path, "-o", tmp_path / "out"), tmp_path / "out", "nothing in this model can be pruned"
    )


@pytest.mark.parametrize("text", ["ffn-channel=0", "ffn-channel=1", "ffn-channel=1.5", "ffn-channel=-0.1"])
def test_a_fraction_out_of_range(source: Path, tmp_path: Path, text: str) -> None:
    refused(
        run("optimize", source, "-o", tmp_path / "out", "--prune", text), tmp_path / "out", "between 0 and 1"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prune", "ffn-channel"], "KIND=FRACTION"),
        (["--prune", "neuron=0.5"], "unknown kind 'neuron'"),
        (["--prune", "query-head=0.5"], "has no query-head"),
        (["--prune", "ffn-channel=0.01"], "removes nothing: the smallest step is 1 of 24"),
        (["--prune", "ffn-channel=0.9", "--min-keep", "20"], "cannot be reached: 0.167"),
        (["--prune", "ffn-channel=0.5,ffn-channel=0.2"], "twice"),
        (["--seed", "-1"], "seed"),
        (["--include", "layers.7*"], "no layer matches 'layers.7*'"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--inputs", "missing.npz"], "missing.npz"),
    ],
)
def test_options_that_cannot_be_met(source: Path, tmp_path: Path, words: list[str], expected: str) -> None:
    refused(run("optimize", source, "-o", tmp_path / "out", *words), tmp_path / "out", expected)


def test_a_configuration_with_unknown_options(source: Path, tmp_path: Path) -> None:
    config = tmp_path / "prune.yaml"
    config.write_text("pruning: {sparsity: 0.5}\n")
    done = run("optimize", source, "-o", tmp_path / "out", "--config", config)
    refused(done, tmp_path / "out", "prune.yaml", "pruning.sparsity")


def test_wrong_usage_is_exit_code_two(source: Path) -> None:
    assert run("optimize").returncode == 2
    assert run("optimize", source, "--scope", "magic").returncode == 2


def test_an_output_that_is_the_input(source: Path) -> None:
    before = source.read_bytes()
    done = run("optimize", source, "-o", source.parent)
    assert done.returncode == 1 and source.read_bytes() == before
    assert [path.name for path in source.parent.iterdir()] == ["model.onnx"]


def test_an_output_below_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("optimize", source, "-o", tmp_path / "file" / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_a_failed_check_is_exit_code_three(tmp_path: Path) -> None:
    path = wide_model(tmp_path, 64, 4096)  # long sums round differently when terms go
    done = run("optimize", path, "-o", tmp_path / "out", "--tolerance", "1e-30")
    refused(done, tmp_path / "out", "differ", code=3)


def test_an_earlier_result_survives_a_failure(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("optimize", source, "-o", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run("optimize", source, "-o", out, "--prune", "hidden=0.5").returncode == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_a_full_disk(tmp_path: Path) -> None:
    import resource

    path, out = wide_model(tmp_path, 64, 4096), tmp_path / "out"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    refused(run("optimize", path, "-o", out, preexec_fn=limit), out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    path, out = wide_model(tmp_path, 1024, 16384), tmp_path / "out"
    # A shell starts background jobs, of which these tests may be part, with interrupts ignored; children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "onnx_autoglm", "optimize", str(path), "-o", str(out)],
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while (
        not list(tmp_path.glob(".out.partial-*")) and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.001)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr and "Traceback" not in stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    shutil.rmtree(out, ignore_errors=True)


def test_options_objects_and_single_options_do_not_mix(source: Path, tmp_path: Path) -> None:
    from onnx_autoglm import Options, UserError, optimize

    with pytest.raises(UserError, match="not both"):
        optimize(source, tmp_path / "out", Options(), prune={"ffn-channel": 0.5})


@pytest.mark.parametrize(
    "damage",
    [
        {"removals": 3},
        {"removals": [{"initializer": "up0"}]},
        {"removals": [{"initializer": "up0", "axis": 9, "kept": [0], "consumers": ["gu0"]}]},
        {"removals": [{"initializer": "up0", "axis": 1, "kept": [99], "consumers": ["gu0"]}]},
        {"removals": [{"initializer": "up0", "axis": 1, "kept": [0], "consumers": ["nobody"]}]},
        {"version": 2},
    ],
)
def test_a_damaged_plan(source: Path, tmp_path: Path, damage: dict[str, object]) -> None:
    out = tmp_path / "out"
    run("optimize", source, "-o", out, "--prune", "ffn-channel=0.5")
    plan = json.loads((out / "plan.json").read_text()) | damage
    (out / "plan.json").write_text(json.dumps(plan))
    done = run("check", source, out / "plan.json", out / "model.onnx")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "plan" in done.stderr


def test_a_plan_with_the_contract_fields_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("optimize", source, "-o", out, "--prune", "ffn-channel=0.5")
    plan = json.loads((out / "plan.json").read_text())
    assert not plan.pop("interfaces") and not plan.pop("lossy")
    (out / "plan.json").write_text(json.dumps(plan))
    assert run("check", source, out / "plan.json", out / "model.onnx").returncode == 0


def test_a_broken_result_is_exit_code_three(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If shape repair were wrong, the user would get a failed check and no files."""
    from onnx_autoglm import CheckFailed, cut, optimize

    monkeypatch.setattr(cut, "repair_shapes", lambda *_: 0)
    text = GATED.replace("num_outputs=2>(gu0)", "axis=-1>(gu0, sizes)").replace("axis=-1, axis=-1", "axis=-1")
    broken = tmp_path / "explicit.onnx"
    ir.save(
        model(text.replace("float[24,16] down1>", "float[24,16] down1, int64[2] sizes = {24,24}>")), broken
    )
    with pytest.raises(CheckFailed):
        optimize(broken, tmp_path / "out", prune={"ffn-channel": 0.5}, include=("*0*",))
    assert not (tmp_path / "out").exists()
