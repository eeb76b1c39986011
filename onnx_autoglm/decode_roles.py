"""What decoding needs to know of a language model: its scores, and which output continues which cache.

Read off the graph, never off a name.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_roles import TokenRoles, token_roles
from onnx_autoglm.feed_sizes import fed_inputs

# Operators that only move what they read from slot 0 to output 0.
MOVES = frozenset(
    {
        "Cast",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "ScatterElements",
        "ScatterND",
        "Slice",
        "Squeeze",
        "TensorScatter",
        "Transpose",
        "Unsqueeze",
    }
)
# (domain, operator, slot of the old cache) -> output with the new one
GROWS: dict[tuple[str, str, int], int] = {
    ("", "Attention", 4): 1,
    ("", "Attention", 5): 2,
    ("com.microsoft", "Attention", 4): 1,
    ("com.microsoft", "GroupQueryAttention", 3): 1,
    ("com.microsoft", "GroupQueryAttention", 4): 2,
    ("com.microsoft", "MultiHeadAttention", 6): 1,
    ("com.microsoft", "MultiHeadAttention", 7): 2,
}


@dataclasses.dataclass(frozen=True)
class Cache:
    """A graph input that holds the past, and the output that holds past and present.

    `shape` is that of an empty cache of one row: 0 on the axis of the length, 1 on the `batch_axis`.
    """

    input: str
    output: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    batch_axis: int

    def empty(self, batch: int) -> tuple[int, ...]:
        return tuple(batch if axis == self.batch_axis else size for axis, size in enumerate(self.shape))


@dataclasses.dataclass(frozen=True)
class DecodeRoles:
    """The inputs of a language model, the output `scores` `[batch, sequence, vocabulary]`, and its caches."""

    inputs: TokenRoles
    scores: str
    caches: tuple[Cache, ...]


def decode_roles(model: ir.Model) -> DecodeRoles:
    """Raises UserError, with the reason, if text cannot be written with the model."""
    roles = token_roles(model)
    if roles is None:
        raise UserError("the model has no token input (integers [batch, sequence] that look up a table)")
    scores = _scores(model, roles)
    if roles.length not in (None, 1):
        raise UserError(
            f"the model takes exactly {roles.length} tokens at once: export it with a symbolic sequence axis"
        )
    caches = _caches(model, roles)
    if roles.length == 1 and not caches:
        raise UserError("the model takes one token at a time and has no cache to remember the others")
    for value in fed_inputs(model):
        if value.name in (roles.tokens, *roles.positions, *roles.lengths, *(cache.input for cache in caches)):
            continue
        if value.name not in roles.masks or value.shape is None or len(value.shape) > 2:
            raise UserError(f"input {value.name!r} is no token, position, cache or mask of rank 2")
        # A mask over past and new tokens has a length of its own; one that cannot grow ends the text.
        if len(value.shape) == 2 and isinstance(value.shape[1], int):
            raise UserError(f"input {value.name!r} has a fixed length: export it with a symbolic one")
    return DecodeRoles(roles, scores, caches)


def _scores(model: ir.Model, roles: TokenRoles) -> str:
    for value in model.graph.outputs:
        size = value.shape[-1] if value.shape is not None and len(value.shape) == 3 else None
        # An embedding table is sometimes padded; a hidden state is far narrower than the vocabulary.
        if isinstance(size, int) and roles.vocabulary // 2 < size <= roles.vocabulary:
            return value.name or ""
    raise UserError(f"the model has no output [batch, sequence, {roles.vocabulary}] of next-token scores")


def _caches(model: ir.Model, roles: TokenRoles) -> tuple[Cache, ...]:
    """All caches, in the order of the inputs."""
    olds = [
        value
        for value in fed_inputs(model)
        if value.dtype is not None and value.dtype.is_floating_point() and value.shape is not None
    ]
    if not olds:
        return ()
    batch = next(value for value in fed_inputs(model) if value.name == roles.tokens).shape[0]  # type: ignore[index]
    places = {old: _axes(old, batch) for old in olds}
    found: dict[ir.Value, ir.Value] = {}
    fits = {old: [new for new in _grown(old, model) if _fits(old, new, places[old][0])] for old in olds}
    for old, news in fits.items():
        if len(news) == 1:
            found[old] = news[0]
    taken = list(found.values())
    if len(set(taken)) < len(taken):
        found, taken = {}, []  # two inputs in one output: the graph does not tell them apart
    # What the graph does not tell is told by shapes and the order of both sides, if that is one to one.
    rest = [old for old in olds if old not in found]
    free = [
        new
        for new in model.graph.outputs
        if new not in taken and any(_fits(old, new, places[old][0]) for old in rest)
    ]
    if len(rest) != len(free):
        raise UserError(
            f"cannot tell which output continues the cache {rest[0].name!r}: {len(rest)} caches and {len(free)} outputs "
            "of such a shape are left"
        )
    for old, new in zip(rest, free, strict=True):
        if not _fits(old, new, places[old][0]):
            raise UserError(f"cannot tell which output continues the cache {old.name!r}: shapes differ")
        found[old] = new
    return tuple(_cache(old, found[old], *places[old]) for old in olds)


def _axes(value: ir.Value, batch: int | ir.SymbolicDim) -> tuple[int, int]:
    """The axes of the length and of the batch of a cache input."""
    assert value.shape is not None
    free = [axis for axis, dim in enumerate(value.shape) if isinstance(dim, ir.SymbolicDim)]
    if isinstance(batch, ir.SymbolicDim):
        named = [axis for axis in free if _text(value.shape[axis]) == _text(batch)]
        rows = named[0] if named else 0
    else:
        rows = next((axis for axis, dim in enumerate(value.shape) if dim == batch), 0)
    lengths = [axis for axis in free if axis != rows]
    if len(lengths) != 1:
        what = "has a fixed length" if not lengths else "has more than one axis of unknown size"
        raise UserError(f"the float input {value.name!r} {what}, so it is no cache that grows")
    return lengths[0], rows


def _text(dim: int | ir.SymbolicDim) -> str:
    return str(dim if isinstance(dim, int) else dim.value)


def _fits(old: ir.Value, new: ir.Value, length: int) -> bool:
    """Whether both have one type and one shape, but for the axis of the length."""
    if new.shape is None or old.shape is None or old.dtype != new.dtype or len(old.shape) != len(new.shape):
        return False
    pairs = enumerate(zip(old.shape, new.shape, strict=True))
    return all(
        a == b for axis, (a, b) in pairs if axis != length and isinstance(a, int) and isinstance(b, int)
    )


def _grown(old: ir.Value, model: ir.Model) -> list[ir.Value]:
    """The graph outputs that the cache reaches by being moved and joined with something new."""
    outputs = set(model.graph.outputs)
    stack, seen = [(old, False)], {(old, False)}
    found: dict[ir.Value, None] = {}
    while stack:
        value, joined = stack.pop()
        if joined and value in outputs:
            found[value] = None
        for node, slot in value.uses():
            for step in _steps(node, slot, joined):
                if step not in seen:
                    seen.add(step)
                    stack.append(step)
    return list(found)


def _steps(node: ir.Node, slot: int, joined: bool) -> list[tuple[ir.Value, bool]]:
    if node.domain == "" and node.op_type == "Concat":
        return [(node.outputs[0], True)]
    if node.domain == "" and node.op_type == "Split":
        return [(output, joined) for output in node.outputs]
    if node.domain == "" and node.op_type in MOVES and slot == 0:
        scattered = node.op_type in ("ScatterElements", "ScatterND", "TensorScatter")
        return [(node.outputs[0], joined or scattered)]
    grown = GROWS.get((node.domain, node.op_type, slot))
    if grown is not None and grown < len(node.outputs):
        return [(node.outputs[grown], True)]
    return []


def _cache(old: ir.Value, new: ir.Value, length: int, rows: int) -> Cache:
    assert old.shape is not None and old.dtype is not None
    sizes: list[int] = []
    for axis, dim in enumerate(old.shape):
        fixed = dim if isinstance(dim, int) else 1
        sizes.append(0 if axis == length else 1 if axis == rows else fixed)
    return Cache(old.name or "", new.name or "", old.dtype, tuple(sizes), rows)
