"""The error of a product when its operands are integers, on sampled rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_autoglm.patches import spread_out
from onnx_autoglm.quantization.places import Place
from onnx_autoglm.quantization.ranges import LEVELS
from onnx_autoglm.quantization.weights import Quantized

Floats = npt.NDArray[np.float32]
OUTPUTS = 4096  # of a product, that choices are tried on


def weight_of(model: ir.Model, place: Place, outputs: int | None = None) -> Floats:
    """The weight of a place as `[k, n]`, contracted inputs first (kernel positions among them).

    Args: `outputs` is how many at most are taken, evenly spread; all by default.
    """
    tensor = model.graph.initializers[place.initializer].const_value
    assert tensor is not None
    array = np.moveaxis(np.asarray(tensor.numpy()), place.channel_axis, -1)
    if outputs is not None:
        array = array[..., spread_out(array.shape[-1], outputs)]
    return np.ascontiguousarray(array.reshape(-1, array.shape[-1]), dtype=np.float32)


def rounded(rows: Floats, threshold: float) -> Floats:
    """Rows as 8 bits hold them: `s * clip(round(x / s), -128, 127)`, with s = threshold / 127."""
    scale = np.float32(threshold / LEVELS)
    result = rows / scale
    np.round(result, out=result)
    np.clip(result, -LEVELS - 1, LEVELS, out=result)
    result *= scale
    return result


class OutputError:
    """The error of one product on the same rows, for any threshold of its activation.

    It is the mean over rows of the squared error of their outputs, relative to the square of the outputs. Relative per
    row, since what follows is normalised: otherwise a few rows a hundred times as large as the others would decide.
    """

    def __init__(self, rows: Floats, weight: Floats, quantized: Quantized | None = None) -> None:
        self._rows, self._held = rows, weight if quantized is None else quantized.floats()
        self._exact = rows @ weight
        squares = np.square(self._exact).sum(axis=1)
        self._squares = np.maximum(squares, 1e-3 * np.median(squares) + 1e-30) if len(rows) else squares

    def __call__(self, threshold: float | None) -> float:
        """The error with activations clipped at a threshold; None leaves them as they are."""
        if not len(self._rows):
            return 0.0
        rows = self._rows if threshold is None else rounded(self._rows, threshold)
        error = rows @ self._held
        error -= self._exact
        return float((np.square(error).sum(axis=1) / self._squares).mean())
