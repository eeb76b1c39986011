"""Raises the operator set of a model, with its weights left where they are."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from onnx_autoglm.errors import UserError

_SMALL_BYTES = 1 << 10  # smaller tensors travel with the graph: the converter reads shapes from them


def raise_opset(model: ir.Model, opset: int) -> ir.Model:
    """A copy of the model in a newer operator set.

    Raises UserError if the ONNX version converter cannot do it.
    """
    now = model.opset_imports.get("", 0)
    stripped = model.clone()
    weights: dict[str, ir.TensorProtocol] = {}
    for name, value in stripped.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes <= _SMALL_BYTES:
            continue
        weights[name] = tensor
        shape = ir.Shape(tensor.shape.numpy())
        value.const_value = ir.ExternalTensor(
            "weights", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name
        )
    try:
        proto = onnx.version_converter.convert_version(ir.serde.serialize_model(stripped), opset)
    except Exception as error:  # whatever the converter makes of an operator that it cannot convert
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the model's opset {now} is too old for bfloat16, and it cannot be converted to {opset} ({reason}): export it "
            f"again with opset {opset}"
        ) from error
    result = ir.serde.deserialize_model(proto)
    for name, tensor in weights.items():
        result.graph.initializers[name].const_value = tensor
    result.ir_version = max(result.ir_version, 10)
    return result
