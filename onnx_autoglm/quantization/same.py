"""Whether a graph whose weights were rescaled still computes what it did."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from onnx_autoglm.dataset import Arrays, Dataset
from onnx_autoglm.errors import CheckFailed
from onnx_autoglm.runtime import Session
from onnx_autoglm.upcast import needs_upcast, upcast, upcast_arrays

_PIECE = 1 << 20
_SAME, _SAME_16 = (
    1e-3,
    3e-2,
)  # relative differences that rounding of rescaled weights may leave, by their type


def refuse_change(source: ir.Model, model: ir.Model, data: Dataset) -> None:
    """Raises CheckFailed if the smoothed model computes something else than the source."""
    outputs: list[Arrays] = []
    for one in (source, model):
        session = Session(upcast(one) if needs_upcast(one) else one)
        feed = {name: array for name, array in data.feeds[0].items() if name in session.input_names}
        outputs.append(session.run(upcast_arrays(feed) if needs_upcast(one) else feed))
        del session
    limit = _SAME_16 if needs_upcast(source) else _SAME
    for name, array in outputs[0].items():
        if array.dtype.kind == "f" and (worst := _apart(array, outputs[1][name])) > limit:
            raise CheckFailed(
                f"folding changed what the model computes: {name} differs by {worst:.1e}; pass --no-smooth, and report this"
            )


def _apart(expected: np.ndarray, actual: np.ndarray) -> float:
    """max |a - b| / max |a| over numbers that are finite, a piece at a time: scores of a vocabulary are large."""
    off = scale = 0.0
    rows, others = expected.reshape(-1), actual.reshape(-1)
    for start in range(0, rows.size, _PIECE):
        a, b = rows[start : start + _PIECE], others[start : start + _PIECE]
        finite = np.isfinite(a)
        if not np.array_equal(finite, np.isfinite(b)):
            return math.inf
        off = max(off, float(np.abs(a - b)[finite].max(initial=0)))
        scale = max(scale, float(np.abs(a)[finite].max(initial=0)))
    return off / max(scale, 1e-6)
