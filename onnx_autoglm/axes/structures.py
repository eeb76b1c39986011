"""Prunable structures, read off a finished analysis.

A structure is a free atom with the places where it lives in initializers. Its kind follows from the roles
that its axis was seen in, its outer atoms from where it occurs, and every reason not to cut it is a pin.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import TypeVar

import onnx_ir as ir

from onnx_autoglm.axes.analysis import Analysis
from onnx_autoglm.axes.blocks import Block, find_blocks
from onnx_autoglm.axes.dims import Atom, Dim, Sum, leaves, parts_of, resolve, size_of
from onnx_autoglm.axes.facts import Pin, PinKind, Role, label
from onnx_autoglm.axes.names import name_structures
from onnx_autoglm.axes.outers import find_outers
from onnx_autoglm.axes.places import Place, Use
from onnx_autoglm.axes.zeros import Zeros

T = TypeVar("T")

# Kinds of pin that a kind of structure may lift when it is asked for by name.
_LIFTS = {"expert": PinKind.SELECT, "hidden": PinKind.NORM}
_CACHED = frozenset({"query-head", "kv-group", "value-channel", "qk-pair"})
# Ops that write into a cache in place: its axes do not grow, so the axes alone do not tell it from data.
_WRITES = frozenset("GroupQueryAttention ScatterND ScatterElements TensorScatter".split())


@dataclasses.dataclass(eq=False)
class Structure:
    """An atom that can be cut, or that could be but for its pins.

    `outers` are atoms with which the selection may vary; `floor` is the least count per selection;
    `cost` the parameters that one index holds, in one outer index. The indices of a `block` have `names`, and its
    atom is no axis.
    """

    atom: Atom
    kind: str
    size: int
    places: list[Place]
    outers: tuple[Atom, ...] = ()
    pins: list[Pin] = dataclasses.field(default_factory=list)
    interface: list[str] = dataclasses.field(default_factory=list)
    floor: int = 1
    cost: float = 0.0
    layer: str = ""
    id: str = ""
    names: tuple[str, ...] = ()

    @property
    def groups(self) -> int:
        """How many separate selections there are: the product of the outer sizes."""
        return math.prod(self.shape[:-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of scores and masks: `[*sizes of the outer atoms, size]`."""
        sizes = [outer.size for outer in self.outers]
        assert all(isinstance(size, int) for size in sizes)
        return (*(size for size in sizes if isinstance(size, int)), self.size)

    @property
    def parameters(self) -> int:
        return round(self.cost * self.size * self.groups)


@dataclasses.dataclass(frozen=True, eq=False)
class Structures:
    """All structures of a model and the initializer uses they live in."""

    analysis: Analysis
    found: list[Structure]
    uses: list[Use]
    blocks: list[Block] = dataclasses.field(default_factory=list)  # the indices of the structure of that kind

    def __iter__(self) -> Iterator[Structure]:
        return iter(self.found)


def find_structures(analysis: Analysis) -> Structures:
    """Reads structures, kinds, pins and outer atoms off a finished analysis."""
    uses = list(_uses(analysis))
    places: dict[Atom, list[Place]] = defaultdict(list)
    for use in uses:
        for axis, dim in enumerate(use.dims):
            for atom in dict.fromkeys(leaves(dim)):
                places[atom].append(Place(use, axis))
    roles = _by_atom((dim, role) for dim, role, _ in analysis.roles)
    pins = _by_atom(analysis.pins)
    _add_zero_pins(analysis, pins, places)
    groups = _kv_groups(analysis, places)
    candidates: dict[Atom, str] = {}
    for atom in list(places):
        kind = _kind(set(roles[atom]), set(pins[atom]), is_group=atom in groups)
        if kind is not None and isinstance(atom.size, int):
            candidates[atom] = kind
    entries = _entries(uses)
    experts = {atom for atom, kind in candidates.items() if kind == "expert"}
    outers = find_outers(analysis, uses, list(candidates))
    found = []
    for atom, kind in candidates.items():
        if kind == "ffn-channel" and experts and all(_holds(place.use, experts) for place in places[atom]):
            kind = "expert-channel"
        assert isinstance(atom.size, int)
        # A norm sees the same channels everywhere, or it could not be narrowed to them.
        around = () if kind == "hidden" else outers[atom]
        structure = Structure(atom, kind, atom.size, places[atom], around)
        _settle(analysis, structure, list(dict.fromkeys(pins[atom])), entries[atom])
        found.append(structure)
    order = {node: index for index, node in enumerate(analysis.graph)}
    found.sort(key=lambda structure: _position(structure, order))
    _name(found)
    blocks = find_blocks(analysis)
    free = [block for block in blocks if not block.reason]
    return Structures(analysis, found + _of_blocks(blocks, uses), uses, free)


def _of_blocks(blocks: list[Block], uses: list[Use]) -> list[Structure]:
    """One structure whose indices are the blocks that can go, and one for each that cannot."""
    entries = []
    for block in blocks:
        inside = block.dying()
        own = [use for use in uses if len(use.dims) > 1 and all(node in inside for node, _ in use.consumers)]
        entries.append(("block", [Place(use, 0) for use in own]))
    names = [name for _, name in name_structures(entries)]
    free = [(block, name) for block, name in zip(blocks, names, strict=True) if not block.reason]
    found = []
    if free:
        cost = sum(block.parameters() for block, _ in free) / len(free)
        listed = tuple(name for _, name in free)
        found.append(
            Structure(
                Atom(len(free)), "block", len(free), [], cost=cost, layer="blocks", id="blocks", names=listed
            )
        )
    for block, name in zip(blocks, names, strict=True):
        if block.reason:
            pins = [Pin(block.reason, block.where)]
            found.append(
                Structure(
                    Atom(1),
                    "block",
                    1,
                    [],
                    pins=pins,
                    cost=block.parameters(),
                    layer=name,
                    id=f"{name}:block",
                )
            )
    return found


def _position(structure: Structure, order: dict[ir.Node, int]) -> int:
    """Where in the graph a structure first matters: layers come in the order of the graph."""
    consumers = [node for place in structure.places for node, _ in place.use.consumers]
    return min(order.get(node, len(order)) for node in consumers)


def _uses(analysis: Analysis) -> list[Use]:
    uses: list[Use] = []
    for value in analysis.graph.initializers.values():
        shared: list[tuple[ir.Node, int]] = []
        for node, index in value.uses():
            view = analysis.views.get((node, index))
            if view is not None:
                uses.append(Use(value, ((node, index),), view))
            else:
                shared.append((node, index))
        dims = analysis.values.get(value)
        if shared and dims is not None:
            uses.append(Use(value, tuple(shared), dims))
    return uses


def _by_atom(facts: Iterable[tuple[Dim, T]]) -> dict[Atom, list[T]]:
    result: dict[Atom, list[T]] = defaultdict(list)
    for dim, fact in facts:
        for atom in leaves(dim):
            result[atom].append(fact)
    return result


def _add_zero_pins(analysis: Analysis, pins: dict[Atom, list[Pin]], places: dict[Atom, list[Place]]) -> None:
    zeros = Zeros(analysis)
    for check in analysis.zero_checks:
        for atom in leaves(check.dim):
            if atom not in places:
                continue
            is_zero = any(zeros.input_is_zero(check.node, index, atom) for index in check.operands)
            if is_zero != check.zero:
                pins[atom].append(Pin(check.reason, label(check.node)))


def _kv_groups(analysis: Analysis, places: dict[Atom, list[Place]]) -> set[Atom]:
    """Head atoms under which another head atom covers fewer entries of the weights: `kv` above `rep`.

    Entries are counted, since one fused weight, `[q|k|v]` or `kv*(rep+1+1)`, holds both.
    """
    heads: dict[ir.Node, set[Atom]] = defaultdict(set)
    for dim, role, node in analysis.roles:
        if role == Role.HEAD:
            heads[node].update(atom for atom in leaves(dim) if atom in places)
    groups: set[Atom] = set()
    for atoms in heads.values():
        held = {atom: _covered(atom, places[atom]) for atom in atoms}
        groups.update(a for a in atoms if any(held[b] < held[a] for b in atoms))
    return groups


def _covered(atom: Atom, places: list[Place]) -> Counter[Use]:
    """How many entries of an axis hold the atom, per initializer."""
    counts: Counter[Use] = Counter()
    for place in places:
        assert isinstance(atom.size, int)
        counts[place.use] += _held(place.use.dims[place.axis])[atom] * atom.size
    return counts


def _kind(roles: set[Role], pins: set[Pin], *, is_group: bool) -> str | None:
    pinned = {pin.kind for pin in pins}
    if not roles & {Role.MADE, Role.CONTRACTED, Role.STACKED, Role.CONVOLVED}:
        return None  # positions and batches take part in products too, but no weight makes them
    if Role.HEAD in roles:
        return "kv-group" if is_group else "query-head"
    if Role.STACKED in roles and Role.SCORED in roles:
        return "expert"  # mixed by a product of router weights and expert outputs
    if Role.SCORED in roles:
        return "qk-pair"
    if Role.CARRIED in roles:
        return "value-channel" if Role.CONTRACTED in roles else None
    if Role.STACKED in roles:
        return "expert"
    if PinKind.NORM in pinned and Role.ADDED in roles:
        return "hidden"
    if Role.CONVOLVED in roles:
        return "conv-channel"
    if Role.CONTRACTED in roles and Role.MADE in roles:
        return "ffn-channel"
    if PinKind.HARD in pinned and PinKind.INTERFACE not in pinned:
        return "other"  # lost from sight at an op that pinned it; listed so that the reason is told
    return None


def _holds(use: Use, atoms: set[Atom]) -> bool:
    return any(atom in atoms for dim in use.dims for atom in leaves(dim))


def _settle(analysis: Analysis, structure: Structure, pins: list[Pin], entries: float) -> None:
    """Pins that remain for this kind, the graph interface it changes, its floor and its cost."""
    atom = structure.atom
    lifted = _LIFTS.get(structure.kind)
    structure.pins = [pin for pin in pins if pin.kind not in (lifted, PinKind.INTERFACE)]
    if any(pin.kind == PinKind.INTERFACE for pin in pins):
        names, stateful = _interface(analysis, atom)
        # Only attention keeps state; whatever else grows into an output is the user's data.
        stateful = stateful and structure.kind in _CACHED
        structure.interface = names
        if not stateful:
            structure.pins.extend(pin for pin in pins if pin.kind == PinKind.INTERFACE)
    for dim, count in analysis.floors:
        if atom in leaves(dim):
            total = size_of(dim)
            assert isinstance(total, int)
            structure.floor = max(structure.floor, -(-count * structure.size // total))
    structure.cost = entries / structure.groups


def _entries(uses: list[Use]) -> dict[Atom, float]:
    """How many initializer entries one index of each atom holds, summed over its outer indices."""
    totals: dict[Atom, float] = defaultdict(float)
    for use in uses:
        assert use.value.const_value is not None
        for dim in use.dims:
            size = size_of(dim)
            if not isinstance(size, int) or size == 0:
                continue
            for atom, held in _held(dim).items():
                totals[atom] += use.value.const_value.size * held / size
    return totals


def _held(dim: Dim) -> dict[Atom, int]:
    """How many entries of an axis belong to one index of each of its atoms."""
    factors = resolve(dim)
    total = size_of(factors)
    assert isinstance(total, int)
    result: dict[Atom, int] = defaultdict(int)
    for factor in factors:
        assert isinstance(factor.size, int)
        rest = total // factor.size
        if not isinstance(factor.bound, Sum):
            result[factor] += rest
            continue
        for part in parts_of(factor):
            for atom, held in _held(part).items():
                result[atom] += held * rest
    return result


def _interface(analysis: Analysis, atom: Atom) -> tuple[list[str], bool]:
    """The graph inputs and outputs that hold the atom, and whether all of them are cache state."""

    def axes(value: ir.Value) -> list[int]:
        return [axis for axis, dim in enumerate(analysis.values.get(value) or []) if atom in leaves(dim)]

    inputs = [value for value in analysis.graph.inputs if axes(value)]
    outputs = [value for value in analysis.graph.outputs if axes(value)]
    names = [value.name or "" for value in (*inputs, *outputs)]
    fed: set[ir.Value] = set()
    for output in outputs:
        state = [value for value in inputs if _is_state(analysis, value, output, atom)]
        if not state:
            return names, False
        fed.update(state)
    return names, bool(inputs) and fed == set(inputs)


def _is_state(analysis: Analysis, before: ir.Value, after: ir.Value, atom: Atom) -> bool:
    """Whether an output is an input grown along one axis, not that of the atom, or written in place."""
    old, new = analysis.values.get(before), analysis.values.get(after)
    if old is None or new is None or len(old) != len(new):
        return False
    changed = [(a, b) for a, b in zip(old, new, strict=True) if resolve(a) != resolve(b)]
    writer = after.producer()
    if writer is not None and writer.op_type in _WRITES and before in writer.inputs:
        return len(changed) <= 1
    if len(changed) != 1 or atom in leaves(changed[0][1]):
        return False
    return set(leaves(changed[0][0])) < set(leaves(changed[0][1]))


def _name(found: list[Structure]) -> None:
    names = name_structures([(structure.kind, structure.places) for structure in found])
    for structure, (layer, name) in zip(found, names, strict=True):
        structure.layer, structure.id = layer, name
