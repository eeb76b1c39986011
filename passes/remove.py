"""Removes the unselected indices of atoms from every initializer in which they live."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_autoglm.axes.places import Use
from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.structures import Structures
from onnx_autoglm.passes.edit_shapes import value_names
from onnx_autoglm.sliced_tensor import SlicedTensor


@dataclasses.dataclass(frozen=True, eq=False)
class Removal:
    """What was kept of one axis of one initializer, for the consumers named.

    `kept` are ascending source indices, one row per index of `outer_axis` where there is one.
    """

    initializer: str
    axis: int
    kept: np.ndarray
    consumers: tuple[str, ...]
    outer_axis: int | None = None

    def as_json(self) -> dict[str, Any]:
        result: dict[str, Any] = {"initializer": self.initializer, "axis": self.axis}
        if self.outer_axis is not None:
            result["outer_axis"] = self.outer_axis
        result["kept"] = self.kept.tolist()
        result["consumers"] = list(self.consumers)
        return result


def remove(structures: Structures, selection: Selection) -> list[Removal]:
    """Cuts the initializers of the analysed model, in place, and returns what was cut.

    Weights are cut lazily (`SlicedTensor`). An initializer whose uses are cut differently is cloned: the
    first way of cutting keeps the name.
    """
    by_value: dict[ir.Value, list[tuple[Use, list[Removal]]]] = defaultdict(list)
    for use in structures.uses:
        by_value[use.value].append((use, _cuts(use, selection)))
    removals: list[Removal] = []
    taken = value_names(structures.analysis.graph)
    for value, uses in by_value.items():
        if any(cuts for _, cuts in uses):
            removals.extend(cut for _, cuts in uses for cut in cuts)
            _rewrite(structures.analysis.graph, value, uses, taken)
    return removals


def _cuts(use: Use, selection: Selection) -> list[Removal]:
    consumers = tuple(dict.fromkeys(name_of(node) for node, _ in use.consumers))
    cuts = []
    for axis, dim in enumerate(use.dims):
        if selection.touches(dim):
            kept, outer = selection.indices(use.dims, axis)
            cuts.append(Removal(use.value.name or "", axis, kept, consumers, outer))
    return cuts


def name_of(node: ir.Node) -> str:
    return next((output.name for output in node.outputs if output.name), "")


def _rewrite(
    graph: ir.Graph, value: ir.Value, uses: list[tuple[Use, list[Removal]]], taken: set[str]
) -> None:
    source = value.const_value
    assert source is not None
    variants: dict[bytes, ir.Value] = {}
    # The uses that stay whole keep the original; otherwise the first cut may take its place.
    if any(not cuts for _, cuts in uses) or _is_used_elsewhere(value, uses):
        variants[b""] = value
    for use, cuts in uses:
        key = b"|".join(f"{cut.axis},{cut.outer_axis}:".encode() + cut.kept.tobytes() for cut in cuts)
        if key not in variants:
            variants[key] = _cut_value(graph, value, source, cuts, taken, in_place=not variants)
        if variants[key] is not value:
            for node, index in use.consumers:
                node.replace_input_with(index, variants[key])


def _is_used_elsewhere(value: ir.Value, uses: list[tuple[Use, list[Removal]]]) -> bool:
    covered = sum(len(use.consumers) for use, _ in uses)
    return value.is_graph_output() or covered < len(value.uses())


def _cut_value(
    graph: ir.Graph,
    value: ir.Value,
    source: ir.TensorProtocol,
    cuts: list[Removal],
    taken: set[str],
    *,
    in_place: bool,
) -> ir.Value:
    target = value
    if not in_place:
        name = _free_name(taken, f"{value.name}_cut")
        target = ir.Value(name=name, type=value.type, metadata_props=dict(value.metadata_props))
    kept = {cut.axis: cut.kept for cut in cuts}
    outer = {cut.axis: cut.outer_axis for cut in cuts if cut.outer_axis is not None}
    tensor = SlicedTensor(source, kept, outer, name=target.name)
    target.const_value = tensor
    target.shape = ir.Shape(tensor.shape.numpy())
    if not in_place:
        graph.register_initializer(target)
    return target


def _free_name(taken: set[str], wanted: str) -> str:
    name, count = wanted, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name
