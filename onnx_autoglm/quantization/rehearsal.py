"""What quantizing costs in quality, rehearsed in floating point: one session, any choice of activations.

The weights of the graph are what the integers stand for. Each activation is rounded and clipped as 8 bits would, with
a scale that is an input of the run, so that a choice is measured without building a model for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_autoglm.dataset import Arrays, Dataset
from onnx_autoglm.divergence import Loss, reference_for
from onnx_autoglm.quantization.ranges import LEVELS
from onnx_autoglm.runtime import Session
from onnx_autoglm.upcast import needs_upcast, upcast, upcast_arrays

_FINE = 2.0**-22  # of the threshold: a step so fine that rounding to it changes nothing in float32


class Rehearsal:
    """Runs a model with some activations as 8 bits would hold them."""

    def __init__(
        self,
        source: ir.Model,
        rounded: ir.Model,
        thresholds: Mapping[str, float],
        data: Dataset,
        numbers: Sequence[int],
        readers: Mapping[str, Collection[str] | None] | None = None,
        *,
        scratch: Path | None = None,
        step: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Runs the source once on the feeds of `data` with the given numbers.

        Args:
            source: what losses are measured against; only read.
            rounded: the same graph with the weights that integers stand for; becomes the rehearsal's own.
            thresholds: for every activation that may be rounded, by name, where it is clipped.
            readers: for each, the nodes (by their first output) that read it rounded; all without.
        """
        self._thresholds = dict(thresholds)
        before = reference_for(source.clone(), data)
        session = Session(_runnable(before.source), optimize=True, prepack=False, scratch=scratch)
        self._feeds: list[Arrays] = []
        for count, number in enumerate(numbers, 1):
            step(f"source {count} of {len(numbers)}")
            feed = data.feeds[number]
            feed = upcast_arrays(feed) if needs_upcast(source) else feed
            feed = before.prepare(feed, data.targets(number))
            outputs = session.run({name: feed[name] for name in session.input_names if name in feed})
            self._feeds.append(before.remember(feed, outputs, data.targets(number)))
        del session
        self._before = before
        for name in thresholds:
            _round(rounded.graph, name, (readers or {}).get(name))
        self._session = Session(
            _runnable(reference_for(rounded, data).trial), optimize=True, prepack=False, scratch=scratch
        )

    def measure(self, chosen: Mapping[str, float] | Collection[str], runs: int | None = None) -> Loss:
        """The loss when the chosen activations are rounded; a mapping gives thresholds of its own.

        Args: `runs` limits the feeds that it is measured on.
        """
        own = chosen if isinstance(chosen, Mapping) else {}
        given: Arrays = {}
        for name, threshold in self._thresholds.items():
            if name in chosen:
                step = own.get(name, threshold) / LEVELS
                values = (step, -LEVELS - 1.0, float(LEVELS))
            else:
                values = (threshold * _FINE, -np.inf, np.inf)
            for part, value in zip(_PARTS, values, strict=True):
                given[_input(name, part)] = np.array(value, np.float32)
        total = np.zeros(5)
        for feed in self._feeds[:runs]:
            known = {name: feed[name] for name in self._session.input_names if name in feed}
            total += self._before.compare(feed, self._session.run(known | given))
        return Loss.mean(total)


_PARTS = ("step", "low", "high")


def _input(name: str, part: str) -> str:
    return f"rehearsal/{part}/{name}"


def _round(graph: ir.Graph, name: str, readers: Collection[str] | None) -> None:
    """Lets readers of a value (all of them, for None) read it as `step * clip(round(x / step), low, high)`, with inputs for these."""
    value = (
        next(v for node in graph for v in node.outputs if v.name == name) if _is_made(graph, name) else None
    )
    value = value if value is not None else next(v for v in graph.inputs if v.name == name)
    kind = value.dtype or ir.DataType.FLOAT
    parts = []
    for part in _PARTS:
        own = ir.Value(name=_input(name, part), type=ir.TensorType(kind), shape=ir.Shape([]))
        graph.inputs.append(own)
        parts.append(own)
    step, low, high = parts
    divided = ir.node("Div", [value, step])
    whole = ir.node("Round", [divided.outputs[0]])
    clipped = ir.node("Clip", [whole.outputs[0], low, high])
    back = ir.node("Mul", [clipped.outputs[0], step])
    nodes = [divided, whole, clipped, back]
    for node in nodes:
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(kind), value.shape
    for user, index in list(value.uses()):
        if user is not divided and (readers is None or user.outputs[0].name in readers):
            user.replace_input_with(index, back.outputs[0])
    maker = value.producer()
    if maker is None:
        graph.insert_before(next(iter(graph)), nodes)
    else:
        graph.insert_after(maker, nodes)


def _is_made(graph: ir.Graph, name: str) -> bool:
    return all(value.name != name for value in graph.inputs)


def _runnable(model: ir.Model) -> ir.Model:
    return upcast(model) if needs_upcast(model) else model
