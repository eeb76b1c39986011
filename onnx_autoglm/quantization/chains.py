"""Convolutions and sums whose results must be integers too, if integer kernels are to compute them.

Products of matrices come with kernels that read integers and give floats; convolutions do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import onnx_ir as ir

from onnx_autoglm.quantization.places import Place

# They commute with rounding to one scale: their result may be quantized with that of what they read.
_COMMUTE = frozenset({"Relu", "MaxPool", "Identity", "Flatten", "Reshape", "Transpose"})


@dataclasses.dataclass(frozen=True)
class Chain:
    """A convolution or sum (`node`, by its first output), and the values from its result on that one scale serves.

    The last of `values` decides the scale. `operands` are inputs of a sum that are read through a pair.
    """

    node: str
    values: tuple[str, ...]
    operands: tuple[int, ...] = ()


def find_chains(graph: ir.Graph, places: Collection[Place]) -> list[Chain]:
    """Chains behind the given convolutions, in the order of the graph, and behind sums of what they end in."""
    wanted = {place.node for place in places if place.op == "Conv"}
    ends: set[str] = set()
    chains: list[Chain] = []
    for node in graph:
        name = node.outputs[0].name or ""
        if name in wanted:
            chains.append(Chain(name, tuple(_values(node.outputs[0]))))
        elif node.op_type == "Add" and all(v is not None and v.name in ends for v in node.inputs):
            chains.append(Chain(name, tuple(_values(node.outputs[0])), (0, 1)))
        else:
            continue
        ends.add(chains[-1].values[-1])
    return chains


def _values(value: ir.Value) -> list[str]:
    """The value, and what follows it alone and commutes with rounding."""
    found = [value.name or ""]
    while len(value.uses()) == 1 and not value.is_graph_output():
        ((user, index),) = value.uses()
        if user.op_type not in _COMMUTE or index != 0 or len(user.outputs) > 1:
            break
        value = user.outputs[0]
        found.append(value.name or "")
    return found
