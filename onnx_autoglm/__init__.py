"""Graph-level structured pruning for ONNX models."""

from __future__ import annotations

from onnx_autoglm.errors import CheckFailed, UserError

__all__ = ["CheckFailed", "UserError"]


def __getattr__(name: str) -> str:
    # Reading the installed metadata takes a few milliseconds that most imports do not need.
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("onnx-autoglm")
        except PackageNotFoundError:
            return "0+uninstalled"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
