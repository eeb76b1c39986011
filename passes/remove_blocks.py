"""Removes whole branches from a residual stream: what they would be added to goes on alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from onnx_autoglm.axes.blocks import Block
from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.structures import Structures
from onnx_autoglm.passes.remove import Removal, name_of


def chosen_blocks(structures: Structures, selection: Selection) -> list[Block]:
    """The blocks that a selection removes, in the order of the graph."""
    for structure in structures.found:
        if structure.kind == "block" and structure.atom in selection.kept:
            kept = selection.kept[structure.atom]
            return [block for block, stays in zip(structures.blocks, kept, strict=True) if not stays]
    return []


def remove_blocks(structures: Structures, selection: Selection) -> list[Removal]:
    """Takes the chosen blocks out of the analysed model, in place, with all that was computed for them alone.

    The removals say which initializers mask them: nothing of these is kept.
    """
    removals, graph = [], structures.analysis.graph
    blocks = chosen_blocks(structures, selection)
    for block in blocks:
        for initializer, reader in block.zeroed:
            removals.append(
                Removal(initializer.name or "", 0, np.zeros(0, dtype=np.int64), (name_of(reader),))
            )
    for block in blocks:
        index = next(i for i, value in enumerate(block.add.inputs) if value is not block.branch)
        stream, total = block.add.inputs[index], block.add.outputs[0]
        assert stream is not None
        if total.is_graph_output():  # its name must stay
            kept = ir.node("Identity", [stream])
            kept.outputs[0].type, kept.outputs[0].shape = total.type, total.shape
            graph.insert_after(block.add, kept)
            ir.convenience.replace_all_uses_with(total, kept.outputs[0], replace_graph_outputs=True)
            total.name, kept.outputs[0].name = None, total.name
        else:
            ir.convenience.replace_all_uses_with(total, stream)
    if blocks:
        common.RemoveUnusedNodesPass()(structures.analysis.model)
    return removals
