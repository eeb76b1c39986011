"""Options of `quantize`, and of the quantize stage of `optimize`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from onnx_autoglm.units import fraction_of
from onnx_autoglm.validation import flag_of

Limit = Annotated[float, BeforeValidator(fraction_of), Field(gt=0)]


class QuantizationOptions(BaseModel):
    """Integers instead of floating point: where, how far, for which runtime."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: Literal["auto", "w8a8", "w8", "w4", "fp8", "none"] = Field(
        default="auto",
        description="w8a8: 8-bit weights and activations, with the products that are too sensitive for it falling back "
        "to 8-bit weights alone or to floating point until the limit of loss holds. w8, w4: weights alone, per channel, "
        "or in 4 bits per block. fp8: E4M3 weights and activations, for TensorRT. auto: the fastest of w8a8 and w8, by "
        "measured time, within the limit. none: nothing.",
        json_schema_extra=flag_of("--quantize"),
    )
    target: Literal["all", "cpu", "tensorrt"] = Field(
        default="all",
        description="What to write: model.cpu.onnx for ONNX Runtime, model.trt.onnx for TensorRT, or both. They compute "
        "the same.",
    )
    max_loss: Limit = Field(
        default=0.02,
        description="The most that quality may fall by quantizing: of perplexity, or of top-1.",
        json_schema_extra=flag_of("--max-loss", "FRACTION"),
    )
    calibrator: Literal["auto", "min-max", "percentile", "mse", "entropy"] = Field(
        default="auto",
        description="How far the range of an activation reaches. auto takes, for each, what leaves the least error at "
        "the outputs of the products that read it.",
    )
    smooth: bool = Field(
        default=True,
        description="Move the size of large activation columns into weights first (SmoothQuant), folded into constants, "
        "with the strength searched for each.",
        json_schema_extra=flag_of("--smooth"),
    )
    rounding: Literal["gptq", "nearest"] = Field(
        default="gptq",
        description="How weights are rounded: gptq lets later inputs make up for the error of earlier ones, nearest "
        "looks at weights alone.",
    )
    block: int = Field(
        default=32,
        ge=16,
        le=256,
        description="Inputs per scale of 4-bit weights: 16, 32, 64, 128 or 256.",
    )

    embedding: Literal["int8", "float"] = Field(
        default="int8",
        description="How tables are stored that rows are looked up in: 8 bits with a scale per row (shared with the "
        "output layer, where both are one table), or as they are.",
    )
    keep_float: tuple[str, ...] = Field(
        default=(),
        description="Leave products alone whose node, or the layer it belongs to, matches one of these globs.",
        json_schema_extra=flag_of("--keep-float", "GLOB"),
    )
    regime: Literal["both", "prefill", "decode"] = Field(
        default="both",
        description="What is to be fast: a prompt, one token after the other, or both alike.",
        json_schema_extra=flag_of("--quantize-regime"),
    )
    strict: bool = Field(
        default=False,
        description="Make it an error if ONNX Runtime computes in floating point what was promised in integers.",
    )

    @field_validator("block")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"{value} is no power of two: take 16, 32, 64, 128 or 256")
        return value


class QuantizationStage(QuantizationOptions):
    """The same as a stage of `optimize`, where it is off unless asked for."""

    scheme: Literal["auto", "w8a8", "w8", "w4", "fp8", "none"] = Field(
        default="none",
        description="Quantize the result too: see onnx-autoglm quantize --help.",
        json_schema_extra=flag_of("--quantize"),
    )
    max_loss: Limit = Field(
        default=0.02,
        description="The most that quality may fall by quantizing, beyond pruning.",
        json_schema_extra=flag_of("--quantize-loss", "FRACTION"),
    )
