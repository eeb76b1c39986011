"""What is known of integer values: constants, extents of axes and arithmetic over them.

A graph computes shapes with Shape, Gather, Concat and arithmetic. Such a value is followed as an array of
entries, each a number or an expression over extents, so that it can be evaluated for the source and again
for the pruned sizes. `Shape` observes an axis, it does not use it: nothing here pins anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_autoglm.axes.dims import Dim
from onnx_autoglm.axes.size import Poly, Size, add, exact_div, mul, sub

# Longer integer arrays are data, not shapes; following them would cost time and find nothing.
MAX_ENTRIES = 512


@dataclasses.dataclass(frozen=True, eq=False)
class Extent:
    """The size of an axis, as `Shape` reads it."""

    dim: Dim


@dataclasses.dataclass(frozen=True, eq=False)
class Arithmetic:
    operator: str
    operands: tuple[Entry, ...]


Entry = int | Extent | Arithmetic
Contents = npt.NDArray[Any]  # of dtype object, holding entries


def constant(values: np.ndarray[Any, Any]) -> Contents:
    result = np.empty(values.shape, dtype=object)
    result[...] = values.tolist() if values.shape else int(values)
    return result


def array(entries: list[Entry]) -> Contents:
    result = np.empty(len(entries), dtype=object)
    for index, entry in enumerate(entries):
        result[index] = entry
    return result


def apply(operator: str, *operands: Contents) -> Contents:
    """The operator over broadcast operands, numbers folded at once."""
    arrays: list[Contents] = list(np.broadcast_arrays(*operands))
    result = np.empty(arrays[0].shape, dtype=object)
    for index in np.ndindex(result.shape):
        result[index] = _fold(operator, tuple(operand[index] for operand in arrays))
    return result


def _fold(operator: str, entries: tuple[Any, ...]) -> Entry:
    if all(isinstance(entry, int) for entry in entries):
        value = OPERATORS[operator](*entries)
        if isinstance(value, int):
            return value
    return Arithmetic(operator, entries)


def evaluate(entry: Entry, size: Callable[[Dim], Size]) -> Size | None:
    """The value of an entry for the given sizes of axes; None where it cannot be decided."""
    if isinstance(entry, int):
        return entry
    if isinstance(entry, Extent):
        return size(entry.dim)
    operands = [evaluate(operand, size) for operand in entry.operands]
    if entry.operator == "where":
        condition = operands[0]
        return None if not isinstance(condition, int) else operands[1] if condition else operands[2]
    known = [operand for operand in operands if operand is not None]
    if len(known) != len(operands):
        return None
    return OPERATORS[entry.operator](*known)


def extents(contents: Contents) -> list[Dim]:
    """The axes whose sizes an array depends on."""
    found: list[Dim] = []
    stack = list(contents.flat)
    while stack:
        entry = stack.pop()
        if isinstance(entry, Extent):
            found.append(entry.dim)
        elif isinstance(entry, Arithmetic):
            stack.extend(entry.operands)
    return found


def is_constant(contents: Contents) -> bool:
    return all(isinstance(entry, int) for entry in contents.flat)


def _numbers(function: Callable[..., int]) -> Callable[..., Size | None]:
    def checked(*operands: Size) -> Size | None:
        numbers = [operand for operand in operands if isinstance(operand, int)]
        return function(*numbers) if len(numbers) == len(operands) else None

    return checked


def _divide(a: Size, b: Size) -> Size | None:
    """Integer division as ONNX defines it: towards zero."""
    if isinstance(a, int) and isinstance(b, int):
        return None if not b else a // b if (a < 0) == (b < 0) else -(-a // b)
    return exact_div(a, b)


def _equal(a: Size, b: Size) -> Size | None:
    if a == b:
        return 1
    if isinstance(a, int) and isinstance(b, int):
        return 0
    # A symbolic extent may be zero (an empty cache), but it equals no marker such as -1.
    number, other = (a, b) if isinstance(a, int) else (b, a)
    if isinstance(number, int) and number < 0 and _is_extent(other):
        return 0
    return None


def _greater(a: Size, b: Size) -> Size | None:
    if isinstance(a, int) and isinstance(b, int):
        return int(a > b)
    if isinstance(b, int) and b < 0 and _is_extent(a):
        return 1
    if isinstance(a, int) and a <= 0 and _is_extent(b):
        return 0
    return None


def _is_extent(size: Size) -> bool:
    return isinstance(size, Poly) and all(factor > 0 for _, factor in size.terms)


OPERATORS: dict[str, Callable[..., Size | None]] = {
    "add": add,
    "sub": sub,
    "mul": mul,
    "div": _divide,
    "mod": _numbers(lambda a, b: a % b),
    "min": _numbers(min),
    "max": _numbers(max),
    "abs": _numbers(abs),
    "neg": lambda a: mul(-1, a),
    "equal": _equal,
    "greater": _greater,
    "less": lambda a, b: _greater(b, a),
    "not": _numbers(lambda a: int(not a)),
    "and": _numbers(lambda a, b: int(bool(a) and bool(b))),
    "or": _numbers(lambda a, b: int(bool(a) or bool(b))),
    "where": lambda c, a, b: None if not isinstance(c, int) else a if c else b,
}
