"""Outer atoms: with which a selection may vary.

A selection of an atom may vary with another atom exactly when that one occurs, around it, in every value and
initializer in which it occurs: query heads may differ in each KV group, channels in each expert.
"""

from __future__ import annotations

from collections import Counter

from onnx_autoglm.axes.analysis import Analysis
from onnx_autoglm.axes.dims import Atom, Dim, Sum, leaves, parts_of, resolve
from onnx_autoglm.axes.places import Use


def find_outers(analysis: Analysis, uses: list[Use], atoms: list[Atom]) -> dict[Atom, tuple[Atom, ...]]:
    """For each atom its outer atoms among `atoms`, in their order."""
    wanted = set(atoms)
    common: dict[Atom, set[Atom]] = {}
    # A product counts as one array: what it sums over may not vary with an atom that is free on both sides.
    # Where an op mixes along an axis, nothing may vary with it.
    arrays = [dims for dims in analysis.values.values() if dims] + analysis.mixed
    arrays += [dims for _, dims in analysis.products]
    for dims in [*arrays, *(use.dims for use in uses)]:
        for atom, around in _around(dims, wanted):
            common[atom] = common[atom] & around if atom in common else around
    outers = {atom: tuple(outer for outer in atoms if outer in common.get(atom, set())) for atom in atoms}
    return _that_slice(outers, uses)


def _around(dims: list[Dim], wanted: set[Atom]) -> list[tuple[Atom, set[Atom]]]:
    """For each wanted atom of an array the atoms that have one index wherever it has one."""
    found = [leaves(dim) for dim in dims]
    counts = Counter(atom for row in found for atom in row)
    result = []
    for axis, dim in enumerate(dims):
        rest = Counter(atom for other, row in enumerate(found) if other != axis for atom in row)
        elsewhere = {
            atom
            for other, row in enumerate(dims)
            if other != axis
            for atom in resolve(row)
            if atom.bound is None and counts[atom] == 1
        }
        for atom, before, beside in _enclosing(dim, set(), rest):
            if atom in wanted:
                # An atom with two places around another one (`a*a*b`) gives it no one index.
                result.append((atom, elsewhere | {outer for outer in before if beside[outer] == 1}))
    return result


def _that_slice(outers: dict[Atom, tuple[Atom, ...]], uses: list[Use]) -> dict[Atom, tuple[Atom, ...]]:
    """Drops outer atoms where an initializer would have to be cut along several axes at once.

    One axis may vary along one other axis, which itself is cut alike everywhere.
    """
    for use in uses:
        rows = [list(dict.fromkeys(leaves(dim))) for dim in use.dims]
        varying: set[int] = set()
        along: set[int] = set()
        for axis, row in enumerate(rows):
            for atom in row:
                away = {outer for outer in outers.get(atom, ()) if outer not in row}
                others = {other for other, held in enumerate(rows) if other != axis and away & set(held)}
                if len(others) > 1 or others & varying or (others and axis in along):
                    outers[atom] = tuple(outer for outer in outers[atom] if outer in row)
                elif others:
                    varying.add(axis)
                    along |= others
    return outers


def _enclosing(
    dim: Dim, before: set[Atom], beside: Counter[Atom]
) -> list[tuple[Atom, set[Atom], Counter[Atom]]]:
    """Every free atom of an axis, the free factors to its left, and all atoms that occur beside it.

    Those of enclosing products count too; other parts of a sum do not.
    """
    factors = resolve(dim)
    held = [leaves((factor,)) for factor in factors] if len(factors) > 1 else [[]]
    found: list[tuple[Atom, set[Atom], Counter[Atom]]] = []
    for position, factor in enumerate(factors):
        others = beside
        if len(factors) > 1:
            others = beside.copy()
            others.update(atom for other, row in enumerate(held) if other != position for atom in row)
        if isinstance(factor.bound, Sum):
            for part in parts_of(factor):
                found.extend(_enclosing(part, before, others))
        else:
            found.append((factor, before, others))
            before = before | {factor}
    return found
