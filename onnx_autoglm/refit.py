"""Refits one consumer from the covariances of what the source's consumer reads: quick, and good enough to compare cuts.

With means and covariances split into kept P and removed R: `A = S_RP (S_PP + lambda I)^-1`, `W_new = W_P + A' W_R`,
`b_new = b + W_R' (m_R - A m_P)` (CORP; FLAP's bias compensation is the case A = 0). `passes.repair_weights` does it with
what the repaired prefix really delivers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnx_autoglm.axes.selection import Indices
from onnx_autoglm.consumers import Consumer, Weight, as_rows
from onnx_autoglm.statistics import Key, Moments, Observed, key_of

LAMBDAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def refit(
    consumer: Consumer,
    source: ir.TensorProtocol,
    kept: Indices,
    observed: Mapping[Key, Observed],
    mode: Literal["affine", "bias"],
    strengths: Sequence[float] = LAMBDAS,
) -> Fit | str:
    """The best refit of a consumer for the kept indices of what it contracts, or why there is none.

    Args:
        source: the whole weight.
        strengths: ridge strengths to choose from, relative to the mean variance.
    """
    reason = why_no_refit(consumer)
    if reason:
        return reason
    seen = observed[key_of(consumer.contraction)]
    if consumer.contraction.node.op_type == "Conv" and _pads(consumer.contraction.node):
        # Padding is zero, not the mean: without centring no constant is needed, inside or at the border.
        seen = Observed(seen.fitted.uncentred(), seen.held_out.uncentred())
    fit = _fit(as_rows(source, consumer.axis), kept, seen, mode, strengths)
    return "no refit was better than none on held-out data" if fit is None else fit


def why_no_refit(consumer: Consumer) -> str:
    """Why a consumer can never be refitted, or an empty string."""
    contraction, tensor = consumer.contraction, consumer.initializer.const_value
    node = contraction.node
    if node.domain not in ("", "com.microsoft") or node.op_type not in (
        "MatMul",
        "Gemm",
        "FusedMatMul",
        "Conv",
    ):
        return f"no refit is defined for {node.op_type}"
    if _is_shared(consumer):
        return "its weight has other consumers"
    if node.op_type != "Conv" and (contraction.weight != 1 or tensor is None or len(tensor.shape) != 2):
        return "its weight is not a matrix on the right"
    return ""


def _is_shared(consumer: Consumer) -> bool:
    """Whether anything else reads the weight, or what is made of it on the way to the consumer."""
    value = consumer.contraction.node.inputs[consumer.contraction.weight]
    while value is not None:
        if len(value.uses()) > 1 or value.is_graph_output():
            return True
        producer = value.producer()
        value = None if producer is None else producer.inputs[0]
    return False


def _pads(node: ir.Node) -> bool:
    pads = node.attributes.get("pads")
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    return automatic.startswith("SAME") or (pads is not None and any(pads.as_ints()))


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """A refitted weight and how good it is on held-out rows, relative to the variance of the output."""

    rows: Weight  # [kept, outputs]
    shift: Weight  # [outputs], what to add
    strength: float | None
    error: float
    before: float  # the error without repair


def _fit(
    weight: Weight, kept: Indices, observed: Observed, mode: str, strengths: Sequence[float]
) -> Fit | None:
    """The best refit on held-out rows, fitted again on all; None if leaving the weight alone is best."""
    removed = np.setdiff1d(np.arange(len(weight)), kept)
    gone = weight[removed]
    output = (
        float(np.einsum("ko,kl,lo->", weight, observed.held_out.covariance, weight, optimize=True)) or 1.0
    )
    nothing = np.zeros((len(removed), len(kept)))
    before = _held_out_error(observed.held_out, nothing, np.zeros(len(removed)), kept, removed, gone)
    best: tuple[float, float | None] = (np.inf, None)
    for strength in strengths if mode == "affine" else ():
        matrix, shift = _regression(observed.fitted, kept, removed, strength)
        error = _held_out_error(observed.held_out, matrix, shift, kept, removed, gone)
        best = min(best, (error, strength), key=lambda item: item[0])
    bias_only = observed.fitted.mean[removed]
    error = _held_out_error(observed.held_out, nothing, bias_only, kept, removed, gone)
    if error < best[0]:
        best = (error, None)
    if not best[0] < before:
        return None
    if best[1] is None:
        matrix, shift = nothing, observed.all.mean[removed]
    else:
        matrix, shift = _regression(observed.all, kept, removed, best[1])
    return Fit(weight[kept] + matrix.T @ gone, shift @ gone, best[1], best[0] / output, before / output)


def _regression(moments: Moments, kept: Indices, removed: Indices, strength: float) -> tuple[Weight, Weight]:
    """A `[removed, kept]` and the constant `m_R - A m_P`."""
    covariance, mean = moments.covariance, moments.mean
    inner = covariance[np.ix_(kept, kept)]
    ridge = strength * max(float(np.diag(inner).mean()), 1e-12)
    solved = np.linalg.solve(inner + ridge * np.eye(len(kept)), covariance[np.ix_(kept, removed)])
    matrix = np.asarray(solved.T, dtype=np.float64)
    return matrix, mean[removed] - matrix @ mean[kept]


def _held_out_error(
    moments: Moments, matrix: Weight, shift: Weight, kept: Indices, removed: Indices, gone: Weight
) -> float:
    """Mean squared error at the consumer of `x_R ~ A x_P + c` on other rows."""
    covariance, mean = moments.covariance, moments.mean
    cross = matrix @ covariance[np.ix_(kept, removed)]
    spread = covariance[np.ix_(removed, removed)] - cross - cross.T
    spread = spread + matrix @ covariance[np.ix_(kept, kept)] @ matrix.T
    offset = mean[removed] - matrix @ mean[kept] - shift
    spread = spread + np.outer(offset, offset)
    return float(np.einsum("ko,kl,lo->", gone, spread, gone, optimize=True))


def per_output(consumer: Consumer, shift: Weight) -> Weight:
    """What a constant at the consumer's input adds to its output, given its shift `[outputs, *kernel]`.

    A convolution adds it at every position of the kernel, a Gemm scales it.
    """
    node = consumer.contraction.node
    total = node.attributes.get_float("alpha", 1.0) * shift.reshape(len(shift), -1).sum(axis=1)
    tensor = consumer.initializer.const_value
    assert tensor is not None
    return total.reshape(-1, *([1] * (len(tensor.shape) - 2))) if node.op_type == "Conv" else total
