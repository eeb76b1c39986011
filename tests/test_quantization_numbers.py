"""Histograms, ranges and integer weights: plain numbers, no graphs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_autoglm.quantization.histogram import BINS, Histogram
from onnx_autoglm.quantization.output_error import OutputError
from onnx_autoglm.quantization.ranges import candidates, entropy, min_max, mse, percentile
from onnx_autoglm.quantization.weights import gptq, limits, nearest, round_to, scales_of


def histogram(*arrays: np.ndarray) -> Histogram:
    result = Histogram()
    for array in arrays:
        result.add(array)
    return result


@given(st.integers(0, 10_000), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
@settings(max_examples=50, deadline=None)
def test_a_histogram_does_not_depend_on_the_order_of_its_data(seed: int, first: float, second: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=300).astype(np.float32) * np.float32(size) for size in (first, second))
    forward, backward, merged = histogram(a, b), histogram(b, a), histogram(a)
    merged.merge(histogram(b))
    for other in (backward, merged):
        assert other.exponent == forward.exponent
        assert (other.counts == forward.counts).all() and other.largest == forward.largest
    assert forward.total == 600 and len(forward.counts) == BINS


def test_an_empty_histogram_merges() -> None:
    full = histogram(np.arange(10, dtype=np.float32))
    full.merge(Histogram())
    assert full.total == 10 and full.largest == 9


def test_ranges_of_a_normal_distribution_with_outliers() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=100_000).astype(np.float32)
    rows[:3] = 400.0
    found = histogram(rows)
    assert min_max(found) == 400
    assert 3 < percentile(found, 99.9) < 3.6
    # Clipping three numbers costs less than a hundred times coarser steps for all the others only if they are few.
    step = mse(found) / 127
    error = np.square(rows - np.clip(np.round(rows / step), -127, 127) * step).mean()
    for other in (min_max(found), percentile(found, 99.99)):
        own = other / 127
        assert error <= np.square(rows - np.clip(np.round(rows / own), -127, 127) * own).mean() * 1.02
    assert entropy(found) < 400
    assert set(candidates(found)) == {
        "min-max",
        "mse",
        "entropy",
        "percentile 99.9",
        "percentile 99.99",
        "percentile 99.999",
    }


def test_entropy_keeps_a_uniform_distribution_whole() -> None:
    rows = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    assert entropy(histogram(rows)) > 0.98


@pytest.mark.parametrize(("bits", "block"), [(8, None), (4, 32), (4, 16), (8, 32)])
def test_rounding_is_within_half_a_step_and_clipping_never_worse(bits: int, block: int | None) -> None:
    weight = np.random.default_rng(0).normal(size=(72, 20)).astype(np.float32)
    plain, clipped = (nearest(weight, bits, block, clip=clip) for clip in (False, True))  # type: ignore[arg-type]
    low, high = limits(bits)  # type: ignore[arg-type]
    assert plain.values.min() >= low and plain.values.max() <= high
    spread = np.repeat(plain.scales, block or 72, axis=0)[:72]
    assert (np.abs(plain.floats() - weight) <= spread * 0.5001).all()
    assert np.square(clipped.floats() - weight).sum() <= np.square(plain.floats() - weight).sum()
    assert clipped.scales.shape == ((72 + (block or 72) - 1) // (block or 72), 20)


def test_a_column_of_zeros_has_a_scale() -> None:
    weight = np.zeros((32, 2), np.float32)
    weight[:, 1] = 1
    assert (scales_of(weight, 8) > 0).all() and np.isfinite(nearest(weight).floats()).all()


@pytest.mark.parametrize("block", [None, 32])
def test_gptq_leaves_less_error_at_the_output_than_rounding(block: int | None) -> None:
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(64, 64)).astype(np.float32)
    rows = rng.normal(size=(2000, 64)).astype(np.float32) @ mixing
    weight = rng.normal(size=(64, 24)).astype(np.float32)
    moments = rows.T.astype(np.float64) @ rows / len(rows)
    exact = rows @ weight
    errors = [
        np.square(rows @ held.floats() - exact).sum()
        for held in (gptq(weight, moments, 4, block), nearest(weight, 4, block))
    ]
    assert errors[0] < 0.6 * errors[1]


def test_gptq_takes_inputs_that_are_always_zero() -> None:
    rows = np.random.default_rng(0).normal(size=(100, 32)).astype(np.float32)
    rows[:, 5] = 0
    weight = np.ones((32, 16), np.float32)
    held = gptq(weight, (rows.T @ rows / 100).astype(np.float64), 4, None)
    assert np.isfinite(held.floats()).all()


def test_the_output_error_is_that_of_the_integers() -> None:
    rng = np.random.default_rng(0)
    rows, weight = rng.normal(size=(50, 16)).astype(np.float32), rng.normal(size=(16, 8)).astype(np.float32)
    held = round_to(weight, scales_of(weight, 8), 8)
    scale = 3 / 127
    integers = np.clip(np.round(rows / scale), -128, 127)
    error = rows @ weight - (integers @ held.values.astype(np.float64)) * scale * held.scales
    expected = (np.square(error).sum(axis=1) / np.square(rows @ weight).sum(axis=1)).mean()
    assert OutputError(rows, weight, held)(3.0) == pytest.approx(expected, rel=0.02)
    assert OutputError(rows, weight)(None) == 0
