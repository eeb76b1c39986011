"""How far an 8-bit range of an activation reaches, from its histogram.

All are symmetric: numbers beyond the threshold T are clipped, and 127 steps lie between 0 and T.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from onnx_autoglm.quantization.histogram import BINS, Histogram

LEVELS = 127
PERCENTILES = (99.9, 99.99, 99.999)
_RATIOS = np.geomspace(0.01, 1.0, 80)

Calibrator = Callable[[Histogram], float]


def min_max(histogram: Histogram) -> float:
    """The largest |x|."""
    return histogram.largest


def percentile(histogram: Histogram, percent: float = 99.99) -> float:
    """The least bin border below which so many percent of all |x| lie."""
    reached = np.cumsum(histogram.counts)
    index = int(np.searchsorted(reached, percent / 100 * reached[-1]))
    return min((index + 1) * histogram.width, histogram.largest)


def mse(histogram: Histogram) -> float:
    """The threshold with the least mean squared error of rounding and clipping."""
    centres = (np.arange(BINS) + 0.5) * histogram.width
    best, least = histogram.largest, np.inf
    for ratio in _RATIOS:
        threshold = ratio * histogram.largest
        step = threshold / LEVELS
        if step <= 0:
            continue
        # Within a bin wider than a step, rounding leaves step^2/12 whatever its centre.
        rounded = np.minimum(np.round(centres / step), LEVELS) * step
        squares = np.where(
            (centres <= threshold) & (histogram.width > step), step * step / 12, np.square(centres - rounded)
        )
        error = float((histogram.counts * squares).sum())
        if error < least:
            best, least = threshold, error
    return best


def entropy(histogram: Histogram) -> float:
    """The threshold whose 128 levels lose the least information: KL divergence, after NVIDIA's calibrator.

    For every candidate of at least 128 bins, P is the clipped distribution, and Q the same merged to 128
    levels and spread again over the bins of P that hold something.
    """
    counts = histogram.counts.astype(np.float64)
    used = int(np.nonzero(counts)[0].max()) + 1 if counts.any() else 0
    best, least = histogram.largest, np.inf
    for bins in range(LEVELS + 1, used + 1, 16):
        p = counts[:bins].copy()
        p[-1] += counts[bins:].sum()
        q = _merged(counts[:bins])
        divergence = _divergence(p, q)
        if divergence < least:
            best, least = (bins + 0.5) * histogram.width, divergence
    return min(best, histogram.largest)


def _merged(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The counts on 128 levels, spread over the bins that hold something."""
    group = np.arange(len(counts)) * (LEVELS + 1) // len(counts)
    held = counts > 0
    sums = np.bincount(group, counts, LEVELS + 1)
    filled = np.bincount(group, held, LEVELS + 1)
    return np.where(held, sums[group] / np.maximum(filled[group], 1), 0.0)


def _divergence(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    """KL(P || Q) in nats, with zeros smoothed."""
    tiny = 1e-4
    p, q = (np.where(row > 0, row, tiny) for row in (p, q))
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


def candidates(histogram: Histogram) -> dict[str, float]:
    """Thresholds by the name of what proposes them, without repetition; min-max first."""
    found = {"min-max": min_max(histogram), "mse": mse(histogram), "entropy": entropy(histogram)}
    for percent in PERCENTILES:
        found[f"percentile {percent:g}"] = percentile(histogram, percent)
    return {name: value for name, value in found.items() if value > 0}


def mse_of_rows(rows: npt.NDArray[np.float32]) -> float:
    """`mse` of the entries of sampled rows."""
    histogram = Histogram()
    histogram.add(rows)
    return max(mse(histogram), 1e-12)
