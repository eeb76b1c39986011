"""What the integers of a graph input mean: an index, a position, a mask or a length.

Read off the operators that they reach, never off the name of the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_autoglm.feed_sizes import Sizes, fed_inputs, shape_of

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

POSITION_ROWS = 32  # a table of positions has at least so many rows, one of token types fewer

# Sequence lengths that an operator reads: whether past and new tokens count (or the past alone), and what is added.
LENGTHS: dict[tuple[str, str, int], tuple[bool, int]] = {
    ("com.microsoft", "GroupQueryAttention", 5): (True, -1),
    ("com.microsoft", "GroupQueryAttention", 6): (True, 0),
    ("", "Attention", 6): (True, 0),
    ("", "TensorScatter", 2): (False, 0),
}

# Operators that read an integer as a mask: one means "attend".
MASKS = frozenset({"And", "CumSum", "Equal", "Greater", "GreaterOrEqual", "Less", "Not", "Or", "ReduceSum"})
MASK_SLOTS = frozenset({("com.microsoft", "Attention", 3), ("com.microsoft", "MultiHeadAttention", 4)})


@dataclass(frozen=True)
class Use:
    """A node that reads an input's integers, shifted by a constant, at an input slot."""

    node: ir.Node
    slot: int
    offset: int

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.node.domain, self.node.op_type, self.slot)


def uses_of(value: ir.Value) -> list[Use]:
    """Every use of the value and of what still holds the same integers."""
    found: list[Use] = []
    stack, seen = [(value, 0)], {value}
    while stack:
        current, offset = stack.pop()
        for node, slot in current.uses():
            found.append(Use(node, slot, offset))
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


def limit_of(
    use: Use, tables: Mapping[tuple[str, str, int], tuple[int, int | None]], sizes: Sizes
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


def length_at(use: Use, sizes: Sizes, model: ir.Model) -> int | None:
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
        (not any(limit_of(use, RANDOM_INDICES, sizes) for use in uses_of(value)), shape_of(value, sizes))
        for value in fed_inputs(model)
    ]
    wide = [(is_no_index, shape[1]) for is_no_index, shape in shapes if len(shape) > 1]
    return min(wide, key=lambda item: item[0])[1] if wide else 1


def is_position(use: Use) -> bool:
    """Whether the integers are multiplied with a table of frequencies."""
    if use.node.op_type in ("MatMul", "Einsum"):
        return True
    if use.node.op_type != "Mul":
        return False
    constant = _constant(use.node.inputs[1 - use.slot])
    return constant is not None and constant.size > 1


def _looks_up_positions(use: Use) -> bool:
    """Whether the integers look up a table with a row per position; a shorter one holds types of tokens."""
    limit = limit_of(use, RANDOM_INDICES, {})
    return use.key in POSITIONS or (limit is not None and limit >= POSITION_ROWS)


def is_mask(use: Use) -> bool:
    node = use.node
    if node.op_type == "Cast":
        return node.attributes.get_int("to", 0) == ir.DataType.BOOL
    from_one = node.op_type == "Sub" and use.slot == 1 and _constant(node.inputs[0]) is not None
    return from_one or node.op_type in MASKS or use.key in MASK_SLOTS


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """The value as an array if it is a constant small enough to look at."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > 1 << 16:
        return None
    return np.asarray(tensor.numpy())


@dataclass(frozen=True)
class TokenRoles:
    """What the inputs of a language model are for.

    `tokens` looks up the largest table, of `vocabulary` rows; `past_symbols` are the lengths of caches; `lengths` are
    inputs that count tokens. `batch` and `length` are the sizes of its axes where they are fixed.
    """

    tokens: str
    vocabulary: int
    sequence_symbol: str | None
    positions: tuple[str, ...]
    masks: tuple[str, ...]
    lengths: tuple[str, ...]
    past_symbols: tuple[str, ...]
    batch: int | None
    length: int | None


def token_roles(model: ir.Model) -> TokenRoles | None:
    """The roles of the inputs, or None if no integer input of rank 2 looks up a table."""
    tables: list[tuple[int, ir.Value]] = []
    for value in fed_inputs(model):
        if (
            value.dtype is None
            or not value.dtype.is_integer()
            or value.shape is None
            or len(value.shape) != 2
        ):
            continue
        sizes = [limit_of(use, RANDOM_INDICES, {}) for use in uses_of(value)]
        known = [size for size in sizes if size is not None]
        if known:
            tables.append((min(known), value))
    if not tables:
        return None
    vocabulary, tokens = max(tables, key=lambda item: item[0])
    assert tokens.shape is not None
    rows, length = tokens.shape
    batch = rows.value if isinstance(rows, ir.SymbolicDim) else None
    sequence = str(length.value) if isinstance(length, ir.SymbolicDim) and length.value else None
    positions, masks, lengths, past = [], [], [], []
    for value in fed_inputs(model):
        if value is tokens or value.dtype is None or value.shape is None:
            continue
        if value.dtype.is_floating_point():
            past += [
                str(dim.value)
                for axis, dim in enumerate(value.shape)
                if (axis or batch)
                and isinstance(dim, ir.SymbolicDim)
                and dim.value not in (None, sequence, batch)
            ]
        elif any(use.key in LENGTHS for use in uses_of(value)):
            lengths.append(value.name or "")
        elif any(is_position(use) or _looks_up_positions(use) for use in uses_of(value)):
            positions.append(value.name or "")
        else:
            masks.append(value.name or "")
    return TokenRoles(
        tokens.name or "",
        vocabulary,
        sequence,
        tuple(positions),
        tuple(masks),
        tuple(lengths),
        tuple(dict.fromkeys(past)),
        *(size if isinstance(size, int) else None for size in tokens.shape),
    )
