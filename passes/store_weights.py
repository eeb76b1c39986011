"""Stores weights as integers: behind a DequantizeLinear, as MatMulNBits, or as a table whose rows are looked up."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from onnx_autoglm.consumers import retraced
from onnx_autoglm.quantization.places import Place
from onnx_autoglm.quantization.schemes import Decision, Target
from onnx_autoglm.quantization.stored import as_stored, lazy
from onnx_autoglm.quantization.weights import Quantized, nearest


class WeightWriter:
    """Replaces the weights of products in a graph by integers."""

    def __init__(self, graph: ir.Graph, target: Target, *, lookups: Collection[str]) -> None:
        self._graph, self._target, self._lookups = graph, target, lookups
        # What products read instead, by initializer, kind of integer, and axis of the outputs.
        self._stored: dict[tuple[str, str, int], ir.Value] = {}
        self._own: dict[str, ir.Value] = {}  # constants made here, by the name they were asked for
        self._tables: dict[str, tuple[ir.Value, ir.Value]] = {}  # by initializer: integers and scales per row

    def write(self, node: ir.Node, decision: Decision) -> None:
        """Gives a product its integers."""
        assert decision.weight is not None
        if node.op_type == "Gemm":
            node = _as_matmul(self._graph, node)
        place, weight = decision.place, decision.weight
        if weight.block is not None and self._target == "cpu":
            self._as_nbits(node, place, weight)
            return
        path = node.inputs[place.operand]
        assert path is not None
        source = self._graph.initializers[place.initializer]
        if self._is_looked_up(source) and decision.scheme == "w8" and self._target == "cpu":
            node.replace_input_with(place.operand, self._turned(source, weight))
            return
        plain = self._plain(source, place, weight, is_fp8=decision.scheme == "fp8")
        node.replace_input_with(place.operand, retraced(self._graph, node, plain, path))
        if self._target == "cpu":
            _keep_apart(node)

    def _plain(self, source: ir.Value, place: Place, weight: Quantized, *, is_fp8: bool) -> ir.Value:
        """The dequantized weight, in the layout of the initializer."""
        kind_of = "fp8" if is_fp8 else f"int{weight.bits}"
        key = (place.initializer, kind_of, place.channel_axis)
        if key in self._stored:
            return self._stored[key]
        tensor = source.const_value
        assert tensor is not None
        shape, kind = tuple(int(size) for size in tensor.shape.numpy()), tensor.dtype
        axis = place.channel_axis
        attributes: dict[str, int] = {"axis": axis}
        scales = weight.scales[0]
        if weight.block is not None:
            axis = place.input_axis
            attributes = {"axis": axis, "block_size": weight.block}
            scales = weight.scales if place.channel_axis else np.ascontiguousarray(weight.scales.T)
        if is_fp8:
            stored_type, factor = ir.DataType.FLOAT8E4M3FN, np.float32(127 / 448)
            scales = scales * factor
            stored = lazy(
                place.initializer,
                stored_type,
                shape,
                lambda: _fp8(np.asarray(tensor.numpy()), scales, place.channel_axis),
            )
        else:
            stored_type = ir.DataType.INT8 if weight.bits == 8 else ir.DataType.INT4
            stored = lazy(
                place.initializer,
                stored_type,
                shape,
                lambda: as_stored(np.asarray(weight.values), place, shape).astype(stored_type.numpy()),
            )
        name = f"{place.initializer}/{stored_type.name.lower()}"
        integers = self._initializer(name, stored, stored_type)
        factors = self._array(f"{name}/scale", scales.astype(kind.numpy()), kind)
        zero = self._array(f"{name}/zero", np.zeros(scales.shape, stored_type.numpy()), stored_type)
        node = ir.node("DequantizeLinear", [integers, factors, zero], attributes, name=f"{name}/dequantize")
        node.outputs[0].name = f"{name}/dequantized"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(kind), ir.Shape(shape)
        self._graph.insert_before(next(iter(self._graph)), node)
        self._stored[key] = node.outputs[0]
        if weight.bits == 8 and not is_fp8 and place.channel_axis == 0 and len(shape) == 2:
            self._tables[place.initializer] = (integers, factors)
        return node.outputs[0]

    def _is_looked_up(self, source: ir.Value) -> bool:
        return source.name in self._lookups

    def _turned(self, source: ir.Value, weight: Quantized) -> ir.Value:
        """The weight `[k, n]` as a tensor of its own: ONNX Runtime unpacks on every run what two nodes share, unless the
        activation is quantized too."""
        tensor = source.const_value
        assert tensor is not None
        name, kind = f"{source.name}/int8/turned", tensor.dtype
        key = (source.name or "", "turned", 1)
        if key in self._stored:
            return self._stored[key]
        integers = self._initializer(
            name, lazy(name, ir.DataType.INT8, weight.values.shape, lambda: weight.values), ir.DataType.INT8
        )
        factors = self._array(f"{name}/scale", weight.scales[0].astype(kind.numpy()), kind)
        zero = self._array(f"{name}/zero", np.zeros(weight.scales[0].shape, np.int8), ir.DataType.INT8)
        node = ir.node("DequantizeLinear", [integers, factors, zero], {"axis": 1}, name=f"{name}/dequantize")
        node.outputs[0].name = f"{name}/dequantized"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(kind), integers.shape
        self._graph.insert_before(next(iter(self._graph)), node)
        self._stored[key] = node.outputs[0]
        return node.outputs[0]

    def _as_nbits(self, node: ir.Node, place: Place, weight: Quantized) -> None:
        """A product of ONNX Runtime's own, `[n, blocks, bytes]` of unsigned integers with zero point 8 or 128."""
        block, (k, n) = weight.block, weight.values.shape
        assert block is not None
        blocks = math.ceil(k / block)
        per_byte = 8 // weight.bits

        def pack() -> np.ndarray:
            values = np.zeros((blocks * block, n), np.int16)
            values[:k] = weight.values
            unsigned = (values + (1 << (weight.bits - 1))).astype(np.uint8).T.reshape(n, blocks, block)
            return unsigned if weight.bits == 8 else unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)

        tensor = self._graph.initializers[place.initializer].const_value
        assert tensor is not None
        name = f"{place.initializer}/nbits{weight.bits}"
        shape = (n, blocks, block // per_byte)
        packed = self._initializer(name, lazy(name, ir.DataType.UINT8, shape, pack), ir.DataType.UINT8)
        scales = np.ascontiguousarray(weight.scales.T).astype(tensor.dtype.numpy())
        factors = self._array(f"{name}/scale", scales, tensor.dtype)
        activation = next(v for v in node.inputs if v is not None and v.name == place.activation)
        attributes = {"K": k, "N": n, "bits": weight.bits, "block_size": block, "accuracy_level": 4}
        product = ir.node(
            "MatMulNBits", [activation, packed, factors], attributes, domain="com.microsoft", name=node.name
        )
        self._graph.opset_imports.setdefault("com.microsoft", 1)
        _take_over(self._graph, node, product)

    def shrink_lookups(self) -> None:
        """Stores the tables that Gather looks rows up in as integers with one scale per row."""
        for node in list(self._graph):
            if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
                continue
            table = node.inputs[0]
            if table is not None and table.name in self._lookups and table.const_value is not None:
                self._look_up(node, table, table.const_value)

    def _look_up(self, node: ir.Node, table: ir.Value, tensor: ir.TensorProtocol) -> None:
        name, kind = table.name or "", tensor.dtype
        if self._target == "tensorrt":
            node.replace_input_with(0, self._row_table(table, tensor)[2])
            return
        integers, scales, _ = self._row_table(table, tensor)
        ids = node.inputs[1]
        assert ids is not None
        rows = ir.node("Gather", [integers, ids], {"axis": 0}, name=f"{node.outputs[0].name}/integers")
        wide = ir.node("Cast", [rows.outputs[0]], {"to": int(kind)})
        factors = ir.node("Gather", [scales, ids], {"axis": 0}, name=f"{node.outputs[0].name}/scales")
        last = self._array("axis/last", np.array([-1], np.int64), ir.DataType.INT64)
        column = ir.node("Unsqueeze", [factors.outputs[0], last])
        product = ir.node("Mul", [wide.outputs[0], column.outputs[0]], name=node.name)
        rows.outputs[0].type = ir.TensorType(ir.DataType.INT8)
        for other in (wide, factors, column):
            other.outputs[0].type = ir.TensorType(kind)
        self._graph.insert_before(node, [rows, wide, factors, column])
        for number, other in enumerate((rows, wide, factors, column)):
            other.outputs[0].name = f"{name}/looked_up_{number}/{node.outputs[0].name}"
        _take_over(self._graph, node, product)

    def _row_table(self, table: ir.Value, tensor: ir.TensorProtocol) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Integers, scales per row, and both multiplied; those of a product that reads the same table, if there is one."""
        name = table.name or ""
        if name not in self._tables:
            rows, columns = (int(size) for size in tensor.shape.numpy())
            place = Place(name, "Gather", name, "", -1, 0, name, 0, 1, columns, rows)
            weight = nearest(np.asarray(tensor.numpy()).astype(np.float32).T, 8, clip=False)
            self._plain(table, place, weight, is_fp8=False)
        integers, scales = self._tables[name]
        return integers, scales, self._stored[name, "int8", 0]

    def drop_unused(self) -> None:
        """Removes what nothing reads any more."""
        for node in reversed(list(self._graph)):
            if not any(output.uses() or output.is_graph_output() for output in node.outputs):
                self._graph.remove(node, safe=True)
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del self._graph.initializers[name]

    def _array(self, name: str, array: np.ndarray, kind: ir.DataType) -> ir.Value:
        return self._initializer(name, ir.Tensor(np.ascontiguousarray(array), dtype=kind, name=name), kind)

    def _initializer(self, name: str, tensor: ir.TensorProtocol, kind: ir.DataType) -> ir.Value:
        if name not in self._own:
            value = ir.Value(name=unique_name(self._graph, name), const_value=tensor)
            value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), kind
            self._graph.register_initializer(value)
            self._own[name] = value
        return self._own[name]


def unique_name(graph: ir.Graph, base: str) -> str:
    """The name, or with a number behind it where the graph has a value of that name."""
    name, number = base, 0
    while name in graph.initializers or any(value.name == name for value in graph.inputs):
        number += 1
        name = f"{base}/{number}"
    return name


def _keep_apart(product: ir.Node) -> None:
    """Writes the sum of a product of two matrices and a constant as Sum instead of Add: the same, but ONNX Runtime would
    make one float Gemm of product and Add before it looks for integers."""
    output = product.outputs[0]
    is_stack = output.shape is not None and len(output.shape) != 2
    if product.op_type != "MatMul" or len(output.uses()) != 1 or is_stack:
        return
    ((user, index),) = output.uses()
    if user.op_type == "Add" and (other := user.inputs[1 - index]) is not None and other.is_initializer():
        user.op_type = "Sum"


def _fp8(array: np.ndarray, scales: np.ndarray, axis: int) -> np.ndarray:
    shape = [1] * array.ndim
    shape[axis] = -1
    return np.clip(array.astype(np.float32) / scales.reshape(shape), -448, 448).astype(
        ir.DataType.FLOAT8E4M3FN.numpy()
    )


def _as_matmul(graph: ir.Graph, gemm: ir.Node) -> ir.Node:
    """A Gemm as MatMul and Add, which have integer kernels that need no integer bias."""
    activation, weight, *rest = gemm.inputs
    assert weight is not None
    if gemm.attributes.get_int("transB", 0):
        turned = ir.node("Transpose", [weight], {"perm": [1, 0]})
        turned.outputs[0].type = weight.type
        graph.insert_before(gemm, turned)
        weight = turned.outputs[0]
    product = ir.node("MatMul", [activation, weight], name=gemm.name)
    bias = rest[0] if rest else None
    if bias is None:
        _take_over(graph, gemm, product)
        return product
    added = ir.node("Add", [product.outputs[0], bias])
    product.outputs[0].type, product.outputs[0].shape = gemm.outputs[0].type, gemm.outputs[0].shape
    graph.insert_before(gemm, product)
    product.outputs[0].name = f"{gemm.outputs[0].name}/product"
    _take_over(graph, gemm, added)
    return product


def _take_over(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Puts a node in the place of another, under the name of its output."""
    output, name = old.outputs[0], old.outputs[0].name
    new.outputs[0].type, new.outputs[0].shape = output.type, output.shape
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(output, new.outputs[0], replace_graph_outputs=True)
    graph.remove(old, safe=True)
    new.outputs[0].name = name
