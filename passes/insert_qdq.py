"""Writes a calibrated choice into a graph: integer weights, and Q/DQ pairs where products read activations.

Weights become integers behind a DequantizeLinear, per output channel (or per block of inputs). An activation gets one
QuantizeLinear whose DequantizeLinear feeds exactly the products that compute in 8 bits; all other readers keep the
value. Nothing else gets a pair: norms, rotary embeddings, gates, softmax and biases stay as they are. The two emissions
differ in the type of activations alone: int8 with zero point 0 for TensorRT, uint8 with zero point 128 for ONNX Runtime,
which has no other fast kernels; what they compute is the same bit by bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnx_autoglm.errors import UserError
from onnx_autoglm.passes.store_weights import WeightWriter, unique_name
from onnx_autoglm.quantization.chains import Chain
from onnx_autoglm.quantization.ranges import LEVELS
from onnx_autoglm.quantization.schemes import Decision, Target


@dataclasses.dataclass(frozen=True)
class InsertQdq:
    """For which runtime, and which tables of embeddings are stored as 8 bits too."""

    target: Target = "cpu"
    lookups: tuple[str, ...] = ()

    def __call__(
        self,
        model: ir.Model,
        decisions: Sequence[Decision],
        thresholds: Mapping[str, float],
        chains: Sequence[Chain] = (),
    ) -> None:
        insert_qdq(model, decisions, thresholds, self.target, chains, lookups=self.lookups)


def insert_qdq(
    model: ir.Model,
    decisions: Sequence[Decision],
    thresholds: Mapping[str, float],
    target: Target,
    chains: Sequence[Chain] = (),
    *,
    lookups: Collection[str] = (),
) -> None:
    """Quantizes a canonical model in place.

    Args:
        decisions: one per place; those whose scheme is `float` change nothing.
        thresholds: where activations are clipped, by name: of all that places of scheme w8a8 or fp8 read, and of the
            results of `chains`.
        chains: results of convolutions and sums that are to stay integers, with what leads to them.
        lookups: names of tables that Gather looks rows up in, to be stored in 8 bits with a scale per row.

    Raises UserError if the opset is too old for what is asked (13; 19 for 16-bit floats; 21 for blocks).
    """
    active = [decision for decision in decisions if decision.scheme != "float"]
    _check_opset(model, active, target)
    graph = model.graph
    pairs = _Pairs(graph, target, thresholds)
    nodes = {node.outputs[0].name: node for node in graph}
    writer = WeightWriter(graph, target, lookups=lookups)
    for decision in active:
        node = nodes[decision.place.node]
        if decision.scheme in ("w8a8", "fp8"):
            operand = next(
                index
                for index, value in enumerate(node.inputs)
                if value is not None and value.name == decision.place.activation
            )
            pairs.feed(node, operand, is_fp8=decision.scheme == "fp8")
        writer.write(node, decision)
    writer.shrink_lookups()
    for chain in chains:
        pairs.keep_integers(chain, nodes)
    writer.drop_unused()


def _check_opset(model: ir.Model, decisions: Sequence[Decision], target: Target) -> None:
    opset = model.graph.opset_imports.get("", 1)
    needed, why = 13, "scales per channel"
    kinds = {value.dtype for value in model.graph.initializers.values()}
    if kinds & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}:
        needed, why = 19, "quantizing 16-bit floats"
    if any(decision.scheme == "fp8" for decision in decisions):
        needed, why = 19, "FP8"
    if target == "tensorrt" and any(decision.scheme == "w4" for decision in decisions):
        needed, why = 21, "4-bit weights in blocks"
    if decisions and opset < needed:
        raise UserError(
            f"the model has opset {opset}, and {why} needs opset {needed}: export it again with opset_version={needed} or "
            "newer, or convert it with onnx.version_converter"
        )


class _Pairs:
    """Q/DQ pairs on activations, one per value."""

    def __init__(self, graph: ir.Graph, target: Target, thresholds: Mapping[str, float]) -> None:
        self._graph, self._target, self._thresholds = graph, target, thresholds
        self._made: dict[tuple[str, bool], ir.Value] = {}
        self._constants: dict[str, ir.Value] = {}

    def feed(self, node: ir.Node, operand: int, *, is_fp8: bool = False) -> None:
        """Lets one operand of a node read its value through a pair."""
        value = node.inputs[operand]
        assert value is not None
        if value in self._made.values():  # it reads through a pair already
            return
        key = (value.name or "", is_fp8)
        if key not in self._made:
            self._made[key] = self._pair(value, self._thresholds[key[0]], is_fp8)
        node.replace_input_with(operand, self._made[key])

    def keep_integers(self, chain: Chain, nodes: Mapping[str | None, ir.Node]) -> None:
        """Puts pairs where a runtime needs them to compute a convolution or a sum in integers throughout.

        The value at the chain's end has its pair; ReLU and MaxPool commute with it, so that more of them in front, with
        the same scale, change nothing. Only ONNX Runtime needs those; TensorRT fuses what lies between.
        """
        end = chain.values[-1]
        threshold = self._thresholds[end]
        for index in chain.operands:
            self.feed(nodes[chain.node], index)
        inner = chain.values if self._target == "cpu" else chain.values[-1:]
        for name in inner:
            value = nodes[name].outputs[0]
            if (name, False) in self._made:
                made = self._made[name, False]
            else:
                made = self._made[name, False] = self._pair(value, threshold, False)
            for user, index in list(value.uses()):
                if user.op_type != "QuantizeLinear":
                    user.replace_input_with(index, made)
        if self._target == "cpu":
            for name in chain.values[1:]:
                node = nodes[name]
                if node.op_type == "Relu":  # the same function, for which ONNX Runtime has an integer kernel
                    node.op_type = "LeakyRelu"
                    node.attributes["alpha"] = ir.AttrFloat32("alpha", 0.0)

    def _pair(self, value: ir.Value, threshold: float, is_fp8: bool) -> ir.Value:
        name, kind = value.name or "", value.dtype or ir.DataType.FLOAT
        scale_number = threshold / (448.0 if is_fp8 else LEVELS)
        scale = self._constant(
            f"{name}/scale{'_fp8' if is_fp8 else ''}", np.asarray(scale_number, kind.numpy()), kind
        )
        if is_fp8:
            zero = self._constant(
                "zero/fp8", np.zeros((), ir.DataType.FLOAT8E4M3FN.numpy()), ir.DataType.FLOAT8E4M3FN
            )
        elif self._target == "cpu":
            zero = self._constant("zero/uint8", np.asarray(128, np.uint8), ir.DataType.UINT8)
        else:
            zero = self._constant("zero/int8", np.asarray(0, np.int8), ir.DataType.INT8)
        quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}/quantize")
        dequantize = ir.node(
            "DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{name}/dequantize"
        )
        quantize.outputs[0].name, dequantize.outputs[0].name = f"{name}/quantized", f"{name}/dequantized"
        quantize.outputs[0].type, dequantize.outputs[0].type = (
            ir.TensorType(zero.dtype or kind),
            ir.TensorType(kind),
        )
        quantize.outputs[0].shape = dequantize.outputs[0].shape = value.shape
        maker = value.producer()
        if maker is None:
            self._graph.insert_before(next(iter(self._graph)), [quantize, dequantize])
        else:
            self._graph.insert_after(maker, [quantize, dequantize])
        return dequantize.outputs[0]

    def _constant(self, name: str, array: np.ndarray, kind: ir.DataType) -> ir.Value:
        if name not in self._constants:
            value = ir.Value(
                name=unique_name(self._graph, name), const_value=ir.Tensor(array, dtype=kind, name=name)
            )
            value.shape, value.dtype = ir.Shape(array.shape), kind
            self._graph.register_initializer(value)
            self._constants[name] = value
        return self._constants[name]
