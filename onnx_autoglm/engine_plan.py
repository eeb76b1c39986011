"""Loads a plan, and refuses one that was built for something else before the backend is asked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from onnx_autoglm.engine_backend import Backend, Device
from onnx_autoglm.engine_log import BuildLog
from onnx_autoglm.engine_report import NAME, EngineReport, read_engine_report
from onnx_autoglm.errors import UserError


def described(path: Path) -> EngineReport | None:
    """The `engine.json` beside a plan, if there is one and it is about this plan.

    Raises UserError if it is about the plan's name, but other bytes.
    """
    beside = path.with_name(NAME)
    if not beside.exists():
        return None
    report = read_engine_report(beside)
    if report.plan is None or report.plan["file"] != path.name:
        return None
    if report.plan["sha256"] != hashlib.sha256(path.read_bytes()).hexdigest():
        raise UserError(
            f"{path} is not the engine that {beside} describes: copy both again, or build it again"
        )
    return report


def backend_of(path: Path, choice: str) -> str:
    """Which backend a plan needs: what is asked for, or with `auto` what `engine.json` says."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    beside = path.with_name(NAME)
    if choice != "auto" or not beside.exists():
        return choice
    try:
        return str(json.loads(beside.read_text())["backend"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return choice


def refuse_foreign(report: EngineReport, path: Path, backend: Backend, gpu: Device | None) -> None:
    """Raises UserError if the plan is of another backend, version or kind of GPU."""
    again = f"build it again here: {report.command}"
    if report.backend["name"] != backend.name:
        raise UserError(f"{path} was built by {report.backend['package']}, not {backend.described}; {again}")
    if report.backend["version"] != backend.version and not report.options["version_compatible"]:
        raise UserError(
            f"{path} was built by {report.backend['package']} {report.backend['version']} and this is "
            f"{backend.described}; {again}"
        )
    targets = report.backend["compute_capabilities"]
    portable = report.options["hardware_compatible"] != "none"
    if gpu is not None and targets and not portable and gpu.compute_capability not in targets:
        raise UserError(
            f"{path} was built for compute capability {', '.join(targets)} and {gpu.name} has "
            f"{gpu.compute_capability}; {again}"
        )


def deserialize(path: Path, backend: Backend, runtime: Any, log: BuildLog) -> Any:
    """The engine of a plan. Raises UserError with the backend's reason."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    runtime.engine_host_code_allowed = True  # a version-compatible plan brings its own runtime
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise UserError(
            f"{backend.described} cannot load {path}: {log.reason('it was built for another backend, version or GPU')}"
        )
    return engine
