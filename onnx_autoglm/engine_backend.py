"""What builds and runs engines: TensorRT, or TensorRT-RTX, through one interface.

Both have one Python API under two module names. Nothing here is imported before an engine is asked for.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import importlib.util
import sys
from typing import Any

from onnx_autoglm.engine_options import EngineOptions
from onnx_autoglm.errors import UserError

MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
EXTRAS = {name: f"pip install 'onnx-autoglm[{name}]'" for name in MODULES}
OLDEST = (10, 12)  # of tensorrt: the first with all of strong typing, on which the builder relies
OPSETS = (9, 25)  # of ONNX that the parsers read

# Options that a backend has not, and what to do instead.
_UNAVAILABLE = {
    "rtx": {
        "timing_cache": "it measures no kernels when it builds: leave --timing-cache out",
        "optimization_level": "its kernels are chosen on the device that runs them: leave --optimization-level out",
        "version_compatible": "its lean runtime is not part of the package: build again with each version",
        "hardware_compatible": "name the GPUs with --compute-capability, or none for all",
    },
    "tensorrt": {"compute_capability": "it builds for the GPU at hand; see --hardware-compatible"},
}
_NEED_DEVICE = {"rtx": ("refit", "strip_plan"), "tensorrt": ()}


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU, as its driver describes it."""

    name: str
    compute_capability: str
    memory: int


@dataclasses.dataclass(frozen=True)
class Backend:
    """An installed backend: `trt` is its module."""

    name: str
    version: str
    trt: Any

    @property
    def described(self) -> str:
        return f"{MODULES[self.name].replace('_', '-')} {self.version}"


def find_backend(choice: str) -> Backend:
    """Loads the backend of the name, or for `auto` the one that is installed.

    Raises UserError, with the command that installs one, if there is none that works.
    """
    names = list(MODULES) if choice == "auto" else [choice]
    problems: dict[str, str] = {}
    for name in names:
        if importlib.util.find_spec(MODULES[name]) is None:
            problems[name] = "not installed"
            continue
        try:
            return _load(name)
        except UserError as error:
            problems[name] = str(error)
    found = "; ".join(
        f"{name}: {problem}" for name, problem in problems.items() if problem != "not installed"
    )
    if choice == "auto":
        hint = f"{EXTRAS['rtx']} (builds without a GPU) or {EXTRAS['tensorrt']}"
    else:
        hint = EXTRAS[choice]
    raise UserError(f"{found or 'no backend to build or run engines is installed'}; run: {hint}")


def _load(name: str) -> Backend:
    if importlib.util.find_spec("polygraphy") is None:
        raise UserError("polygraphy is missing")
    try:
        trt = importlib.import_module(MODULES[name])
    except Exception as error:  # missing libraries, or a driver that is too old, in many forms
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{MODULES[name]} cannot be loaded ({reason})") from error
    version = str(trt.__version__)
    if name == "tensorrt" and _numbers(version) < OLDEST:
        raise UserError(f"tensorrt {version} is older than {'.'.join(map(str, OLDEST))}")
    from polygraphy import config

    # Polygraphy binds itself to one of both modules when its TensorRT parts are first imported.
    bound = any(module.startswith("polygraphy.backend.trt") for module in sys.modules)
    if bound and config.USE_TENSORRT_RTX != (name == "rtx"):
        raise UserError("one process can use one of tensorrt and rtx: use the other in a new process")
    config.USE_TENSORRT_RTX = name == "rtx"
    return Backend(name, version, trt)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def refuse_unavailable(backend: Backend, options: EngineOptions, gpu: Device | None) -> None:
    """Raises UserError if options are set that the backend does not have, here or at all."""
    defaults = EngineOptions()
    for name, advice in _UNAVAILABLE[backend.name].items():
        if getattr(options, name) != getattr(defaults, name):
            raise UserError(f"{backend.described} has no option --{name.replace('_', '-')}: {advice}")
    for name in _NEED_DEVICE[backend.name]:
        if getattr(options, name) and gpu is None:
            raise UserError(
                f"{backend.described} needs a GPU to build with --{name.replace('_', '-')}, and none is at hand: build "
                "on the machine that has one"
            )
    for text in options.compute_capability:
        if not hasattr(backend.trt.ComputeCapability, f"SM{text.replace('.', '')}"):
            known = [name for name in dir(backend.trt.ComputeCapability) if name.startswith("SM")]
            raise UserError(
                f"{backend.described} does not build for compute capability {text}; it knows "
                + ", ".join(f"{name[2:-1]}.{name[-1]}" for name in known)
            )


def device() -> Device | None:
    """The first GPU, or None without one. Asks the driver alone, which no package has to be installed for."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    memory, name = ctypes.c_size_t(), ctypes.create_string_buffer(256)
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(handle), 0),
        lambda: driver.cuDeviceGetName(name, len(name), handle),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, handle),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, handle),
        lambda: driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle),
    )
    if any(call() != 0 for call in calls):
        return None
    return Device(name.value.decode(errors="replace"), f"{major.value}.{minor.value}", memory.value)


_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
