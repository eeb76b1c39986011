"""What is installed, and what starting the program loads."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # new in Python 3.11

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ["torch", "transformers", "tensorrt", "tensorrt_rtx", "polygraphy", "onnxruntime"]


def _modules(folder: str, name: str) -> set[str]:
    return {f"{name}/{file.relative_to(ROOT / folder).as_posix()}" for file in (ROOT / folder).rglob("*.py")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy, so that building leaves nothing behind in the checkout and finds nothing left over in it."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("onnx_autoglm", "passes", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignore)
    return copy


def _wheel_modules(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def _build_wheel(checkout: Path, out: Path) -> Path:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, checkout]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return wheel


def test_wheel_contents(checkout, tmp_path):
    names = _wheel_modules(_build_wheel(checkout, tmp_path))
    assert {name.split("/")[0] for name in names} == {"onnx_autoglm"}
    core = {module for module in _modules("onnx_autoglm", "onnx_autoglm") if "/passes/" not in module}
    assert {n for n in names if n.endswith(".py")} == core | _modules("passes", "onnx_autoglm/passes")
    assert "onnx_autoglm/py.typed" in names


def test_sdist_builds_the_same_wheel(checkout, tmp_path):
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, cwd=checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    from_sdist = _wheel_modules(_build_wheel(unpacked, tmp_path / "a"))
    assert from_sdist == _wheel_modules(_build_wheel(checkout, tmp_path / "b"))


def test_the_passes_are_importable_without_an_install():
    command = [sys.executable, "-S", "-c", "import onnx_autoglm.passes as p; print(p.__file__)"]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert Path(result.stdout.strip()).samefile(ROOT / "passes" / "__init__.py")


def test_every_sub_package_is_listed():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "onnx_autoglm").rglob("__init__.py")}
    listed = {Path(package.replace(".", "/")) for package in setup["packages"]}
    assert listed == folders | {Path("onnx_autoglm/passes")}
    assert not [file for file in (ROOT / "passes").iterdir() if file.is_dir() and file.name != "__pycache__"]


def test_no_module_hides_a_function_of_its_name():
    """`onnx_autoglm.sweep` must stay the function, also after a module of the package was imported."""
    package = importlib.import_module("onnx_autoglm")
    modules = {file.stem for file in (ROOT / "onnx_autoglm").glob("*.py")}
    assert not modules & set(package.__all__)


def test_help_is_light():
    code = (
        "import sys; from onnx_autoglm.cli import main; sys.argv = ['onnx-autoglm', '--help']\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "finally: print('LOADED', *sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    text, loaded = result.stdout.rsplit("LOADED", 1)
    assert "optimize" in text
    assert not {name.split(".")[0] for name in loaded.split()} & set(HEAVY)


def test_all_runtime_dependencies_are_pinned_in_the_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    installed = ("dev", "export", "bench", "eval", "images", "plot", "polygraphy", "rtx")
    wanted = project["dependencies"] + [one for extra in installed for one in extras[extra]]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    names = {requirement.split(">")[0].split("=")[0].lower().replace("_", "-") for requirement in wanted}
    assert names <= pinned
