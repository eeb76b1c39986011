"""The view of one node that a rule works with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnx_autoglm.axes import contents as known
from onnx_autoglm.axes import dims as ax
from onnx_autoglm.axes.contents import Contents, evaluate
from onnx_autoglm.axes.dims import Clash, Dim
from onnx_autoglm.axes.facts import (
    Contraction,
    CountedAttribute,
    DefaultedAttribute,
    Pin,
    PinKind,
    Role,
    ScoredProduct,
    ZeroCheck,
    label,
)
from onnx_autoglm.axes.size import Size, exact_div

if TYPE_CHECKING:
    from onnx_autoglm.axes.analysis import Analysis


class Unknown(Exception):
    """A rule cannot be applied (unknown rank, missing constant); the message says why."""


class Op:
    """Inputs, attributes and the vocabulary of equations for one node."""

    def __init__(self, analysis: Analysis, node: ir.Node) -> None:
        self.analysis = analysis
        self.node = node

    # --- what the node says

    @property
    def version(self) -> int:
        """The opset version that defines the node."""
        return self.node.version or self.analysis.opset(self.node.domain)

    def has(self, index: int) -> bool:
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def value(self, index: int) -> ir.Value:
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        if value is None:
            raise Unknown(f"input {index} is missing")
        return value

    def dims(self, index: int) -> list[Dim]:
        """The axes of an input. Raises Unknown where its rank is not known."""
        self.value(index)
        found = self.analysis.input_dims(self.node, index)
        if found is None:
            raise Unknown(f"the rank of input {index} is not known")
        return found

    def contents(self, index: int) -> Contents | None:
        return self.analysis.contents.get(self.value(index)) if self.has(index) else None

    def numbers(self, index: int) -> list[Size | None] | None:
        """The entries of an integer input, evaluated for the source; None if nothing is known."""
        contents = self.contents(index)
        return None if contents is None else [evaluate(entry, ax.size_of) for entry in contents.flat]

    def integers(self, index: int) -> list[int] | None:
        """The entries of an integer input if all are numbers, else None."""
        numbers = self.numbers(index)
        if numbers is None:
            return None
        known = [number for number in numbers if isinstance(number, int)]
        return known if len(known) == len(numbers) else None

    def settled(self, index: int) -> list[int] | None:
        """As `integers`, where they decide what an array of integers holds: their axes are not cut."""
        numbers = self.integers(index)
        contents = self.contents(index)
        if numbers is not None and contents is not None:
            for dim in known.extents(contents):
                self.pin(dim, "its size decides what an integer array holds")
        return numbers

    def constant(self, index: int) -> np.ndarray | None:
        """The value of a small constant input of any type."""
        value = self.value(index) if self.has(index) else None
        if value is None or value.const_value is None or value.const_value.size > 64:
            return None
        return value.const_value.numpy()

    def attr_int(self, name: str, default: int) -> int:
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_int()

    def attr_ints(self, name: str) -> list[int] | None:
        attribute = self.node.attributes.get(name)
        return None if attribute is None else list(attribute.as_ints())

    def attr_text(self, name: str, default: str) -> str:
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_string()

    def axis(self, rank: int, default: int) -> int:
        return self.attr_int("axis", default) % max(rank, 1)

    def axes(self, name: str, index: int) -> list[int] | None:
        """Axes given as an attribute in old opsets and as an input in new ones."""
        listed = self.attr_ints(name)
        if listed is not None or not self.has(index):
            return listed
        numbers = self.integers(index)
        if numbers is None:
            raise Unknown(f"{name} are computed at run time")
        return numbers

    def is_weight(self, index: int) -> bool:
        return self.value(index) in self.analysis.weights

    # --- what a rule may state

    def equal(self, a: Dim, b: Dim) -> None:
        """The two expressions are one axis; where they cannot be, both are pinned."""
        try:
            ax.unify(a, b)
        except Clash as clash:
            self.pin(a + b, f"axes that do not line up: {clash}")

    def cut(self, dim: Dim, at: Size) -> tuple[Dim, Dim]:
        try:
            return ax.cut(dim, at)
        except Clash as clash:
            self.pin(dim, f"cut across its structure: {clash}")
            total = ax.size_of(dim)
            rest = total - at if isinstance(total, int) and isinstance(at, int) else self.opaque()
            return self.born(at, "cut out of a pinned axis"), self.born(rest, "cut out of a pinned axis")

    def divide(self, dim: Dim, inner: Size) -> tuple[Dim, Dim]:
        """Splits an axis into (outer, inner)."""
        try:
            return ax.split_inner(dim, inner)
        except Clash as clash:
            self.pin(dim, f"split across its structure: {clash}")
            outer = exact_div(ax.size_of(dim), inner) or self.opaque()
            return self.born(outer, "split out of a pinned axis"), self.born(
                inner, "split out of a pinned axis"
            )

    def pin(self, dim: Dim, reason: str, kind: PinKind = PinKind.HARD) -> None:
        if dim:
            self.analysis.pins.append((dim, Pin(reason, label(self.node), kind, self.node)))

    def pin_all(self, dims: Sequence[Dim], reason: str) -> None:
        self.pin(ax.product(dims), reason)

    def born(self, size: Size, reason: str) -> Dim:
        """An axis that the op makes out of data: never prunable."""
        dim = ax.fresh(size)
        self.pin(dim, reason)
        return dim

    def opaque(self) -> Size:
        return self.analysis.opaque()

    def contracts(self, activation: tuple[int, int], weight: tuple[int, int], dim: Dim) -> None:
        """Operand `activation[0]` meets the weight `weight[0]` along axes `[1]` of each, from the end."""
        self.analysis.contractions.append(Contraction(self.node, *activation, *weight, dim))

    def scores(self, operands: tuple[int, int], dim: Dim) -> None:
        """Two activations are multiplied and summed over `dim`."""
        self.role(dim, Role.SCORED)
        self.analysis.scored.append(ScoredProduct(self.node, operands, dim))

    def mixes(self, dims: Sequence[Dim], axes: Iterable[int]) -> None:
        """Entries along the given axes influence each other, so nothing else may be chosen by them."""
        mixed = {axis % len(dims) for axis in axes} if dims else set()
        self.analysis.mixed.append([dim for axis, dim in enumerate(dims) if axis not in mixed])

    def at_least(self, dim: Dim, count: int) -> None:
        """The axis must keep `count` entries, for example the k of a TopK."""
        self.analysis.floors.append((dim, count))

    def role(self, dim: Dim, role: Role) -> None:
        if dim:
            self.analysis.roles.append((dim, role, self.node))

    def must_be_zero(self, operands: tuple[int, ...], dim: Dim, reason: str) -> None:
        """Summing over `dim` is exact only if a masked entry is zero in one of the operands."""
        if dim:
            self.analysis.zero_checks.append(ZeroCheck(self.node, operands, dim, reason))

    def must_not_be_zero(self, operand: int) -> None:
        """A masked entry of the operand would make the source divide by zero."""
        reason = f"a masked entry would be the zero of a {self.node.op_type}"
        for dim in self.dims(operand):
            if dim:
                self.analysis.zero_checks.append(ZeroCheck(self.node, (operand,), dim, reason, zero=False))

    def counts(self, name: str, dim: Dim) -> None:
        """The attribute `name` equals the size of `dim`."""
        self.analysis.counted.append(CountedAttribute(self.node, name, dim))

    def keeps(self, name: str, dim: Dim, value: float, unset: float | None = None) -> None:
        """The attribute `name` defaults to a function of `dim` but must keep the source's value.

        `unset` is a value that means the default, too.
        """
        attribute = self.node.attributes.get(name)
        if attribute is None or attribute.as_float() == unset:
            self.analysis.defaulted.append(DefaultedAttribute(self.node, name, dim, value))

    def output(self, dims: list[Dim], index: int = 0) -> None:
        if index < len(self.node.outputs):
            self.analysis.values[self.node.outputs[index]] = dims


Rule = Callable[[Op], None]
