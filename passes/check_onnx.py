"""Checks a written model as others will see it: the ONNX checker, and ONNX Runtime on the file itself."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from onnx_autoglm.errors import CheckFailed, UserError
from onnx_autoglm.mapped_tensor import MappedTensor
from onnx_autoglm.modelfile import open_model
from onnx_autoglm.tensor_slots import tensor_slots

_SKELETON_BYTES = 64 << 20  # files up to this size are checked as they are


def check_onnx(result: Path, source: Path) -> list[str]:
    """Asks the ONNX checker, with full shape inference, about `result`.

    A complaint that the source gives rise to as well, word for word, is returned as a note.
    Raises CheckFailed for any other complaint.
    """
    complaint = _complaint(result)
    if complaint is None:
        return []
    if _complaint(source) == complaint:
        return [f"neither the source nor the result passes the ONNX checker: {complaint}"]
    raise CheckFailed(f"the result does not pass the ONNX checker: {complaint}")


def _complaint(path: Path) -> str | None:
    import onnx

    skeleton = _skeleton(path) if path.stat().st_size > _SKELETON_BYTES else None
    try:
        onnx.checker.check_model(str(skeleton or path), full_check=True)
    except Exception as error:  # noqa: BLE001 - the checker raises several kinds, each with its reason
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    finally:
        if skeleton is not None:
            skeleton.unlink(missing_ok=True)
    return None


def _skeleton(path: Path) -> Path | None:
    """The model without its weights, which become external data in the file where they lie.

    The checker reads a whole file into memory; this keeps a model with inline weights out of it. None if
    the folder cannot be written to.
    """
    folder = path.resolve().parent
    if not os.access(folder, os.W_OK):
        return None
    model = open_model(path)
    for slot in tensor_slots(model):
        tensor = slot.tensor
        if isinstance(tensor, MappedTensor) and tensor.file.resolve().parent == folder:
            slot.put(
                ir.ExternalTensor(
                    tensor.file.name,
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=tensor.name or "",
                    base_dir=folder,
                )
            )
    target = folder / f".{path.name}.skeleton-{os.getpid()}"
    target.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    return target


def check_loads(result: Path, source: Path) -> list[str]:
    """Loads the file in ONNX Runtime, as a user would, without this package's help.

    Where the CPU lacks kernels for the types of the source as well, that is a note: the proof ran in float32.
    Raises UserError if the source does not load either for another reason, CheckFailed otherwise.
    """
    problem = _load(result)
    if not problem:
        return []
    before = _load(source)
    if "NOT_IMPLEMENTED" in problem and "NOT_IMPLEMENTED" in before:
        return [
            "ONNX Runtime's CPU has no kernels for the 16-bit types of this model; it was proved in float32"
        ]
    if before:
        raise UserError(f"ONNX Runtime cannot load the model: {before}")
    raise CheckFailed(f"ONNX Runtime cannot load the result: {problem}")


def _load(path: Path) -> str:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Weights stay mapped: packing them would copy the whole model into memory.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - ONNX Runtime raises its own kinds, each with its reason
        return str(error).splitlines()[0]
    return ""
