"""Folds a BatchNormalization by constants into the convolution before it: w g / sqrt(v + eps), (b - m) g / sqrt(v + eps) + beta."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def fold_batchnorm(model: ir.Model) -> int:
    """Folds in place wherever a convolution's output goes to one BatchNormalization alone; returns how many.

    Weights of a convolution that other nodes share stay, and so does its norm.
    """
    folded = 0
    for norm in list(model.graph):
        if norm.op_type != "BatchNormalization" or norm.attributes.get_int("training_mode", 0) == 1:
            continue
        conv = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if conv is None or conv.op_type != "Conv" or not _can_fold(conv, norm):
            continue
        _fold(model.graph, conv, norm)
        folded += 1
    return folded


def _can_fold(conv: ir.Node, norm: ir.Node) -> bool:
    constants = [*conv.inputs[1:], *norm.inputs[1:]]
    known = all(
        value is None or (value.is_initializer() and value.const_value is not None) for value in constants
    )
    weight, output = conv.inputs[1], conv.outputs[0]
    alone = len(output.uses()) == 1 and not output.is_graph_output()
    alone &= not any(value is not None and value.is_graph_output() for value in constants)
    return known and alone and weight is not None and len(weight.uses()) == 1


def _fold(graph: ir.Graph, conv: ir.Node, norm: ir.Node) -> None:
    gamma, beta, mean, variance = (np.asarray(_array(value), np.float64) for value in norm.inputs[1:5])
    gain = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    weight = conv.inputs[1]
    assert weight is not None and weight.const_value is not None
    kind = weight.const_value.dtype
    array = np.asarray(_array(weight), np.float64) * gain.reshape(
        -1, *[1] * (len(weight.const_value.shape) - 1)
    )
    weight.const_value = ir.Tensor(array.astype(kind.numpy()), dtype=kind, name=weight.name)
    old = conv.inputs[2] if len(conv.inputs) > 2 else None
    shift = (0 if old is None else np.asarray(_array(old), np.float64)) - mean
    tensor = ir.Tensor((shift * gain + beta).astype(kind.numpy()), dtype=kind)
    bias = ir.Value(name=f"{weight.name}/folded_bias", const_value=tensor)
    bias.shape, bias.dtype = ir.Shape(tensor.shape.numpy()), kind
    graph.register_initializer(bias)
    if len(conv.inputs) > 2:
        conv.replace_input_with(2, bias)
    else:
        conv.resize_inputs(3)
        conv.replace_input_with(2, bias)
    out, name = conv.outputs[0], norm.outputs[0].name
    ir.convenience.replace_all_uses_with(norm.outputs[0], out, replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    out.name = name  # who reads the norm's output by name finds it still
    for value in list(graph.initializers.values()):
        if not value.uses() and not value.is_graph_output() and value.const_value is not None:
            del graph.initializers[value.name or ""]


def _array(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return np.asarray(value.const_value.numpy())
