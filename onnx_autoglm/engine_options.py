"""The options of `build`, and of the engine stage of `optimize`.

As in `onnx_autoglm.options`, command line and documentation derive from the fields.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from onnx_autoglm.errors import UserError
from onnx_autoglm.options import flags
from onnx_autoglm.units import bytes_of
from onnx_autoglm.validation import flag_of


@dataclasses.dataclass(frozen=True)
class Range:
    """The sizes of an axis that an engine takes, and the one that it is tuned for."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max:
            raise ValueError(f"{self}: the sizes must rise, as in 1:128:2048 (min:opt:max)")

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    def __iter__(self) -> Any:
        return iter((self.min, self.opt, self.max))


def range_of(value: Any) -> Any:
    """`1:128:2048` (min:opt:max), or one number for all three. Raises ValueError."""
    if isinstance(value, Range):
        return value
    if isinstance(value, dict):
        return Range(**value)
    words = [str(word) for word in value] if isinstance(value, list | tuple) else str(value).split(":")
    if not all(re.fullmatch(r"\s*\d+\s*", word) for word in words) or len(words) not in (1, 3):
        raise ValueError(f"{value!r}: write MIN:OPT:MAX, as in 1:128:2048, or one number")
    sizes = [int(word) for word in words]
    return Range(*(sizes * 3 if len(sizes) == 1 else sizes))


Sizes = Annotated[Range, BeforeValidator(range_of)]


_RANGE = "MIN:OPT:MAX"


class EngineOptions(BaseModel):
    """How an engine is built."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["auto", "tensorrt", "rtx"] = Field(
        default="auto",
        description="What builds the engine: tensorrt (10.12 or newer), rtx (TensorRT-RTX, builds without a GPU), or "
        "auto: tensorrt if it is installed, else rtx.",
    )
    batch: Sizes = Field(
        default=Range(1, 1, 8),
        description="Sizes of the batch axis (1:1:8).",
        json_schema_extra=flag_of("--batch", _RANGE),
    )
    sequence: Sizes = Field(
        default=Range(1, 128, 2048),
        description="New tokens per run (1:128:2048). In a graph with a KV cache these are the tokens of the prefill "
        "profile; the decode profile takes one.",
        json_schema_extra=flag_of("--sequence", _RANGE),
    )
    past: Sizes = Field(
        default=Range(1, 512, 2048),
        description="Tokens in the KV cache (1:512:2048). The prefill profile also takes an empty cache, and is tuned "
        "for that.",
        json_schema_extra=flag_of("--past", _RANGE),
    )
    shapes: tuple[str, ...] = Field(
        default=(),
        description="Sizes of any other symbol in the shapes of the inputs (names: the inputs' shapes), or the values "
        "of an input that holds sizes. Wins over the options above.",
        json_schema_extra=flag_of("--shape", f"NAME={_RANGE}"),
    )
    workspace: Annotated[int, BeforeValidator(bytes_of), Field(gt=0)] | None = Field(
        default=None,
        description="Device memory that layers may use as scratch space, for example 4GiB. All of it by default.",
        json_schema_extra=flag_of("--workspace", "BYTES"),
    )
    timing_cache: Path | None = Field(
        default=None,
        description="A file that keeps measured kernel times for the next build on the same device (tensorrt).",
        json_schema_extra=flag_of("--timing-cache", "FILE"),
    )
    optimization_level: int | None = Field(
        default=None, ge=0, le=5, description="How long to search for fast kernels, 0 to 5 (tensorrt)."
    )
    refit: bool = Field(default=False, description="Weights can be replaced in the finished engine.")
    strip_plan: bool = Field(
        default=False, description="Leave the weights out of the engine; they are put in by refitting."
    )
    weight_streaming: bool = Field(
        default=False, description="Weights may stay in host memory, for models too large for the device."
    )
    version_compatible: bool = Field(
        default=False, description="The engine also runs with later versions of the backend (tensorrt)."
    )
    hardware_compatible: Literal["none", "ampere-plus", "same-compute-capability"] = Field(
        default="none", description="Other GPUs that the engine also runs on (tensorrt)."
    )
    compute_capability: tuple[str, ...] = Field(
        default=(),
        description="GPUs to build for, such as 8.9 (rtx). By default the backend's own choice, which is portable.",
        json_schema_extra=flag_of("--compute-capability", "X.Y"),
    )
    prepare: bool | None = Field(
        default=None,
        description="Make the graph ready first: fold constants, remove NaN guards behind masked softmaxes and casts "
        "that cancel. On by default.",
    )

    @field_validator("shapes", "compute_capability", mode="before")
    @classmethod
    def _as_texts(cls, value: Any) -> Any:
        """Repeated, comma-separated, or (shapes, in Python) a mapping."""
        if isinstance(value, dict):
            value = [f"{name}={':'.join(map(str, range_of(size)))}" for name, size in value.items()]
        words = (value,) if isinstance(value, str) else value
        return tuple(part.strip() for word in words for part in str(word).split(",") if part.strip())

    @field_validator("shapes")
    @classmethod
    def _are_ranges(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            name, is_pair, sizes = text.rpartition("=")
            if not is_pair or not name:
                raise ValueError(f"{text!r}: write NAME={_RANGE}, as in height=224")
            range_of(sizes)
        return value

    @field_validator("compute_capability")
    @classmethod
    def _are_numbers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if not re.fullmatch(r"\d+\.\d", text):
                raise ValueError(f"{text!r}: write a compute capability as in 8.9")
        return value

    @field_validator("batch", "sequence")
    @classmethod
    def _not_empty(cls, value: Range) -> Range:
        if value.min < 1:
            raise ValueError(f"{value}: the smallest size is 1")
        return value

    @property
    def named_shapes(self) -> dict[str, Range]:
        """`shapes` by name."""
        return {name: range_of(sizes) for name, _, sizes in (text.rpartition("=") for text in self.shapes)}


def engine_options(given: dict[str, Any]) -> EngineOptions:
    """Options from keywords, named as the flags of `build`; None and () mean the default.

    Raises UserError: an unknown keyword or a value that is not allowed.
    """
    known = {flag.keyword: flag for flag in flags(EngineOptions)}
    data: dict[str, Any] = {}
    for keyword, value in given.items():
        if keyword not in known:
            raise UserError(f"unknown option {keyword!r}; options are {', '.join(known)}")
        if value is not None and value != ():
            data[known[keyword].path[-1]] = value
    try:
        return EngineOptions.model_validate(data)
    except ValidationError as error:
        names = {flag.path[-1]: flag.name for flag in known.values()}
        lines = [
            f"{names.get(str(item['loc'][0]), item['loc'][0])}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        ]
        raise UserError("\n".join(lines)) from error


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """`NAME=VALUE` texts, with the names of the flags of `build`, as keywords; repeated ones as a tuple.

    Raises UserError if a text has another form.
    """
    given: dict[str, Any] = {}
    switches = {flag.keyword for flag in flags(EngineOptions) if "bool" in str(flag.field.annotation)}
    for text in texts:
        name, is_pair, value = text.partition("=")
        keyword = name.strip().removeprefix("--").replace("-", "_")
        if keyword in switches:
            if value.strip().lower() not in ("", "true", "false"):
                raise UserError(f"{text!r}: {name} is true or false")
            given[keyword] = value.strip().lower() != "false"
        elif not is_pair:
            raise UserError(f"{text!r}: write NAME=VALUE, as in past=1:512:4096")
        elif keyword in given:
            before = given[keyword]
            given[keyword] = (*(before if isinstance(before, tuple) else (before,)), value)
        else:
            given[keyword] = value
    return given


def command_line(options: EngineOptions) -> list[str]:
    """The words of `build` that give these options; those at their default are left out."""
    words: list[str] = []
    for flag in flags(EngineOptions):
        value, default = getattr(options, flag.path[-1]), flag.field.default
        if value == default:
            continue
        if isinstance(value, bool):
            words.append(flag.name if value else f"--no-{flag.name[2:]}")
        else:
            items: Iterable[Any] = value if isinstance(value, tuple) else (value,)
            words += [word for item in items for word in (flag.name, str(item))]
    return words
