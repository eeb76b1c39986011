"""The options of a conversion to 16 bits."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class PrecisionOptions(BaseModel):
    """Which numbers the result computes with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Literal["none", "fp16", "bf16"] = Field(
        default="none",
        description="Compute in 16 bits: fp16 or bf16. Statistics of norms, positions, scores that choose experts, and "
        "whatever was measured not to fit the format stay in float32.",
    )
    io_precision: Literal["keep", "fp16", "bf16"] = Field(
        default="keep",
        description="The type of the graph's float inputs and outputs, KV caches among them; keep leaves them as they are.",
    )
    keep_logits_fp32: bool = Field(
        default=False, description="Make the scores of the model in float32, and return them so."
    )
