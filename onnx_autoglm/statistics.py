"""Means and covariances of what consumers read, streamed.

A consumer is a product with a weight. What it contracts is observed by making its activation an output of
a probe graph; per consumer only a mean and a second-moment matrix are held, in float64, whatever the amount
of data or the length of sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from onnx_autoglm.axes.facts import Contraction
from onnx_autoglm.data import Arrays
from onnx_autoglm.errors import UserError
from onnx_autoglm.runtime import Session
from onnx_autoglm.upcast import needs_upcast, upcast

Matrix = npt.NDArray[np.float64]
_ROWS = 2048  # rows per float32 product, before the sum goes on in float64
HELD_OUT = 5  # every fifth run is held out, to choose what must not be chosen on the fitted data


class Moments:
    """Count, mean and covariance of the columns of a stream of rows `[n, k]`."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.total: Matrix = np.zeros(width)
        self.products: Matrix = np.zeros((width, width))

    def add(self, rows: npt.NDArray[np.float32]) -> None:
        for start in range(0, len(rows), _ROWS):
            piece = rows[start : start + _ROWS]
            self.count += len(piece)
            self.total += piece.sum(axis=0, dtype=np.float64)
            products = piece.T @ piece
            if not np.isfinite(products).all():  # beyond float32
                products = piece.T.astype(np.float64) @ piece.astype(np.float64)
            self.products += products

    def __add__(self, other: Moments) -> Moments:
        result = Moments(len(self.total))
        result.count = self.count + other.count
        result.total = self.total + other.total
        result.products = self.products + other.products
        return result

    def uncentred(self) -> Moments:
        """The same second moments around zero instead of around the mean."""
        result = Moments(len(self.total))
        result.count, result.products = self.count, self.products
        return result

    @property
    def mean(self) -> Matrix:
        return self.total / max(self.count, 1)

    @property
    def covariance(self) -> Matrix:
        """Population covariance `[k, k]`."""
        mean = self.mean
        return self.products / max(self.count, 1) - np.outer(mean, mean)


@dataclasses.dataclass(frozen=True, eq=False)
class Observed:
    """What one consumer reads: rows to fit on, and rows held out."""

    fitted: Moments
    held_out: Moments

    @property
    def all(self) -> Moments:
        return self.fitted + self.held_out


Key = tuple[str, int]  # name of the activation and its contracted axis, from the end


def key_of(contraction: Contraction) -> Key:
    value = contraction.node.inputs[contraction.activation]
    assert value is not None
    return value.name or "", contraction.activation_axis


def observe(
    model: ir.Model,
    contractions: Sequence[Contraction],
    feeds: Iterable[Arrays],
    *,
    step: Callable[[str], None] = lambda _: None,
) -> dict[Key, Observed]:
    """Runs a canonical model on all feeds and sums up what the given consumers read.

    Activations of rank 4 are read along their axis, all other axes counting as rows.

    Raises:
        UserError: the model does not run, an activation is not finite (the node is named), or there is
            less data than needed for a held-out part.
    """
    keys = list(dict.fromkeys(key_of(contraction) for contraction in contractions))
    makers = {key_of(c): c.node for c in contractions}
    session = Session(_probed(model, [name for name, _ in keys]), optimize=True)
    moments: dict[Key, tuple[Moments, Moments]] = {}
    runs = 0
    for runs, feed in enumerate(feeds, 1):
        step(f"statistics, run {runs}")
        outputs = session.run({name: feed[name] for name in session.input_names})
        held_out = runs % HELD_OUT == 0
        for key in keys:
            rows = _rows(outputs[key[0]], key[1])
            if not np.isfinite(rows).all():
                raise UserError(
                    f"{key[0]}, which {makers[key].op_type} {makers[key].name} reads, is not finite on the data"
                )
            pair = moments.setdefault(key, (Moments(rows.shape[1]), Moments(rows.shape[1])))
            pair[held_out].add(rows)
    if runs < HELD_OUT:
        raise UserError(
            f"calibration needs at least {HELD_OUT} runs of the model and has {runs}: pass more data, or a smaller --window"
        )
    if any(part.count == 0 for pair in moments.values() for part in pair):
        raise UserError("the calibration data holds no rows: pass samples with at least one entry each")
    return {key: Observed(*pair) for key, pair in moments.items()}


def _rows(array: np.ndarray, axis: int) -> npt.NDArray[np.float32]:
    moved = np.moveaxis(array, axis, -1)
    return np.ascontiguousarray(moved.reshape(-1, moved.shape[-1]), dtype=np.float32)


def _probed(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy whose only outputs are the named values; what they do not need is gone."""
    probe = model.clone()
    values = {output.name: output for node in probe.graph for output in node.outputs}
    values.update({value.name: value for value in probe.graph.inputs})
    wanted = [values[name] for name in dict.fromkeys(names)]
    probe.graph.outputs.clear()
    probe.graph.outputs.extend(wanted)
    for value in wanted:
        if value.dtype is None:
            value.dtype = ir.DataType.FLOAT
    common.RemoveUnusedNodesPass()(probe)
    return upcast(probe) if needs_upcast(probe) else probe
