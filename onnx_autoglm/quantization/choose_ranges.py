"""Chooses how far the range of each activation reaches: by the error of what reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnx_autoglm.quantization.calibrate import Recording
from onnx_autoglm.quantization.histogram import Histogram
from onnx_autoglm.quantization.output_error import OUTPUTS, OutputError, weight_of
from onnx_autoglm.quantization.places import Place
from onnx_autoglm.quantization.ranges import candidates, mse
from onnx_autoglm.quantization.schemes import Range

_NEAR = (0.5, 0.6, 0.7, 0.8, 0.9, 1.15, 1.3)  # times the best that was proposed


def choose_ranges(
    model: ir.Model,
    places: Sequence[Place],
    recordings: Mapping[str, Recording],
    calibrator: str = "auto",
    step: Callable[[str], None] = lambda _: None,
) -> dict[str, Range]:
    """A range for every activation that is not zero everywhere, by name.

    Args:
        calibrator: `auto` takes what leaves the least error at the outputs of the products that read the activation, on
            sampled rows, and refines it; a name (min-max, mse, entropy, percentile) takes that one.
    """
    readers: dict[str, list[Place]] = {}
    for place in places:
        readers.setdefault(place.activation, []).append(place)
    found = {}
    for number, (name, own) in enumerate(readers.items(), 1):
        step(f"choose ranges {number} of {len(readers)}")
        recording = recordings[name]
        if recording.histogram.largest > 0:
            found[name] = _choose(model, own, recording, calibrator)
    return found


def range_of(histogram: Histogram, calibrator: str) -> Range:
    """The range of a value that no product reads; `auto` is mse."""
    if calibrator == "auto":
        return Range(mse(histogram), "mse")
    return _named(candidates(histogram), calibrator)


def _named(proposed: Mapping[str, float], calibrator: str) -> Range:
    name = "percentile 99.99" if calibrator == "percentile" else calibrator
    return Range(proposed[name], name)


def _choose(
    model: ir.Model,
    places: Sequence[Place],
    recording: Recording,
    calibrator: str,
) -> Range:
    proposed = candidates(recording.histogram)
    errors_of = [
        OutputError(recording.of(place).rows, weight_of(model, place, OUTPUTS))
        for place in places
        if len(recording.of(place).rows)
    ]
    if not errors_of:
        return range_of(recording.histogram, calibrator)

    def error(threshold: float) -> float:
        return float(np.mean([of(threshold) for of in errors_of]))

    if calibrator != "auto":
        named = _named(proposed, calibrator)
        return Range(named.threshold, named.calibrator, error(named.threshold))
    errors = {name: error(threshold) for name, threshold in proposed.items()}
    best = min(errors, key=lambda name: errors[name])
    middle, least, source = proposed[best], errors[best], best
    best_range = Range(middle, source, least)
    for ratio in _NEAR:
        threshold = min(middle * ratio, recording.histogram.largest)
        tried = error(threshold)
        if tried < best_range.error:
            best_range = Range(threshold, "output error", tried)
    return best_range
