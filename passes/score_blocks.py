"""Scores whole branches by what they change of their residual stream: ShortGPT's block influence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnx_autoglm.axes.blocks import Block
from onnx_autoglm.axes.facts import label
from onnx_autoglm.dataset import Arrays
from onnx_autoglm.errors import UserError
from onnx_autoglm.passes.score_norm import Scores
from onnx_autoglm.walk import Walk


def score_blocks(
    blocks: Sequence[Block],
    model: ir.Model,
    feeds: Sequence[Arrays],
    step: Callable[[str], None] = lambda _: None,
) -> Scores:
    """`1 - E[cos(x, x + branch)]` of each block, `[blocks]`, over all rows of channels of its stream.

    Args:
        blocks: of a clone of the model, in the order of the graph.

    Raises UserError if the model does not run, or a stream is not finite.
    """
    scores = np.zeros(len(blocks))
    with Walk(model, feeds) as walk:
        for number, block in enumerate(blocks):
            step(f"observe block {number + 1} of {len(blocks)}")
            names = [block.stream.name or "", block.add.outputs[0].name or ""]
            walk.reach(names)
            total = count = 0.0
            for arrays in walk.values(names):
                cosines = _cosines(*(_rows(arrays[name], block.axis) for name in names))
                if not np.isfinite(cosines).all():
                    raise UserError(f"the values around {label(block.add)} are not finite on the data")
                total, count = total + float(cosines.sum()), count + len(cosines)
            scores[number] = 1 - total / max(count, 1)
    return scores


def _rows(array: np.ndarray, axis: int) -> Scores:
    moved = np.moveaxis(array, axis, -1)
    return np.asarray(moved.reshape(-1, moved.shape[-1]), dtype=np.float64)


def _cosines(before: Scores, after: Scores) -> Scores:
    """One per row; 1 where a row stayed as it was (also if it is zero)."""
    sizes = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    cosines = (before * after).sum(axis=1) / np.maximum(sizes, np.finfo(np.float64).tiny)
    return np.where((before == after).all(axis=1), 1.0, cosines)
