"""Dimension expressions and their unification.

The axis of a value is a *dimension expression*: a product of factors, outermost first. A factor is an
`Atom`: free, or bound to a product (what a Reshape splits), or bound to a sum (what a Concat joins and a
Split or Slice cuts). Binding is substitution, as in type inference: every expression that mentions an
atom sees the binding, so an equation that was solved once stays solved.

The empty product is an axis of size 1. It unifies with nothing, as broadcasting demands.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from onnx_autoglm.axes.size import Size, add, exact_div, is_larger, mul, sub


class Clash(Exception):
    """Two expressions whose boundaries do not nest; the message says which sizes met."""


class Sum:
    """The parts of an atom, in order along the axis."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Dim]) -> None:
        self.parts = list(parts)


_ages = itertools.count()


class Atom:
    """A factor of an axis. `bound` is None (free), a product of atoms, or a Sum."""

    __slots__ = ("age", "bound", "size")

    def __init__(self, size: Size, bound: Dim | Sum | None = None) -> None:
        self.size = size
        self.bound = bound
        self.age = next(_ages)

    def __repr__(self) -> str:
        return f"<{self.size} {id(self) & 0xFFFF:04x}>"


Dim = tuple[Atom, ...]
UNIT: Dim = ()


def fresh(size: Size) -> Dim:
    """A new axis of the given size; size 1 is the empty product."""
    return UNIT if size == 1 else (Atom(size),)


def product(dims: Iterable[Dim]) -> Dim:
    return tuple(atom for dim in dims for atom in dim)


def resolve(dim: Dim) -> Dim:
    """The expression with all bindings applied: a product of free atoms and sums."""
    if all(atom.bound is None or isinstance(atom.bound, Sum) for atom in dim):
        return dim
    factors: list[Atom] = []
    for atom in dim:
        if atom.bound is None or isinstance(atom.bound, Sum):
            factors.append(atom)
        else:
            atom.bound = _expanded(atom.bound)
            factors.extend(atom.bound)
    return tuple(factors)


def _expanded(dim: Dim) -> Dim:
    """As `resolve`, without recursion: chains of bindings can be as long as a graph is deep."""
    factors: list[Atom] = []
    stack = list(reversed(dim))
    while stack:
        atom = stack.pop()
        if atom.bound is None or isinstance(atom.bound, Sum):
            factors.append(atom)
        else:
            stack.extend(reversed(atom.bound))
    return tuple(factors)


def size_of(dim: Dim) -> Size:
    total: Size = 1
    for atom in dim:
        total = mul(total, atom.size)
    return total


def parts_of(atom: Atom) -> list[Dim]:
    """The parts of a sum, nested sums spliced in and products over sums distributed."""
    assert isinstance(atom.bound, Sum)
    flat: list[Dim] = []
    for part in atom.bound.parts:
        part = resolve(part)
        if part and isinstance(part[0].bound, Sum):
            flat.extend(inner + part[1:] for inner in parts_of(part[0]))
        else:
            flat.append(part)
    return flat


def join(parts: Sequence[Dim]) -> Dim:
    """The sum of several axes, in order; a single one is itself. Parts of size 0 vanish."""
    parts = [part for part in parts if size_of(part) != 0]
    parts = [piece for part in parts for piece in _spliced(part)]
    if len(parts) == 1:
        return resolve(parts[0])
    total: Size = 0
    for part in parts:
        total = add(total, size_of(part))
    return (Atom(total, Sum(parts)),)


def _spliced(part: Dim) -> list[Dim]:
    part = resolve(part)
    return parts_of(part[0]) if len(part) == 1 and isinstance(part[0].bound, Sum) else [part]


def leaves(dim: Dim) -> list[Atom]:
    """All free atoms of an expression, those inside sums included (repeated where they repeat)."""
    found: list[Atom] = []
    for atom in resolve(dim):
        if isinstance(atom.bound, Sum):
            for part in parts_of(atom):
                found.extend(leaves(part))
        else:
            found.append(atom)
    return found


def unify(a: Dim, b: Dim) -> None:
    """Makes two expressions of the same axis equal, splitting atoms where the two views differ.

    Raises Clash where no common refinement exists. What was identified before the clash stays so: in
    row-major order outer factors of equal size correspond, whatever happens further in.
    """
    left, right = list(resolve(a)), list(resolve(b))
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x is y:
            continue
        if x.size == y.size:
            _identify(x, y)
        elif is_larger(x.size, y.size):
            left[:0] = _peel(x, y)
        elif is_larger(y.size, x.size):
            right[:0] = _peel(y, x)
        else:
            raise Clash(f"factors of size {x.size} and {y.size} do not nest")
        left, right = list(resolve(tuple(left))), list(resolve(tuple(right)))
    if left or right:
        raise Clash(f"sizes {size_of(a)} and {size_of(b)} differ")


def _peel(larger: Atom, smaller: Atom) -> Dim:
    """Splits `larger` as `smaller * rest` and returns the rest."""
    rest = exact_div(larger.size, smaller.size)
    if rest is None:
        raise Clash(f"factors of size {larger.size} and {smaller.size} do not nest")
    outer, inner = _divide(larger, rest)
    unify(outer, (smaller,))
    return inner


def _divide(atom: Atom, inner_size: Size) -> tuple[Dim, Dim]:
    """Binds an atom to `outer * inner` with an inner factor of the given size."""
    outer_size = exact_div(atom.size, inner_size)
    if outer_size is None:
        raise Clash(f"an axis of size {atom.size} has no inner factor of size {inner_size}")
    if atom.bound is None:
        outer, inner = fresh(outer_size), fresh(inner_size)
        atom.bound = outer + inner
        return outer, inner
    parts = parts_of(atom)
    if any(exact_div(size_of(part), inner_size) is None for part in parts):
        sizes = "+".join(str(size_of(part)) for part in parts)
        raise Clash(f"parts {sizes} are not all multiples of {inner_size}")
    pairs = [split_inner(part, inner_size) for part in parts]
    shared = pairs[0][1]
    for _, inner in pairs[1:]:
        unify(shared, inner)
    outer = join([outer for outer, _ in pairs])
    atom.bound = outer + resolve(shared)
    return outer, resolve(shared)


def split_inner(dim: Dim, inner_size: Size) -> tuple[Dim, Dim]:
    """Splits an expression into (outer, inner) where the inner one has the given size."""
    factors, inner, missing = list(resolve(dim)), UNIT, inner_size
    while missing != 1:
        if not factors:
            raise Clash(f"an axis of size {size_of(dim)} has no inner factor of size {inner_size}")
        last = factors.pop()
        rest = exact_div(missing, last.size)
        if rest is not None:
            inner, missing = (last, *inner), rest
            continue
        outer, tail = _divide(last, missing)
        factors.extend(outer)
        inner, missing = tail + inner, 1
    return resolve(tuple(factors)), resolve(inner)


def _identify(x: Atom, y: Atom) -> None:
    if x.bound is None and y.bound is None:
        # The younger follows the older, so that chains stay short.
        older, younger = (x, y) if x.age < y.age else (y, x)
        younger.bound = (older,)
    elif y.bound is None:
        y.bound = (x,)
    elif x.bound is None:
        x.bound = (y,)
    else:
        _match_sums(x, y)
        y.bound = (x,)


def _match_sums(x: Atom, y: Atom) -> None:
    """Matches two sums part by part, cutting the longer part."""
    left, right = parts_of(x), parts_of(y)
    while left and right:
        a, b = left.pop(0), right.pop(0)
        a_size, b_size = size_of(a), size_of(b)
        if a_size == b_size:
            unify(a, b)
        elif not (isinstance(a_size, int) and isinstance(b_size, int)):
            raise Clash(f"parts of size {a_size} and {b_size} cannot be compared")
        elif a_size > b_size:
            first, rest = cut(a, b_size)
            unify(first, b)
            left.insert(0, rest)
        else:
            first, rest = cut(b, a_size)
            unify(a, first)
            right.insert(0, rest)


def cut(dim: Dim, at: Size) -> tuple[Dim, Dim]:
    """Cuts an axis at an index into two; by the distributive law a product is cut in its outer factor."""
    dim = resolve(dim)
    total = size_of(dim)
    if at == 0:
        return fresh(0), dim
    if at == total:
        return dim, fresh(0)
    if not dim:
        raise Clash("an axis of size 1 cannot be cut")
    head, tail = dim[0], dim[1:]
    head_at = exact_div(at, size_of(tail))
    if head_at is None:
        raise Clash(f"a cut at {at} falls inside an inner axis of size {size_of(tail)}")
    if head.bound is None:
        if not (isinstance(head_at, int) and isinstance(head.size, int) and 0 < head_at < head.size):
            raise Clash(f"an axis of size {head.size} cannot be cut at {head_at}")
        first, rest = fresh(head_at), fresh(sub(head.size, head_at))
        head.bound = Sum([first, rest])
        return first + tail, rest + tail
    before: list[Dim] = []
    after = parts_of(head)
    position: Size = 0
    while position != head_at:
        if not after:
            raise Clash(f"a cut at {head_at} meets no boundary of an axis of size {head.size}")
        part = after.pop(0)
        end = add(position, size_of(part))
        if isinstance(end, int) and isinstance(head_at, int) and end > head_at:
            first, rest = cut(part, sub(head_at, position))
            before.append(first)
            after.insert(0, rest)
            break
        before.append(part)
        position = end
    return join(before) + tail, join(after) + tail
