"""Options of `bench`: the command line and the documentation derive from these fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator


class BenchOptions(BaseModel):
    """What is timed, how often, and at what load."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_tokens: int = Field(default=128, ge=1, description="Tokens of a prompt.")
    decode_tokens: int = Field(default=16, ge=1, description="Tokens to write after it, in each round.")
    batch: int = Field(default=1, ge=1, description="Prompts at once, without --load.")
    rounds: int = Field(default=20, ge=5, description="Rounds in which A and B take turns.")
    threads: int | None = Field(
        default=None, ge=1, description="Worker threads of ONNX Runtime. By default its own choice."
    )
    margin: float = Field(
        default=0.02, ge=0, lt=1, description="A difference smaller than this is called none, however sure."
    )
    seed: int = Field(default=0, ge=0, description="Draws prompts, arrivals and the samples of intervals.")
    load: bool = Field(default=False, description="Also start a server of each and measure both under load.")
    rates: tuple[float, ...] = Field(
        default=(),
        description="Requests per second to offer, comma-separated. By default they rise by half until both servers "
        "are saturated.",
        json_schema_extra={"metavar": "N"},
    )
    seconds: float = Field(default=20.0, gt=0, description="How long each load is offered.")
    slots: int = Field(default=8, ge=1, description="Requests that each server decodes together.")
    data: Path | None = Field(
        default=None,
        description="A text, samples or images to measure the quality of both on, as eval does.",
        json_schema_extra={"metavar": "PATH"},
    )
    tokenizer: Path | None = Field(
        default=None,
        description="tokenizer.json for a text. By default the one beside A or B.",
        json_schema_extra={"metavar": "PATH"},
    )
    tokens: int = Field(default=4096, ge=2, description="Use at most this many tokens of --data.")

    @field_validator("rates", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        """Repeated, or comma-separated."""
        texts = value if isinstance(value, tuple | list) else (value,)
        return tuple(part for text in texts for part in str(text).split(","))

    @field_validator("rates")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not rate > 0 for rate in value):
            raise ValueError("rates must be above 0")
        return tuple(sorted(value))
