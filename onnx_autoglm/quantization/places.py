"""Where integers may compute: products of an activation and a weight, found by the axis engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import onnx_ir as ir

from onnx_autoglm.axes.facts import label
from onnx_autoglm.axes.structures import Structures
from onnx_autoglm.consumers import find_consumers

NARROW = 16  # kernels for integers gain nothing below this many inputs or outputs
_WEIGHTED = frozenset({"MatMul", "Gemm", "Conv"})
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclasses.dataclass(frozen=True)
class Place:
    """A product that may be quantized.

    `node` names it by its first output. `activation` is the value that it multiplies, along `activation_axis` (from
    the end), `operand` the slot of the weight. `initializer` is the constant behind the weight, before any Transpose
    between: its `channel_axis` counts the outputs, its `input_axis` is contracted. `inputs` and `outputs` are the
    sizes of the product (a convolution seen as one), `macs` its multiply-adds per row or output pixel.
    """

    node: str
    op: str
    label: str
    activation: str
    activation_axis: int
    operand: int
    initializer: str
    channel_axis: int
    input_axis: int
    inputs: int
    outputs: int

    @property
    def macs(self) -> int:
        return self.inputs * self.outputs


@dataclasses.dataclass(frozen=True)
class Refused:
    """A product with a weight that stays as it is, and why."""

    label: str
    reason: str
    macs: int


def find_places(structures: Structures) -> tuple[list[Place], list[Refused]]:
    """All products with a weight, in the order of the graph: those that may be quantized, and the others.

    The structures are those of a clone of the model (`cut.analyse`); names are the model's.
    """
    order = {node: number for number, node in enumerate(structures.analysis.graph)}
    places: dict[str, Place] = {}
    refused: dict[str, Refused] = {}
    axes: dict[str, int] = {}  # along which the outputs of each weight lie
    consumers = find_consumers(structures)
    for consumer in sorted(consumers, key=lambda c: order.get(c.contraction.node, 0)):
        node = consumer.contraction.node
        name = node.outputs[0].name or ""
        tensor = consumer.initializer.const_value
        assert tensor is not None
        sizes = list(tensor.shape.numpy())
        reason = _why_not(node, consumer.contraction.weight, consumer.initializer, sizes)
        if reason:
            refused.setdefault(name, Refused(label(node), reason, math.prod(sizes)))
            continue
        channel_axis = 0 if node.op_type == "Conv" else 1 - consumer.axis
        if axes.setdefault(consumer.initializer.name or "", channel_axis) != channel_axis:
            reason = "its weight is read transposed elsewhere, where scales lie along the other axis"
            refused.setdefault(name, Refused(label(node), reason, math.prod(sizes)))
            continue
        activation = node.inputs[consumer.contraction.activation]
        assert activation is not None
        places.setdefault(
            name,
            Place(
                name,
                node.op_type,
                label(node),
                activation.name or "",
                consumer.contraction.activation_axis,
                consumer.contraction.weight,
                consumer.initializer.name or "",
                channel_axis,
                1 if node.op_type == "Conv" else consumer.axis,
                math.prod(sizes) // sizes[channel_axis],
                sizes[channel_axis],
            ),
        )
    known = {*places, *refused}
    for node in structures.analysis.graph:
        weight = node.inputs[1] if node.op_type in _WEIGHTED and len(node.inputs) > 1 else None
        name = node.outputs[0].name or ""
        if name in known or weight is None or not weight.is_initializer() or weight.const_value is None:
            continue
        is_grouped = node.op_type == "Conv" and node.attributes.get_int("group", 1) > 1
        reason = "a grouped convolution" if is_grouped else "its axes are not known"
        refused[name] = Refused(label(node), reason, math.prod(weight.const_value.shape.numpy()))
    return list(places.values()), list(refused.values())


def _why_not(node: ir.Node, operand: int, initializer: ir.Value, sizes: list[int]) -> str:
    """Why a product stays in floating point, or nothing."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in _WEIGHTED:
        return f"no integer kernel is known for {node.domain + '::' if node.domain else ''}{node.op_type}"
    if initializer.const_value is not None and initializer.const_value.dtype not in _FLOATS:
        return f"its weight holds {initializer.const_value.dtype.name}, no floating point"
    if operand != 1:
        return "its weight is the left operand, where kernels expect the activation"
    if node.op_type != "Conv" and len(sizes) != 2:
        return f"its weight is a stack of matrices (rank {len(sizes)})"
    if node.op_type == "Gemm" and (
        node.attributes.get_float("alpha", 1.0) != 1
        or node.attributes.get_float("beta", 1.0) != 1
        or node.attributes.get_int("transA", 0) != 0
    ):
        return "this Gemm scales or transposes its operands"
    if node.op_type == "Conv" and node.attributes.get_int("group", 1) > 1:
        return "a grouped convolution"
    narrow = min(sizes[0], math.prod(sizes[1:]))
    return f"it is narrower than {NARROW}: {sizes[0]} x {math.prod(sizes[1:])}" if narrow < NARROW else ""


def by_activation(places: Iterable[Place]) -> dict[str, list[Place]]:
    """The places that read each activation, by its name."""
    found: dict[str, list[Place]] = {}
    for place in places:
        found.setdefault(place.activation, []).append(place)
    return found
