"""All options of `convert`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from onnx_autoglm.options import DataOptions
from onnx_autoglm.precision_options import PrecisionOptions


class ConvertOptions(BaseModel):
    """Everything that `convert` can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: PrecisionOptions = PrecisionOptions()
    data: DataOptions = DataOptions()
    external_data: bool | None = Field(
        default=None,
        description="Write weights to model.onnx.data. By default above 1 GB, or when the source has such a file.",
    )
