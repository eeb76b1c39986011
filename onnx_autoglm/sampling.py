"""How the next token is drawn from its scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from onnx_autoglm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Scores of tokens that the text already has are divided by `repetition_penalty` where positive and multiplied by it
    where negative (Keskar et al. 2019). Then scores over `temperature` (0: the token of the highest score, and nothing
    below counts), then the `top_k` best ones (0: all), then the fewest that have `top_p` of the probability.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"{self}: temperature must be 0 or more, top_k 0 or more, and top_p must be above 0 and at most 1"
            )
        if not self.repetition_penalty > 0:
            raise UserError(f"{self}: repetition_penalty must be above 0 (1: none)")


GREEDY = Sampling(temperature=0)


def pick(
    scores: np.ndarray,
    sampling: Sampling | None,
    draws: np.ndarray,
    seen: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """The next token of each row, int64 `[batch]`.

    Args:
        scores: float32 `[batch, vocabulary]`; not changed.
        sampling: how to draw; None takes the token of the highest score.
        draws: one uniform number per row, `[batch]`.
        seen: the tokens of each row so far, for a repetition penalty.
    """
    sampling = sampling or GREEDY
    if seen is not None and sampling.repetition_penalty != 1:
        scores = _penalized(scores, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return np.asarray(scores.argmax(axis=-1), dtype=np.int64)
    scaled = scores / np.float32(sampling.temperature)
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = np.partition(scaled, -sampling.top_k, axis=-1)[:, -sampling.top_k, None]
        scaled = np.where(scaled >= least, scaled, -np.inf)
    weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    if sampling.top_p < 1:
        weights = _most_likely(weights, sampling.top_p)
    summed = weights.cumsum(axis=-1, dtype=np.float64)
    # The first token whose sum is above the draw; a token of weight zero never is the first.
    chosen = (summed <= draws[:, None] * summed[:, -1:]).sum(axis=-1)
    return np.asarray(np.minimum(chosen, scores.shape[-1] - 1), dtype=np.int64)


def _penalized(scores: np.ndarray, seen: Sequence[np.ndarray], penalty: float) -> np.ndarray:
    result = scores.copy()
    for row, tokens in zip(result, seen, strict=True):
        own = row[tokens]
        row[tokens] = np.where(own > 0, own / penalty, own * penalty)
    return result


def _most_likely(weights: np.ndarray, share: float) -> np.ndarray:
    """The weights with zeros outside the fewest that together have `share` of the sum."""
    order = np.argsort(-weights, axis=-1, kind="stable")
    ranked = np.take_along_axis(weights, order, axis=-1)
    before = ranked.cumsum(axis=-1, dtype=np.float64) - ranked
    ranked[before >= share * ranked.sum(axis=-1, keepdims=True, dtype=np.float64)] = 0
    result = np.zeros_like(weights)
    np.put_along_axis(result, order, ranked, axis=-1)
    return result
