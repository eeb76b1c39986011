"""The places in a model that hold a tensor, and how much those add up to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir


@dataclass
class Slot:
    """A place in a model that holds a tensor: an initializer or a node attribute. `put` replaces the tensor."""

    tensor: ir.TensorProtocol
    put: Callable[[ir.TensorProtocol], None]
    is_initializer: bool
    name: str | None = None


def tensor_slots(model: ir.Model) -> list[Slot]:
    """Every tensor of a model: graphs, subgraphs and functions, initializers first."""
    slots: list[Slot] = []
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                slots.append(_initializer_slot(value, value.const_value))
    containers: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for container in containers:
        for node in container.all_nodes():
            for attribute in node.attributes.values():
                slots += _attribute_slots(node, attribute)
    return slots


def parameters(model: ir.Model) -> int:
    """The number of weights: elements of floating-point (or quantized, 8 bits or less) initializers."""
    return sum(tensor.size for tensor in _distinct_initializers(model) if _is_weight(tensor.dtype))


def weight_bytes(model: ir.Model) -> int:
    """The bytes of all initializers, shared ones once."""
    return sum(
        tensor.nbytes for tensor in _distinct_initializers(model) if tensor.dtype != ir.DataType.STRING
    )


def _is_weight(dtype: ir.DataType) -> bool:
    return dtype.is_floating_point() or (dtype.is_integer() and dtype.bitwidth <= 8)


def _distinct_initializers(model: ir.Model) -> list[ir.TensorProtocol]:
    slots = (slot for slot in tensor_slots(model) if slot.is_initializer)
    return list({identity(slot.tensor): slot.tensor for slot in slots}.values())


def identity(tensor: ir.TensorProtocol) -> object:
    """Equal for two tensors that are the same bytes of the same file, or the same object."""
    if isinstance(tensor, ir.ExternalTensor):
        return tensor.path, tensor.offset, tensor.nbytes, tensor.dtype
    return id(tensor)


def _initializer_slot(value: ir.Value, tensor: ir.TensorProtocol) -> Slot:
    def put(new: ir.TensorProtocol) -> None:
        value.const_value = new

    return Slot(tensor, put, True, value.name)


def _attribute_slots(node: ir.Node, attribute: ir.Attr) -> list[Slot]:
    if attribute.is_ref() or attribute.type not in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
        return []
    single = attribute.type == ir.AttributeType.TENSOR
    tensors: list[ir.TensorProtocol] = [attribute.value] if single else list(attribute.value)
    current = list(tensors)

    def put_at(index: int) -> Callable[[ir.TensorProtocol], None]:
        def put(new: ir.TensorProtocol) -> None:
            current[index] = new
            value = current[0] if single else tuple(current)
            node.attributes[attribute.name] = ir.Attr(
                attribute.name, attribute.type, value, doc_string=attribute.doc_string
            )

        return put

    return [Slot(tensor, put_at(index), False) for index, tensor in enumerate(tensors)]
