"""Brings a model into the form that the analysis reads, without changing what it computes."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common


def canonicalize(model: ir.Model) -> ir.Model:
    """Inlines functions, lifts constants to initializers, drops dead nodes and sorts, in place.

    Constants become initializers under the name of their output, so they are cut and cloned as any
    other. Names of initializers and values stay.
    """
    if model.functions:
        common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    if any(True for _ in model.graph.subgraphs()):
        # What a body returns has no rule of ours; without a declared rank all that follows is unknown.
        common.ShapeInferencePass()(model)
    return model
