"""Optimization profiles: which sizes of its inputs an engine takes, from the signature of the graph.

What a symbol stands for (batch, sequence, past, their sum) is read off the roles of the inputs, never off names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from onnx_autoglm.engine_options import EngineOptions, Range
from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_roles import TokenRoles, token_roles
from onnx_autoglm.feed_sizes import SizePlan, fed_inputs, plan_sizes, shape_of

Shape = tuple[int, ...]
ONE = Range(1, 1, 1)
IMAGE = Range(224, 224, 224)


@dataclasses.dataclass(frozen=True)
class Profile:
    """The shapes of all inputs at their smallest, at the ones tuned for, and at their largest."""

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shapes": {
                name: dict(zip(("min", "opt", "max"), map(list, sizes), strict=True))
                for name, sizes in self.shapes.items()
            },
        }


def profiles_for(model: ir.Model, options: EngineOptions) -> list[Profile]:
    """One profile, or for a graph with a KV cache two: prefill (an empty or short past) and decode (one new token).

    Sizes that the graph fixes, such as the heads of each layer's cache, are as declared, in each layer.

    Raises:
        UserError: an input has no declared rank, a symbol's sizes cannot be told, or a given name is no symbol.
    """
    plan = plan_sizes(model)
    roles = token_roles(model)
    named = options.named_shapes
    unknown = [name for name in named if name not in plan.free and name not in _names(model)]
    if unknown:
        symbols = ", ".join(plan.free) or "none"
        raise UserError(f"--shape {unknown[0]}: no input has such a symbol; symbols are {symbols}")
    wanted: list[tuple[str, Range, Range]] = [("default", options.sequence, options.past)]
    if roles is not None and roles.past_symbols:
        empty = Range(0, 0, options.past.max)
        wanted = [("prefill", options.sequence, empty), ("decode", ONE, options.past)]
        if roles.length is not None:  # the graph fixes how many tokens it takes
            wanted = wanted[1:] if roles.length == 1 else wanted[:1]
    profiles = []
    for name, sequence, past in wanted:
        ranges = {**_ranges(model, plan, roles, options.batch, sequence, past), **named}
        missing = [symbol for symbol in plan.free if symbol not in ranges]
        if missing:
            raise UserError(
                f"the sizes of {', '.join(missing)} ({_places(model, missing[0])}) cannot be told from the graph: give "
                f"--shape {missing[0]}=MIN:OPT:MAX"
            )
        profiles.append(_profile(name, model, ranges))
    return profiles


def _names(model: ir.Model) -> list[str]:
    return [value.name or "" for value in fed_inputs(model)]


def _places(model: ir.Model, symbol: str) -> str:
    """Where a symbol stands, in words."""
    for value in fed_inputs(model):
        if symbol in map(str, value.shape or ()) or symbol.startswith(f"?{value.name}["):
            return f"input {value.name} {value.shape}"
    return "an input"


def _ranges(
    model: ir.Model, plan: SizePlan, roles: TokenRoles | None, batch: Range, sequence: Range, past: Range
) -> dict[str, Range]:
    """The sizes of every symbol whose meaning is known."""
    ranges: dict[str, Range] = {}
    for symbol in plan.image:
        ranges[symbol] = IMAGE
    for symbol, role in _meanings(model, roles):
        size = {"sequence": sequence, "past": past, "total": _sum(past, sequence)}[role]
        ranges.setdefault(symbol, size)
    for symbol in plan.leading:
        ranges.setdefault(symbol, batch)
    return ranges if plan.batch is None else {**ranges, plan.batch: batch}


def _sum(a: Range, b: Range) -> Range:
    return Range(a.min + b.min, a.opt + b.opt, a.max + b.max)


def _meanings(model: ir.Model, roles: TokenRoles | None) -> Iterator[tuple[str, str]]:
    """Symbols of the inputs of a language model, with what they count."""
    if roles is None:
        return
    tokens = next(value for value in fed_inputs(model) if value.name == roles.tokens)
    yield from ((symbol, "sequence") for symbol in _symbols(tokens, 1))
    yield from ((symbol, "past") for symbol in roles.past_symbols)
    for value in fed_inputs(model):
        # A mask covers past and new tokens, a position belongs to a new one. Expressions of both follow by themselves.
        grows = value.name in roles.masks and bool(roles.past_symbols)
        if (
            value.name in (*roles.masks, *roles.positions)
            and value.shape is not None
            and len(value.shape) > 1
        ):
            yield from ((symbol, "total" if grows else "sequence") for symbol in _symbols(value, -1))


def _symbols(value: ir.Value, axis: int) -> list[str]:
    """The symbol of an axis that is one by itself, as `plan_sizes` names it."""
    assert value.shape is not None
    axis %= len(value.shape)
    dim = value.shape[axis]
    if isinstance(dim, int):
        return []
    if dim.value is None:
        return [f"?{value.name}[{axis}]"]
    return [dim.value]


def _profile(name: str, model: ir.Model, ranges: dict[str, Range]) -> Profile:
    corners = [
        {symbol: getattr(size, corner) for symbol, size in ranges.items()} for corner in ("min", "opt", "max")
    ]
    shapes = {}
    for value in fed_inputs(model):
        low, usual, high = (shape_of(value, sizes) for sizes in corners)
        shapes[value.name or ""] = (low, usual, high)
    return Profile(name, shapes)
