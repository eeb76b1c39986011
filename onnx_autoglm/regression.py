"""Ridge regression with an intercept, from sums over a stream of rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


class Sums:
    """Counts and products of rows `x [n, k]` beside rows `e [n, m]`, each row with a weight."""

    def __init__(self, width: int, outputs: int) -> None:
        self.count = 0.0  # the sum of the weights
        self.x: Matrix = np.zeros(width)
        self.e: Matrix = np.zeros(outputs)
        self.xx: Matrix = np.zeros((width, width))
        self.xe: Matrix = np.zeros((width, outputs))
        self.ee: Matrix = np.zeros(outputs)

    def add(
        self,
        x: npt.NDArray[np.float32],
        e: npt.NDArray[np.float32],
        weights: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Adds rows; without `weights [n]` all weigh 1."""
        w = np.ones(len(x), dtype=np.float32) if weights is None else weights
        heavy = x * w[:, None]
        self.count += float(w.sum(dtype=np.float64))
        self.x += heavy.sum(axis=0, dtype=np.float64)
        self.e += (e * w[:, None]).sum(axis=0, dtype=np.float64)
        self.xx += _product(heavy, x)
        self.xe += _product(heavy, e)
        self.ee += (np.square(e, dtype=np.float64) * w[:, None]).sum(axis=0)

    def __add__(self, other: Sums) -> Sums:
        result = Sums(len(self.x), len(self.e))
        result.count = self.count + other.count
        for name in ("x", "e", "xx", "xe", "ee"):
            setattr(result, name, getattr(self, name) + getattr(other, name))
        return result

    def of_outputs(self, start: int, stop: int) -> Sums:
        """The sums of some of the outputs; those of x are shared."""
        result = Sums(0, 0)
        result.count, result.x, result.xx = self.count, self.x, self.xx
        result.e, result.ee, result.xe = self.e[start:stop], self.ee[start:stop], self.xe[:, start:stop]
        return result


def _product(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        product = left.T @ right
    if np.isfinite(product).all():
        return product
    return left.T.astype(np.float64) @ right.astype(np.float64)  # beyond float32


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """`e ~ x @ slope + shift`."""

    slope: Matrix
    shift: Matrix


def ridge(sums: Sums, strength: float | None) -> Line:
    """The line of least squares, its slope drawn to zero by `strength` times the mean variance of x.

    Without a strength the slope is zero, and the shift alone is fitted.
    """
    n = max(sums.count, 1e-30)
    mean_x, mean_e = sums.x / n, sums.e / n
    if strength is None:
        return Line(np.zeros_like(sums.xe), mean_e)
    covariance = sums.xx / n - np.outer(mean_x, mean_x)
    damping = strength * max(float(np.diag(covariance).mean()), 1e-12)
    cross = sums.xe / n - np.outer(mean_x, mean_e)
    solved = np.linalg.solve(covariance + damping * np.eye(len(covariance)), cross)
    slope = np.asarray(solved, dtype=np.float64)
    return Line(slope, mean_e - mean_x @ slope)


def error(sums: Sums, line: Line) -> float:
    """The mean over rows of the squared error that a line leaves, summed over its outputs."""
    n = max(sums.count, 1e-30)
    slope, shift = line.slope, line.shift
    squares = sums.ee.sum() + (slope * (sums.xx @ slope)).sum() + n * np.square(shift).sum()
    mixed = (slope * sums.xe).sum() + shift @ sums.e - (sums.x @ slope) @ shift
    return float(squares - 2 * mixed) / n
