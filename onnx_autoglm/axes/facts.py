"""What rules state about dimension expressions while the graph is walked.

Facts are stated about expressions and read through `resolve` once unification is finished, so a fact that
was stated early holds for every factor into which its axis was split later.
"""

from __future__ import annotations

import dataclasses
import enum

import onnx_ir as ir

from onnx_autoglm.axes.dims import Dim


class PinKind(enum.Enum):
    """Why an axis cannot simply be cut. All but HARD can be lifted for one kind of structure."""

    HARD = "hard"
    INTERFACE = "interface"  # a graph input or output: lifted for caches, on request
    NORM = "norm"  # a mean over the axis: lifted for the residual stream, which is lossy
    SELECT = "select"  # a choice along the axis: lifted for experts, which is lossy


@dataclasses.dataclass(frozen=True)
class Pin:
    """A reason, in words for the user, why an axis stays as it is."""

    reason: str
    node: str
    kind: PinKind = PinKind.HARD
    source: ir.Node | None = dataclasses.field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.reason} ({self.node})" if self.node else self.reason


class Role(enum.Enum):
    """What an axis was seen doing. Kinds of structures follow from roles, never from names."""

    MADE = "made by a weight"
    CONTRACTED = "contracted with a weight"
    SCORED = "contracted between two activations"
    HEAD = "batch axis of a product of two activations"
    CARRIED = "carried out of a product of two activations"
    STACKED = "batch axis of a product with a stacked weight"
    CONVOLVED = "channel of a convolution"
    ADDED = "added between two activations"


@dataclasses.dataclass(frozen=True, eq=False)
class ZeroCheck:
    """What an op needs of masked entries, checked when the walk is over.

    A sum over an axis loses nothing only if a masked entry of one operand is zero (`zero`); a division
    stays finite only if a masked entry of none of them is.
    """

    node: ir.Node
    operands: tuple[int, ...]
    dim: Dim
    reason: str
    zero: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Contraction:
    """A product of an activation and a weight: which operands, along which axis of each (from the end)."""

    node: ir.Node
    activation: int
    activation_axis: int
    weight: int
    weight_axis: int
    dim: Dim


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredProduct:
    """A product of two activations that sums over `dim`: which operands of the node."""

    node: ir.Node
    operands: tuple[int, int]
    dim: Dim


@dataclasses.dataclass(frozen=True, eq=False)
class CountedAttribute:
    """An attribute that must equal the size of an axis, such as `num_heads` or `group`."""

    node: ir.Node
    name: str
    dim: Dim


@dataclasses.dataclass(frozen=True, eq=False)
class DefaultedAttribute:
    """An attribute whose default follows the size of an axis but must keep the source's value."""

    node: ir.Node
    name: str
    dim: Dim
    value: float


def label(node: ir.Node) -> str:
    """How messages name a node: its operator and its name, or its first output."""
    name = node.name or next((output.name for output in node.outputs if output.name), "")
    return f"{node.op_type} {name}".strip()
