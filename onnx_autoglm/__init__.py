"""Graph-level structured pruning for ONNX models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnx_autoglm.errors import CheckFailed, UserError

if TYPE_CHECKING:
    from onnx_autoglm.bench_options import BenchOptions
    from onnx_autoglm.bench_report import Bench
    from onnx_autoglm.bench_run import bench
    from onnx_autoglm.conversion import Conversion, convert
    from onnx_autoglm.engine import build
    from onnx_autoglm.engine_options import EngineOptions
    from onnx_autoglm.engine_report import EngineReport
    from onnx_autoglm.evaluation import Evaluation, evaluate
    from onnx_autoglm.generate import Generated, Generator
    from onnx_autoglm.options import Options
    from onnx_autoglm.pipeline import check, inspect, optimize
    from onnx_autoglm.quantization.pipeline import quantize
    from onnx_autoglm.quantization.report import QuantizationReport
    from onnx_autoglm.report import Inspection, Report
    from onnx_autoglm.sampling import Sampling
    from onnx_autoglm.sweep_run import sweep
    from onnx_autoglm.sweep_table import Sweep

    __version__: str

__all__ = [
    "Bench",
    "BenchOptions",
    "CheckFailed",
    "Conversion",
    "EngineOptions",
    "EngineReport",
    "Evaluation",
    "Generated",
    "Generator",
    "Inspection",
    "Options",
    "QuantizationReport",
    "Report",
    "Sampling",
    "Sweep",
    "UserError",
    "bench",
    "build",
    "check",
    "convert",
    "evaluate",
    "inspect",
    "optimize",
    "quantize",
    "sweep",
]

_HOMES = {
    "bench": "onnx_autoglm.bench_run",
    "Bench": "onnx_autoglm.bench_report",
    "BenchOptions": "onnx_autoglm.bench_options",
    "Generated": "onnx_autoglm.generate",
    "Generator": "onnx_autoglm.generate",
    "Sampling": "onnx_autoglm.sampling",
    "build": "onnx_autoglm.engine",
    "EngineOptions": "onnx_autoglm.engine_options",
    "EngineReport": "onnx_autoglm.engine_report",
    "check": "onnx_autoglm.pipeline",
    "convert": "onnx_autoglm.conversion",
    "Conversion": "onnx_autoglm.conversion",
    "evaluate": "onnx_autoglm.evaluation",
    "Evaluation": "onnx_autoglm.evaluation",
    "inspect": "onnx_autoglm.pipeline",
    "optimize": "onnx_autoglm.pipeline",
    "Options": "onnx_autoglm.options",
    "quantize": "onnx_autoglm.quantization.pipeline",
    "QuantizationReport": "onnx_autoglm.quantization.report",
    "Inspection": "onnx_autoglm.report",
    "Report": "onnx_autoglm.report",
    "Sweep": "onnx_autoglm.sweep_table",
    "sweep": "onnx_autoglm.sweep_run",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: `onnx-autoglm --help` must not wait for onnx and numpy."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("onnx-autoglm")
        except PackageNotFoundError:
            return "0+uninstalled"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
