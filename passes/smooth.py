"""Moves the size of large activation columns into weights, where it costs less (SmoothQuant, Xiao et al. 2023).

Column j of an activation is divided by s_j and row j of every weight that reads it multiplied, with s_j =
max|X_j|^a / max|W_j|^(1-a). The division happens in constants (`quantization.absorb`), so no node is added and the model
computes what it did. The strength a is searched per activation, by the error that 8 bits leave on sampled rows. For weights
alone in blocks of 4 bits, s_j = mean|X_j|^a makes room for those that large columns meet (AWQ, Lin et al. 2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_autoglm.quantization.absorb import Folding
from onnx_autoglm.quantization.calibrate import Recording
from onnx_autoglm.quantization.output_error import OUTPUTS, OutputError, weight_of
from onnx_autoglm.quantization.ranges import mse_of_rows
from onnx_autoglm.quantization.weights import nearest

Floats = npt.NDArray[np.float32]
STRENGTHS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_START = 0.8  # most end near here
_GAIN = 0.95  # the error must fall by at least so much, or things stay as they are
_RANGE = 1e4  # no column is scaled by more than this, up or down


@dataclasses.dataclass(frozen=True)
class Smooth:
    """The strengths that are tried; an activation that none of them helps stays as it is.

    With `block` weights alone are quantized, in 4 bits per so many inputs.
    """

    strengths: tuple[float, ...] = STRENGTHS
    block: int | None = None

    def __call__(
        self,
        model: ir.Model,
        foldings: Sequence[Folding],
        recordings: Mapping[str, Recording],
        step: Callable[[str], None] = lambda _: None,
    ) -> list[dict[str, Any]]:
        return smooth(model, foldings, recordings, self.strengths, self.block, step)


def smooth(
    model: ir.Model,
    foldings: Sequence[Folding],
    recordings: Mapping[str, Recording],
    strengths: Sequence[float] = STRENGTHS,
    block: int | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Smooths activations of a canonical model in place; returns what was done to each.

    Args:
        foldings: from the analysis of a clone of the model.
        recordings: of the model as it is.
        block: inputs per scale, if weights alone are quantized, in 4 bits; 8 bits on both sides without.
    """
    done = []
    for number, folding in enumerate(foldings, 1):
        step(f"smooth {number} of {len(foldings)}")
        recording = recordings[folding.activation]
        strength, scales, before, after = _best(model, folding, recording, strengths, block)
        entry = {
            "activation": folding.activation,
            "strength": strength,
            "error_before": before,
            "error": after,
        }
        if scales is not None:
            fold(model, folding, scales)
        done.append(entry)
    return done


def fold(model: ir.Model, folding: Folding, scales: Floats) -> None:
    """Divides the columns of an activation by `scales` (one per group of the folding), in constants alone."""
    nodes = {node.outputs[0].name: node for node in model.graph}
    for absorber in folding.absorbers:
        factors = np.where(absorber.scale_of >= 0, 1 / scales[absorber.scale_of], 1).astype(np.float32)
        _replace(model.graph, nodes[absorber.node], absorber.operand, factors, absorber.axis)
    for place in folding.places:
        value = model.graph.initializers[place.initializer]
        assert value.const_value is not None
        value.const_value = scaled(value.const_value, scales[folding.groups], place.input_axis)
    for name in folding.lookups:
        _divide(model.graph, nodes[name], (1 / scales[folding.groups]).astype(np.float32))


def _divide(graph: ir.Graph, lookup: ir.Node, factors: Floats) -> None:
    """Multiplies the rows that a node looks up."""
    found = lookup.outputs[0]
    kind = found.dtype or ir.DataType.FLOAT
    tensor = ir.Tensor(factors.astype(kind.numpy()), dtype=kind)
    own = ir.Value(name=f"{found.name}/smoothed", const_value=tensor)
    own.shape, own.dtype = ir.Shape(factors.shape), kind
    graph.register_initializer(own)
    product = ir.node("Mul", [found, own])
    product.outputs[0].type, product.outputs[0].shape = found.type, found.shape
    ir.convenience.replace_all_uses_with(found, product.outputs[0], replace_graph_outputs=True)
    product.replace_input_with(0, found)
    graph.insert_after(lookup, product)
    product.outputs[0].name, found.name = found.name, f"{found.name}/looked_up"


def _replace(graph: ir.Graph, node: ir.Node, operand: int, factors: Floats, axis: int) -> None:
    """Gives one use of a constant scaled entries; other uses keep theirs."""
    value = node.inputs[operand]
    assert value is not None and value.const_value is not None
    tensor = scaled(value.const_value, factors, axis)
    if len(value.uses()) == 1:
        value.const_value = tensor
        return
    own = ir.Value(name=f"{value.name}/smoothed/{node.outputs[0].name}", const_value=tensor)
    own.shape, own.dtype = value.shape, value.const_value.dtype
    graph.register_initializer(own)
    node.replace_input_with(operand, own)


def scaled(tensor: ir.TensorProtocol, factors: Floats, axis: int) -> ir.TensorProtocol:
    """The tensor with the entries of one axis multiplied, computed when it is read."""
    shape = [1] * len(tensor.shape)
    shape[axis] = -1
    spread = factors.reshape(shape)

    def compute() -> ir.TensorProtocol:
        product = tensor.numpy().astype(np.float32) * spread
        return ir.Tensor(product.astype(tensor.dtype.numpy()), dtype=tensor.dtype, name=tensor.name)

    return ir.LazyTensor(compute, tensor.dtype, ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _best(
    model: ir.Model,
    folding: Folding,
    recording: Recording,
    strengths: Sequence[float],
    block: int | None,
) -> tuple[float | None, Floats | None, float, float]:
    """The strength with the least error, its scales per group, and the errors before and after."""
    products = [(recording.of(place).rows, weight_of(model, place, OUTPUTS)) for place in folding.places]
    groups = int(folding.groups.max()) + 1
    columns = len(folding.groups)
    size, weight_size = np.zeros(groups, np.float32), np.zeros(groups, np.float32)
    largest = recording.largest
    if block is not None:
        largest = np.abs(products[0][0]).reshape(len(products[0][0]), columns, -1).mean(axis=(0, 2))
    np.maximum.at(size, folding.groups, largest)
    for _, weight in products:
        np.maximum.at(weight_size, folding.groups, np.abs(weight).reshape(columns, -1).max(axis=1))
    before = _error(products, block)
    if folding.lookups:
        before += _table_error(products[0][1], np.ones(columns, np.float32))
    best: tuple[float | None, Floats | None, float] = (None, None, before)
    if not (size > 0).any() or not all(rows.size for rows, _ in products):
        return None, None, before, before
    errors: dict[float, float] = {}
    for strength in _uphill(strengths, lambda tried: errors.get(tried, np.inf)):
        raw = np.maximum(size, 1e-6) ** strength
        if block is None:
            raw /= np.maximum(weight_size, 1e-6) ** (1 - strength)
        scales = (raw / np.exp(np.log(raw).mean())).astype(np.float32)
        scales = np.where(size > 0, np.clip(scales, 1 / _RANGE, _RANGE), 1).astype(np.float32)
        changed = []
        for rows, weight in products:
            spread = np.repeat(scales[folding.groups], len(weight) // columns)
            changed.append((rows / spread, weight * spread[:, None]))
        error = _error(changed, block)
        if folding.lookups:
            error += _table_error(products[0][1], scales[folding.groups])
        errors[strength] = error
        if error < best[2] * (_GAIN if best[0] is None else 1):
            best = (strength, scales, error)
    return best[0], best[1], before, best[2]


def _table_error(weight: Floats, scales: Floats) -> float:
    """What 8 bits leave of the rows of a table, kept with its columns scaled; relative per row. `weight` is `[k, rows]`."""
    restored = nearest(weight * scales[:, None], clip=False).floats() / scales[:, None]
    squares = np.maximum(np.square(weight).sum(axis=0), 1e-30)
    return float((np.square(restored - weight).sum(axis=0) / squares).mean())


def _uphill(strengths: Sequence[float], error: Callable[[float], float]) -> Iterator[float]:
    """Strengths to try: from a usual one to both sides, each side for as long as the error falls."""
    ordered = sorted(strengths)
    start = min(range(len(ordered)), key=lambda index: abs(ordered[index] - _START))
    yield ordered[start]
    for side in (ordered[start + 1 :], ordered[:start][::-1]):
        least = error(ordered[start])
        for strength in side:
            yield strength
            if error(strength) >= least:
                break
            least = error(strength)


def _error(products: Sequence[tuple[Floats, Floats]], block: int | None) -> float:
    """What integers leave, over all readers; `products` has the rows and the weight of each."""
    errors = []
    for rows, weight in products:
        if rows.size:
            held = nearest(weight, 8 if block is None else 4, block, clip=False)
            errors.append(OutputError(rows, weight, held)(mse_of_rows(rows) if block is None else None))
    return float(np.mean(errors)) if errors else 0.0
