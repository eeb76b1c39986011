"""Quality of a model on data, and how near it is to a reference, in one pass over both.

Scores are looked at window by window and never kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_autoglm.data import Arrays, Dataset
from onnx_autoglm.errors import UserError
from onnx_autoglm.runtime import Session
from onnx_autoglm.scores import ScoreOutput, any_scores, class_scores, log_probabilities, token_scores
from onnx_autoglm.upcast import needs_upcast, upcast

Metric = Literal["perplexity", "top-1", "agreement"]
_ENTRIES = 1 << 22  # scores that are looked at together, in float64
IGNORED = -1  # the label of a sample that only fills up a batch


@dataclasses.dataclass(frozen=True)
class TextQuality:
    """`perplexity`: exp of the mean negative log-likelihood of the next token, over `tokens` of them.

    `accuracy` is the share of tokens that the model ranks first.
    """

    perplexity: float
    accuracy: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class ClassQuality:
    """The shares of `samples` whose label is ranked first, and among the first five."""

    top1: float
    top5: float
    samples: int


Quality = TextQuality | ClassQuality


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Quality of a model and of a reference, and how near the first is to the second.

    `agreement` is the share of positions where both rank the same first; `kl` the mean divergence
    KL(reference || model) per position in nats; both over `positions`. The qualities are None without labels.
    """

    metric: Metric
    reference: Quality | None
    model: Quality | None
    agreement: float
    kl: float
    positions: int

    @property
    def ratio(self) -> float:
        """Perplexity or top-1 of the model, divided by that of the reference (without labels: the agreement)."""
        if self.model is None or self.reference is None:
            return self.agreement
        before = headline(self.reference)
        return headline(self.model) / before if before else math.nan

    def as_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "source": None if self.reference is None else dataclasses.asdict(self.reference),
            "result": None if self.model is None else dataclasses.asdict(self.model),
            "ratio": self.ratio,
            "agreement": self.agreement,
            "kl": self.kl,
            "positions": self.positions,
        }


def headline(quality: Quality) -> float:
    """The one number: perplexity, or top-1."""
    return quality.perplexity if isinstance(quality, TextQuality) else quality.top1


def find_scores(model: ir.Model, data: Dataset, who: str = "the model") -> ScoreOutput:
    """The output that is to be judged on the data. Raises UserError, naming `who`, if there is none."""
    if data.metric == "perplexity":
        found, want = token_scores(model), "next-token scores [batch, sequence, vocabulary]"
    elif data.metric == "top-1":
        found, want = class_scores(model), "class scores [batch, classes]"
    else:
        found, want = class_scores(model) or any_scores(model), "scores"
    if found is None:
        raise UserError(
            f"{who} has no output of {want}, so its quality on {data.name} cannot be measured: pass other data"
        )
    return found


def measure(model: ir.Model, data: Dataset, step: Callable[[str], None] = lambda _: None) -> Quality:
    """Perplexity and accuracy on a text, or top-1 and top-5 on labelled samples.

    Text comes in windows that do not overlap; the first token of a window is not counted.

    Raises:
        UserError: samples without labels, a model without scores, or scores that are not numbers.
    """
    if data.metric == "agreement":
        raise UserError(
            f"{data.name} holds samples without labels, so there is nothing to measure: add an array 'labels', or "
            "pass --reference to compare with another model"
        )
    scorer = _Scorer(model, data, "the model")
    tally = _Tally()
    for number, feed in enumerate(data, 1):
        step(f"quality, run {number} of {len(data.feeds)}")
        targets = data.targets(number - 1)
        tally.add(scorer.rows(feed, number), targets, scorer.output.normalised)
    return tally.quality(data.metric)


def compare(
    reference: ir.Model,
    model: ir.Model,
    data: Dataset,
    *,
    reference_feeds: Iterable[Arrays] | None = None,
    model_feeds: Iterable[Arrays] | None = None,
    native: bool = False,
    step: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Measures two models and their distance in one pass.

    Args:
        reference: the model to be near to.
        model: the model to judge.
        data: what to run; both models must score the same tokens or classes.
        reference_feeds: the data as feeds of the reference where it takes other inputs (smaller caches).
        model_feeds: the same for the model.
        native: run the model in its own types, 16-bit ones too, and without optimisation; else in float32.
        step: told which run it is.

    Raises:
        UserError: as `measure`, or the scores of both cannot be compared.
    """
    scorers = (_Scorer(reference, data, "the reference"), _Scorer(model, data, "the model", native))
    feeds = (reference_feeds or data.feeds, model_feeds or data.feeds)
    tallies, distance = (_Tally(), _Tally()), _Distance()
    for number, pair in enumerate(zip(*feeds, strict=True), 1):
        step(f"quality, run {number} of {len(data.feeds)}")
        before, after = (scorer.rows(feed, number) for scorer, feed in zip(scorers, pair, strict=True))
        if before.shape != after.shape:
            raise UserError(
                f"the scores have shapes {list(before.shape)} (reference) and {list(after.shape)} (model), which "
                "cannot be compared: pass two models of one task and one vocabulary"
            )
        targets = data.targets(number - 1)
        known = np.ones(len(before), bool) if targets is None else targets != IGNORED
        for tally, rows, scorer in zip(tallies, (before, after), scorers, strict=True):
            if targets is not None:
                tally.add(rows, targets, scorer.output.normalised)
        distance.add(before[known], after[known], *(scorer.output.normalised for scorer in scorers))
    labelled = data.metric != "agreement"
    return Comparison(
        data.metric,
        tallies[0].quality(data.metric) if labelled else None,
        tallies[1].quality(data.metric) if labelled else None,
        distance.agreed / max(distance.count, 1),
        distance.kl / max(distance.count, 1),
        distance.count,
    )


class _Scorer:
    """Runs a model and returns its scores as rows."""

    def __init__(self, model: ir.Model, data: Dataset, who: str, native: bool = False) -> None:
        self._data, self._who = data, who
        self.output = find_scores(model, data, who)
        in_float32 = needs_upcast(model) and not native
        self._session = Session(upcast(model) if in_float32 else model, optimize=not native)

    def rows(self, feed: Arrays, number: int) -> np.ndarray:
        """Scores `[positions, classes]` of the run with this number."""
        scores = self._session.run(feed, [self.output.name])[self.output.name]
        if scores.ndim < 2:
            raise UserError(
                f"{self._who}: output {self.output.name!r} has shape {list(scores.shape)}, no scores"
            )
        shape: tuple[int, ...] = scores.shape
        rows: np.ndarray = scores[:, :-1] if self._data.metric == "perplexity" else scores
        is_flat = all(size == 1 for size in shape[2:]) and self._data.metric != "perplexity"
        rows = rows.reshape(shape[:2] if is_flat else (-1, shape[-1]))
        if np.isnan(rows).any():
            raise UserError(
                f"{self._who} computes scores that are not numbers (NaN) in run {number} on {self._data.name}: it is "
                "broken, or its numbers overflow"
            )
        if self._data.classes is not None and self._data.classes != rows.shape[1]:
            raise UserError(
                f"{self._data.name} has {self._data.classes} folders of classes, the model {rows.shape[1]} classes: "
                "name each folder by the number of its class"
            )
        return rows


class _Tally:
    """Counts how well scores meet their targets."""

    def __init__(self) -> None:
        self.count, self.loss, self.first, self.five = 0, 0.0, 0, 0

    def add(self, rows: np.ndarray, targets: npt.NDArray[np.int64] | None, normalised: bool) -> None:
        """Takes scores `[n, classes]` and the `[n]` right ones; targets of `IGNORED` are left out."""
        assert targets is not None
        if len(targets) != len(rows):
            raise UserError(
                f"there are {len(targets)} labels for {len(rows)} rows of scores: pass one per sample"
            )
        if targets.size and targets.max() >= rows.shape[1]:
            raise UserError(
                f"the data has label {targets.max()}, the model {rows.shape[1]} classes: labels count from 0"
            )
        known = targets != IGNORED
        for piece, right in _pieces(rows[known], targets[known]):
            chosen = np.take_along_axis(piece, right[:, None], axis=-1)
            # Equal scores rank in the order of their classes, so that a constant model gains nothing.
            earlier = (piece == chosen) & (np.arange(piece.shape[1]) < right[:, None])
            rank = ((piece > chosen) | earlier).sum(axis=-1)
            logs = log_probabilities(piece, normalised=normalised)
            self.count += len(piece)
            self.loss -= float(np.take_along_axis(logs, right[:, None], axis=-1).sum())
            self.first += int((rank == 0).sum())
            self.five += int((rank < 5).sum())

    def quality(self, metric: Metric) -> Quality:
        count = max(self.count, 1)
        if metric == "perplexity":
            return TextQuality(math.exp(min(self.loss / count, 700.0)), self.first / count, self.count)
        return ClassQuality(self.first / count, self.five / count, self.count)


class _Distance:
    """Counts where two models agree, and sums KL(reference || model) in nats."""

    def __init__(self) -> None:
        self.count, self.agreed, self.kl = 0, 0, 0.0

    def add(self, before: np.ndarray, after: np.ndarray, normalised: bool, normalised_after: bool) -> None:
        for old, new in _pieces(before, after):
            p = log_probabilities(old, normalised=normalised)
            q = log_probabilities(new, normalised=normalised_after)
            possible = np.isfinite(p)  # what the reference excludes adds nothing
            gap = np.subtract(p, q, out=np.zeros_like(p), where=possible)
            self.kl += float((np.exp(p) * gap).sum())
            self.agreed += int((old.argmax(axis=-1) == new.argmax(axis=-1)).sum())
            self.count += len(old)


def _pieces(first: np.ndarray, second: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Both arrays cut along axis 0 into parts of bounded size."""
    step = max(1, _ENTRIES // max(first.shape[1], 1))
    return ((first[at : at + step], second[at : at + step]) for at in range(0, len(first), step))
