"""Means and covariances of what consumers read, streamed.

A consumer is a product with a weight. Per consumer only a mean and a second-moment matrix are held, in float64,
whatever the amount of data or the length of sequences, and those of one consumer at a time.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_autoglm.axes.facts import Contraction, label
from onnx_autoglm.dataset import Arrays
from onnx_autoglm.errors import UserError
from onnx_autoglm.targets import find_target
from onnx_autoglm.walk import Walk

Matrix = npt.NDArray[np.float64]
_ROWS = 2048  # rows per float32 product, before the sum goes on in float64
HELD_OUT = 5  # every fifth run is held out, to choose what must not be chosen on the fitted data


class Moments:
    """Count, mean and covariance of the columns of a stream of rows `[n, k]`."""

    def __init__(self, width: int) -> None:
        self.count = 0.0  # the sum of the weights
        self.total: Matrix = np.zeros(width)
        self.products: Matrix = np.zeros((width, width))

    def add(self, rows: npt.NDArray[np.float32], weights: npt.NDArray[np.float32] | None = None) -> None:
        """Adds rows; without `weights [n]` all weigh 1."""
        for start in range(0, len(rows), _ROWS):
            piece = heavy = rows[start : start + _ROWS]
            if weights is not None:
                heavy = piece * weights[start : start + _ROWS, None]
            self.count += len(piece) if weights is None else float(weights[start : start + _ROWS].sum())
            self.total += heavy.sum(axis=0, dtype=np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                products = heavy.T @ piece
            if not np.isfinite(products).all():  # beyond float32
                products = heavy.T.astype(np.float64) @ piece.astype(np.float64)
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
        return self.total / max(self.count, 1e-30)

    @property
    def covariance(self) -> Matrix:
        """Population covariance `[k, k]`."""
        mean = self.mean
        return self.products / max(self.count, 1e-30) - np.outer(mean, mean)


@dataclasses.dataclass(frozen=True, eq=False)
class Observed:
    """What one consumer reads: rows to fit on, and rows held out.

    `sizes [k]` is the sum over samples of the square of the mean size |x| of a column in a sample, over all rows.
    """

    fitted: Moments
    held_out: Moments
    sizes: Matrix = dataclasses.field(default_factory=lambda: np.zeros(0))

    @property
    def all(self) -> Moments:
        return self.fitted + self.held_out


Key = tuple[str, int]  # name of the activation and its contracted axis, from the end


def key_of(contraction: Contraction) -> Key:
    value = contraction.node.inputs[contraction.activation]
    assert value is not None
    return value.name or "", contraction.activation_axis


class Store(Mapping[Key, Observed]):
    """Moments in files, so that memory holds those of one consumer, whatever the depth of the model."""

    def __init__(self, scratch: Path | None = None) -> None:
        """Args: `scratch` is the folder for the files; the system's for temporary files by default."""
        self._folder = tempfile.TemporaryDirectory(
            prefix="onnx-autoglm-", dir=scratch, ignore_cleanup_errors=True
        )
        self._paths: dict[Key, Path] = {}

    def put(self, key: Key, observed: Observed) -> None:
        path = Path(self._folder.name) / f"{len(self._paths)}.npz"
        parts = {"fitted": observed.fitted, "held_out": observed.held_out}
        np.savez(
            path,
            sizes=observed.sizes,
            **{
                f"{name}_{field}": getattr(part, field)
                for name, part in parts.items()
                for field in ("count", "total", "products")
            },
        )
        self._paths[key] = path

    def __getitem__(self, key: Key) -> Observed:
        with np.load(self._paths[key]) as file:
            parts = []
            for name in ("fitted", "held_out"):
                part = Moments(0)
                part.count = float(file[f"{name}_count"])
                part.total, part.products = file[f"{name}_total"], file[f"{name}_products"]
                parts.append(part)
            return Observed(parts[0], parts[1], file["sizes"])

    def __iter__(self) -> Iterator[Key]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def observe(
    model: ir.Model,
    contractions: Sequence[Contraction],
    feeds: Sequence[Arrays],
    *,
    normed: Container[str] = (),
    step: Callable[[str], None] = lambda _: None,
) -> Store:
    """Runs a canonical model on all feeds and sums up what the given consumers read.

    The model runs piece by piece, from one consumer to the next. Activations of rank 4 are read along their
    axis, all other axes counting as rows. Where the consumer ends in a value of `normed`, a row weighs less the
    larger that value's row is (`relative`).

    Raises:
        UserError: the model does not run, an activation is not finite (the node is named), or there is
            less data than needed for a held-out part.
    """
    if len(feeds) < HELD_OUT:
        raise UserError(
            f"calibration needs at least {HELD_OUT} runs of the model and has {len(feeds)}: pass more data, or a "
            "smaller --window"
        )
    order = {value.name: index for index, node in enumerate(model.graph) for value in node.outputs}
    readers: dict[Key, list[Contraction]] = {}
    for contraction in contractions:
        readers.setdefault(key_of(contraction), []).append(contraction)
    store = Store()
    with Walk(model, feeds) as walk:
        for number, key in enumerate(sorted(readers, key=lambda key: order.get(key[0], -1)), 1):
            step(f"observe {number} of {len(readers)}: {key[0]}")
            store.put(key, observe_one(walk, readers[key], normed))
    return store


def observe_one(walk: Walk, readers: Sequence[Contraction], normed: Container[str] = ()) -> Observed:
    """What consumers of one activation read, where a walk has come to."""
    name, axis = key_of(readers[0])
    ends = {find_target(walk.model.graph, _same_node(walk.model, reader)).value for reader in readers}
    end = ends.pop() if len(ends) == 1 else ""
    names = [name, end] if end in normed else [name]
    walk.reach([name])
    parts: list[Moments] = []
    sizes: Matrix = np.zeros(0)
    for run, arrays in enumerate(walk.values(names), 1):
        rows = _rows(arrays[name], axis)
        if not np.isfinite(rows).all():
            raise UserError(f"{name}, which {label(readers[0].node)} reads, is not finite on the data")
        if not parts:
            parts, sizes = [Moments(rows.shape[1]), Moments(rows.shape[1])], np.zeros(rows.shape[1])
        sizes += _sizes(np.moveaxis(arrays[name], axis, -1))
        weights = relative(_rows(arrays[end], -1)) if len(names) > 1 else None
        parts[run % HELD_OUT == 0].add(
            rows, None if weights is None or len(weights) != len(rows) else weights
        )
    if any(part.count == 0 for part in parts):
        raise UserError("the calibration data holds no rows: pass samples with at least one entry each")
    return Observed(parts[0], parts[1], sizes)


def _sizes(array: np.ndarray) -> Matrix:
    """Sum over samples (the first axis) of the squared mean size of a column (the last) in a sample."""
    whole = array.reshape(-1, int(np.prod(array.shape[1:-1])), array.shape[-1])
    means = np.abs(whole).mean(axis=1, dtype=np.float64) if whole.size else np.zeros((0, array.shape[-1]))
    return np.asarray(np.square(means).sum(axis=0), dtype=np.float64)


def _same_node(model: ir.Model, contraction: Contraction) -> ir.Node:
    """The node of this model that has the name of the contraction's: analysed models are clones."""
    wanted = contraction.node.outputs[0].name
    return next(node for node in model.graph if node.outputs[0].name == wanted)


def relative(rows: np.ndarray) -> npt.NDArray[np.float32]:
    """Weights `[n]` of rows `[n, m]`: one over their mean square, 1 for the middle one; small rows weigh no more.

    Where a norm follows, an error matters by its size relative to that of its row. Language models have a few
    positions a hundred times as large as all others, which would otherwise decide every fit.
    """
    squares = np.square(rows, dtype=np.float64).mean(axis=-1)
    middle = max(float(np.median(squares)), 1e-30)
    return (middle / np.maximum(squares, middle)).astype(np.float32)


def _rows(array: np.ndarray, axis: int) -> npt.NDArray[np.float32]:
    moved = np.moveaxis(array, axis, -1)
    return np.ascontiguousarray(moved.reshape(-1, moved.shape[-1]), dtype=np.float32)
