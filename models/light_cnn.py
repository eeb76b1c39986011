"""The convolutional networks inside the `onnx` wheel, with noise for weights.

The wheel carries well-known ImageNet networks with `ConstantOfShape` nodes in place of their
weights, to stay light. Here each becomes an initializer whose scale fits the place where it is
consumed, so that activations neither vanish nor explode and every channel matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from recipes import Recipe

if TYPE_CHECKING:
    import numpy
    import onnx

EXTERNAL_ABOVE = 100 * 2**20  # bytes of weights
BRANCH_SCALE = 0.5  # of what a residual sum adds: keeps its variance level over many blocks


def recipes() -> list[Recipe]:
    def recipe(network: str, *tags: str) -> Recipe:
        return Recipe(f"light-{network}", "cnn", partial(build, network), frozenset(tags))

    return [
        recipe("squeezenet"),
        recipe("shufflenet"),
        recipe("inception_v1"),
        recipe("densenet121"),
        recipe("inception_v2"),
        recipe("resnet50"),
        recipe("bvlc_alexnet", "big"),
        recipe("zfnet512", "big"),
        recipe("vgg19", "big"),
    ]


def build(network: str, folder: Path) -> None:
    import numpy
    import onnx
    from export import save_sample

    source = Path(onnx.__file__).parent / "backend/test/data/light" / f"light_{network}.onnx"
    model = onnx.load(source)
    fill(model.graph, numpy.random.default_rng(0))
    model.ir_version = 8  # from 4 on, an initializer need not be a graph input as well
    large = model.ByteSize() > EXTERNAL_ABOVE
    onnx.save_model(
        model,
        folder / "model.onnx",
        save_as_external_data=large,
        location="model.onnx.data" if large else None,
    )
    (image,) = model.graph.input
    shape = [dim.dim_value for dim in image.type.tensor_type.shape.dim]
    pixels = numpy.random.default_rng(1).standard_normal(shape, numpy.float32)
    save_sample(folder, {image.name: pixels})


def fill(graph: onnx.GraphProto, random: numpy.random.Generator) -> None:
    """Turn every weight into an initializer of noise; no initializer stays a graph input."""
    from onnx import numpy_helper

    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    shapes = {name: array.shape for name, array in stored.items() if array.dtype.kind == "f"}
    empty = [node for node in graph.node if node.op_type == "ConstantOfShape"]
    shapes |= {node.output[0]: tuple(stored[node.input[0]].tolist()) for node in empty}
    for node in empty:
        graph.node.remove(node)

    kept = {name: stored[name] for node in graph.node for name in node.input if name in stored}
    used = {name: shape for name, shape in shapes.items() if any(uses(graph, name))}
    kept |= {name: values(graph, name, shape, random) for name, shape in used.items()}
    inputs = [value for value in graph.input if value.name not in stored]
    del graph.initializer[:], graph.input[:]
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in kept.items())
    graph.input.extend(inputs)


def values(
    graph: onnx.GraphProto, name: str, shape: tuple[int, ...], random: numpy.random.Generator
) -> numpy.ndarray:
    """Noise for the weight `name`, after the role that its consumer gives it."""
    import numpy

    node, position = next(uses(graph, name))
    noise = random.standard_normal(shape, numpy.float32)
    match node.op_type, position:
        case (("Conv" | "Gemm"), 1):
            columns = any(a.name == "transB" and a.i for a in node.attribute)
            fan_in = numpy.prod(shape[1:]) if node.op_type == "Conv" or columns else shape[-2]
            gain = 2 if rectified(graph, node.input[0]) else 1
            return noise * numpy.float32(gain / fan_in) ** 0.5
        case "BatchNormalization", 4:
            return random.uniform(0.5, 1.5, shape).astype(numpy.float32)
        case "BatchNormalization", 1:
            branch = any(user.op_type == "Sum" for user, _ in uses(graph, node.output[0]))
            return (1 + noise / 10) * numpy.float32(BRANCH_SCALE if branch else 1)
        case "Mul", _:
            return 1 + noise / 10
        case (("Conv" | "Gemm" | "BatchNormalization" | "Add"), _):
            return noise / 10
    raise ValueError(
        f"weight {name!r} is input {position} of a {node.op_type} node: no noise is known to fit"
    )


def uses(graph: onnx.GraphProto, name: str) -> Iterator[tuple[onnx.NodeProto, int]]:
    """The nodes that consume `name`, and at which input; a change of shape is looked through."""
    for node in graph.node:
        for position, consumed in enumerate(node.input):
            if consumed == name and node.op_type in ("Unsqueeze", "Reshape"):
                yield from uses(graph, node.output[0])
            elif consumed == name:
                yield node, position


def rectified(graph: onnx.GraphProto, name: str) -> bool:
    """Whether `name` carries what a Relu left over: half of the variance that went in."""
    producer = next((node for node in graph.node if name in node.output), None)
    if producer is None:
        return False
    passing = ("MaxPool", "LRN", "Dropout", "Reshape", "Transpose", "Concat")
    return producer.op_type == "Relu" or (producer.op_type in passing and rectified(graph, producer.input[0]))
