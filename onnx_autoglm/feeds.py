"""Inputs to run a model on, generated from what the graph says about them.

Nothing here depends on the name of an input. Sizes come from its declared shape; what an integer means (an
index into a table, a position, a mask, a length) comes from the operators it reaches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_roles import (
    POSITIONS,
    RANDOM_INDICES,
    is_mask,
    is_position,
    length_at,
    limit_of,
    token_roles,
    uses_of,
)
from onnx_autoglm.feed_sizes import FREE_SIZES, Sizes, fed_inputs, plan_sizes, shape_of

if TYPE_CHECKING:
    from onnx_autoglm.runtime import Session

Arrays = dict[str, np.ndarray]


def generate_feeds(
    model: ir.Model, *, seed: int = 0, sizes: Mapping[str, int] | None = None, batch: int = 2
) -> Arrays:
    """One array per graph input.

    Static dimensions are as declared. A symbol has one size everywhere; distinct symbols get distinct sizes;
    the first symbol that is an axis 0 gets `batch`. Expressions of symbols are evaluated. `sizes` overrides.

    Raises:
        UserError: an input has no declared rank, or is not a tensor.
    """
    plan = plan_sizes(model)
    return _feeds(model, plan.assign(sizes or {}, batch), seed)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to generate feeds: the sizes of free axes, batches to try, masks with holes, empty caches."""

    sizes: tuple[int, ...] = FREE_SIZES
    batches: tuple[int, ...] = (2, 1)
    holes: bool = False
    empty: bool = False


# What a graph gets wrong at other sizes, or where masks are not all ones, one set of feeds does not show.
VARIANTS = (
    Variant(),
    Variant((2, 3, 4, 5, 6, 8, 9), (3, 1), holes=True),
    Variant((33, 40, 37, 44, 42, 50, 47), (2, 1), empty=True),
)


def candidate_feeds(model: ir.Model, seed: int = 0, variant: Variant = VARIANTS[0]) -> Iterator[Arrays]:
    """Feeds with different sizes, the most telling first, to be tried until the model runs.

    Symbols may hide a relation, such as a total length that is the sum of two others: after distinct sizes at
    batch 2 come such sums, then equal sizes, then the same at batch 1 and with single steps.

    Raises:
        UserError: as `generate_feeds`.
    """
    plan = plan_sizes(model, variant.sizes, variant.batches)
    roles = token_roles(model) if variant.empty else None
    empty = dict.fromkeys(roles.past_symbols if roles else (), 0)
    tried: set[tuple[tuple[int, ...], ...]] = set()
    for batch, sizes in plan.choices():
        assigned = plan.assign({**sizes, **empty}, batch)
        shapes = tuple(shape_of(value, assigned) for value in fed_inputs(model))
        if shapes not in tried:
            tried.add(shapes)
            yield _feeds(model, assigned, seed, holes=variant.holes)


def first_run(
    session: Session, candidates: Iterable[Arrays], outputs: Sequence[str] | None = None
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


def first_working(session: Session, candidates: Iterable[Arrays]) -> Arrays:
    """The first candidate feeds on which the session runs.

    Raises:
        UserError: none of them runs.
    """
    return first_run(session, candidates)[0]


def _feeds(model: ir.Model, sizes: Sizes, seed: int, *, holes: bool = False) -> Arrays:
    rng = np.random.default_rng(seed)
    return {value.name or "": _array(value, sizes, rng, model, holes) for value in fed_inputs(model)}


def _array(
    value: ir.Value, sizes: Sizes, rng: np.random.Generator, model: ir.Model, holes: bool
) -> np.ndarray:
    shape = shape_of(value, sizes)
    kind = value.dtype
    assert kind is not None
    if kind == ir.DataType.STRING:
        return np.full(shape, "a", dtype=object)
    dtype = kind.numpy()
    if kind == ir.DataType.BOOL:
        return rng.random(shape) < 0.5 if holes else np.ones(shape, dtype)
    if not kind.is_integer():
        return np.asarray(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)
    if kind.bitwidth < 8:
        return np.ones(shape, dtype)
    return _integers(value, shape, sizes, rng, model, holes).astype(dtype)


def _integers(
    value: ir.Value,
    shape: tuple[int, ...],
    sizes: Sizes,
    rng: np.random.Generator,
    model: ir.Model,
    holes: bool,
) -> np.ndarray:
    """Integers that make sense where the graph uses them; by default 1, 2, 3 ... along the last axis."""
    counting = np.broadcast_to(1 + np.arange(shape[-1]) % 100, shape) if shape else np.array(1)
    uses = uses_of(value)
    for use in uses:
        length = length_at(use, sizes, model)
        if length is not None:
            return np.full(shape, length)
    lookups = [(use, limit) for use in uses if (limit := limit_of(use, RANDOM_INDICES, sizes)) is not None]
    if lookups:
        low = max(0, *(-use.offset for use, _ in lookups))
        return rng.integers(low, max(low + 1, min(limit for _, limit in lookups)), size=shape)
    last = [limit for limit in (limit_of(use, POSITIONS, sizes) for use in uses) if limit is not None]
    if last:
        return np.broadcast_to(counting % max(1, min(last)), shape)
    if not any(is_position(use) for use in uses) and any(is_mask(use) for use in uses):
        mask = np.ones(shape, np.int64)
        if holes and len(shape) > 1 and shape[-1] > 1:
            mask[1:, ..., 0] = 0  # as left padding is, in all rows but the first
        return mask
    return rng.integers(0, 100, size=shape) if len(shape) > 2 else counting
