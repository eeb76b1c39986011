"""Whether the sizes of a profile fit the graph, by shape inference. Some backends find that out only when they run."""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx
import onnx_ir as ir

from onnx_autoglm.engine_profiles import Profile
from onnx_autoglm.errors import UserError
from onnx_autoglm.tensor_slots import tensor_slots

_INLINE_BYTES = 1024  # larger tensors are weights, whose numbers shapes do not depend on


def refuse_misfit(model: ir.Model, profiles: Sequence[Profile]) -> None:
    """Raises UserError, with the node, if the graph contradicts the smallest, usual or largest sizes of a profile."""
    skeleton = _skeleton(model)
    tried: set[tuple[object, ...]] = set()
    for profile in profiles:
        for index, corner in enumerate(("smallest", "usual", "largest")):
            sizes = {name: shapes[index] for name, shapes in profile.shapes.items()}
            key = tuple(sorted(sizes.items()))
            complaint = "" if key in tried else _complaint(skeleton, sizes)
            tried.add(key)
            if complaint:
                raise UserError(
                    f"the {corner} sizes of the {profile.name} profile do not fit the graph: {complaint}; see --batch, "
                    "--sequence, --past and --shape"
                )


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    """The graph with nothing but the shapes of its weights, and no shapes of what is computed."""
    copy = model.clone()
    for slot in tensor_slots(copy):
        tensor = slot.tensor
        if tensor.dtype != ir.DataType.STRING and tensor.nbytes > _INLINE_BYTES:
            shape = ir.Shape(tensor.shape.numpy())
            name = slot.name or tensor.name or ""
            slot.put(
                ir.ExternalTensor(
                    "weights", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name, base_dir=""
                )
            )
    proto = ir.serde.serialize_model(copy)
    del proto.graph.value_info[:]
    for value in proto.graph.output:  # its symbols are those of the inputs, which have sizes now
        value.type.tensor_type.ClearField("shape")
    return proto


def _complaint(skeleton: onnx.ModelProto, sizes: dict[str, tuple[int, ...]]) -> str:
    for value in skeleton.graph.input:
        if value.name in sizes:
            dims = value.type.tensor_type.shape.dim
            for dim, size in zip(dims, sizes[value.name], strict=True):
                dim.Clear()
                dim.dim_value = size
    try:
        onnx.shape_inference.infer_shapes(skeleton, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        return _plain(str(error))
    return ""


def _plain(message: str) -> str:
    """The first complaint, on one line: the operator, the node where it has a name, and the reason."""
    text = " ".join(message.split())
    text = text.replace("[ShapeInferenceError] ", "").removeprefix("Inference error(s): ")
    found = re.match(r"\(op_type:(\w+)(?:, node name: ([^)]*))?\): (.*?)(?= \(op_type:|$)", text)
    if found is None:
        return text[:300]
    name = f" {found[2]!r}" if found[2] else ""
    return f"{found[1]}{name}: {found[3]}"[:300]
