"""What a selection costs a model, measured without writing one.

The source runs with other weights at the consumers: removed rows are zero, kept ones refitted. By the
invariant that masked equals pruned this is the pruned and repaired model, at the price of one run.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.consumers import Consumer, as_rows
from onnx_autoglm.dataset import Arrays, Dataset, Labels
from onnx_autoglm.errors import UserError
from onnx_autoglm.refit import LAMBDAS, per_output, refit, why_no_refit
from onnx_autoglm.runtime import Session
from onnx_autoglm.scores import ScoreOutput, class_scores, token_scores
from onnx_autoglm.statistics import Key, Observed
from onnx_autoglm.upcast import needs_upcast, upcast

Repair = Literal["affine", "bias", "none"]
_LIKELIEST = 64  # tokens per position whose probabilities are compared; all others count as one
_QUICK = (1e-2,)  # one ridge strength is enough to tell structures apart


@dataclasses.dataclass(frozen=True)
class Loss:
    """How far a run is from the source's.

    `divergence` is KL(source || trial) per position in nats for scores of tokens or classes, otherwise the
    squared error of the outputs relative to their variance. `likelihood` is the mean negative log-likelihood of
    the right answers and `accuracy` how many are ranked first, where there are right answers.
    """

    divergence: float
    likelihood: float = math.nan
    accuracy: float = math.nan


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
        scores = _scores(model, data)
        self._reference: _Reference = (
            _Outputs(graph_model)
            if scores is None
            else _Scores(graph_model, scores, is_text=data.labels is None)
        )
        source = self._reference.source
        source = upcast(source) if needs_upcast(source) else source
        session = Session(source, optimize=True)
        feeds = []
        for count, number in enumerate(numbers, 1):
            step(f"trial, source {count} of {len(numbers)}")
            feed = data.feeds[number]
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
        total = np.zeros(4)
        for feed in self._feeds:
            known = {name: feed[name] for name in self._session.input_names if name in feed}
            total += self._reference.compare(feed, self._session.run(known | given))
        _, divergence, likelihood, correct = total / max(total[0], 1)
        if not math.isfinite(divergence):
            return Loss(math.inf, math.inf, 0.0)
        return Loss(float(divergence), float(likelihood), float(correct))

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
        path = _retraced(graph, node, weight, node.inputs[contraction.weight])
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


def _retraced(graph: ir.Graph, before: ir.Node, weight: ir.Value, path: ir.Value | None) -> ir.Value:
    """The weight through copies of the transposes that lead from the old one to its consumer."""
    perms: list[list[int]] = []
    while path is not None and path.producer() is not None:
        producer = path.producer()
        assert producer is not None
        perms.append(list(producer.attributes["perm"].as_ints()))
        path = producer.inputs[0]
    for perm in reversed(perms):
        turned = ir.node("Transpose", [weight], {"perm": perm})
        turned.outputs[0].dtype = weight.dtype or ir.DataType.FLOAT
        graph.insert_before(before, turned)
        weight = turned.outputs[0]
    return weight


def _scores(model: ir.Model, data: Dataset) -> ScoreOutput | None:
    """The scores that the data has right answers for."""
    if data.labels is not None:
        return class_scores(model)
    return token_scores(model) if data.token_input is not None else None


class _Reference(abc.ABC):
    """What of the source's run is remembered, and how a trial's run is compared with it."""

    source: ir.Model
    trial: ir.Model

    @abc.abstractmethod
    def remember(self, feed: Arrays, outputs: Arrays, targets: Labels | None) -> Arrays:
        """The feed with what `compare` needs of the source's outputs."""

    @abc.abstractmethod
    def compare(self, feed: Arrays, outputs: Arrays) -> npt.NDArray[np.float64]:
        """Positions, and over them the sums of divergences, negative log-likelihoods and right answers."""


class _Outputs(_Reference):
    """All outputs of floating point, compared by squared error relative to their variance."""

    def __init__(self, model: ir.Model) -> None:
        self.source = self.trial = model
        self._expected: dict[int, Arrays] = {}

    def remember(self, feed: Arrays, outputs: Arrays, targets: Labels | None) -> Arrays:
        self._expected[id(feed)] = {
            name: array
            for name, array in outputs.items()
            if isinstance(array, np.ndarray) and array.dtype.kind in "fV"
        }
        if not self._expected[id(feed)]:
            raise UserError("the model has no output of floating point to measure a loss on: use --prune")
        return feed

    def compare(self, feed: Arrays, outputs: Arrays) -> npt.NDArray[np.float64]:
        total = 0.0
        expected = self._expected[id(feed)]
        for name, array in expected.items():
            a = array.astype(np.float64)
            error = float(np.square(a - outputs[name].astype(np.float64)).sum())
            total += error / max(float(np.square(a - a.mean()).sum()), 1e-30)
        return np.array([1.0, total / len(expected), math.nan, math.nan])


class _Scores(_Reference):
    """Scores of tokens or classes: the probabilities of the source's likeliest ones and of the right answer."""

    def __init__(self, model: ir.Model, scores: ScoreOutput, *, is_text: bool) -> None:
        self._is_text = is_text
        self.source, self.trial = model.clone(), model
        size = _last_size(model, scores.name)
        count = np.array([min(_LIKELIEST, size or _LIKELIEST)])
        for target in (self.source, self.trial):
            graph = target.graph
            (value,) = [output for output in graph.outputs if output.name == scores.name]
            kind = value.dtype or ir.DataType.FLOAT
            logs = (
                ir.node("Log", [value]) if scores.normalised else ir.node("LogSoftmax", [value], {"axis": -1})
            )
            logs.outputs[0].dtype = kind
            graph.append(logs)
            graph.outputs.clear()
            if target is self.source:
                likeliest = ir.Value(name="trial/count", const_value=ir.tensor(count))
                graph.register_initializer(likeliest)
                top = ir.node("TopK", [logs.outputs[0], likeliest], {"axis": -1}, num_outputs=2)
                top.outputs[0].dtype, top.outputs[1].dtype = kind, ir.DataType.INT64
                graph.append(top)
                top.outputs[0].name, top.outputs[1].name = "trial/logs", "trial/answers"
                graph.outputs.extend(top.outputs)
            else:
                index = ir.Value(
                    name="trial/answers",
                    type=ir.TensorType(ir.DataType.INT64),
                    shape=ir.Shape([None] * (3 if is_text else 2)),
                )
                graph.inputs.append(index)
                picked = ir.node("GatherElements", [logs.outputs[0], index], {"axis": -1})
                picked.outputs[0].dtype, picked.outputs[0].name = kind, "trial/logs"
                graph.append(picked)
                graph.outputs.append(picked.outputs[0])
            common.RemoveUnusedNodesPass()(target)

    def remember(self, feed: Arrays, outputs: Arrays, targets: Labels | None) -> Arrays:
        answers = outputs["trial/answers"]
        assert targets is not None
        if self._is_text:  # the last position of a window has no right answer
            rows = targets.reshape(len(answers), -1)
            right = np.concatenate([rows, np.full((len(rows), 1), -1)], axis=1)
        else:
            right = targets
        return feed | {
            "trial/answers": np.concatenate([answers, np.maximum(right, 0)[..., None]], axis=-1),
            "trial/expected": outputs["trial/logs"].astype(np.float64),
            "trial/counts": right >= 0,
        }

    def compare(self, feed: Arrays, outputs: Arrays) -> npt.NDArray[np.float64]:
        counts = feed["trial/counts"]
        logs, expected = outputs["trial/logs"].astype(np.float64)[counts], feed["trial/expected"][counts]
        actual, right = logs[:, :-1], logs[:, -1]
        probability = np.exp(expected)
        divergence = (probability * (expected - actual)).sum(axis=-1)
        rest = np.maximum(1 - probability.sum(axis=-1), 1e-9)
        other = np.maximum(1 - np.exp(actual).sum(axis=-1), 1e-9)
        divergence += rest * (np.log(rest) - np.log(other))
        correct = right >= actual.max(axis=-1)
        return np.array([float(len(logs)), divergence.sum(), -right.sum(), float(correct.sum())])


def _last_size(model: ir.Model, output: str) -> int | None:
    for value in model.graph.outputs:
        if value.name == output and value.shape is not None and isinstance(value.shape[-1], int):
            return value.shape[-1]
    return None
