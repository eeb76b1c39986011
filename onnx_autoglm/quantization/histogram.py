"""Streaming histograms of what an activation holds: mergeable, of bounded memory, for any shape."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

BINS = 8192  # fine enough for the few activations that are hundreds of times larger than the rest
_SMALLEST = 2.0**-100


class Histogram:
    """Counts of |x| in `BINS` equal bins from 0 to a power of two that grows with the data.

    Where a larger number arrives the range doubles and bins merge in exact pairs, so that the order in which data
    is added, or histograms are merged, does not matter.
    """

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.exponent: int | None = None  # the range is 2**exponent
        self.low = math.inf
        self.high = -math.inf

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def largest(self) -> float:
        """max |x|."""
        return max(abs(self.low), abs(self.high)) if self.total else 0.0

    @property
    def width(self) -> float:
        """The width of a bin."""
        return 0.0 if self.exponent is None else 2.0**self.exponent / BINS

    def add(self, array: np.ndarray) -> None:
        """Counts all entries. The array is finite."""
        if not array.size:
            return
        self.low, self.high = min(self.low, float(array.min())), max(self.high, float(array.max()))
        self._grow(_exponent(self.largest_of(array)))
        sizes = np.abs(array.reshape(-1)).astype(np.float32, copy=False)
        bins = (sizes * np.float32(1 / self.width)).astype(np.int32)
        self.counts += np.bincount(np.minimum(bins, BINS - 1), minlength=BINS)

    @staticmethod
    def largest_of(array: np.ndarray) -> float:
        return max(abs(float(array.min())), abs(float(array.max())))

    def merge(self, other: Histogram) -> None:
        """Adds what another histogram has counted, which stays as it is."""
        if other.exponent is None:
            return
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self._grow(other.exponent)
        assert self.exponent is not None
        self.counts += _coarser(other.counts, self.exponent - other.exponent)

    def _grow(self, exponent: int) -> None:
        if self.exponent is None:
            self.exponent = exponent
        elif exponent > self.exponent:
            self.counts = _coarser(self.counts, exponent - self.exponent)
            self.exponent = exponent


def _exponent(largest: float) -> int:
    """The least power of two that is larger."""
    return math.frexp(max(largest, _SMALLEST))[1]


def _coarser(counts: npt.NDArray[np.int64], doublings: int) -> npt.NDArray[np.int64]:
    """The counts over a range doubled so many times."""
    for _ in range(min(doublings, 64)):
        merged = counts.reshape(-1, 2).sum(axis=1)
        counts = np.concatenate([merged, np.zeros(BINS - len(merged), np.int64)])
    return counts
