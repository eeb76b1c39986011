"""Refits consumers after a cut, in closed form and one after another, each on what the last ones left.

A consumer of the pruned model reads x; its error e is what the source computes there, less what the pruned
model does. Ridge regression with an intercept, `e ~ x D + d`, gives the correction: `W += D`, `b += d`. x is
taken from the model as pruned and repaired so far, so errors do not add up from layer to layer. Where the output
goes on into a sum, what counts is the error of the sum: a branch then makes up for what its residual stream has lost.
Whether that can be learnt from x is not sure, so two fits compete there, to the error of the sum and to that of the
output alone; which one is kept, and lambda, is decided by the error of the sum on held-out rows. (FLAP's bias compensation is the case D = 0; CORP's affine one that of equal inputs.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.consumers import Consumer
from onnx_autoglm.data import Arrays
from onnx_autoglm.patches import patches, spread_out
from onnx_autoglm.refit import LAMBDAS, per_output, refit, why_no_refit
from onnx_autoglm.regression import Line, Matrix, Sums, error, ridge
from onnx_autoglm.sliced_tensor import SlicedTensor
from onnx_autoglm.statistics import HELD_OUT, key_of, observe_one, relative
from onnx_autoglm.targets import Target, find_target
from onnx_autoglm.walk import Walk

ROWS = 1 << 16  # at most this many are looked at: more rows of the same data hardly change a fit


@dataclasses.dataclass(frozen=True)
class RepairWeights:
    """`affine`: weights and bias; `bias`: the mean of what went, as a bias alone."""

    mode: Literal["affine", "bias"] = "affine"

    def __call__(
        self,
        source: ir.Model,
        pruned: ir.Model,
        selection: Selection,
        consumers: list[Consumer],
        feeds: Sequence[tuple[Arrays, Arrays]],
        step: Callable[[str], None] = lambda _: None,
    ) -> list[dict[str, Any]]:
        return repair_weights(source, pruned, selection, consumers, feeds, self.mode, step)


def repair_weights(
    source: ir.Model,
    pruned: ir.Model,
    selection: Selection,
    consumers: list[Consumer],
    feeds: Sequence[tuple[Arrays, Arrays]],
    mode: Literal["affine", "bias"],
    step: Callable[[str], None] = lambda _: None,
    scratch: Path | None = None,
    normed: Container[str] = (),
) -> list[dict[str, Any]]:
    """Refits every cut consumer of a pruned graph, in place; returns what was done to each.

    Args:
        source: the canonical source, with the names of the pruned model.
        pruned: the analysed model after its cut.
        consumers: with the initializers of the analysed model, whose cut tensors know their source.
        feeds: calibration data, as the source and as the pruned model take it.
        scratch: folder for activations; by default the system's for temporary files.
        normed: names of values whose last axis is normalised where they are read on.
    """
    order = {node: index for index, node in enumerate(pruned.graph)}
    left = [c for c in consumers if c.contraction.node in order]  # a removed block takes its own with it
    cut = [c for c in left if selection.touches(c.contraction.dim)]
    done: list[dict[str, Any]] = []
    jobs: list[_Job] = []
    for consumer in sorted(cut, key=lambda c: order[c.contraction.node]):
        reason = _why_not(consumer)
        if reason:
            done.append({"consumer": _name(consumer), "repaired": False, "reason": reason})
        else:
            jobs.append(_Job(consumer, find_target(pruned.graph, consumer.contraction.node)))
    with (
        Walk(source, (feed for feed, _ in feeds), scratch) as before,
        Walk(pruned, (feed for _, feed in feeds), scratch) as after,
    ):
        for index, job in enumerate(jobs):
            step(f"repair {_name(job.consumer)}")
            if mode == "bias" and job.consumer.contraction.node.op_type != "Conv":
                done.append(
                    {"consumer": _name(job.consumer), **_add_mean(pruned.graph, job, selection, before)}
                )
                continue
            before.reach(job.outputs, keep=(name for later in jobs[index:] for name in later.outputs))
            after.reach([job.activation])
            fit = _fit(_observe(job, before, after, normed), mode)
            done.append({"consumer": _name(job.consumer), **_described(fit)})
            if fit.line is not None:
                _write(pruned.graph, job.consumer, fit.line)
    return done


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    consumer: Consumer
    target: Target

    @property
    def activation(self) -> str:
        contraction = self.consumer.contraction
        value = contraction.node.inputs[contraction.activation]
        assert value is not None
        return value.name or ""

    @property
    def outputs(self) -> list[str]:
        return [_name(self.consumer), self.target.value]


def _name(consumer: Consumer) -> str:
    return next(output.name or "" for output in consumer.contraction.node.outputs)


def _why_not(consumer: Consumer) -> str:
    """Why a consumer is left as it is, or an empty string."""
    tensor = consumer.initializer.const_value
    if not isinstance(tensor, SlicedTensor) or consumer.axis not in tensor.kept:
        return why_no_refit(consumer) or "its weight was not cut along what it contracts"
    if tensor.outer:
        return "its selection varies along another axis of the weight"
    return why_no_refit(consumer)


# --- data


@dataclasses.dataclass(frozen=True, eq=False)
class _Evidence:
    """Sums by what e is the error of (`sum`, `output`); the first is the one that counts."""

    fitted: dict[str, Sums]
    held_out: dict[str, Sums]
    variance: float  # of the output, summed over its channels


def _observe(job: _Job, before: Walk, after: Walk, normed: Container[str]) -> _Evidence:
    """Inputs and errors of a consumer; where a norm follows, errors count relative to the size of their row."""
    node, tensor = job.consumer.contraction.node, job.consumer.initializer.const_value
    assert isinstance(tensor, SlicedTensor)
    channels = tensor.kept.get(1 - job.consumer.axis)  # of the output, that stay
    axis = 1 if node.op_type == "Conv" else -1
    shape = tensor.shape.numpy()
    kernel = shape[2:]
    outputs = shape[1 - job.consumer.axis]
    parts: list[Sums] = []
    spread = Sums(0, outputs)
    runs = len(before)

    def cut(array: np.ndarray) -> np.ndarray:
        return array if channels is None else np.take(array, channels, axis=axis)

    def as_rows(array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array, axis, -1).reshape(-1, outputs)

    output, end = job.outputs
    targets = ["output"] if end == output else ["sum", "output"]
    pairs = zip(before.values([output, end]), after.values([job.activation, output, end]), strict=True)
    for run, (expected, actual) in enumerate(pairs, 1):
        # A sum that broadcasts has no row for each row of the consumer.
        meets = actual[output].shape == actual[end].shape
        place, scale = (end, job.target.scale()) if meets else (output, np.float32(1))
        miss = as_rows(cut(expected[place]) - actual[place]) / scale
        if len(targets) > 1:
            miss = np.hstack([miss, as_rows(cut(expected[output]) - actual[output])])
        if node.op_type == "Conv":
            rows, chosen = patches(actual[job.activation], node, kernel, ROWS // runs)
        else:
            values = np.moveaxis(actual[job.activation], job.consumer.contraction.activation_axis, -1)
            chosen = spread_out(len(miss), ROWS // runs)
            rows = values.reshape(len(miss), -1)[chosen]
        weights = relative(as_rows(cut(expected[place]))) if place in normed else None
        parts = parts or [Sums(tensor.size // outputs, miss.shape[1]) for _ in range(2)]
        parts[run % HELD_OUT == 0].add(
            rows.astype(np.float32), miss[chosen], None if weights is None else weights[chosen]
        )
        spread.add(np.empty((len(miss), 0), np.float32), as_rows(cut(expected[output])), weights)
    fitted, held_out = (
        {name: part.of_outputs(n * outputs, (n + 1) * outputs) for n, name in enumerate(targets)}
        for part in parts
    )
    return _Evidence(fitted, held_out, error(spread, ridge(spread, None)))


# --- the fit


@dataclasses.dataclass(frozen=True, eq=False)
class _Fit:
    line: Line | None  # none: leaving the weight alone is best
    target: str  # what it was fitted to
    strength: float | None
    error: float  # held-out, relative to the variance of the output
    before: float  # the same without repair


def _fit(seen: _Evidence, mode: str) -> _Fit:
    """The best correction on held-out rows, fitted again on all."""
    counts, scale = next(iter(seen.held_out.values())), seen.variance or 1.0
    before = float(counts.ee.sum()) / max(counts.count, 1e-30)
    candidates = [
        (target, strength)
        for target in seen.fitted
        for strength in (None, *(LAMBDAS if mode == "affine" else ()))
    ]
    errors = [error(counts, ridge(seen.fitted[target], strength)) for target, strength in candidates]
    best = int(np.argmin(errors))
    target, strength = candidates[best]
    if not errors[best] < before:
        return _Fit(None, target, None, before / scale, before / scale)
    line = ridge(seen.fitted[target] + seen.held_out[target], strength)
    return _Fit(line, target, strength, errors[best] / scale, before / scale)


def _described(fit: _Fit) -> dict[str, Any]:
    if fit.line is None:
        return {"repaired": False, "reason": "no refit was better than none on held-out data"}
    described = {"repaired": True, "target": fit.target, "lambda": fit.strength}
    return described | {"error": fit.error, "unrepaired": fit.before}


def _add_mean(graph: ir.Graph, job: _Job, selection: Selection, before: Walk) -> dict[str, Any]:
    """Adds to a product the mean of what went, as the source has it (FLAP).

    Not the mean of the error on the pruned prefix: a constant that makes up for what other layers have lost makes
    a language model worse, even where it lowers that error. (A convolution pads, so there the error is the way.)
    """
    consumer, tensor = job.consumer, job.consumer.initializer.const_value
    assert isinstance(tensor, SlicedTensor)
    kept, _ = selection.indices([consumer.contraction.dim], 0)
    seen = {key_of(consumer.contraction): observe_one(before, [consumer.contraction])}
    fit = refit(consumer, tensor.source, kept, seen, "bias")
    if isinstance(fit, str):
        return {"repaired": False, "reason": fit}
    channels = tensor.kept.get(1 - consumer.axis)
    shift = per_output(consumer, fit.shift[:, None])
    shift = shift if channels is None else shift[channels]
    width = tensor.size // len(shift)
    _write(graph, consumer, Line(np.zeros((width, len(shift))), shift))
    return {"repaired": True, "lambda": None, "error": fit.error, "unrepaired": fit.before}


# --- the weights


def _write(graph: ir.Graph, consumer: Consumer, line: Line) -> None:
    """Adds the slope to the weight and the shift to the bias."""
    node, tensor = consumer.contraction.node, consumer.initializer.const_value
    assert tensor is not None
    alpha = node.attributes.get_float("alpha", 1.0)  # a Gemm scales its product, not its bias
    array = tensor.numpy().astype(np.float64)
    if node.op_type == "Conv":
        array += line.slope.reshape(array.shape[1], *array.shape[2:], -1).transpose(
            array.ndim - 1, *range(array.ndim - 1)
        )
    else:
        array += (line.slope if consumer.axis == 0 else line.slope.T) / alpha
    consumer.initializer.const_value = ir.Tensor(
        np.ascontiguousarray(array).astype(tensor.dtype.numpy()), dtype=tensor.dtype, name=tensor.name
    )
    _add_bias(graph, consumer, line.shift, tensor.dtype)


def _add_bias(graph: ir.Graph, consumer: Consumer, shift: Matrix, dtype: ir.DataType) -> None:
    """Adds a constant per channel: to the bias of the node, as its new bias, or behind it."""
    node = consumer.contraction.node
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if node.op_type not in ("Conv", "Gemm") or (bias is not None and not _is_own(bias, shift)):
        _add_behind(graph, node, shift, dtype)
        return
    if bias is not None:
        assert bias.const_value is not None
        total = bias.const_value.numpy() + shift / node.attributes.get_float("beta", 1.0)
        bias.const_value = ir.Tensor(total.astype(dtype.numpy()), dtype=dtype, name=bias.name)
        return
    node.resize_inputs(3)
    node.replace_input_with(2, _constant(graph, f"{node.outputs[0].name}_shift", shift, dtype))


def _is_own(bias: ir.Value, shift: Matrix) -> bool:
    """Whether a bias is an initializer of this node alone, one number per channel."""
    tensor = bias.const_value
    alone = len(bias.uses()) == 1 and bias.is_initializer() and not bias.is_graph_output()
    return alone and tensor is not None and tuple(tensor.shape.numpy()) == shift.shape


def _constant(graph: ir.Graph, name: str, array: Matrix, dtype: ir.DataType) -> ir.Value:
    while name in graph.initializers:
        name += "_"
    value = ir.Value(name=name, const_value=ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=name))
    value.shape, value.dtype = ir.Shape(list(array.shape)), dtype
    graph.register_initializer(value)
    return value


def _add_behind(graph: ir.Graph, node: ir.Node, shift: Matrix, dtype: ir.DataType) -> None:
    output = node.outputs[0]
    if node.op_type == "Conv":
        rank = len(output.shape) if output.shape is not None else 4
        shift = shift.reshape(-1, *([1] * (rank - 2)))
    added = ir.node("Add", [output, _constant(graph, f"{output.name}_shift", shift, dtype)])
    result = added.outputs[0]
    result.type, result.shape = output.type, output.shape
    ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    added.replace_input_with(0, output)
    graph.insert_after(node, added)
    taken = {value.name for other in graph for value in other.outputs}
    name = f"{output.name}_unshifted"
    while name in taken:
        name += "_"
    output.name, result.name = name, output.name
