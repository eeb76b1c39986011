"""Where the scores of a model are, and what they say as log-probabilities."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_autoglm.feed_roles import token_roles

Matrix = npt.NDArray[np.float64]

# Between a Softmax and the output of a graph; none of them changes a number.
_SAME_NUMBERS = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_SMALLEST = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class ScoreOutput:
    """The output that holds scores over classes or tokens; `normalised` says that a Softmax made them."""

    name: str
    normalised: bool


def token_scores(model: ir.Model) -> ScoreOutput | None:
    """The output `[batch, sequence, vocabulary]` of next-token scores, or None.

    Of several outputs of rank 3 (hidden states beside logits) the one as wide as the table of tokens is meant.
    """
    wide = [value for value in _floats(model) if value.shape is not None and len(value.shape) == 3]
    if not wide:
        return None
    roles = token_roles(model)

    def fit(value: ir.Value) -> tuple[bool, int]:
        assert value.shape is not None
        size = value.shape[-1]
        width = size if isinstance(size, int) else 0
        return (roles is not None and width == roles.vocabulary, width)

    return _score_output(max(wide, key=fit))


def class_scores(model: ir.Model) -> ScoreOutput | None:
    """The output `[batch, classes]` (axes of size 1 may follow), or None."""
    for value in _floats(model):
        shape = value.shape
        if shape is None or (len(shape) >= 2 and all(size == 1 for size in list(shape)[2:])):
            return _score_output(value)
    return None


def any_scores(model: ir.Model) -> ScoreOutput | None:
    """The first output of floats, whose last axis is taken for the classes."""
    return next((_score_output(value) for value in _floats(model)), None)


def log_probabilities(rows: np.ndarray, *, normalised: bool) -> Matrix:
    """Log-probabilities `[rows, classes]` from scores of the same shape, in nats."""
    scores: Matrix = rows.astype(np.float64)
    if normalised:
        scores = np.log(np.maximum(scores, _SMALLEST))
    peak = scores.max(axis=-1, keepdims=True)
    result: Matrix = scores - (np.log(np.exp(scores - peak).sum(axis=-1, keepdims=True)) + peak)
    return result


def _floats(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.outputs if value.dtype is None or value.dtype.is_floating_point()]


def _score_output(value: ir.Value) -> ScoreOutput:
    node = value.producer()
    while node is not None and node.op_type in _SAME_NUMBERS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return ScoreOutput(value.name or "", node is not None and node.op_type == "Softmax")
