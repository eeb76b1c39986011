"""What a budget counts: parameters, bytes and FLOPs of a model after a selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnx_autoglm.axes.dims import Dim
from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.structures import Structure, Structures
from onnx_autoglm.flops import count_flops

Resource = Callable[[Selection], float]


def resource_of(name: str, structures: Structures) -> Resource:
    """`parameters` (of floating point), `bytes` of weights or `flops`, as a function of the selection."""
    if name == "flops":
        return lambda selection: float(count_flops(structures.analysis, selection))

    def weight(tensor: ir.TensorProtocol) -> float:
        if name == "bytes":
            return tensor.nbytes / tensor.size if tensor.size else 0.0
        return float(tensor.dtype.is_floating_point())

    # An initializer of several uses counts once, as the first of them sees it.
    uses = list({use.value: use for use in reversed(structures.uses)}.values())
    known = [(use.dims, weight(use.value.const_value)) for use in uses if use.value.const_value is not None]
    return lambda selection: sum(each * _entries(selection, dims) for dims, each in known)


def _entries(selection: Selection, dims: list[Dim]) -> float:
    sizes = [selection.size(dim) for dim in dims]
    return float(math.prod(size for size in sizes if isinstance(size, int)))


def unit_costs(structures: Sequence[Structure], resource: Resource) -> dict[Structure, float]:
    """What removing one index of each structure (in every outer index) saves, from the whole model."""
    whole = resource(Selection())
    costs = {}
    for structure in structures:
        selection = Selection()
        mask = np.ones(structure.shape, dtype=bool)
        mask[..., -1] = False
        if structure.size > 1:
            selection.keep(structure.atom, structure.outers, mask)
        costs[structure] = whole - resource(selection)
    return costs
