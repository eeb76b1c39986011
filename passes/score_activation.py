"""Scores structures by what their consumers read: Wanda (structured) and FLAP's WIFV."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from onnx_autoglm.axes.structures import Structure
from onnx_autoglm.consumers import Consumer, consumers_of, members
from onnx_autoglm.passes.score_norm import Scores
from onnx_autoglm.statistics import Key, Observed, key_of


@dataclasses.dataclass(frozen=True)
class ScoreActivation:
    """`wanda`: `sum |W_kj| * sqrt(E x_k^2)`; `flap`: `Var(x_k) * sum W_kj^2` (FLAP's WIFV).

    Summed over the rows k that belong to a structure, and over its consumers.
    """

    method: Literal["wanda", "flap"] = "flap"

    def __call__(
        self, structures: Sequence[Structure], consumers: list[Consumer], observed: Mapping[Key, Observed]
    ) -> dict[Structure, Scores]:
        return score_activation(structures, consumers, observed, self.method)


def score_activation(
    structures: Sequence[Structure],
    consumers: list[Consumer],
    observed: Mapping[Key, Observed],
    method: Literal["wanda", "flap"],
) -> dict[Structure, Scores]:
    """Scores of shape `[*sizes of the outer atoms, size]`; structures without a consumer are left out."""
    scores: dict[Structure, Scores] = {}
    for structure in structures:
        own = consumers_of(structure, consumers)
        if not own:
            continue
        total = np.zeros(structure.groups * structure.size)
        for consumer in own:
            moments, weight = observed[key_of(consumer.contraction)].all, consumer.rows()
            variance = np.diag(moments.covariance)
            if method == "wanda":
                rows = np.sqrt(np.maximum(variance + moments.mean**2, 0.0)) * np.abs(weight).sum(axis=1)
            else:
                rows = np.maximum(variance, 0.0) * np.square(weight).sum(axis=1)
            index = members(structure, consumer)
            np.add.at(total, index[index >= 0], rows[index >= 0])
        scores[structure] = total.reshape(structure.shape)
    return scores
