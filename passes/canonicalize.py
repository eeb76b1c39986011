"""Brings a model into the form that the analysis reads, without changing what it computes."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from onnx_autoglm.errors import UserError


def canonicalize(model: ir.Model) -> ir.Model:
    """Inlines functions, lifts constants to initializers, drops dead nodes and sorts, in place.

    Constants become initializers under the name of their output, so they are cut and cloned as any
    other. Names of initializers and values stay.

    Raises UserError if a function cannot be inlined.
    """
    if model.functions:
        try:
            common.InlinePass()(model)
        except ValueError as error:
            raise UserError(
                f"the model's local functions cannot be inlined: {error}; inline them with the exporter's tools, or "
                "convert the model to one opset"
            ) from error
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    if any(True for _ in model.graph.subgraphs()) and not has_sequences(model):
        # What a body returns has no rule of ours; without a declared rank all that follows is unknown.
        common.ShapeInferencePass()(model)
    return model


def has_sequences(model: ir.Model) -> bool:
    """Shape inference gives sequences the type of tensors, which is worse than no shapes."""
    return any("Sequence" in node.op_type for node in model.graph.all_nodes())
