"""Times of two models that took turns: percentiles, and how sure their ratio is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

Verdict = Literal["B is faster", "A is faster", "no difference"]

SAMPLES = 2000  # of the bootstrap
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Times:
    """Percentiles in milliseconds, of `count` runs."""

    p50: float
    p90: float
    p99: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        p50, p90, p99 = (1000 * float(value) for value in np.percentile(seconds, (50, 90, 99)))
        return cls(p50, p90, p99, len(seconds))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as fast B is: the median over rounds, and its 95 % confidence interval."""

    median: float
    low: float
    high: float

    def verdict(self, margin: float) -> Verdict:
        """What can be said: a difference must be both sure and at least `margin`."""
        if self.low <= 1 <= self.high or abs(self.median - 1) < margin:
            return "no difference"
        return "B is faster" if self.median > 1 else "A is faster"


def paired_ratio(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Ratio:
    """The ratio of times (A over B) that were measured in the same rounds.

    The interval is the percentile bootstrap (Efron 1979) of the median over rounds: what disturbs the machine in a
    round disturbs both, and rounds are drawn whole.
    """
    ratios = np.asarray(a, np.float64) / np.asarray(b, np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(ratios), (SAMPLES, len(ratios)))
    medians = np.median(ratios[drawn], axis=1)
    low, high = np.quantile(medians, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Ratio(float(np.median(ratios)), float(low), float(high))
