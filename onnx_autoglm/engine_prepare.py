"""Makes a graph ready for an engine builder, without changing what it computes for rows that count."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from onnx_ir.passes import common

from onnx_autoglm.passes.drop_casts import drop_casts
from onnx_autoglm.passes.expand_rotary import expand_rotary
from onnx_autoglm.passes.fold_shapes import fold_shapes
from onnx_autoglm.passes.remove_nan_guard import remove_nan_guard
from onnx_autoglm.passes.split_sequences import split_sequences


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What was done to a graph: nodes folded, sequences replaced, casts dropped, rotary tables given the batch of what they rotate, guards
    removed, and why other guards stayed."""

    folded: int
    sequences: int
    casts: int
    rotary_tables: int
    guards: int
    kept_guards: tuple[str, ...]


def prepare(model: ir.Model) -> Prepared:
    """Applies the passes named in `Prepared`, in place.

    The model must be canonical.
    """
    folded = fold_shapes(model)
    sequences = split_sequences(model)
    if sequences:
        folded += fold_shapes(model)  # without sequences shapes can be inferred
    casts = drop_casts(model)
    tables = expand_rotary(model)
    guards = remove_nan_guard(model)
    common.RemoveUnusedNodesPass()(model)
    return Prepared(folded, sequences, casts, tables, guards.removed, guards.kept)
