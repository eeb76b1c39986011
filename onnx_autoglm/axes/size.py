"""Sizes of axes: integers, or polynomials over symbols such as `batch` and `sequence`.

Two symbolic sizes are equal when their polynomials are; anything that cannot be decided counts as
different, which makes the engine pin an axis rather than guess.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping

Monomial = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Poly:
    """A polynomial with integer coefficients, at least one symbol, in a canonical order."""

    terms: tuple[tuple[Monomial, int], ...]

    def __str__(self) -> str:
        def term(monomial: Monomial, factor: int) -> str:
            names = "*".join(monomial)
            if not names:
                return str(factor)
            return names if factor == 1 else f"{factor}*{names}"

        return " + ".join(term(*entry) for entry in self.terms)


Size = int | Poly


def symbol(name: str) -> Poly:
    return Poly((((name,), 1),))


def _terms(size: Size) -> dict[Monomial, int]:
    if isinstance(size, int):
        return {(): size} if size else {}
    return dict(size.terms)


def _make(terms: Mapping[Monomial, int]) -> Size:
    kept = {monomial: factor for monomial, factor in terms.items() if factor}
    if not kept:
        return 0
    if set(kept) == {()}:
        return kept[()]
    return Poly(tuple(sorted(kept.items())))


def add(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    terms = _terms(a)
    for monomial, factor in _terms(b).items():
        terms[monomial] = terms.get(monomial, 0) + factor
    return _make(terms)


def mul(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    terms: dict[Monomial, int] = {}
    for left, x in _terms(a).items():
        for right, y in _terms(b).items():
            monomial = tuple(sorted(left + right))
            terms[monomial] = terms.get(monomial, 0) + x * y
    return _make(terms)


def sub(a: Size, b: Size) -> Size:
    return add(a, mul(-1, b))


def exact_div(a: Size, b: Size) -> Size | None:
    """`a / b` where it is exact, otherwise None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    divisor = _terms(b)
    if not divisor:
        return None
    lead = max(divisor, key=_degree)
    rest, quotient = a, {}
    while rest != 0:
        terms = _terms(rest)
        top = max(terms, key=_degree)
        monomial = _without(top, lead)
        if monomial is None or terms[top] % divisor[lead]:
            return None
        quotient[monomial] = terms[top] // divisor[lead]
        rest = sub(rest, mul(b, _make({monomial: quotient[monomial]})))
    return _make(quotient)


def _degree(monomial: Monomial) -> tuple[int, Monomial]:
    """A monomial order: the leading term of a product is the product of the leading terms."""
    return len(monomial), monomial


def _without(monomial: Monomial, divisor: Monomial) -> Monomial | None:
    """The monomial divided by another one; None if that does not divide it."""
    rest = list(monomial)
    for name in divisor:
        if name not in rest:
            return None
        rest.remove(name)
    return tuple(rest)


def is_larger(a: Size, b: Size) -> bool:
    """Whether `a` can be `b` times something: what decides which side unification splits."""
    if isinstance(a, int) and isinstance(b, int):
        return a > b
    quotient = exact_div(a, b)
    return quotient is not None and quotient != 1


def parse(text: str) -> Size:
    """Reads a declared dimension such as `past + sequence`; anything else is one opaque symbol."""
    try:
        return _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError):
        return symbol(text)


def _evaluate(tree: ast.expr) -> Size:
    if isinstance(tree, ast.Name):
        return symbol(tree.id)
    if isinstance(tree, ast.Constant) and type(tree.value) is int:
        return tree.value
    if isinstance(tree, ast.BinOp) and type(tree.op) in _ARITHMETIC:
        return _ARITHMETIC[type(tree.op)](_evaluate(tree.left), _evaluate(tree.right))
    raise ValueError("not a polynomial")


_ARITHMETIC = {ast.Add: add, ast.Sub: sub, ast.Mult: mul}
