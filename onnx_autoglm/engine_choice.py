"""Whether `optimize` ends in an engine: the section `engine` of its options."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from onnx_autoglm.errors import UserError


class EngineChoice(BaseModel):
    """What to build behind the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    build: Literal["none", "auto", "tensorrt", "rtx"] = Field(
        default="none",
        description="Also build model.engine with TensorRT or TensorRT-RTX (auto: what is installed). Where that is "
        "not possible, engine.json and build_engine.sh are written, which build it elsewhere.",
        json_schema_extra={"flag": "--engine", "metavar": None},
    )
    options: tuple[str, ...] = Field(
        default=(),
        description="An option of build for that engine, without dashes, for example past=1:512:4096. Repeatable.",
        json_schema_extra={"flag": "--engine-option", "metavar": "NAME=VALUE"},
    )

    @field_validator("options", mode="before")
    @classmethod
    def _as_settings(cls, value: Any) -> Any:
        """One text, several, or (in YAML and Python) a mapping."""
        if isinstance(value, dict):
            return tuple(
                f"{name}={str(v).lower() if isinstance(v, bool) else v}" for name, v in value.items()
            )
        return (value,) if isinstance(value, str) else value

    @field_validator("options")
    @classmethod
    def _are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from onnx_autoglm.engine_options import engine_options, parse_settings

        try:
            given = parse_settings(value)
            if "backend" in given:
                raise UserError("the backend is the value of --engine")
            engine_options(given)
        except UserError as error:
            raise ValueError(str(error)) from error
        return value
