"""Quality of a model on data: perplexity of language models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnx_autoglm.data import Dataset
from onnx_autoglm.errors import UserError
from onnx_autoglm.runtime import Session
from onnx_autoglm.upcast import needs_upcast, upcast


@dataclasses.dataclass(frozen=True)
class Quality:
    """`perplexity`: exp of the mean negative log-likelihood of the next token, over `tokens` of them."""

    perplexity: float
    tokens: int


def measure(model: ir.Model, data: Dataset, step: Callable[[str], None] = lambda _: None) -> Quality:
    """Perplexity in windows that do not overlap; the first token of a window is not counted.

    The scores of the next token are the output `[batch, sequence, vocabulary]` of rank 3.

    Raises UserError if the data is no text or the model has no such output.
    """
    output = scores_output(model)
    if data.token_input is None or output is None:
        raise UserError("quality is measured as perplexity: pass a text, and a model with next-token scores")
    session = Session(upcast(model) if needs_upcast(model) else model, optimize=True)
    total, count = 0.0, 0
    for number, feed in enumerate(data, 1):
        step(f"quality, run {number} of {len(data.feeds)}")
        (scores,) = session.run(feed, [output]).values()
        tokens = feed[data.token_input][:, 1:]
        rows = scores[:, :-1].astype(np.float64)
        peak = rows.max(axis=-1, keepdims=True)
        normaliser = np.log(np.exp(rows - peak).sum(axis=-1)) + peak[..., 0]
        chosen = np.take_along_axis(rows, tokens[..., None].astype(np.int64), axis=-1)[..., 0]
        total += float((normaliser - chosen).sum())
        count += tokens.size
    return Quality(math.exp(min(total / max(count, 1), 700.0)), count)


def scores_output(model: ir.Model) -> str | None:
    """The output of next-token scores `[batch, sequence, vocabulary]`: the first of rank 3."""
    outputs = [value for value in model.graph.outputs if value.shape is not None and len(value.shape) == 3]
    return outputs[0].name if outputs else None
