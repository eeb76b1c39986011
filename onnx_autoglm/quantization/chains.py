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

    The last of `values` decides the scale. `operands` are inputs of a sum that are read through a pair, and
    `operands_of` what they are.
    """

    node: str
    values: tuple[str, ...]
    operands: tuple[int, ...] = ()
    operands_of: tuple[str, ...] = ()


def find_chains(graph: ir.Graph, places: Collection[Place]) -> list[Chain]:
    """Chains behind the given convolutions, in the order of the graph, and behind sums of what they end in."""
    wanted = {place.node for place in places if place.op == "Conv"}
    ends: set[str] = set()
    chains: list[Chain] = []
    for node in graph:
        name = node.outputs[0].name or ""
        if node.outputs[0].is_graph_output():  # stays a float for whoever runs the model
            continue
        if name in wanted:
            chains.append(Chain(name, tuple(_values(node.outputs[0]))))
        elif node.op_type == "Add" and all(v is not None and v.name in ends for v in node.inputs):
            chains.append(
                Chain(
                    name,
                    tuple(_values(node.outputs[0])),
                    (0, 1),
                    tuple(v.name or "" for v in node.inputs if v),
                )
            )
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
        if user.outputs[0].is_graph_output():
            break
        value = user.outputs[0]
        found.append(value.name or "")
    return found


def kept_chains(places: Collection[Place], chains: Collection[Chain], active: Collection[str]) -> list[Chain]:
    """The chains that stay integers when the places of these nodes compute in 8 bits.

    A convolution's does if it is one of them, a sum's if both operands end in kept chains; and none whose end is read by a
    place that is not: that place would read what was rounded for others.
    """
    idle = {place.activation for place in places} - {p.activation for p in places if p.node in active}
    ends: set[str] = set()
    kept = []
    for chain in chains:
        is_fed = set(chain.operands_of) <= ends if chain.operands else chain.node in active
        if is_fed and chain.values[-1] not in idle:
            kept.append(chain)
            ends.add(chain.values[-1])
    return kept


def rounded_values(
    places: Collection[Place], chains: Collection[Chain], chosen: Collection[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """What is rounded, and which activations products read so, when these activations were chosen.

    A convolution whose result cannot stay an integer computes in floating point after all.
    """
    while True:
        active = {place.node for place in places if place.activation in chosen}
        kept = kept_chains(places, chains, active)
        whole = {chain.node for chain in kept if not chain.operands}
        lost = {p.activation for p in places if p.op == "Conv" and p.node in active and p.node not in whole}
        if not lost:
            return frozenset({*chosen, *(chain.values[-1] for chain in kept)}), frozenset(chosen)
        chosen = {name for name in chosen if name not in lost}
