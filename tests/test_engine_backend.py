"""Which backend is used, and what is said where there is none."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from onnx_autoglm import UserError, engine_backend
from onnx_autoglm.engine_backend import Backend, Device, find_backend, refuse_unavailable
from onnx_autoglm.engine_options import engine_options


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | Exception) -> None:
    """Backends that are installed, by module name; an exception is raised when the module is imported."""
    real_find, real_import = importlib.util.find_spec, importlib.import_module

    def find_spec(name: str, *rest: Any) -> Any:
        if name in engine_backend.MODULES.values():
            return object() if name in versions else None
        return real_find(name, *rest)

    def import_module(name: str, *rest: Any) -> Any:
        if name not in versions:
            return real_import(name, *rest)
        version = versions[name]
        if isinstance(version, Exception):
            raise version
        return types.SimpleNamespace(__version__=version)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(importlib, "import_module", import_module)
    for name in [name for name in sys.modules if name.startswith("polygraphy.backend.trt")]:
        monkeypatch.delitem(sys.modules, name)
    polygraphy = pytest.importorskip("polygraphy.config")
    monkeypatch.setattr(polygraphy, "USE_TENSORRT_RTX", polygraphy.USE_TENSORRT_RTX)


def test_auto_prefers_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, tensorrt="10.13.0.35", tensorrt_rtx="1.7.1")
    assert find_backend("auto").described == "tensorrt 10.13.0.35"
    assert find_backend("rtx").described == "tensorrt-rtx 1.7.1"


def test_auto_takes_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ImportError("libnvonnxparser.so.11: cannot open shared object file")
    pretend(monkeypatch, tensorrt=broken, tensorrt_rtx="1.7.1")
    assert find_backend("auto").name == "rtx"
    with pytest.raises(
        UserError, match=r"tensorrt cannot be loaded \(libnvonnxparser.*onnx-autoglm\[tensorrt\]"
    ):
        find_backend("tensorrt")


def test_without_a_backend_the_hint_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    with pytest.raises(UserError, match=r"run: pip install 'onnx-autoglm\[rtx\]'.*or pip install"):
        find_backend("auto")
    with pytest.raises(UserError, match=r"run: pip install 'onnx-autoglm\[tensorrt\]'$"):
        find_backend("tensorrt")


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, tensorrt="10.9.0.34")
    with pytest.raises(UserError, match=r"tensorrt 10.9.0.34 is older than 10.12"):
        find_backend("tensorrt")


RTX = Backend("rtx", "1.7.1", types.SimpleNamespace(ComputeCapability=types.SimpleNamespace(SM86=1, SM120=2)))
TENSORRT = Backend("tensorrt", "11.4.0", types.SimpleNamespace())
GPU = Device("some card", "8.6", 8 << 30)


@pytest.mark.parametrize(
    ("backend", "given", "words"),
    [
        (RTX, {"timing_cache": "t"}, "no option --timing-cache"),
        (RTX, {"version_compatible": True}, "no option --version-compatible"),
        (RTX, {"hardware_compatible": "ampere-plus"}, "--compute-capability"),
        (RTX, {"optimization_level": 3}, "no option --optimization-level"),
        (RTX, {"compute_capability": "9.0"}, "it knows 12.0, 8.6"),
        (RTX, {"refit": True}, "needs a GPU to build with --refit"),
        (RTX, {"strip_plan": True}, "needs a GPU to build with --strip-plan"),
        (TENSORRT, {"compute_capability": "8.6"}, "builds for the GPU at hand"),
    ],
)
def test_options_that_a_backend_has_not(backend: Backend, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        refuse_unavailable(backend, engine_options(given), None)


def test_options_that_a_backend_has() -> None:
    refuse_unavailable(RTX, engine_options({"compute_capability": "8.6", "weight_streaming": True}), None)
    refuse_unavailable(RTX, engine_options({"refit": True, "strip_plan": True}), GPU)
    refuse_unavailable(TENSORRT, engine_options({"timing_cache": "t", "version_compatible": True}), GPU)


def test_the_device_is_asked_from_the_driver_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that answers as the real one does."""
    import ctypes

    def attribute(target: Any, which: int, _: Any) -> int:
        target._obj.value = {75: 9, 76: 0}[which]
        return 0

    def total(target: Any, _: Any) -> int:
        target._obj.value = 80 << 30
        return 0

    def name(buffer: Any, size: int, _: Any) -> int:
        buffer.value = b"a large card"
        return 0

    driver = types.SimpleNamespace(
        cuInit=lambda _: 0,
        cuDeviceGet=lambda target, index: 0,
        cuDeviceGetName=name,
        cuDeviceGetAttribute=attribute,
        cuDeviceTotalMem_v2=total,
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    assert engine_backend.device() == Device("a large card", "9.0", 80 << 30)
    driver.cuInit = lambda _: 100  # no device
    assert engine_backend.device() is None


def test_build_without_a_backend_says_how_to_get_one(tmp_path: Path) -> None:
    """As a user meets it: one line, exit code 1, nothing written. The folder hides whatever is installed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['tensorrt'] = sys.modules['tensorrt_rtx'] = None\n"
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name.startswith('tensorrt') else find(name, *rest)\n"
    )
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "onnx_autoglm", "build", tmp_path / "m.onnx", "-o", out / "m.engine"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "pip install 'onnx-autoglm[rtx]'" in done.stderr
    assert not out.exists()
