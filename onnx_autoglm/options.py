"""All options of `optimize`, in one place.

The command line, the YAML configuration and the documentation derive from these models: a field's
description is its help text, its `flag` the name on the command line where that differs.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from onnx_autoglm.criterion_names import BUILT_IN, CriterionOption
from onnx_autoglm.engine_choice import EngineChoice
from onnx_autoglm.errors import UserError
from onnx_autoglm.kinds import KINDS, LOSSY
from onnx_autoglm.precision_options import PrecisionOptions
from onnx_autoglm.quantization.options import QuantizationStage
from onnx_autoglm.units import bytes_of, fraction_of, parse_fractions
from onnx_autoglm.validation import flag_of, validated

DEFAULT_FRACTION = 0.25
Model = TypeVar("Model", bound=BaseModel)


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PruningOptions(_Options):
    """What to remove and how to choose it."""

    sparsity_level: dict[str, float] | float = Field(
        default={},
        description="The fraction to remove of each kind of structure, for example query-head=0.5. Repeatable, or "
        "comma-separated. A plain number in a configuration means the usual kinds. Without it a quarter of the query heads and FFN channels goes (of the convolution "
        "channels where there are neither). Kinds: " + ", ".join(KINDS) + ".",
        json_schema_extra=flag_of("--prune", "KIND=FRACTION"),
    )
    algorithm: CriterionOption = Field(
        default="auto",
        description="How structures are scored. With calibration data: obs (the error that is left after the best "
        "refit), flap (variance times weight), wanda (size times weight), minitron (size); without: l2 or l1 (norms "
        "of all weights that go with one), or random. auto is obs with data and l2 without. MODULE:NAME is your own.",
        json_schema_extra=flag_of("--criterion", "|".join((*BUILT_IN, "MODULE:NAME"))),
    )
    swaps: int = Field(
        default=0,
        ge=0,
        description="With obs: after the choice exchange up to N kept and removed indices of each structure while "
        "that lowers the error after the best refit.",
    )
    scope: Literal["layer", "global"] = Field(
        default="layer",
        description="Remove the fraction in every layer, or overall by rank among all layers of one kind.",
    )
    normalize: Literal["none", "mean", "max", "z-score"] = Field(
        default="mean",
        description="How the scores of a layer are made comparable with those of others, in global scope.",
    )
    target_layers: tuple[str, ...] = Field(
        default=(),
        description="Prune only structures whose name matches one of these globs (names: onnx-autoglm inspect).",
        json_schema_extra=flag_of("--include", "GLOB"),
    )
    exclude_layers: tuple[str, ...] = Field(
        default=(),
        description="Leave structures alone whose name matches one of these globs.",
        json_schema_extra=flag_of("--exclude", "GLOB"),
    )
    protect_first: int = Field(
        default=0,
        ge=0,
        description="Leave the first N structures of each kind alone (a transformer layer has one of each).",
    )
    protect_last: int = Field(default=0, ge=0, description="Leave the last N structures of each kind alone.")
    min_keep: int = Field(default=1, ge=1, description="Keep at least this many in each layer (and group).")
    align: int = Field(
        default=1,
        ge=1,
        description="Keep a multiple of this many channels, at least one tile; what rounding leaves unspent is "
        "removed elsewhere. Heads, groups and experts are not aligned.",
    )
    schedule: Literal["one-shot"] = Field(default="one-shot", description="When to remove: all at once.")
    seed: int = Field(default=0, ge=0, description="Seed of the random criterion and of generated inputs.")

    @field_validator("sparsity_level", mode="before")
    @classmethod
    def _as_fractions(cls, value: Any) -> Any:
        """`KIND=FRACTION,...`, as on the command line, is as good as a mapping."""
        return parse_fractions(value) if isinstance(value, str) else value

    @field_validator("target_layers", "exclude_layers", mode="before")
    @classmethod
    def _as_globs(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("sparsity_level")
    @classmethod
    def _known_kinds(cls, value: dict[str, float] | float) -> dict[str, float] | float:
        for kind, fraction in value.items() if isinstance(value, dict) else [("all", value)]:
            if kind not in KINDS and isinstance(value, dict):
                raise ValueError(f"unknown kind {kind!r}; kinds are {', '.join(KINDS)}")
            if not 0 < fraction < 1:
                raise ValueError(f"{kind}={fraction:g}: the fraction to remove must lie between 0 and 1")
        return value


Share = Annotated[float, BeforeValidator(fraction_of), Field(gt=0, lt=1)]
Bytes = Annotated[int, BeforeValidator(bytes_of), Field(gt=0)]
Factor = Annotated[float, Field(gt=1)]
Limit = Annotated[float, BeforeValidator(fraction_of), Field(gt=0)]


class BudgetOptions(_Options):
    """A target for the whole model: structures of several kinds and layers compete for what may stay."""

    keep: Share | None = Field(
        default=None,
        description="Keep this fraction of the parameters of the kinds that compete, chosen jointly over kinds and "
        "layers by what each cut does to the outputs. Not with --prune.",
        json_schema_extra=flag_of("--keep", "FRACTION"),
    )
    flops: Share | None = Field(
        default=None,
        description="The same for the FLOPs of the whole model: 0.75 keeps three quarters.",
        json_schema_extra=flag_of("--flops", "FRACTION"),
    )
    size: Bytes | None = Field(
        default=None,
        description="The same for the bytes of all weights, for example 200MB.",
        json_schema_extra=flag_of("--size", "BYTES"),
    )
    speedup: Factor | None = Field(
        default=None,
        description="The same for time in ONNX Runtime on this machine: 1.5 is 1.5 times faster. Measured before "
        "and after; a promise that is missed by more than 5 % is an error.",
        json_schema_extra=flag_of("--speedup", "FACTOR"),
    )
    max_loss: Limit | None = Field(
        default=None,
        description="The most that quality may fall on the evaluation data, for example 2% of perplexity. Alone it "
        "sets the budget: as much goes as it allows. With another budget it is a limit, and missing it an error.",
        json_schema_extra=flag_of("--max-loss", "FRACTION"),
    )
    kinds: tuple[str, ...] = Field(
        default=(),
        description="The kinds that compete. By default query-head, ffn-channel, expert-channel and conv-channel, "
        "where they change no graph input or output.",
        json_schema_extra=flag_of("--kinds", "KIND"),
    )
    uniform: bool = Field(
        default=False,
        description="Keep the same count in every layer of a kind, for runtimes that need it.",
    )
    batch: int = Field(default=1, ge=1, description="Batch at which --speedup measures.")
    sequence: int = Field(
        default=128, ge=1, description="Tokens at which --speedup measures: of the prompt, or of the past."
    )
    regime: Literal["prefill", "decode"] = Field(
        default="prefill",
        description="What --speedup promises to speed up: a prompt, or one more token after a past (KV cache).",
    )

    @field_validator("kinds", mode="before")
    @classmethod
    def _as_kinds(cls, value: Any) -> Any:
        """Repeated, or comma-separated."""
        texts = (value,) if isinstance(value, str) else value
        return tuple(kind.strip() for text in texts for kind in str(text).split(","))

    @field_validator("kinds")
    @classmethod
    def _compete(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for kind in value:
            if kind not in KINDS:
                raise ValueError(f"unknown kind {kind!r}; kinds are {', '.join(KINDS)}")
            if kind in LOSSY or kind == "block":
                raise ValueError(f"the loss without some {kind} cannot be told beforehand: use --prune")
        return value

    @model_validator(mode="after")
    def _one_target(self) -> BudgetOptions:
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one budget, not {' and '.join(given)} (--max-loss may go with it)")
        return self

    @property
    def target(self) -> str | None:
        """Which budget is given; `max_loss` only where it stands alone."""
        return next((name for name in (*_TARGETS, "max_loss") if getattr(self, name) is not None), None)


_TARGETS = ("keep", "flops", "size", "speedup")


class DataOptions(_Options):
    """What the choice and the repair may learn from, and what quality is measured on."""

    calibration: Literal["auto", "self", "none"] | Path = Field(
        default="auto",
        description="Calibration data: a text file, .npz samples, polygraphy's .json, a folder of one of these, a "
        "folder of .npy files (one per input), or of images (never the data of --eval); self: text that the model writes "
        "itself; none. auto is self for a language model that can write, if the criterion or the repair learns from "
        "data, and none otherwise.",
        json_schema_extra=flag_of("--calib", "PATH|self|none"),
    )
    evaluation: Path | None = Field(
        default=None,
        description="Data to measure source and result on: perplexity on a text, top-1 and top-5 on samples with an "
        "array 'labels' or images in one folder per class, and on all data how often both agree. With self-written "
        "calibration text the default is more of that.",
        json_schema_extra=flag_of("--eval", "PATH"),
    )
    tokenizer: Path | None = Field(
        default=None,
        description="tokenizer.json for texts. By default the one beside the model.",
        json_schema_extra=flag_of("--tokenizer", "PATH"),
    )
    calibration_tokens: int = Field(
        default=16384,
        ge=1024,
        description="Use at most this many tokens for calibration.",
        json_schema_extra=flag_of("--calib-tokens", None),
    )
    evaluation_tokens: int = Field(
        default=16384,
        ge=2,
        description="Use at most this many tokens for evaluation.",
        json_schema_extra=flag_of("--eval-tokens", None),
    )
    window: int = Field(default=512, ge=2, description="Tokens per run of the model, for both kinds of data.")
    preprocess: str | None = Field(
        default=None,
        description="How images become the model's input: size (of the shorter side, or HxW), crop, mean and std (a "
        "number per channel, joined by colons), layout (nchw, nhwc), gray, scale (what pixels are divided by). For "
        "example size=256,crop=224,mean=0.485:0.456:0.406,std=0.229:0.224:0.225. What is left out follows from the "
        "shape of the input.",
        json_schema_extra=flag_of("--preprocess", "KEY=VALUE,..."),
    )

    @property
    def calibration_path(self) -> Path | None:
        """Where calibration data is read from, if it is."""
        return self.calibration if isinstance(self.calibration, Path) else None


TOLERANCE = 1e-4  # relative, per output: rounding of float32 through a deep network


class CheckOptions(_Options):
    """How the result is proved."""

    tolerance: float = Field(
        default=TOLERANCE,
        gt=0,
        description="The largest relative difference between masked source and pruned model that passes.",
    )
    inputs: Path | None = Field(
        default=None,
        description="Sample inputs for the proof: an .npz file with one array per graph input. Generated from "
        "the signature by default.",
        json_schema_extra=flag_of("--inputs", "FILE"),
    )


class Options(_Options):
    """Everything that `optimize` can be told."""

    pruning: PruningOptions = PruningOptions()
    budget: BudgetOptions = BudgetOptions()
    data: DataOptions = DataOptions()
    repair: Literal["auto", "affine", "bias", "none"] = Field(
        default="auto",
        description="Closed-form repair of the consumers' weights on calibration data: affine (least squares with a "
        "bias), bias (the mean of what went), none. auto is affine with data and none without.",
    )
    precision: PrecisionOptions = PrecisionOptions()
    quantization: QuantizationStage = QuantizationStage()
    check: CheckOptions = CheckOptions()

    @model_validator(mode="after")
    def _prune_or_budget(self) -> Options:
        if self.pruning.sparsity_level and self.budget.target not in (None, "max_loss"):
            raise ValueError(
                f"--prune fixes how much of each kind goes, --{self.budget.target} chooses it: give one of them"
            )
        return self

    external_data: bool | None = Field(
        default=None,
        description="Write weights to model.onnx.data. By default above 1 GB, or when the source has such a file.",
    )
    engine: EngineChoice = EngineChoice()


@dataclasses.dataclass(frozen=True)
class Flag:
    """One option as users give it: `name` on the command line and in Python, `path` in the configuration."""

    name: str
    path: tuple[str, ...]
    field: FieldInfo
    metavar: str | None

    @property
    def keyword(self) -> str:
        return self.name.removeprefix("--").replace("-", "_")


def flags(model: type[BaseModel] = Options, path: tuple[str, ...] = ()) -> Iterator[Flag]:
    """All options, in the order of their definition."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from flags(kind, (*path, name))
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        flag, metavar = extra.get("flag"), extra.get("metavar")
        yield Flag(
            flag if isinstance(flag, str) else "--" + name.replace("_", "-"),
            (*path, name),
            field,
            metavar if isinstance(metavar, str) else None,
        )


def collect(given: Mapping[str, Any], config: Path | str | None = None) -> Options:
    """The options of `optimize`, as `collect_as`."""
    return collect_as(Options, given, config)


def collect_as(model: type[Model], given: Mapping[str, Any], config: Path | str | None = None) -> Model:
    """Options from keywords (named as the flags) over a configuration file; UserError for what is not allowed."""
    known = {flag.keyword: flag for flag in flags(model)}
    data = {} if config is None else read_config(Path(config))
    for keyword, value in given.items():
        if keyword not in known:
            raise UserError(f"unknown option {keyword!r}; options are {', '.join(known)}")
        if value is None or value in ((), ""):
            continue
        *sections, name = known[keyword].path
        target = data
        for section in sections:
            inner = target.get(section) or {}
            if not isinstance(inner, dict):
                raise UserError(f"{config}: {section}: expected options below it, found {inner!r}")
            target[section] = dict(inner)
            target = target[section]
        target[name] = value
    return validated(model, data, str(config) if config else "options")


def make_options(data: dict[str, Any], where: str) -> Options:
    """Validates options. Raises UserError with one line per mistake."""
    return validated(Options, data, where)


def read_config(path: Path) -> dict[str, Any]:
    """The content of a YAML configuration file. Raises UserError if it cannot be read."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {str(error).splitlines()[0]}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected sections such as 'pruning:', found {type(data).__name__}")
    return data


def matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
