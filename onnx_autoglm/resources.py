"""What a budget counts: parameters, bytes and FLOPs of a model after a selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from onnx_autoglm.axes.dims import Dim
from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.structures import Structure, Structures
from onnx_autoglm.flops import count_flops

Resource = Callable[[Selection], float]


def count_bytes(structures: Structures, selection: Selection) -> float:
    """Bytes of all initializers after a selection."""
    seen, total = set(), 0.0
    for use in structures.uses:
        tensor = use.value.const_value
        if tensor is None or use.value in seen:
            continue
        seen.add(use.value)
        if tensor.size:
            total += tensor.nbytes / tensor.size * _entries(selection, use.dims)
    return total


def count_parameters(structures: Structures, selection: Selection) -> float:
    """Entries of all floating-point initializers after a selection."""
    seen, total = set(), 0.0
    for use in structures.uses:
        tensor = use.value.const_value
        if tensor is not None and use.value not in seen and tensor.dtype.is_floating_point():
            seen.add(use.value)
            total += _entries(selection, use.dims)
    return total


def _entries(selection: Selection, dims: list[Dim]) -> float:
    sizes = [selection.size(dim) for dim in dims]
    return float(math.prod(size for size in sizes if isinstance(size, int)))


def resource_of(name: str, structures: Structures) -> Resource:
    """`parameters`, `bytes` or `flops` as a function of the selection."""
    if name == "flops":
        return lambda selection: float(count_flops(structures.analysis, selection))
    count = count_bytes if name == "bytes" else count_parameters
    return lambda selection: count(structures, selection)


def unit_costs(structures: Sequence[Structure], resource: Resource) -> dict[Structure, float]:
    """What removing one index of each structure (in every outer index) saves, from the whole model."""
    whole = resource(Selection())
    costs = {}
    for structure in structures:
        selection = Selection()
        shape = [*(int(str(outer.size)) for outer in structure.outers), structure.size]
        mask = np.ones(shape, dtype=bool)
        mask[..., -1] = False
        if structure.size > 1:
            selection.keep(structure.atom, structure.outers, mask)
        costs[structure] = whole - resource(selection)
    return costs
