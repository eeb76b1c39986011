"""What becomes of each place: the schemes, and one decision per place."""

from __future__ import annotations

import dataclasses
from typing import Literal

from onnx_autoglm.quantization.places import Place
from onnx_autoglm.quantization.weights import Quantized

Scheme = Literal["w8a8", "w8", "w4", "fp8", "float"]
Target = Literal["tensorrt", "cpu"]
FILES: dict[Target, str] = {"tensorrt": "model.trt.onnx", "cpu": "model.cpu.onnx"}


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """How one place computes.

    `weight` holds the integers unless the scheme is `float`; `reason` says why the place computes less in integers
    than was asked for.
    """

    place: Place
    scheme: Scheme
    weight: Quantized | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Range:
    """The threshold of one activation, and which calibrator proposed it."""

    threshold: float
    calibrator: str
    error: float = 0.0
