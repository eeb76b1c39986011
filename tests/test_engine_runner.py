"""The session on an engine. Without a GPU: a backend that computes with numpy on memory that stands for the device's."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipes
from fake_engine import Engine, Memory, fake
from helpers import model

import onnx_autoglm
from onnx_autoglm import UserError, engine_backend, engine_runner
from onnx_autoglm.engine_backend import Backend, Device
from onnx_autoglm.engine_compare import compare_engine, compare_sessions
from onnx_autoglm.engine_memory import DeviceValue, _block
from onnx_autoglm.engine_options import engine_options
from onnx_autoglm.engine_plan import backend_of, described, refuse_foreign
from onnx_autoglm.engine_report import EngineReport
from onnx_autoglm.engine_runner import EngineSession
from onnx_autoglm.feeds import candidate_feeds, first_working
from onnx_autoglm.runtime import Session

ROOT = Path(__file__).parents[1] / "build" / "models"
has_rtx = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(not has_rtx, reason="needs the package tensorrt-rtx")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    return path


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def session(plan: Path, memory: Memory) -> EngineSession:
    return EngineSession.over(plan, fake(Engine(memory)), memory)


def feed(new: int, past: int, batch: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((batch, new), dtype=np.float32),
        "p": rng.standard_normal((batch, past), dtype=np.float32),
    }


def test_arrays_in_arrays_out(session: EngineSession) -> None:
    assert (session.input_names, session.output_names) == (["x", "p"], ["y", "q"])
    for new, past, batch in [(5, 0, 2), (1, 3, 1), (16, 16, 4), (2, 1, 1), (5, 0, 2)]:
        feeds = feed(new, past, batch)
        found = session.run(feeds)
        np.testing.assert_array_equal(found["y"], 2 * feeds["x"])
        np.testing.assert_array_equal(found["q"], np.concatenate([feeds["p"], feeds["x"]], axis=1))
    assert list(session.run(feeds, ["q"])) == ["q"]
    sliced = np.zeros((2, 10), np.float32)[:, ::2]  # not contiguous
    assert session.run({**feeds, "x": sliced})["y"].shape == (2, 5)


def test_results_are_the_callers_own(session: EngineSession) -> None:
    first = session.run(feed(4, 2))
    kept = {name: array.copy() for name, array in first.items()}
    session.run(feed(4, 2, seed=1))
    assert all((first[name] == kept[name]).all() for name in kept)


def test_the_tightest_profile_runs(session: EngineSession, memory: Memory) -> None:
    session.run(feed(4, 0))  # profile 0 is active from the start
    session.run(feed(1, 3))
    session.run(feed(1, 4))
    session.run(feed(4, 3))
    assert [entry for entry in memory.log if entry.startswith("profile")] == ["profile 1", "profile 0"]


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({"x": feed(1, 1)["x"]}, "input 'p' is missing; inputs are x, p"),
        (feed(17, 0), r"input 'x' has shape \[1, 17\], the engine takes \[1, 1\] to \[4, 16\] or"),
        ({**feed(1, 1), "p": np.zeros((1, 1, 1), np.float32)}, r"input 'p' has shape \[1, 1, 1\]"),
        ({**feed(1, 1), "x": np.zeros((1, 1))}, "type float64 instead of float32"),
    ],
)
def test_feeds_that_the_engine_does_not_take(session: EngineSession, feeds: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        session.run(feeds)


def test_shapes_that_repeat_are_recorded_and_replayed(session: EngineSession, memory: Memory) -> None:
    for seed in range(4):
        feeds = feed(1, 3, seed=seed)
        np.testing.assert_array_equal(session.run(feeds)["y"], 2 * feeds["x"])
    done = [entry for entry in memory.log if entry in ("run", "record", "replay")]
    assert done == ["run", "record", "replay", "replay", "replay"]
    session.run(feed(1, 4))  # another shape runs as it is
    assert memory.log[-2:] == ["run", "wait"]


def test_few_recordings_are_kept(
    session: EngineSession, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_runner, "RECORDINGS", 2)
    for past in (1, 1, 2, 3):
        session.run(feed(1, past))
    assert memory.log.count("forget") == 1
    session.close()
    assert memory.log[-1] == "close"


def test_without_recording_every_run_is_launched(plan: Path, memory: Memory) -> None:
    session = EngineSession.over(plan, fake(Engine(memory)), memory, record=False)
    for _ in range(3):
        session.run(feed(1, 3))
    assert memory.log.count("run") == 3 and "record" not in memory.log


def test_a_cache_that_stays_on_the_device(session: EngineSession, memory: Memory) -> None:
    """Steps of decoding: what one step returns is fed to the next without a copy."""
    feeds = feed(3, 0)
    (cache,) = session.run_values(feeds, ["q"])
    expected = feeds["x"]
    blocks = 0
    for step in range(6):
        token = feed(1, 0, seed=step + 9)["x"]
        y, grown = session.run_values({"x": token, "p": cache}, ["y", "q"])
        expected = np.concatenate([expected, token], axis=1)
        np.testing.assert_array_equal(y.numpy(), 2 * token)
        np.testing.assert_array_equal(grown.numpy(), expected)
        assert isinstance(grown, DeviceValue) and grown.address != cache.address
        y.free()
        cache.free()
        cache = grown
        blocks = len(memory.blocks) if step == 1 else blocks
    assert len(memory.blocks) == blocks, "memory is used again"


def test_a_plan_that_cannot_be_loaded(plan: Path, memory: Memory) -> None:
    with pytest.raises(UserError, match=r"cannot load .*model.engine: built for another device$"):
        EngineSession.over(plan, fake(None), memory)
    with pytest.raises(UserError, match="needs 12,345 bytes besides its weights"):
        EngineSession.over(plan, fake(Engine(memory, fits=False)), memory)


def test_a_run_that_fails(session: EngineSession) -> None:
    session._engine.works = False
    with pytest.raises(UserError, match="does not run on these feeds"):
        session.run(feed(1, 1))


def test_blocks_grow_in_steps() -> None:
    assert [_block(n) for n in (0, 1, 256, 257, 5000)] == [256, 256, 256, 512, 8192]
    assert _block(1 << 20) == 1 << 20 and _block((1 << 20) + 1) == 2 << 20


# --- engine.json beside the plan

REPORT = {
    "plan": {"file": "model.engine", "sha256": "", "bytes": 4},
    "backend": {"name": "rtx", "package": "tensorrt-rtx", "version": "1.0", "compute_capabilities": ["8.6"]},
    "options": engine_options({}).model_dump(mode="json"),
    "command": "onnx-autoglm build model.onnx -o model.engine",
}


def report_with(**changes: Any) -> EngineReport:
    empty = {name: None for name in EngineReport.__dataclass_fields__}
    return EngineReport(**{**empty, **REPORT, **changes})  # type: ignore[arg-type]


HERE = Backend("rtx", "1.0", None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"backend": {**REPORT["backend"], "name": "tensorrt", "package": "tensorrt"}},
            "built by tensorrt, not tensorrt-rtx",
        ),  # type: ignore[dict-item]
        (
            {"backend": {**REPORT["backend"], "version": "0.9"}},
            "by tensorrt-rtx 0.9 and this is tensorrt-rtx 1.0",
        ),  # type: ignore[dict-item]
        (
            {"backend": {**REPORT["backend"], "compute_capabilities": ["9.0"]}},
            "for compute capability 9.0 and card has 8.6",
        ),  # type: ignore[dict-item]
    ],
)
def test_a_plan_for_something_else(changes: dict[str, Any], words: str) -> None:
    gpu = Device("card", "8.6", 1 << 30)
    refuse_foreign(report_with(), Path("model.engine"), HERE, gpu)
    with pytest.raises(UserError, match=f"{words}.*build it again here: onnx-autoglm build"):
        refuse_foreign(report_with(**changes), Path("model.engine"), HERE, gpu)


def test_a_plan_that_was_built_to_run_elsewhere() -> None:
    gpu = Device("card", "8.6", 1 << 30)
    options = {"version_compatible": True, "hardware_compatible": "ampere-plus"}
    backend = {**REPORT["backend"], "version": "0.9", "compute_capabilities": ["9.0"]}  # type: ignore[dict-item]
    changes = {"backend": backend, "options": engine_options(options).model_dump(mode="json")}
    refuse_foreign(report_with(**changes), Path("model.engine"), HERE, gpu)


def test_a_plan_that_its_description_does_not_fit(plan: Path) -> None:
    assert described(plan) is None
    report_with().write(plan.with_name("engine.json"))
    with pytest.raises(UserError, match="is not the engine that .*engine.json describes"):
        described(plan)
    assert backend_of(plan, "auto") == "rtx" and backend_of(plan, "tensorrt") == "tensorrt"
    data = json.loads(plan.with_name("engine.json").read_text())
    plan.with_name("engine.json").write_text(json.dumps({**data, "version": 9}))
    with pytest.raises(UserError, match="of another version of onnx-autoglm"):
        described(plan)


# --- against the real interface


@needs_rtx
def test_the_backend_has_all_that_the_session_uses() -> None:
    """The numpy backend above must not allow what the real one has not."""
    import tensorrt_rtx as trt

    homes = {"_engine": trt.ICudaEngine, "_context": trt.IExecutionContext}
    used: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(Path(engine_runner.__file__).read_text())):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Attribute)
            and node.value.attr in homes
        ):
            used.add((node.value.attr, node.attr))
    assert len(used) > 15
    assert not [item for item in used if not hasattr(homes[item[0]], item[1])]
    kinds = {name for name in dir(trt.DataType) if name.isupper()}
    assert set(engine_runner._TYPES) <= kinds
    assert hasattr(trt.Runtime, "engine_host_code_allowed") and hasattr(
        trt.Runtime, "deserialize_cuda_engine"
    )


@needs_rtx
@pytest.mark.skipif(engine_backend.device() is not None, reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    source = recipes.build("glm-gqa-op20", ROOT) / "model.onnx"
    onnx_autoglm.build(source, tmp_path / "m.engine", backend="rtx", sequence="1:8:16")
    with pytest.raises(UserError) as error:
        EngineSession(tmp_path / "m.engine")
    assert len(str(error.value).splitlines()) == 1 and "CUDA" in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        EngineSession(tmp_path / "none.engine")


class Off:
    """A session whose results are a little off."""

    def __init__(self, session: Session, factor: float) -> None:
        self.session, self.factor = session, factor
        self.output_names = session.output_names

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array * np.float32(self.factor) for name, array in self.session.run(feeds).items()}


def test_the_comparator_sees_differences() -> None:
    pytest.importorskip("polygraphy")
    source = model("g (float[b,4] x) => (float[b,4] y) <float[4,4] w> { y = MatMul(x, w) }")
    session = Session(source)
    feeds = [first_working(session, candidate_feeds(source, seed)) for seed in range(2)]
    same = compare_sessions(source, session, Session(source), feeds, rtol=1e-6, atol=0)
    assert same.close and same.absolute == {"y": 0.0}
    off = compare_sessions(source, session, Off(session, 1.01), feeds, rtol=1e-3, atol=0)
    assert not off.close and off.relative["y"] == pytest.approx(0.01, rel=0.02)
    assert compare_sessions(source, session, Off(session, 1.01), feeds, rtol=2e-2, atol=0).close


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["glm-gqa-op20", "glm-gqa-op20-kv", "glm-gqa-op20-kv-fp16", "glm4moe-gqa-op20"]
)
def test_an_engine_computes_what_onnxruntime_does(name: str, tmp_path: Path) -> None:
    source = recipes.build(name, ROOT) / "model.onnx"
    onnx_autoglm.build(source, tmp_path / "m.engine", batch="1:2:4", sequence="1:16:64", past="1:16:64")
    assert compare_engine(tmp_path / "m.engine", source).close


@pytest.mark.gpu
def test_decoding_on_a_gpu_keeps_the_cache_there(tmp_path: Path) -> None:
    """Recorded runs, and a cache that is fed back, give what a plain run gives."""
    from onnx_autoglm.modelfile import open_model

    source = recipes.build("glm-gqa-op20-kv-static", ROOT) / "model.onnx"
    onnx_autoglm.build(source, tmp_path / "m.engine")
    opened = open_model(source)
    session = Session(opened)
    with EngineSession(tmp_path / "m.engine") as engine:
        for seed in range(4):
            feeds = first_working(session, candidate_feeds(opened, seed))
            expected, actual = session.run(feeds), engine.run(feeds)
            values = engine.run_values(feeds, engine.output_names)
            for key, value in zip(engine.output_names, values, strict=True):
                np.testing.assert_allclose(actual[key], expected[key], rtol=1e-2, atol=1e-2)
                np.testing.assert_allclose(value.numpy(), expected[key], rtol=1e-2, atol=1e-2)
