"""Options of `generate`: the command line and the documentation derive from these fields."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from onnx_autoglm.sampling import Sampling


class LanguageOptions(BaseModel):
    """What a language model needs beside its file; `serve` has the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokenizer: Path | None = Field(
        default=None,
        description="tokenizer.json. By default the one beside the model.",
        json_schema_extra={"metavar": "PATH"},
    )
    eos: tuple[str, ...] = Field(
        default=(),
        description="A token that ends a text, by number or text; repeatable. By default what generation_config.json, "
        "config.json, tokenizer_config.json or tokenizer.json beside the model says.",
        json_schema_extra={"metavar": "TOKEN"},
    )
    context: int | None = Field(
        default=None,
        ge=2,
        description="The most tokens of a prompt and its continuation together. By default what config.json says, or "
        "2048.",
    )
    threads: int | None = Field(
        default=None, ge=1, description="Worker threads of ONNX Runtime. By default its own choice."
    )


class GenerateOptions(LanguageOptions):
    """How a continuation is drawn, and when it ends."""

    max_tokens: int = Field(default=128, ge=1, description="The most tokens to write for each prompt.")
    temperature: float = Field(
        default=0.0, ge=0, description="Scores are divided by it; 0 takes the best token each time."
    )
    top_k: int = Field(default=0, ge=0, description="Draw among this many of the best tokens; 0: all.")
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Draw among the fewest tokens that have this share of probability.",
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0, description="Above 1: tokens that the text has already become less likely."
    )
    seed: int = Field(default=0, ge=0, description="The same seed draws the same text.")
    stop: tuple[str, ...] = Field(
        default=(),
        description="End a text before this; repeatable.",
        json_schema_extra={"metavar": "TEXT"},
    )
    batch: int = Field(default=8, ge=1, description="Prompts to continue at once.")

    @property
    def sampling(self) -> Sampling:
        from onnx_autoglm.sampling import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty)
