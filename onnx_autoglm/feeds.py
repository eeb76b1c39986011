"""Inputs to run a model on: generated from what the graph says about them, or loaded from a file.

Nothing here depends on the name of an input. Sizes come from its declared shape; what an integer means (an
index into a table, a position, a mask, a length) comes from the operators it reaches.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnx_autoglm.errors import UserError

if TYPE_CHECKING:
    from onnx_autoglm.runtime import Session

Arrays = dict[str, np.ndarray]
Sizes = dict[str, int]

FREE_SIZES = (7, 5, 6, 9, 4, 11, 3)
IMAGE_SIZE = 64
UNKNOWN_SIZE = 3  # of an expression that makes no sense
MAX_SUMS = 12  # candidates of the kind "this symbol is the sum of those two"

# Operators whose result holds the same integers (from the listed input slots; None: from all).
SAME_INTEGERS: dict[str, tuple[int, ...] | None] = {
    "Cast": (0,),
    "Clip": (0,),
    "Concat": None,
    "Expand": (0,),
    "Flatten": (0,),
    "Identity": (0,),
    "Reshape": (0,),
    "Slice": (0,),
    "Split": (0,),
    "Squeeze": (0,),
    "Tile": (0,),
    "Transpose": (0,),
    "Unsqueeze": (0,),
    "Where": (1, 2),
}

# (domain, operator, slot of the indices) -> (slot of the table, its axis; None: the attribute `axis`)
RANDOM_INDICES: dict[tuple[str, str, int], tuple[int, int | None]] = {
    ("", "Gather", 1): (0, None),
    ("", "GatherElements", 1): (0, None),
    ("", "ScatterElements", 1): (0, None),
    ("com.microsoft", "EmbedLayerNormalization", 0): (2, 0),
    ("com.microsoft", "EmbedLayerNormalization", 1): (4, 0),
    ("com.microsoft", "GatherBlockQuantized", 1): (0, None),
}
POSITIONS: dict[tuple[str, str, int], tuple[int, int | None]] = {
    ("", "RotaryEmbedding", 3): (1, 0),
    ("com.microsoft", "RotaryEmbedding", 1): (2, 0),
    ("com.microsoft", "EmbedLayerNormalization", 8): (3, 0),
    ("com.microsoft", "GroupQueryAttention", 9): (7, 0),
}

# Operators that read an integer as a mask: one means "attend".
MASKS = frozenset({"And", "CumSum", "Equal", "Greater", "GreaterOrEqual", "Less", "Not", "Or", "ReduceSum"})
MASK_SLOTS = frozenset({("com.microsoft", "Attention", 3), ("com.microsoft", "MultiHeadAttention", 4)})

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


def generate_feeds(
    model: ir.Model, *, seed: int = 0, sizes: Mapping[str, int] | None = None, batch: int = 2
) -> Arrays:
    """One array per graph input.

    Static dimensions are as declared. A symbol has one size everywhere; distinct symbols get distinct sizes;
    the first symbol that is an axis 0 gets `batch`. Expressions of symbols are evaluated. `sizes` overrides.

    Raises:
        UserError: an input has no declared rank, or is not a tensor.
    """
    plan = _plan(model)
    return _feeds(model, plan.assign(sizes or {}, batch), seed)


def candidate_feeds(model: ir.Model, seed: int = 0) -> Iterator[Arrays]:
    """Feeds with different sizes, the most telling first, to be tried until the model runs.

    Symbols may hide a relation, such as a total length that is the sum of two others: after distinct sizes at
    batch 2 come such sums, then equal sizes, then the same at batch 1 and with single steps.

    Raises:
        UserError: as `generate_feeds`.
    """
    plan = _plan(model)
    tried: set[tuple[tuple[int, ...], ...]] = set()
    for batch, sizes in plan.choices():
        assigned = plan.assign(sizes, batch)
        shapes = tuple(_shape(value, assigned) for value in _inputs(model))
        if shapes not in tried:
            tried.add(shapes)
            yield _feeds(model, assigned, seed)


def first_run(
    session: "Session", candidates: Iterable[Arrays], outputs: Sequence[str] | None = None
) -> tuple[Arrays, Arrays]:
    """The first candidate feeds on which the session runs, and what it computed from them.

    Raises:
        UserError: none of them runs; the message repeats ONNX Runtime's complaint about the first.
    """
    complaint: UserError | None = None
    for feeds in candidates:
        try:
            return feeds, session.run(feeds, outputs)
        except UserError as error:
            complaint = complaint or error
    raise UserError(
        "no generated input fits the model: pass sample inputs as an .npz file, one array per graph input."
        f"\nWith the first one: {complaint}"
    )


def first_working(session: "Session", candidates: Iterable[Arrays]) -> Arrays:
    """The first candidate feeds on which the session runs.

    Raises:
        UserError: none of them runs.
    """
    return first_run(session, candidates)[0]


def load_feeds(path: Path, model: ir.Model) -> Arrays:
    """The arrays of an .npz file, one per graph input.

    A bfloat16 input, which numpy cannot store, may also be float32, uint16 (its bits) or raw two-byte values.

    Raises:
        UserError: the file cannot be read, or its arrays do not fit the model's inputs.
    """
    arrays = _read_npz(path)
    inputs = {value.name or "": value for value in _inputs(model)}
    optional = {value.name or "" for value in model.graph.inputs} - inputs.keys()
    missing = [name for name in inputs if name not in arrays]
    if missing:
        raise UserError(
            f"{path} has no array for input {missing[0]!r}. The model needs: {', '.join(inputs)}."
        )
    unknown = sorted(arrays.keys() - inputs.keys() - optional)
    if unknown:
        raise UserError(
            f"{path} has an array {unknown[0]!r}, which is no input. Remove it; the model's inputs are: "
            f"{', '.join(inputs)}."
        )
    declared = {value.name or "": value for value in model.graph.inputs}
    return {name: _fitting(path, array, declared[name]) for name, array in arrays.items()}


@dataclass
class _Plan:
    """The symbols in the shapes of the inputs."""

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
        fresh = iter((*FREE_SIZES, *range(12, 12 + len(self.free))))
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
        for batch in (2, 1):
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


def _inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that must be fed: those without a default."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def _plan(model: ir.Model) -> _Plan:
    plan = _Plan()
    for value in _inputs(model):
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


def _note(plan: _Plan, name: str, value: ir.Value, axis: int, image: bool) -> None:
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


def _shape(value: ir.Value, sizes: Sizes) -> tuple[int, ...]:
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


def _feeds(model: ir.Model, sizes: Sizes, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {value.name or "": _array(value, sizes, rng, model) for value in _inputs(model)}


def _array(value: ir.Value, sizes: Sizes, rng: np.random.Generator, model: ir.Model) -> np.ndarray:
    shape = _shape(value, sizes)
    kind = value.dtype
    assert kind is not None
    if kind == ir.DataType.STRING:
        return np.full(shape, "a", dtype=object)
    dtype = kind.numpy()
    if kind == ir.DataType.BOOL:
        return np.ones(shape, dtype)
    if not kind.is_integer():
        return np.asarray(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)
    if kind.bitwidth < 8:
        return np.ones(shape, dtype)
    return _integers(value, shape, sizes, rng, model).astype(dtype)


def _integers(
    value: ir.Value, shape: tuple[int, ...], sizes: Sizes, rng: np.random.Generator, model: ir.Model
) -> np.ndarray:
    """Integers that make sense where the graph uses them; by default 1, 2, 3 ... along the last axis."""
    counting = np.broadcast_to(1 + np.arange(shape[-1]) % 100, shape) if shape else np.array(1)
    uses = _uses(value)
    for use in uses:
        length = _length(use, sizes, model)
        if length is not None:
            return np.full(shape, length)
    lookups = [(use, limit) for use in uses if (limit := _limit(use, RANDOM_INDICES, sizes)) is not None]
    if lookups:
        low = max(0, *(-use.offset for use, _ in lookups))
        return rng.integers(low, max(low + 1, min(limit for _, limit in lookups)), size=shape)
    last = [limit for limit in (_limit(use, POSITIONS, sizes) for use in uses) if limit is not None]
    if last:
        return np.broadcast_to(counting % max(1, min(last)), shape)
    if not any(_is_position(use) for use in uses) and any(_is_mask(use) for use in uses):
        return np.ones(shape, np.int64)
    return rng.integers(0, 100, size=shape) if len(shape) > 2 else counting


@dataclass(frozen=True)
class _Use:
    """A node that reads an input's integers, shifted by a constant, at an input slot."""

    node: ir.Node
    slot: int
    offset: int

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.node.domain, self.node.op_type, self.slot)


def _uses(value: ir.Value) -> list[_Use]:
    """Every use of the value and of what still holds the same integers."""
    found: list[_Use] = []
    stack, seen = [(value, 0)], {value}
    while stack:
        current, offset = stack.pop()
        for node, slot in current.uses():
            found.append(_Use(node, slot, offset))
            step = _offset_after(node, slot)
            if step is None:
                continue
            fresh = [output for output in node.outputs if output not in seen]
            seen.update(fresh)
            stack += [(output, offset + step) for output in fresh]
    return found


def _offset_after(node: ir.Node, slot: int) -> int | None:
    """What the node adds to the integers at the slot; None if its result is something else."""
    if node.domain != "":
        return None
    if node.op_type in SAME_INTEGERS:
        slots = SAME_INTEGERS[node.op_type]
        return 0 if slots is None or slot in slots else None
    if node.op_type == "Add" or (node.op_type == "Sub" and slot == 0):
        constant = _constant(node.inputs[1 - slot])
        if constant is None or constant.size == 0 or constant.dtype.kind not in "iu":
            return None
        return int(constant.max()) if node.op_type == "Add" else -int(constant.min())
    return None


def _limit(
    use: _Use, tables: Mapping[tuple[str, str, int], tuple[int, int | None]], sizes: Sizes
) -> int | None:
    """One more than the largest integer that the use can take, if it looks up one of the tables."""
    if use.key not in tables:
        return None
    slot, axis = tables[use.key]
    if axis is None:
        axis = use.node.attributes.get_int("axis", 0)
    size = _axis_size(use.node, slot, axis, sizes)
    return None if size is None else size - max(use.offset, 0)


def _axis_size(node: ir.Node, slot: int, axis: int, sizes: Sizes) -> int | None:
    """The size of an axis of a node's input, if it is known."""
    value = node.inputs[slot] if slot < len(node.inputs) else None
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    dim = value.shape[axis]
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        return None
    if dim.value in sizes:
        return sizes[dim.value]
    try:
        result = dim.evaluate(sizes)
    except ValueError:
        return None
    return result if isinstance(result, int) else None


def _length(use: _Use, sizes: Sizes, model: ir.Model) -> int | None:
    """What an operator that takes sequence lengths wants at the slot."""
    node = use.node
    if use.key == ("com.microsoft", "GroupQueryAttention", 5):
        return _total_length(node, sizes, model) - 1
    if use.key == ("com.microsoft", "GroupQueryAttention", 6):
        return _total_length(node, sizes, model)
    if use.key == ("", "Attention", 6):
        key = node.inputs[1]
        rank = 0 if key is None or key.shape is None else len(key.shape)
        return _axis_size(node, 1, rank - 2, sizes) or _sequence_length(sizes, model)
    if use.key == ("", "TensorScatter", 2):
        return 0
    return None


def _total_length(node: ir.Node, sizes: Sizes, model: ir.Model) -> int:
    """Past and new tokens of a GroupQueryAttention node."""
    past = _axis_size(node, 3, 2, sizes) or 0
    return past + (_axis_size(node, 0, 1, sizes) or _sequence_length(sizes, model))


def _sequence_length(sizes: Sizes, model: ir.Model) -> int:
    """The size of axis 1 of the tokens: the input that looks up a table, or the first of enough rank."""
    shapes = [
        (not any(_limit(use, RANDOM_INDICES, sizes) for use in _uses(value)), _shape(value, sizes))
        for value in _inputs(model)
    ]
    wide = [(is_no_index, shape[1]) for is_no_index, shape in shapes if len(shape) > 1]
    return min(wide, key=lambda item: item[0])[1] if wide else 1


def _is_position(use: _Use) -> bool:
    """Whether the integers are multiplied with a table of frequencies."""
    if use.node.op_type in ("MatMul", "Einsum"):
        return True
    if use.node.op_type != "Mul":
        return False
    constant = _constant(use.node.inputs[1 - use.slot])
    return constant is not None and constant.size > 1


def _is_mask(use: _Use) -> bool:
    node = use.node
    if node.op_type == "Cast":
        return node.attributes.get_int("to", 0) == ir.DataType.BOOL
    from_one = node.op_type == "Sub" and use.slot == 1 and _constant(node.inputs[0]) is not None
    return from_one or node.op_type in MASKS or use.key in MASK_SLOTS


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


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """The value as an array if it is a constant small enough to look at."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > 1 << 16:
        return None
    return np.asarray(tensor.numpy())


def _read_npz(path: Path) -> Arrays:
    try:
        data = np.load(path, allow_pickle=False)
        if isinstance(data, np.lib.npyio.NpzFile):
            with data:
                return {name: data[name] for name in data.files}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except Exception as error:  # numpy and zipfile raise many kinds
        raise UserError(
            f"{path} is not a readable .npz file: write it with numpy.savez, without object arrays."
        ) from error
    raise UserError(f"{path} holds a single array: write it with numpy.savez(path, input_name=array).")


def _fitting(path: Path, array: np.ndarray, value: ir.Value) -> np.ndarray:
    """The array, if its type, rank and static sizes are those of the input."""
    where = f"{path}: input {value.name!r}"
    array = _typed(where, array, value)
    if value.shape is None:
        return array
    declared = f"[{', '.join(str(dim) for dim in value.shape)}]"
    if array.ndim != len(value.shape):
        raise UserError(f"{where} has shape {list(array.shape)}, the model wants {declared}: reshape it.")
    for axis, (size, dim) in enumerate(zip(array.shape, value.shape, strict=True)):
        if isinstance(dim, int) and size != dim:
            raise UserError(
                f"{where} has shape {list(array.shape)}, the model wants {declared}:"
                f" axis {axis} must be {dim}."
            )
    return array


def _typed(where: str, array: np.ndarray, value: ir.Value) -> np.ndarray:
    assert value.dtype is not None
    if value.dtype == ir.DataType.STRING:
        if array.dtype.kind in "US":
            return array.astype(object)
        raise UserError(f"{where} is {array.dtype}, the model wants strings.")
    wanted = np.dtype(value.dtype.numpy())
    if array.dtype == wanted:
        return array
    if value.dtype == ir.DataType.BFLOAT16:
        if array.dtype == np.float32:
            return array.astype(wanted)
        if array.dtype == np.uint16 or array.dtype.str[1:] == "V2":
            return array.view(wanted)
    raise UserError(
        f"{where} is {array.dtype}, the model wants {wanted}: save it with .astype({str(wanted)!r})."
    )
