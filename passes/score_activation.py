"""Scores structures by what their consumers read: Wanda (structured), FLAP's WIFV, and Minitron's size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from onnx_autoglm.axes.structures import Structure
from onnx_autoglm.consumers import Consumer, consumers_of, members
from onnx_autoglm.passes.score_norm import Scores
from onnx_autoglm.statistics import Key, Observed, key_of

Method = Literal["wanda", "flap", "minitron"]


@dataclasses.dataclass(frozen=True)
class ScoreActivation:
    """`wanda`: `sum |W_kj| * sqrt(E x_k^2)`; `flap`: `Var(x_k) * sum W_kj^2` (FLAP's WIFV), summed over the rows k
    that belong to a structure, and over its consumers.

    `minitron`: no weight counts. `sqrt(sum over samples of (mean over positions |x_k|)^2)`, and of several rows (the
    channels of a head) and readings the L2 norm. What consumers share is read once.
    """

    method: Method = "flap"

    def __call__(
        self, structures: Sequence[Structure], consumers: list[Consumer], observed: Mapping[Key, Observed]
    ) -> dict[Structure, Scores]:
        return score_activation(structures, consumers, observed, self.method)


def score_activation(
    structures: Sequence[Structure],
    consumers: list[Consumer],
    observed: Mapping[Key, Observed],
    method: Method,
) -> dict[Structure, Scores]:
    """Scores of shape `[*sizes of the outer atoms, size]`; structures without a consumer are left out."""
    scores: dict[Structure, Scores] = {}
    for structure in structures:
        own = consumers_of(structure, consumers)
        if not own:
            continue
        if method == "minitron":  # of consumers that read one activation, one
            own = list({key_of(consumer.contraction): consumer for consumer in own}.values())
        total = np.zeros(structure.groups * structure.size)
        for consumer in own:
            rows = _row_scores(observed[key_of(consumer.contraction)], consumer, method)
            index = members(structure, consumer)
            np.add.at(total, index[index >= 0], rows[index >= 0])
        if method == "minitron":
            total = np.sqrt(total)
        scores[structure] = total.reshape(structure.shape)
    return scores


def _row_scores(seen: Observed, consumer: Consumer, method: Method) -> Scores:
    """What each contracted index adds, `[k]`; of `minitron` the square."""
    if method == "minitron":
        return seen.sizes
    moments, weight = seen.all, consumer.rows()
    variance = np.diag(moments.covariance)
    if method == "wanda":
        return np.asarray(np.sqrt(np.maximum(variance + moments.mean**2, 0.0)) * np.abs(weight).sum(axis=1))
    return np.asarray(np.maximum(variance, 0.0) * np.square(weight).sum(axis=1))
