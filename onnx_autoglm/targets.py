"""Where the error of a consumer is best measured: at its output, or behind it at a sum."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A value of the graph, and how much each channel of a consumer counts in it."""

    value: str
    norms: tuple[ir.Node, ...] = ()  # on the way there, normalisations by constants
    beside: str | None = None  # what is added there

    def scale(self) -> npt.NDArray[np.float32] | np.float32:
        """What each channel of the consumer is multiplied with on the way."""
        result: npt.NDArray[np.float32] | np.float32 = np.float32(1)
        for norm in self.norms:
            result = result * _gain(norm)
        return result


def find_target(graph: ir.Graph, node: ir.Node) -> Target:
    """The sum of two activations that a consumer ends in, if the other one is computed before; else its output.

    On the way there may be normalisations by constants (BatchNormalization) and the adding of constants.
    """
    order = {other: index for index, other in enumerate(graph)}
    start = value = node.outputs[0]
    norms: list[ir.Node] = []
    while len(value.uses()) == 1 and not value.is_graph_output():
        ((user, index),) = value.uses()
        if user.op_type == "BatchNormalization" and index == 0 and _has_gain(user):
            norms.append(user)
        elif user.op_type == "Add":
            other = user.inputs[1 - index]
            assert other is not None
            if not other.is_initializer():
                maker = other.producer()
                if maker is None or order.get(maker, len(order)) < order[node]:
                    return Target(user.outputs[0].name or "", tuple(norms))
                break
        else:
            break
        value = user.outputs[0]
    return Target(start.name or "")


def _has_gain(norm: ir.Node) -> bool:
    constants = all(value is not None and value.const_value is not None for value in norm.inputs[1:])
    return constants and bool((np.abs(_gain(norm)) > 1e-6).all())


def _gain(norm: ir.Node) -> npt.NDArray[np.float32]:
    scale, _, _, variance = (value.const_value for value in norm.inputs[1:] if value is not None)
    assert scale is not None and variance is not None
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    return np.asarray(scale.numpy() / np.sqrt(variance.numpy() + epsilon), dtype=np.float32)
