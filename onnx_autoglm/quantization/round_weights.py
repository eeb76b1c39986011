"""Rounds the weights of all places, one after the other, into files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnx_autoglm.quantization.calibrate import Recording
from onnx_autoglm.quantization.output_error import weight_of
from onnx_autoglm.quantization.places import Place
from onnx_autoglm.quantization.ranges import LEVELS
from onnx_autoglm.quantization.schemes import Range
from onnx_autoglm.quantization.stored import Shelf
from onnx_autoglm.quantization.weights import Bits, Quantized, gptq, nearest, round_to


def round_weights(
    model: ir.Model,
    places: Sequence[Place],
    recordings: Mapping[str, Recording],
    ranges: Mapping[str, Range],
    shelf: Shelf,
    blocks: Mapping[str, int],
    rounding: str,
    step: Callable[[str], None] = lambda _: None,
) -> dict[str, Quantized]:
    """Integers for the weight of every place, by initializer: 8 bits per channel, or 4 bits per block where `blocks` has
    the size of one.

    GPTQ is used where second moments were recorded and one place alone reads the weight; the rounding noise of the
    activation, s^2/12, is added to them. Elsewhere weights are rounded to nearest.
    """
    readers = Counter(place.initializer for place in places)
    found: dict[str, Quantized] = {}
    for number, place in enumerate(places, 1):
        if place.initializer in found:
            continue
        step(f"round weights {number} of {len(places)}")
        weight = weight_of(model, place)
        recording = recordings.get(place.activation)
        moments = None if recording is None else recording.of(place).moments
        whole = blocks.get(place.initializer)
        bits: Bits = 8 if whole is None else 4
        if rounding == "gptq" and moments is not None and readers[place.initializer] == 1:
            noisy = np.array(moments)
            if place.activation in ranges:
                noise = (ranges[place.activation].threshold / LEVELS) ** 2 / 12
                noisy[np.diag_indices_from(noisy)] += noise
            quantized = gptq(weight, noisy, bits, whole)
        else:
            quantized = nearest(weight, bits, whole)
        found[place.initializer] = shelf.put(_storable(quantized, weight, model, place))
    return found


def _storable(quantized: Quantized, weight: np.ndarray, model: ir.Model, place: Place) -> Quantized:
    """With scales that are not zero in the type of the graph."""
    tensor = model.graph.initializers[place.initializer].const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT16:
        return quantized
    least = np.float32(np.finfo(np.float16).tiny)
    if (quantized.scales >= least).all():
        return quantized
    return round_to(weight, np.maximum(quantized.scales, least), quantized.bits, quantized.block)
