"""From a source model and a choice to a pruned model and everything that proves it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from onnx_autoglm.axes.analysis import Analysis
from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.structures import Structures, find_structures
from onnx_autoglm.passes.mask import lossy_entries
from onnx_autoglm.passes.remove import Removal, remove
from onnx_autoglm.passes.remove_blocks import remove_blocks
from onnx_autoglm.passes.repair_shapes import repair_shapes
from onnx_autoglm.plan import Plan, describe_structure, interface_cuts


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """A pruned model with the analysis and the selection that made it."""

    model: ir.Model
    structures: Structures
    selection: Selection
    removals: list[Removal]
    interfaces: list[dict[str, Any]]
    lossy: list[dict[str, Any]]
    repairs: int

    def plan(self, source: dict[str, Any]) -> Plan:
        described = (describe_structure(structure, self.selection) for structure in self.structures.found)
        return Plan(
            source=source,
            structures=[entry for entry in described if entry is not None],
            removals=[removal.as_json() for removal in self.removals],
            interfaces=self.interfaces,
            lossy=self.lossy,
        )


def analyse(model: ir.Model) -> Structures:
    """The structures of a canonical model (`passes.canonicalize`), which stays as it is."""
    return find_structures(Analysis(model))


def cut_model(source: ir.Model, choose: Callable[[Structures], Selection]) -> Cut:
    """Cuts a copy of a canonical source; its weights are shared and cut lazily.

    Args:
        source: a canonical model; unchanged.
        choose: which indices of which structures stay.
    """
    structures = analyse(source.clone())
    return apply_selection(structures, choose(structures))


def apply_selection(structures: Structures, selection: Selection) -> Cut:
    """Cuts the model that `structures` were found in, in place."""
    analysis = structures.analysis
    lossy = lossy_entries(analysis, selection)
    interfaces = interface_cuts(structures, selection)
    removals = remove(structures, selection)
    repairs = repair_shapes(analysis, selection)
    removals += remove_blocks(structures, selection)
    return Cut(analysis.model, structures, selection, removals, interfaces, lossy, repairs)
