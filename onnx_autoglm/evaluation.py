"""`eval`: the quality of a model on data, alone or beside a reference."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnx_autoglm import modelfile
from onnx_autoglm.continuations import (
    TextScores,
    continue_prompts,
    cut_prompts,
    require_libraries,
    score_texts,
)
from onnx_autoglm.data import Dataset, load_dataset, refuse_idle_preprocess
from onnx_autoglm.data_text import feeds_for, open_tokenizer
from onnx_autoglm.errors import UserError
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.plan import sha256
from onnx_autoglm.quality import ClassQuality, Quality, TextQuality, compare, measure
from onnx_autoglm.report import finite
from onnx_autoglm.summary import versions

if TYPE_CHECKING:
    from rich.console import Console

FORMAT, VERSION = "onnx-autoglm/evaluation", 1


@dataclasses.dataclass
class Evaluation:
    """What `eval` measured.

    `quality` and `reference_quality` are perplexity and accuracy, or top-1 and top-5 (None without labels).
    `ratio`, `agreement` and `kl` (nats per position) are there with a reference. `continuations` has BLEU-4 and
    ROUGE-L against the `text`, of the model and of the reference, and of the model against the reference.
    """

    model: dict[str, str]
    reference: dict[str, str] | None
    data: dict[str, Any]
    metric: str
    quality: Quality | None
    reference_quality: Quality | None
    ratio: float | None
    agreement: float | None
    kl: float | None
    continuations: dict[str, Any] | None
    options: dict[str, Any]
    versions: dict[str, str]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        data: dict[str, Any] = finite(dataclasses.asdict(self))
        return {"format": FORMAT, "version": VERSION, **data}

    def print(self, console: Console) -> None:
        """Writes a table: one column for the model and one for the reference."""
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column(f"on {self.data['name']}")
        for name in ("model", "reference") if self.reference else ("model",):
            table.add_column(name, justify="right")
        own, other = _shown(self.quality), _shown(self.reference_quality)
        for name in own:
            table.add_row(name, own[name], *([other[name]] if self.reference else []))
        if table.row_count:
            console.print(table)
        if self.agreement is not None:
            ratio = "" if self.quality is None else f"; {self.metric} ratio {self.ratio:.3f}"
            console.print(
                f"agrees with the reference on {self.agreement:.1%}, KL {self.kl:.4f} nats{ratio}",
                highlight=False,
            )
        for name, scores in (self.continuations or {}).get("scores", {}).items():
            console.print(
                f"{name.replace('_', ' ')}: BLEU-4 {scores['bleu']:.1f}, ROUGE-L {scores['rouge_l']:.1f}",
                highlight=False,
            )


def _shown(quality: Quality | None) -> dict[str, str]:
    if isinstance(quality, TextQuality):
        return {
            "perplexity": f"{quality.perplexity:.2f}",
            "next token right": f"{quality.accuracy:.1%}",
            "tokens": f"{quality.tokens:,}",
        }
    if isinstance(quality, ClassQuality):
        return {
            "top-1": f"{quality.top1:.1%}",
            "top-5": f"{quality.top5:.1%}",
            "samples": f"{quality.samples:,}",
        }
    return {}


def evaluate(
    model: Path | str,
    data: Path | str,
    *,
    reference: Path | str | None = None,
    tokenizer: Path | str | None = None,
    preprocess: str | None = None,
    tokens: int = 16384,
    window: int = 512,
    generate: int | None = None,
    prompts: int = 16,
    progress: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Measures a model on data: perplexity on a text, top-1 and top-5 on labelled samples.

    Nothing is written, and scores are not kept: both models run side by side, window by window.

    Args:
        model: the ONNX file.
        data: a text, samples or images, as `optimize --eval` takes them.
        reference: another ONNX file (the source of a pruned one), to measure agreement and KL(reference || model).
        tokenizer: `tokenizer.json` for texts; by default the one beside the model, or beside the reference.
        preprocess: how images become inputs.
        tokens: at most this many tokens of a text.
        window: tokens per run.
        generate: also continue prompts from the text by this many tokens, and score that (BLEU-4, ROUGE-L).
        prompts: continue at most this many.
        progress: told which step runs.

    Raises:
        UserError: something the user can mend.
    """
    started = time.perf_counter()
    source = Path(data)
    _refuse_numbers(tokens, window, generate, prompts)
    if generate is not None:
        require_libraries()
    progress("open")
    refuse_idle_preprocess(preprocess, [source])
    own = canonicalize(modelfile.open_model(model))
    other = None if reference is None else canonicalize(modelfile.open_model(reference))
    words = _tokenizer(tokenizer, [model, *([] if reference is None else [reference])])
    dataset = load_dataset(source, own, tokenizer=words, window=window, limit=tokens, preprocess=preprocess)
    texts = None if generate is None else _cut(dataset, generate, prompts)
    outcome, quality = None, None
    if other is None:
        quality = measure(own, dataset, progress)
    else:
        outcome = compare(other, own, dataset, reference_feeds=feeds_for(dataset, other), step=progress)
        quality = outcome.model
    continuations = None
    if texts is not None:
        assert words is not None
        continuations = _continue(own, other, texts, words, progress)
    return Evaluation(
        model=_described(Path(model)),
        reference=None if reference is None else _described(Path(reference)),
        data={"name": dataset.name, "sha256": dataset.sha256, "rows": dataset.rows},
        metric=dataset.metric,
        quality=quality,
        reference_quality=outcome.reference if outcome else None,
        ratio=outcome.ratio if outcome else None,
        agreement=outcome.agreement if outcome else None,
        kl=outcome.kl if outcome else None,
        continuations=continuations,
        options={
            "tokens": tokens,
            "window": window,
            "preprocess": preprocess,
            "generate": generate,
            "prompts": prompts,
        },
        versions=versions(),
        seconds=round(time.perf_counter() - started, 3),
    )


def _refuse_numbers(tokens: int, window: int, generate: int | None, prompts: int) -> None:
    for name, value, least in (
        ("tokens", tokens, 2),
        ("window", window, 2),
        ("generate", generate, 1),
        ("prompts", prompts, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"--{name} {value} is too small: the least is {least}")


def _tokenizer(given: Path | str | None, models: list[Path | str]) -> Path | None:
    if given is not None:
        return Path(given)
    beside = [Path(model).with_name("tokenizer.json") for model in models]
    return next((path for path in beside if path.is_file()), None)


def _described(path: Path) -> dict[str, str]:
    return {"file": str(path), "sha256": sha256(path)}


@dataclasses.dataclass(frozen=True)
class _Texts:
    """Prompts `[texts, half]` and their true continuations `[texts, tokens]`."""

    prompts: Any
    truth: Any


def _cut(data: Dataset, tokens: int, limit: int) -> _Texts:
    if data.metric != "perplexity":
        raise UserError(f"--generate continues texts, and {data.name} is none: pass a text with --data")
    return _Texts(*cut_prompts([feed[data.token_input or ""] for feed in data], tokens, limit))


def _continue(
    model: ir.Model,
    reference: ir.Model | None,
    texts: _Texts,
    tokenizer: Path,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Scores of the continuations, and how many there are of what length."""
    decode = open_tokenizer(tokenizer).decode_batch
    count, length = texts.truth.shape
    truth = decode(texts.truth.tolist())
    progress(f"continue {count} prompts by {length} tokens")
    written = decode(continue_prompts(model, texts.prompts, length).tolist())
    scores: dict[str, TextScores] = {"model_against_text": score_texts(written, truth)}
    if reference is not None:
        progress(f"continue {count} prompts by {length} tokens, with the reference")
        other = decode(continue_prompts(reference, texts.prompts, length).tolist())
        scores["reference_against_text"] = score_texts(other, truth)
        scores["model_against_reference"] = score_texts(written, other)
    return {
        "prompts": count,
        "prompt_tokens": int(texts.prompts.shape[1]),
        "tokens": length,
        "scores": {name: dataclasses.asdict(one) for name, one in scores.items()},
    }
