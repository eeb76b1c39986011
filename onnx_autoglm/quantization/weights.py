"""Weights as integers: scales per output channel, or per block of inputs, and rounding."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bits = Literal[4, 8]
_RATIOS = np.arange(0.5, 1.0001, 0.025)


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A weight `[k, n]` (contracted axis first) as integers times scales.

    `values` is int8 `[k, n]`, between -127 and 127 for 8 bits and -8 and 7 for 4. `scales` is `[blocks, n]`: one block
    for all inputs, or one for every `block` of them.
    """

    values: npt.NDArray[np.int8]
    scales: Floats
    bits: Bits
    block: int | None = None

    def floats(self) -> Floats:
        """What the integers stand for, `[k, n]`."""
        size = self.block or len(self.values)
        return np.asarray(self.values * np.repeat(self.scales, size, axis=0)[: len(self.values)], np.float32)


def limits(bits: Bits) -> tuple[int, int]:
    """The least and the largest integer in use."""
    return (-127, 127) if bits == 8 else (-8, 7)


def round_to(weight: Floats, scales: Floats, bits: Bits, block: int | None = None) -> Quantized:
    """Rounds a weight `[k, n]` to the nearest multiples of given scales `[blocks, n]`."""
    low, high = limits(bits)
    spread = np.repeat(scales, block or len(weight), axis=0)[: len(weight)]
    values = np.clip(np.round(weight / spread), low, high).astype(np.int8)
    return Quantized(values, scales, bits, block)


def scales_of(weight: Floats, bits: Bits, block: int | None = None, *, clip: bool = True) -> Floats:
    """Scales `[blocks, n]` of a weight `[k, n]`: from the largest entry of each, or less where clipping it has the
    smaller squared error (`clip`). All are positive."""
    size = block or len(weight)
    pieces = [weight[at : at + size] for at in range(0, len(weight), size)]
    return np.stack([_column_scales(piece, bits, clip) for piece in pieces])


def _column_scales(piece: Floats, bits: Bits, clip: bool) -> Floats:
    low, high = limits(bits)
    largest = np.maximum(np.abs(piece).max(axis=0), np.float32(1e-30)).astype(np.float32)
    if bits == 4:
        # -8 is one step more than 7: a column whose largest entry is negative may use it.
        sign_best = np.where(-piece.min(axis=0) >= piece.max(axis=0), 8, 7)
        base = np.maximum(largest / sign_best, piece.max(axis=0) / 7).astype(np.float32)
    else:
        base = (largest / high).astype(np.float32)
    base = np.maximum(base, np.float32(1e-30))
    if not clip:
        return base
    best, least = base.copy(), np.full(piece.shape[1], np.inf, np.float32)
    for ratio in _RATIOS if bits == 4 else _RATIOS[_RATIOS >= 0.8]:
        scale = (base * np.float32(ratio)).astype(np.float32)
        error = np.square(np.clip(np.round(piece / scale), low, high) * scale - piece).sum(axis=0)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best


def nearest(weight: Floats, bits: Bits = 8, block: int | None = None, *, clip: bool = True) -> Quantized:
    """Round to nearest, with scales that may clip."""
    return round_to(weight, scales_of(weight, bits, block, clip=clip), bits, block)


def gptq(
    weight: Floats,
    moments: npt.NDArray[np.float64],
    bits: Bits = 4,
    block: int | None = 32,
    *,
    damping: float = 0.01,
) -> Quantized:
    """Rounds one input after the other and lets those that follow make up for its error (GPTQ, Frantar et al. 2023).

    Args:
        weight: `[k, n]`.
        moments: `[k, k]`, the mean of x x^T of what the weight multiplies.
        damping: added to the diagonal, as a share of its mean.

    Inputs go in their own order, so that blocks stay whole; the scales of a block are set when its turn comes, on
    what the errors before it have made of it.
    """
    rest = weight.astype(np.float64)
    k = len(rest)
    low, high = limits(bits)
    dead = np.diag(moments) <= 0
    h = moments + np.eye(k) * damping * max(float(np.diag(moments).mean()), 1e-30)
    h[dead, dead] = max(float(np.diag(h).max()), 1.0)
    # Upper Cholesky factor of the inverse: row i holds how an error of input i is best spread over those after it.
    factor = np.linalg.cholesky(np.linalg.inv(h)).T
    size = block or k
    values = np.zeros(weight.shape, np.int8)
    scales: list[Floats] = []
    for start in range(0, k, size):
        end = min(start + size, k)
        scale = _column_scales(rest[start:end].astype(np.float32), bits, True)
        scales.append(scale)
        for inner in range(start, end, 64):
            stop = min(inner + 64, end)
            errors = np.zeros((stop - inner, rest.shape[1]))
            for i in range(inner, stop):
                row = np.clip(np.round(rest[i] / scale), low, high)
                values[i] = row.astype(np.int8)
                errors[i - inner] = (rest[i] - row * scale) / factor[i, i]
                rest[i:stop] -= np.outer(factor[i, i:stop], errors[i - inner])
            rest[stop:] -= factor[inner:stop, stop:].T @ errors
    return Quantized(values, np.stack(scales), bits, block)
