"""The inputs of a language model as arrays: tokens, positions, masks and counts, for rows with left padding too."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnx_autoglm.decode_roles import DecodeRoles
from onnx_autoglm.feed_roles import LENGTHS, uses_of


@dataclasses.dataclass(frozen=True)
class DecodeInput:
    """One graph input: what it is, its type, and its declared shape."""

    name: str
    kind: str  # tokens, positions, cache or mask
    dtype: np.dtype
    rank: int
    inner: tuple[int, ...]  # its axes between the first and the last
    own_length: bool  # a mask over the new tokens alone
    length: tuple[bool, int] | None  # a count of tokens: whether past and new count, and what is added

    @classmethod
    def of(cls, value: ir.Value, roles: DecodeRoles) -> DecodeInput:
        assert value.shape is not None and value.dtype is not None
        kinds = {roles.inputs.tokens: "tokens", **dict.fromkeys(roles.inputs.positions, "positions")}
        kinds |= {cache.input: "cache" for cache in roles.caches}
        inner = tuple(dim if isinstance(dim, int) else 1 for dim in value.shape[1:-1])
        last = value.shape[-1] if len(value.shape) else None
        own = isinstance(last, ir.SymbolicDim) and last.value == roles.inputs.sequence_symbol
        lengths = [LENGTHS[use.key] for use in uses_of(value) if use.key in LENGTHS]
        name = value.name or ""
        return cls(
            name,
            kinds.get(name, "mask"),
            value.dtype.numpy(),
            len(value.shape),
            inner,
            own,
            lengths[0] if lengths else None,
        )

    @property
    def masks_the_past(self) -> bool:
        """Whether it can hide tokens of the past, of each row others."""
        return self.kind == "mask" and self.length is None and self.rank == 2 and not self.own_length

    def array(self, tokens: np.ndarray, past: int, padding: np.ndarray | None = None) -> np.ndarray:
        """The input for `[batch, new]` tokens after `past` others, of which the first `padding[row]` are none."""
        batch, new = tokens.shape
        skipped = np.zeros(batch, np.int64) if padding is None else padding
        if self.kind == "tokens":
            return np.ascontiguousarray(tokens, self.dtype)
        if self.kind == "positions":
            counted = np.arange(past, past + new)
            if self.rank == 1:
                return np.ascontiguousarray(counted, self.dtype)
            rows = (counted - skipped[:, None]).reshape(batch, *(1 for _ in self.inner), new)
            return np.ascontiguousarray(np.broadcast_to(rows, (batch, *self.inner, new)), self.dtype)
        if self.length is not None:
            total, shift = self.length
            return np.full((batch,) * self.rank, (past + new if total else past) + shift, self.dtype)
        mask = np.ones((batch, new if self.own_length else past + new)[: self.rank], self.dtype)
        if self.masks_the_past:
            mask[np.arange(past + new) < skipped[:, None]] = 0
        return mask
