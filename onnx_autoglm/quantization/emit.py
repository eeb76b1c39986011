"""Writes the emissions of a plan and checks them."""

from __future__ import annotations

from pathlib import Path

from onnx_autoglm import modelfile
from onnx_autoglm.errors import CheckFailed
from onnx_autoglm.passes.check_onnx import check_loads, check_onnx
from onnx_autoglm.passes.insert_qdq import insert_qdq
from onnx_autoglm.quantization.audit import Audit, audit
from onnx_autoglm.quantization.decide import Plan
from onnx_autoglm.quantization.prepare import Progress
from onnx_autoglm.quantization.schemes import FILES, Target


def emit(plan: Plan, target: Target, source: Path, folder: Path, progress: Progress) -> Path:
    """Writes one emission into a folder and checks that it is a valid model that loads; returns its path.

    Raises CheckFailed if the ONNX checker or ONNX Runtime refuses it, but not the `source`.
    """
    progress(f"write {FILES[target]}")
    model = plan.model.clone()
    insert_qdq(model, plan.decisions, plan.thresholds, target, plan.chains, lookups=plan.lookups)
    path = folder / FILES[target]
    modelfile.save_model(model, path)
    check_onnx(path, source)
    if target == "cpu":
        check_loads(path, source)
    return path


def audited(path: Path, plan: Plan, strict: bool, scratch: Path) -> tuple[Audit, list[str]]:
    """Whether the CPU emission runs in integers as promised, and a note if not.

    Raises CheckFailed if it does not and `strict` is set.
    """
    result = audit(path, plan.decisions, scratch)
    if result.holds:
        return result, []
    first = "".join(f", the first {entry['node']} ({entry['kernel']})" for entry in result.fell_back[:1])
    message = (
        f"{max(len(result.fell_back), result.promised - result.integer)} of {result.promised} products run in floating point "
        f"in ONNX Runtime although their weights are integers{first}"
    )
    if strict:
        raise CheckFailed(f"{message}; leave --strict out to write it nevertheless")
    return result, [f"WARNING: {message}"]
