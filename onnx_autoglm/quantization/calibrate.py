"""What activations hold, recorded in one pass over the data: distributions, sizes of columns, a sample of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_autoglm.dataset import Arrays
from onnx_autoglm.errors import UserError
from onnx_autoglm.patches import patches, spread_out
from onnx_autoglm.quantization.histogram import Histogram
from onnx_autoglm.quantization.places import Place
from onnx_autoglm.statistics import Moments
from onnx_autoglm.walk import Walk

Floats = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]
SAMPLE = 256  # rows that choices are tried on
_TOGETHER = 8  # activations per stop of the walk
_WINDOWS = 4096  # of a convolution, per run
_LARGEST = 8192  # inputs of a product up to which second moments, k^2 numbers, are kept


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """What one kind of product multiplies: rows `[m, k]` (`[m, channels * kernel]` for a convolution).

    Rows are evenly spread, and the one with the largest entry of each run is among them. `moments` is the mean of x x^T
    `[k, k]`, mapped from a file, where it was asked for.
    """

    rows: Floats
    moments: Matrix | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """What one activation holds over all data.

    `largest` is max |x| per column `[k]`, a column being an index of the contracted axis (a channel of a convolution).
    """

    histogram: Histogram
    largest: Floats
    samples: Mapping[str, Sample]

    def of(self, place: Place) -> Sample:
        """What a place multiplies."""
        return self.samples[_kind(place)]


def _kind(place: Place) -> str:
    """Products of matrices multiply the same rows; every convolution has windows of its own."""
    return place.node if place.op == "Conv" else ""


def record(
    model: ir.Model,
    places: Sequence[Place],
    feeds: Sequence[Arrays],
    *,
    moments: Path | None = None,
    others: Sequence[str] = (),
    scratch: Path | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Recording], dict[str, Histogram]]:
    """Runs a canonical model on all feeds and records the activations that the places read, by name.

    Args:
        moments: a folder to write second moments to, k^2 numbers each; none are recorded without.
        others: values of which only the histogram is wanted; the second result.
        scratch: the folder for values between the pieces of the run.

    Raises UserError if the model does not run, or a value is not finite (the node that reads it is named).
    """
    readers: dict[str, dict[str, Place]] = {}
    for place in places:
        readers.setdefault(place.activation, {}).setdefault(_kind(place), place)
    order = {value.name: index for index, node in enumerate(model.graph) for value in node.outputs}
    names = sorted({*readers, *others}, key=lambda name: order.get(name, -1))
    nodes = {node.outputs[0].name: node for node in model.graph}
    found: dict[str, Recording] = {}
    plain: dict[str, Histogram] = {name: Histogram() for name in others}
    with Walk(model, feeds, scratch) as walk:
        for start in range(0, len(names), _TOGETHER):
            together = names[start : start + _TOGETHER]
            step(f"calibrate {start + len(together)} of {len(names)} activations")
            walk.reach(together)
            parts: dict[str, _Part] = {
                name: _Part(readers[name], nodes, model, len(feeds), moments)
                for name in together
                if name in readers
            }
            for arrays in walk.values(together):
                for name in together:
                    array = arrays[name]
                    _refuse_infinite(name, array, next(iter(readers.get(name, {}).values()), None))
                    if name in parts:
                        parts[name].add(array)
                    if name in plain:
                        plain[name].add(array)
            found |= {name: part.finish() for name, part in parts.items()}
    return found, plain


class _Part:
    """A recording in the making."""

    def __init__(
        self,
        readers: Mapping[str, Place],
        nodes: Mapping[str | None, ir.Node],
        model: ir.Model,
        runs: int,
        moments: Path | None,
    ) -> None:
        self._axis = next(iter(readers.values())).activation_axis
        self._histogram = Histogram()
        self._largest: Floats | None = None
        self._samplers = {
            kind: _Sampler(place, nodes[place.node], model, runs, moments) for kind, place in readers.items()
        }

    def add(self, array: np.ndarray) -> None:
        self._histogram.add(array)
        moved = np.moveaxis(array, self._axis, -1)
        columns = np.asarray(np.abs(moved).reshape(-1, moved.shape[-1]).max(axis=0, initial=0), np.float32)
        self._largest = columns if self._largest is None else np.maximum(self._largest, columns)
        for sampler in self._samplers.values():
            sampler.add(array, moved)

    def finish(self) -> Recording:
        assert self._largest is not None
        samples = {kind: sampler.finish() for kind, sampler in self._samplers.items()}
        return Recording(self._histogram, self._largest, samples)


class _Sampler:
    """A sample in the making."""

    def __init__(self, place: Place, node: ir.Node, model: ir.Model, runs: int, moments: Path | None) -> None:
        self._place, self._node, self._folder = place, node, moments
        tensor = model.graph.initializers[place.initializer].const_value
        assert tensor is not None
        self._kernel = tuple(int(size) for size in tensor.shape.numpy()[2:]) if place.op == "Conv" else ()
        self._rows: list[Floats] = []
        self._each = max(SAMPLE // runs, 1)
        self._moments = Moments(place.inputs) if moments is not None and place.inputs <= _LARGEST else None

    def add(self, array: np.ndarray, moved: np.ndarray) -> None:
        if self._kernel:
            rows = patches(array, self._node, self._kernel, _WINDOWS)[0]
        else:
            rows = np.ascontiguousarray(moved.reshape(-1, moved.shape[-1]), dtype=np.float32)
        if not len(rows):
            return
        chosen = {*spread_out(len(rows), self._each).tolist(), int(np.abs(rows).max(axis=1).argmax())}
        self._rows.append(rows[sorted(chosen)])
        if self._moments is not None:
            self._moments.add(rows)

    def finish(self) -> Sample:
        rows = np.concatenate(self._rows) if self._rows else np.zeros((0, self._place.inputs), np.float32)
        if self._moments is None or self._folder is None:
            return Sample(rows)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{len(list(self._folder.iterdir()))}.npy"
        np.save(path, self._moments.products / max(self._moments.count, 1))
        return Sample(rows, np.load(path, mmap_mode="r"))


def _refuse_infinite(name: str, array: np.ndarray, reader: Place | None) -> None:
    if not np.isfinite(array).all():
        where = f", which {reader.label} reads," if reader else ""
        raise UserError(
            f"{name}{where} is not finite on the calibration data: the model overflows there; pass other data, or "
            "mend the model"
        )


def constant_activations(recordings: Mapping[str, Recording]) -> list[str]:
    """Names of activations that are zero on all data: no range can be chosen for them."""
    return [name for name, recording in recordings.items() if recording.histogram.largest <= 0]
