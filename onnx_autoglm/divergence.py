"""How far a changed model is from its source on the same data, from what is remembered of the source's run."""

from __future__ import annotations

import abc
import dataclasses
import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from onnx_autoglm.dataset import Arrays, Dataset, Labels
from onnx_autoglm.errors import UserError
from onnx_autoglm.scores import ScoreOutput, class_scores, token_scores

_LIKELIEST = 64  # tokens per position whose probabilities are compared; all others count as one


@dataclasses.dataclass(frozen=True)
class Loss:
    """How far a run is from the source's.

    `divergence` is KL(source || trial) per position in nats for scores of tokens or classes, otherwise the
    squared error of the outputs relative to their variance. `likelihood` is the mean negative log-likelihood of
    the right answers, `before` that of the source, and `accuracy` how many are ranked first, where there are right
    answers.
    """

    divergence: float
    likelihood: float = math.nan
    accuracy: float = math.nan
    before: float = math.nan

    @property
    def excess(self) -> float:
        """By what share perplexity grows; the divergence where there are no right answers.

        On a few thousand tokens chance may hide a growth, but hardly a divergence, which is as large if the source knows
        its data: the larger of both counts.
        """
        if math.isnan(self.likelihood) or math.isnan(self.before):
            return self.divergence
        return math.expm1(min(max(self.likelihood - self.before, self.divergence), 700.0))

    @classmethod
    def mean(cls, total: npt.NDArray[np.float64]) -> Loss:
        """From sums of `Reference.compare`."""
        _, divergence, likelihood, correct, before = total / max(total[0], 1)
        if not math.isfinite(divergence):
            return cls(math.inf, math.inf, 0.0)
        return cls(float(divergence), float(likelihood), float(correct), float(before))


def reference_for(model: ir.Model, data: Dataset) -> Reference:
    """How runs on the data are compared: by scores where the data has right answers, otherwise by all outputs.

    `model` becomes the graph of the trial, with outputs of its own.
    """
    scores = _scores(model, data)
    return (
        _Outputs(model)
        if scores is None
        else _Scores(model, scores, None if data.labels is not None else data.token_input)
    )


def _scores(model: ir.Model, data: Dataset) -> ScoreOutput | None:
    """The scores that the data has right answers for."""
    if data.labels is not None:
        return class_scores(model)
    return token_scores(model) if data.token_input is not None else None


class Reference(abc.ABC):
    """What of the source's run is remembered, and how a trial's run is compared with it.

    `source` is the graph to run first, `trial` the one that other weights or values may be put into.
    """

    source: ir.Model
    trial: ir.Model

    def prepare(self, feed: Arrays, targets: Labels | None) -> Arrays:
        """What the source's graph is run on."""
        return feed

    @abc.abstractmethod
    def remember(self, feed: Arrays, outputs: Arrays, targets: Labels | None) -> Arrays:
        """The feed with what `compare` needs of the source's outputs."""

    @abc.abstractmethod
    def compare(self, feed: Arrays, outputs: Arrays) -> npt.NDArray[np.float64]:
        """Positions, and over them the sums of divergences, negative log-likelihoods, right answers, and negative
        log-likelihoods of the source."""


class _Outputs(Reference):
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
        return np.array([1.0, total / len(expected), math.nan, math.nan, math.nan])


class _Scores(Reference):
    """Scores of tokens or classes: the probabilities of the source's likeliest ones and of the right answer."""

    def __init__(self, model: ir.Model, scores: ScoreOutput, token_input: str | None) -> None:
        self._token_input = token_input
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
                graph.outputs.append(self._picked(graph, logs.outputs[0], "trial/right", "trial/known"))
            else:
                graph.outputs.append(self._picked(graph, logs.outputs[0], "trial/answers", "trial/logs"))
            common.RemoveUnusedNodesPass()(target)

    def _picked(self, graph: ir.Graph, logs: ir.Value, index: str, name: str) -> ir.Value:
        """The log-probabilities of the answers that an input asks for."""
        asked = ir.Value(
            name=index,
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([None] * (2 if self._token_input is None else 3)),
        )
        graph.inputs.append(asked)
        picked = ir.node("GatherElements", [logs, asked], {"axis": -1})
        picked.outputs[0].dtype, picked.outputs[0].name = logs.dtype or ir.DataType.FLOAT, name
        graph.append(picked)
        return picked.outputs[0]

    def prepare(self, feed: Arrays, targets: Labels | None) -> Arrays:
        assert targets is not None
        right = targets
        if self._token_input is not None:  # the last position of a window has no right answer
            rows = targets.reshape(len(feed[self._token_input]), -1)
            right = np.concatenate([rows, np.full((len(rows), 1), -1)], axis=1)
        return feed | {"trial/right": np.maximum(right, 0)[..., None], "trial/counts": right >= 0}

    def remember(self, feed: Arrays, outputs: Arrays, targets: Labels | None) -> Arrays:
        answers, right = outputs["trial/answers"], feed["trial/right"]
        return feed | {
            "trial/answers": np.concatenate([answers, right], axis=-1),
            "trial/expected": outputs["trial/logs"].astype(np.float64),
            "trial/known": outputs["trial/known"].astype(np.float64)[..., 0],
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
        known = feed["trial/known"][counts]
        return np.array(
            [float(len(logs)), divergence.sum(), -right.sum(), float(correct.sum()), -known.sum()]
        )


def _last_size(model: ir.Model, output: str) -> int | None:
    for value in model.graph.outputs:
        if value.name == output and value.shape is not None and isinstance(value.shape[-1], int):
            return value.shape[-1]
    return None
