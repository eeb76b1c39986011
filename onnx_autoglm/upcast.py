"""A copy of a 16-bit graph that computes in float32, without copying its weights.

A proof in float32 is stricter than one in 16 bits, where both sides round differently, and ONNX Runtime
has hardly any bfloat16 kernels for the CPU.
"""

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

HALF_TYPES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

# Integer attributes that hold an element type, in the ONNX and the ONNX Runtime operator sets.
TYPE_ATTRIBUTES = frozenset(
    {"to", "dtype", "stash_type", "softmax_precision", "output_dtype", "output_datatype", "precision"}
)

CHUNK_BYTES = 16 << 20


class Float32Tensor(ir.LazyTensor):
    """A 16-bit tensor seen as float32: cast when it is read, written in chunks."""

    def __init__(self, source: ir.TensorProtocol) -> None:
        def cast() -> ir.TensorProtocol:
            return ir.Tensor(np.asarray(source.numpy()).astype(np.float32), name=source.name)

        shape = ir.Shape(source.shape.numpy())
        super().__init__(cast, ir.DataType.FLOAT, shape, name=source.name, doc_string=source.doc_string)
        self.source = source

    def tofile(self, file: BinaryIO) -> None:
        """Write the little-endian bytes a chunk at a time, so that memory stays flat."""
        flat = np.asarray(self.source.numpy()).reshape(-1)
        step = CHUNK_BYTES // 4
        starts = range(0, flat.size, step)
        file.writelines(flat[start : start + step].astype("<f4").tobytes() for start in starts)


def needs_upcast(model: ir.Model) -> bool:
    """Whether any input, initializer or value of the model, bodies and functions included, is float16 or
    bfloat16."""
    return any(
        value.dtype in HALF_TYPES or (value.const_value is not None and value.const_value.dtype in HALF_TYPES)
        for value in _values(model)
    )


def upcast(model: ir.Model) -> ir.Model:
    """A copy of the model in which every float16 and bfloat16 became float32.

    Tensors are shared with the source or cast lazily (`Float32Tensor`); the source is untouched. Numbers keep
    their value: a mask that is -65504 stays -65504.
    """
    result = model.clone()
    for value in _values(result):
        if value.type is not None:
            value.type = _upcast_type(value.type)
        if value.const_value is not None:
            value.const_value = _upcast_tensor(value.const_value)
    for node in _nodes(result):
        for name, attribute in list(node.attributes.items()):
            changed = _upcast_attribute(attribute)
            if changed is not attribute:
                node.attributes[name] = changed
    return result


def upcast_arrays(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Feeds of a 16-bit model as its copy in float32 takes them."""
    return {
        name: array.astype(np.float32) if ir.DataType.from_numpy(array.dtype) in HALF_TYPES else array
        for name, array in arrays.items()
    }


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """Every value once: inputs, initializers and node outputs, of bodies and functions too."""
    seen: set[ir.Value] = set()
    graphs = [model.graph, *model.graph.subgraphs()]
    for function in model.functions.values():
        graphs += [function.graph, *function.subgraphs()]
    for graph in graphs:
        outputs = (output for node in graph for output in node.outputs)
        for value in (*graph.inputs, *graph.initializers.values(), *outputs):
            if value not in seen:
                seen.add(value)
                yield value


def _upcast_type(kind: ir.TypeProtocol) -> ir.TypeProtocol:
    """The type with float32 for 16-bit floats; a new object, because clones share their types."""
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        return type(kind)(_upcast_type(kind.elem_type))
    if kind.dtype not in HALF_TYPES:
        return kind
    if isinstance(kind, ir.SparseTensorType):
        return ir.SparseTensorType(ir.DataType.FLOAT)
    return ir.TensorType(ir.DataType.FLOAT)


def _upcast_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return Float32Tensor(tensor) if tensor.dtype in HALF_TYPES else tensor


def _upcast_attribute(attribute: ir.Attr) -> ir.Attr:
    """The attribute itself where nothing changes, else a new one."""
    if attribute.is_ref():
        return attribute
    name, kind, value = attribute.name, attribute.type, attribute.value
    if kind == ir.AttributeType.INT and name in TYPE_ATTRIBUTES and value in HALF_TYPES:
        return ir.AttrInt64(name, int(ir.DataType.FLOAT))
    if kind == ir.AttributeType.TENSOR and value.dtype in HALF_TYPES:
        return ir.AttrTensor(name, _upcast_tensor(value))
    if kind == ir.AttributeType.TENSORS:
        return ir.AttrTensors(name, [_upcast_tensor(tensor) for tensor in value])
    if kind == ir.AttributeType.TYPE_PROTO:
        return ir.AttrTypeProto(name, ir.TypeAndShape(_upcast_type(value.type), value.shape))
    return attribute
