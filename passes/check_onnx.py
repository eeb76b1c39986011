"""Asks the ONNX checker, with full shape inference, about a written model."""

from __future__ import annotations

from pathlib import Path

from onnx_autoglm.errors import CheckFailed


def check_onnx(result: Path, source: Path) -> list[str]:
    """Checks `result`; a complaint that the source gives rise to as well is a note, not a failure.

    Raises CheckFailed for any other complaint.
    """
    complaint = _complaint(result)
    if complaint is None:
        return []
    if _complaint(source) is not None:
        return [f"the source does not pass the ONNX checker, nor does the result: {complaint}"]
    raise CheckFailed(f"the result does not pass the ONNX checker: {complaint}")


def _complaint(path: Path) -> str | None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # noqa: BLE001 - the checker raises several kinds, each with its reason
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return None
