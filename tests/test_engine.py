"""`build`, the engine stage of `optimize`, and what both write. With TensorRT-RTX, which builds without a GPU."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import recipes
from helpers import model

import onnx_autoglm
from onnx_autoglm import UserError
from onnx_autoglm.engine_backend import Backend
from onnx_autoglm.engine_config import load_timing_cache, save_timing_cache
from onnx_autoglm.engine_log import plain
from onnx_autoglm.engine_options import engine_options
from onnx_autoglm.engine_profiles import Profile
from onnx_autoglm.engine_recipe import build_script, trtexec_line

ROOT = Path(__file__).parents[1] / "build" / "models"
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the package tensorrt-rtx"
)
PLAIN = {"criterion": "l2", "repair": "none", "prune": {"ffn-channel": 0.25}}
TEXT = "g (float[b,4] x) => (float[b,4] y) <float[4,4] w> { h = MatMul(x, w) y = Relu(h) }"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onnx_autoglm", *map(str, words)], capture_output=True, text=True, check=False
    )


def saved(folder: Path, text: str = TEXT, **settings: Any) -> Path:
    path = folder / "model.onnx"
    ir.save(model(text, **settings), path)
    return path


def refused(done: subprocess.CompletedProcess[str], folder: Path, *words: str) -> None:
    """One line, exit code 1, nothing written."""
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in said[0] for word in words), said[0]
    assert not folder.exists()


@needs_rtx
def test_build_writes_an_engine_and_says_what_it_is(tmp_path: Path) -> None:
    source = recipes.build("glm-gqa-op20-kv", ROOT) / "model.onnx"
    out = tmp_path / "out"
    done = run("build", source, "-o", out / "glm.engine", "--past", "1:16:64", "--sequence", "1:8:32")
    assert done.returncode == 0, done.stderr
    assert "profiles: prefill, decode" in done.stdout
    assert {file.name for file in out.iterdir()} == {"glm.engine", "glm.engine.log", "engine.json"}
    report = json.loads((out / "engine.json").read_text())
    assert report["format"] == "onnx-autoglm/engine" and report["version"] == 1
    assert report["source"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    engine = (out / "glm.engine").read_bytes()
    assert report["plan"]["sha256"] == hashlib.sha256(engine).hexdigest()
    assert report["plan"]["bytes"] == len(engine) > 1_000_000
    assert report["backend"]["name"] == "rtx" and report["backend"]["version"]
    assert [entry["name"] for entry in report["inputs"]][:2] == ["input_ids", "attention_mask"]
    assert report["inputs"][3] == {
        "name": "past_key_values.0.key",
        "type": "float",
        "shape": ["batch", 2, "past", 16],
    }
    assert [profile["name"] for profile in report["profiles"]] == ["prefill", "decode"]
    assert report["profiles"][1]["shapes"]["past_key_values.1.value"]["max"] == [8, 2, 64, 16]
    assert report["command"] == "onnx-autoglm build model.onnx -o glm.engine --sequence 1:8:32 --past 1:16:64"
    assert "--profile=1 --minShapes=input_ids:1x1,attention_mask:1x2" in report["trtexec"]
    assert "INFO" in (out / "glm.engine.log").read_text()


@needs_rtx
def test_the_weights_are_in_the_engine_and_the_source_stays(tmp_path: Path) -> None:
    source = recipes.build("glm-gqa-op20-raw", ROOT) / "model.onnx"  # is rewritten before it is built
    before = source.read_bytes()
    report = onnx_autoglm.build(source, tmp_path / "a" / "model.engine", batch="1:2:4")
    assert source.read_bytes() == before
    assert report.prepared["sequences"] == 2 and report.prepared["folded"] > 100
    weights = sum(t.nbytes for t in (v.const_value for v in ir.load(source).graph.initializers.values()) if t)
    assert report.plan is not None and report.plan["bytes"] > weights
    with pytest.raises(UserError, match="cannot build this graph: ReduceMean"):
        onnx_autoglm.build(source, tmp_path / "b" / "model.engine", prepare=False)
    assert not (tmp_path / "b").exists()


@needs_rtx
def test_a_second_build_replaces_the_first_and_no_other(tmp_path: Path) -> None:
    source = saved(tmp_path)
    onnx_autoglm.build(source, tmp_path / "one.engine")
    onnx_autoglm.build(source, tmp_path / "one.engine", batch=2)
    with pytest.raises(
        UserError, match="describes one.engine, which is there: write two.engine into another"
    ):
        onnx_autoglm.build(source, tmp_path / "two.engine")
    assert not (tmp_path / "two.engine").exists()
    assert not list(tmp_path.glob(".*"))


@needs_rtx
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("g (float[b,4] x) => (float[b,4] y) { y = test.Swirl(x) }", ["Swirl 'y'", "no operator"]),
        ("g (float[b,4] x) => (float[b,4] y) { s = Unique(x) n = Size(s) y = Mul(x, x) }", []),
        (
            "g (float[b,4] x, float[c,5] z) => (float[b,4] y) { y = Add(x, z) }",
            ["Add", "Incompatible dimensions"],
        ),
    ],
)
def test_a_node_that_cannot_be_built_is_named(text: str, words: list[str], tmp_path: Path) -> None:
    path = saved(tmp_path, text)
    out = tmp_path / "out"
    done = run("build", path, "-o", out / "m.engine", "--shape", "c=1") if "[c," in text else None
    done = done or run("build", path, "-o", out / "m.engine")
    if words:
        refused(done, out, *words)
    else:
        assert done.returncode == 0, done.stderr  # what nothing reads is no obstacle


@needs_rtx
def test_bad_input(tmp_path: Path) -> None:
    path, out = saved(tmp_path), tmp_path / "out"
    engine = out / "m.engine"
    refused(run("build", tmp_path / "none.onnx", "-o", engine), out, "no such file")
    refused(run("build", path, "-o", engine, "--batch", "4:2:8"), out, "--batch", "rise")
    refused(run("build", path, "-o", engine, "--timing-cache", "t"), out, "no option --timing-cache")
    refused(run("build", path, "-o", engine, "--shape", "z=1"), out, "no input has such a symbol")
    new = onnx.load(path)
    new.opset_import[0].version = 26
    onnx.save(new, tmp_path / "new.onnx")
    refused(run("build", tmp_path / "new.onnx", "-o", engine), out, "opset 26", "opset 9 to 25")
    onnx.save(
        onnx.load(path), tmp_path / "ext.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    (tmp_path / "w").unlink()
    refused(run("build", tmp_path / "ext.onnx", "-o", engine), out, "w is missing")
    done = run("build", path, "-o", path)
    assert done.returncode == 1 and "is an input file" in done.stderr and path.stat().st_size > 100


@needs_rtx
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    done = run("build", saved(tmp_path), "-o", closed / "m.engine")
    assert done.returncode == 1 and "no permission" in done.stderr


@needs_rtx
def test_a_profile_that_the_graph_rejects(tmp_path: Path) -> None:
    text = "g (float[b,s,4] x, float[1,6,4] p) => (float[b,s,4] y) { y = Add(x, p) }"
    out = tmp_path / "out"
    done = run("build", saved(tmp_path, text), "-o", out / "m.engine", "--shape", "s=6:7:9")
    refused(done, out, "usual sizes of the default profile", "Add")


@needs_rtx
def test_too_little_workspace_says_what_to_do(tmp_path: Path) -> None:
    source = recipes.build("glm-gqa-op20", ROOT) / "model.onnx"
    with pytest.raises(UserError, match=r"workspace limit.*--sequence.*raise --workspace"):
        onnx_autoglm.build(source, tmp_path / "out" / "m.engine", workspace="1MB")


# --- the stage of optimize


@needs_rtx
def test_optimize_builds_the_engine_of_the_pruned_model(tmp_path: Path) -> None:
    source = recipes.build("glm-gqa-op20", ROOT) / "model.onnx"
    report = onnx_autoglm.optimize(
        source, tmp_path / "out", **PLAIN, engine="rtx", engine_option="sequence=1:8:16"
    )
    engine = json.loads((tmp_path / "out/engine.json").read_text())
    assert engine["source"]["sha256"] == report.result.sha256
    assert engine["plan"]["bytes"] == (tmp_path / "out/model.engine").stat().st_size
    assert engine["profiles"][0]["shapes"]["input_ids"]["max"] == [8, 16]
    assert any(note.startswith("engine model.engine") for note in report.notes)
    assert "engine" in {step["name"] for step in report.passes}
    # Without the stage the engine of the model that was there before does not stay beside the new one.
    onnx_autoglm.optimize(source, tmp_path / "out", **PLAIN)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"model.onnx", "plan.json", "report.json"}


def test_optimize_without_a_backend_writes_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *r: None if name.startswith("tensorrt") else real(name, *r)
    )
    source = recipes.build("glm-gqa-op20-kv", ROOT) / "model.onnx"
    out = tmp_path / "out"
    settings = {"engine": "auto", "engine_option": ("past=1:16:64", "version-compatible=true")}
    report = onnx_autoglm.optimize(source, out, **PLAIN, **settings)
    (line,) = [note for note in report.notes if "no engine was built" in note]
    assert "pip install" in line and "build_engine.sh" in line
    names = {"model.onnx", "plan.json", "report.json", "engine.json", "build_engine.sh"}
    assert {file.name for file in out.iterdir()} == names
    engine = json.loads((out / "engine.json").read_text())
    assert engine["plan"] is None and "pip install" in engine["reason"]
    assert engine["source"]["sha256"] == report.result.sha256
    assert engine["backend"]["name"] == "tensorrt"
    # The script runs whichever tool is there, beside the model.
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("dirname", "sh"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    for tool, first in (
        ("trtexec", "--onnx=model.onnx"),
        ("onnx-autoglm", "build model.onnx -o model.engine"),
    ):
        (tools / tool).write_text('#!/bin/sh\necho "$0 $*"; pwd\n')
        (tools / tool).chmod(0o755)
        done = subprocess.run(
            [out / "build_engine.sh"], capture_output=True, text=True, check=True, env={"PATH": str(tools)}
        )
        assert f"/{tool} {first}" in done.stdout and str(out) in done.stdout
    assert "--version-compatible" in done.stdout and "--past 1:16:64" in done.stdout


@needs_rtx
def test_optimize_survives_a_graph_that_the_backend_does_not_know(tmp_path: Path) -> None:
    text = """
    g (float[b,16] x) => (float[b,16] y, int64[n] u) <float[16,24] up, float[24,16] down>
    { h = MatMul(x, up) r = Relu(h) y = MatMul(r, down) u = NonZero(x) v, i, j, k = Unique(x) }
    """
    path = saved(
        tmp_path,
        text.replace("v, i, j, k = Unique(x)", "").replace(
            "u = NonZero(x)", "v = Hardmax(x) q, u = Unique(v)"
        ),
    )
    report = onnx_autoglm.optimize(path, tmp_path / "out", **PLAIN, engine="rtx")
    assert any("no engine was built" in note and "Unique" in note for note in report.notes)
    assert (tmp_path / "out/model.onnx").exists() and not (tmp_path / "out/model.engine").exists()
    assert not (tmp_path / "out/graph").exists()


# --- parts


def test_the_line_for_the_tools_of_the_backends() -> None:
    shapes = {"x": ((1, 4), (2, 4), (8, 4)), "in:1": ((1,), (1,), (1,)), "z": ((), (), ())}
    options = engine_options(
        {
            "workspace": "2GiB",
            "optimization_level": 4,
            "version_compatible": True,
            "hardware_compatible": "ampere-plus",
        }
    )
    line = trtexec_line("model.onnx", "m.engine", options, [Profile("default", shapes)], "tensorrt")
    assert line.startswith("trtexec --onnx=model.onnx --saveEngine=m.engine ")
    assert "x:2x4" in line and "in:1" in line and "z:scalar" in line and "--profile" not in line
    assert "--memPoolSize=workspace:2048M --builderOptimizationLevel=4" in line
    assert "--hardwareCompatibilityLevel=ampere+ --versionCompatible --skipInference" in line
    # A shell hands the quotes around a name with a colon on to the tool.
    assert "'in:1':1" in __import__("shlex").split(line)[3]
    assert trtexec_line("m", "e", options, [], "rtx").startswith("tensorrt_rtx ")
    assert subprocess.run(["sh", "-n", "-c", build_script("a", "b", "rtx")], check=False).returncode == 0


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            'creator && "Plugin not found, are the plugin name, version, and namespace correct?"',
            "no operator and no plugin of this name",
        ),
        ("false", "not supported"),
        ('Assertion failed: x > 1 && "Only two inputs."', "Only two inputs."),
        (
            "[memory.cpp::getErrorStr::132] Error Code 2: OutOfMemory (Requested size was 12 bytes.)",
            "OutOfMemory (Requested size was 12 bytes.)",
        ),
        ("Invalid Node - node_y Shape Error (no match In op at /_src/a.cpp:9)", "Shape Error (no match)"),
    ],
)
def test_messages_of_the_backend_in_plain_words(message: str, said: str) -> None:
    assert plain(message) == said


class Cache:
    """A timing cache as the builder configuration makes it."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"+new"


class Config:
    def __init__(self) -> None:
        self.cache: Cache | None = None

    def create_timing_cache(self, data: bytes) -> Cache:
        return Cache(data)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache if cache.data in (b"", b"mine") else self.cache
        return self.cache is cache

    def get_timing_cache(self) -> Cache | None:
        return self.cache


def test_a_timing_cache_is_read_and_written(tmp_path: Path) -> None:
    path, config = tmp_path / "cache", Config()
    assert load_timing_cache(config, path) == []
    save_timing_cache(config, path)
    assert path.read_bytes() == b"+new"
    path.write_bytes(b"mine")
    assert load_timing_cache(config, path) == [] and config.cache is not None and config.cache.data == b"mine"


def test_a_timing_cache_of_another_device_is_not_used(tmp_path: Path) -> None:
    path, config = tmp_path / "cache", Config()
    path.write_bytes(b"another device")
    (note,) = load_timing_cache(config, path)
    assert "another device or version" in note
    save_timing_cache(config, path)
    assert path.read_bytes() == b"+new"
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_weights_larger_than_the_device_are_refused() -> None:
    from onnx_autoglm.engine import _refuse_too_large
    from onnx_autoglm.engine_backend import Device

    tensorrt, small = Backend("tensorrt", "11.4", types.SimpleNamespace()), Device("tiny", "8.6", 32)
    with pytest.raises(UserError, match="--weight-streaming"):
        _refuse_too_large(model(TEXT), engine_options({}), tensorrt, small)
    _refuse_too_large(model(TEXT), engine_options({"weight_streaming": True}), tensorrt, small)
    _refuse_too_large(model(TEXT), engine_options({}), tensorrt, None)
