"""Consumers: the products with a weight at which a structure ends, and where least squares is done."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_autoglm.axes.analysis import Analysis
from onnx_autoglm.axes.dims import leaves
from onnx_autoglm.axes.facts import Contraction, PinKind
from onnx_autoglm.axes.selection import Indices, coordinates, merged
from onnx_autoglm.axes.structures import Structure, Structures

Weight = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Consumer:
    """A contraction with the initializer behind its weight operand and the transposes between."""

    contraction: Contraction
    initializer: ir.Value
    axis: int  # of the initializer, the contracted one

    def rows(self) -> Weight:
        """The weight as `[k, outputs]`: one row per contracted index."""
        assert self.initializer.const_value is not None
        return as_rows(self.initializer.const_value, self.axis)


def as_rows(tensor: ir.TensorProtocol, axis: int) -> Weight:
    """A weight as `[k, outputs]` with the given axis in front, in float64."""
    array = np.moveaxis(tensor.numpy().astype(np.float64), axis, 0)
    return array.reshape(array.shape[0], -1)


def find_consumers(structures: Structures) -> list[Consumer]:
    """All contractions whose weight is an initializer, directly or through transposes."""
    found = []
    for contraction in structures.analysis.contractions:
        value, axis = contraction.node.inputs[contraction.weight], contraction.weight_axis
        while value is not None and value.producer() is not None:
            producer = value.producer()
            assert producer is not None
            perm = producer.attributes.get("perm")
            if producer.op_type != "Transpose" or perm is None:
                break
            order = list(perm.as_ints())
            axis = order[axis] - len(order)
            value = producer.inputs[0]
        if value is not None and value.is_initializer() and value.const_value is not None:
            rank = len(value.const_value.shape)
            found.append(Consumer(contraction, value, axis % rank))
    return found


def consumers_of(structure: Structure, consumers: list[Consumer]) -> list[Consumer]:
    """The consumers that contract the structure together with all that its selection varies with."""
    wanted = {structure.atom, *structure.outers}
    return [c for c in consumers if wanted <= set(leaves(c.contraction.dim))]


def members(structure: Structure, consumer: Consumer) -> Indices:
    """For every contracted index of a consumer, the flat index of the structure it belongs to, or -1.

    Flat over `[*outer sizes, size]`.
    """
    places = merged(coordinates(consumer.contraction.dim))
    index = places[structure.atom].copy()
    stride = structure.size
    for outer in reversed(structure.outers):
        assert isinstance(outer.size, int)
        index = np.where(index >= 0, index + stride * places[outer], -1)
        stride *= outer.size
    return index


def normed_values(analysis: Analysis) -> set[str]:
    """The names of values along whose last axis some norm takes a mean."""
    normed = {atom for dim, pin in analysis.pins if pin.kind == PinKind.NORM for atom in leaves(dim)}
    return {
        value.name or "" for value, dims in analysis.values.items() if dims and normed & set(leaves(dims[-1]))
    }


def retraced(graph: ir.Graph, before: ir.Node, weight: ir.Value, path: ir.Value | None) -> ir.Value:
    """The weight through copies of the transposes that lead from the old one to its consumer."""
    perms: list[list[int]] = []
    while path is not None and path.producer() is not None:
        producer = path.producer()
        assert producer is not None
        perms.append(list(producer.attributes["perm"].as_ints()))
        path = producer.inputs[0]
    for perm in reversed(perms):
        turned = ir.node("Transpose", [weight], {"perm": perm})
        turned.outputs[0].dtype = weight.dtype or ir.DataType.FLOAT
        graph.insert_before(before, turned)
        weight = turned.outputs[0]
    return weight
