"""Sizes for the symbolic axes of graph inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations

import onnx_ir as ir

from onnx_autoglm.errors import UserError

Sizes = dict[str, int]

FREE_SIZES = (7, 5, 6, 9, 4, 11, 3)
IMAGE_SIZE = 64
UNKNOWN_SIZE = 3  # of an expression that makes no sense
MAX_SUMS = 12  # candidates of the kind "this symbol is the sum of those two"

# Between an image and its first convolution.
IMAGE_OPS = frozenset(
    {
        "Add",
        "BatchNormalization",
        "Cast",
        "Clip",
        "Div",
        "Identity",
        "Mul",
        "Pad",
        "Resize",
        "Sub",
        "Transpose",
    }
)


@dataclass
class SizePlan:
    """The symbols in the shapes of the inputs, and the sizes and batches to give them."""

    sizes: tuple[int, ...] = FREE_SIZES
    batches: tuple[int, ...] = (2, 1)

    free: list[str] = field(default_factory=list)  # in order of appearance, the batch included
    batch: str | None = None
    leading: set[str] = field(default_factory=set)  # other symbols that are an axis 0
    image: set[str] = field(default_factory=set)  # height and width
    counted: set[str] = field(default_factory=set)  # symbols of integer and bool inputs
    places: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # symbol -> rank and axis, where first seen

    @property
    def others(self) -> list[str]:
        """The symbols that are not the batch, nor another name for it as far as one can tell."""
        return [name for name in self.free if name != self.batch and name not in self.leading]

    def assign(self, sizes: Mapping[str, int], batch: int) -> Sizes:
        """A size for every symbol."""
        assigned: Sizes = {}
        fresh = iter((*self.sizes, *range(12, 12 + len(self.free))))
        for name in self.free:
            if name == self.batch:
                assigned[name] = batch
            elif name in self.image:
                assigned[name] = IMAGE_SIZE
            else:
                assigned[name] = next(fresh)
        return {**assigned, **sizes}

    def choices(self) -> Iterator[tuple[int, Sizes]]:
        """Batch and sizes of each candidate, in order of usefulness."""
        for batch in self.batches:
            leading = dict.fromkeys(self.leading, batch)
            default = self.assign({}, batch)
            yield batch, {}
            yield batch, leading
            yield from ((batch, {**leading, **sizes}) for sizes in self._sums(default))
            yield batch, {**leading, **dict.fromkeys(self.others, 6)}
            for size in (224, 32):
                yield batch, {**leading, **dict.fromkeys(self.image, size)}
        for single in self.others:
            one = self.assign({single: 1}, 1)
            yield from (
                (1, {**dict.fromkeys(self.leading, 1), single: 1, **sizes}) for sizes in self._sums(one)
            )
        yield 1, dict.fromkeys(self.free, 1)

    def _sums(self, assigned: Sizes) -> Iterator[Sizes]:
        """Sizes in which one symbol is the sum of two others.

        Symbols of float inputs at the same axis, such as one per KV cache, count as one.
        """
        groups: dict[object, list[str]] = {}
        for name in self.others:
            key = name if name in self.counted else self.places[name]
            groups.setdefault(key, []).append(name)
        members = list(groups.values())
        triples = [
            (total, a, b)
            for total in reversed(members)
            for a, b in combinations(members, 2)
            if total is not a and total is not b
        ]
        # The total is the length of a mask, which is no float as a rule.
        triples.sort(key=lambda triple: triple[0][0] not in self.counted)
        for total, a, b in triples[:MAX_SUMS]:
            first, second = assigned[a[0]], assigned[b[0]]
            yield {
                **dict.fromkeys(a, first),
                **dict.fromkeys(b, second),
                **dict.fromkeys(total, first + second),
            }
        if len(members) < len(self.others):
            yield {name: assigned[group[0]] for group in members for name in group}


def fed_inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that must be fed: those without a default."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def plan_sizes(
    model: ir.Model, sizes: tuple[int, ...] = FREE_SIZES, batches: tuple[int, ...] = (2, 1)
) -> SizePlan:
    plan = SizePlan(sizes=sizes, batches=batches)
    for value in fed_inputs(model):
        if not isinstance(value.type, ir.TensorType):
            raise UserError(f"input {value.name!r} is not a tensor: pass sample inputs as an .npz file.")
        if value.shape is None:
            raise UserError(
                f"input {value.name!r} declares no shape: pass sample inputs as an .npz file, or declare it."
            )
        image = _is_image(value)
        for axis in range(len(value.shape)):
            for name in _symbols(value, axis):
                _note(plan, name, value, axis, image)
    plan.leading.discard(plan.batch or "")
    return plan


def _note(plan: SizePlan, name: str, value: ir.Value, axis: int, image: bool) -> None:
    assert value.shape is not None and value.dtype is not None
    if name not in plan.free:
        plan.free.append(name)
        plan.places[name] = (len(value.shape), axis)
    if axis == 0:
        plan.batch = plan.batch or name
        plan.leading.add(name)
    if image and axis > 0:
        plan.image.add(name)
    if not value.dtype.is_floating_point():
        plan.counted.add(name)


def _symbols(value: ir.Value, axis: int) -> list[str]:
    """The symbols that the size of the axis depends on."""
    assert value.shape is not None
    dim = value.shape[axis]
    if isinstance(dim, int):
        return []
    name = _symbol(value, axis)
    if dim.value is None:
        return [name]
    try:
        return sorted(dim.free_symbols())
    except ValueError:  # not an expression: a name with odd characters
        return [name]


def _symbol(value: ir.Value, axis: int) -> str:
    """The name of a symbolic axis. Without one, an axis 0 is the batch, any other a symbol of its own."""
    assert value.shape is not None
    dim = value.shape[axis]
    assert isinstance(dim, ir.SymbolicDim)
    if dim.value is not None:
        return dim.value
    return "?batch" if axis == 0 else f"?{value.name}[{axis}]"


def shape_of(value: ir.Value, sizes: Sizes) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(
        dim if isinstance(dim, int) else _size(dim, _symbol(value, axis), sizes)
        for axis, dim in enumerate(value.shape)
    )


def _size(dim: ir.SymbolicDim, name: str, sizes: Sizes) -> int:
    if name in sizes:
        return sizes[name]
    result = dim.evaluate(sizes)
    return result if isinstance(result, int) and result > 0 else UNKNOWN_SIZE


def _is_image(value: ir.Value) -> bool:
    """Whether a value of rank 4 reaches a convolution's data input through elementwise operators."""
    assert value.shape is not None
    if len(value.shape) != 4:
        return False
    stack, seen = [value], {value}
    while stack:
        for node, slot in stack.pop().uses():
            if slot == 0 and node.op_type in ("Conv", "ConvInteger", "QLinearConv"):
                return True
            if node.op_type in IMAGE_OPS:
                fresh = [output for output in node.outputs if output not in seen]
                seen.update(fresh)
                stack += fresh
    return False
