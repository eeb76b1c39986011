"""What a selection costs a model, measured without writing one.

The source runs with other weights at the consumers: removed rows are zero, kept ones refitted. By the
invariant that masked equals pruned this is the pruned and repaired model, at the price of one run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.consumers import Consumer, as_rows, retraced
from onnx_autoglm.dataset import Arrays, Dataset
from onnx_autoglm.divergence import Loss, reference_for
from onnx_autoglm.refit import LAMBDAS, per_output, refit, why_no_refit
from onnx_autoglm.runtime import Session
from onnx_autoglm.statistics import Key, Observed
from onnx_autoglm.upcast import needs_upcast, upcast

Repair = Literal["affine", "bias", "none"]
_QUICK = (1e-2,)  # one ridge strength is enough to tell structures apart


class Trial:
    """Runs a source model on a few feeds with the consumers' weights replaced."""

    def __init__(
        self,
        model: ir.Model,
        consumers: Sequence[Consumer],
        observed: Mapping[Key, Observed],
        data: Dataset,
        *,
        numbers: Sequence[int],
        repair: Repair,
        step: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Runs the source once on the feeds of `data` with the given numbers.

        Args:
            model: the canonical source; it is only read.
            consumers: of a clone of the model, with the same names.
            repair: how kept rows are refitted: `affine`, `bias` or `none`.

        Raises UserError if the model does not run.
        """
        self._observed, self._repair = observed, repair
        graph_model = model.clone()
        self._slots = _open_weights(graph_model.graph, consumers, repair)
        self._reference = reference_for(graph_model, data)
        source = self._reference.source
        source = upcast(source) if needs_upcast(source) else source
        session = Session(source, optimize=True)
        feeds = []
        for count, number in enumerate(numbers, 1):
            step(f"trial, source {count} of {len(numbers)}")
            feed = self._reference.prepare(data.feeds[number], data.targets(number))
            outputs = session.run({name: feed[name] for name in session.input_names if name in feed})
            feeds.append(self._reference.remember(feed, outputs, data.targets(number)))
        self._feeds = feeds
        del session
        trial = self._reference.trial
        trial = upcast(trial) if needs_upcast(trial) else trial
        self._session = Session(trial, optimize=True)

    def measure(self, selection: Selection, *, quick: bool = False) -> Loss:
        """The loss of a selection; `quick` refits with one fixed ridge strength."""
        given: Arrays = {}
        for slot in self._slots:
            if selection.touches(slot.consumer.contraction.dim):
                given.update(self._weights(slot, selection, quick))
        total = np.zeros(5)
        for feed in self._feeds:
            known = {name: feed[name] for name in self._session.input_names if name in feed}
            total += self._reference.compare(feed, self._session.run(known | given))
        return Loss.mean(total)

    def _weights(self, slot: _Slot, selection: Selection, quick: bool) -> Arrays:
        consumer, source = slot.consumer, slot.source
        kept, _ = selection.indices([consumer.contraction.dim], 0)
        weight = as_rows(source, consumer.axis)
        rows = np.zeros_like(weight)
        rows[kept] = weight[kept]
        shape = list(source.shape.numpy())
        moved = [shape[consumer.axis], *(size for axis, size in enumerate(shape) if axis != consumer.axis)]
        result: Arrays = {}
        if slot.shift is not None:
            strengths = _QUICK if quick else LAMBDAS
            assert self._repair != "none"
            fit = refit(consumer, source, kept, self._observed, self._repair, strengths)
            if not isinstance(fit, str):
                rows[kept] = fit.rows
                shift = per_output(consumer, fit.shift.reshape(moved[1:]))
                result[slot.shift] = shift.astype(np.float32)
        array = np.moveaxis(rows.reshape(moved), 0, consumer.axis)
        result[slot.weight] = np.ascontiguousarray(array, dtype=np.float32)
        return result


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A consumer's whole weight, and the inputs that replace it and add to the consumer's output."""

    consumer: Consumer
    source: ir.TensorProtocol
    weight: str
    shift: str | None


def _open_weights(graph: ir.Graph, consumers: Sequence[Consumer], repair: Repair) -> list[_Slot]:
    """Gives each consumer a weight of its own, and a constant to add, that a run may override."""
    nodes = {node.outputs[0].name: node for node in graph}
    slots = []
    for number, consumer in enumerate(consumers):
        contraction, source = consumer.contraction, consumer.initializer.const_value
        assert source is not None
        node = nodes[contraction.node.outputs[0].name]
        weight = _overridable(graph, f"trial/weight_{number}", source)
        path = retraced(graph, node, weight, node.inputs[contraction.weight])
        node.replace_input_with(contraction.weight, path)
        shift: str | None = None
        if repair != "none" and not why_no_refit(consumer):
            width = source.shape[0 if node.op_type == "Conv" else 1 - consumer.axis]
            assert isinstance(width, int)
            zeros = per_output(consumer, np.zeros((width, 1)))
            shift = f"trial/shift_{number}"
            value = _overridable(
                graph, shift, ir.Tensor(zeros.astype(source.dtype.numpy()), dtype=source.dtype)
            )
            output = node.outputs[0]
            added = ir.node("Add", [output, value])
            added.outputs[0].type, added.outputs[0].shape = output.type, output.shape
            ir.convenience.replace_all_uses_with(output, added.outputs[0], replace_graph_outputs=True)
            added.replace_input_with(0, output)
            graph.insert_after(node, added)
            added.outputs[0].name, output.name = output.name, f"trial/unshifted_{number}"
        slots.append(_Slot(consumer, source, weight.name or "", shift))
    return slots


def _overridable(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """An initializer that is a graph input too: a run may give another value."""
    value = ir.Value(name=name, const_value=tensor)
    value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
    graph.register_initializer(value)
    graph.inputs.append(value)
    return value
