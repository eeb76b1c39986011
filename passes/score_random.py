"""Scores structures at random: the control that every criterion must beat."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from onnx_autoglm.axes.structures import Structure
from onnx_autoglm.passes.score_norm import Scores


@dataclasses.dataclass(frozen=True)
class ScoreRandom:
    """Uniform scores; the same seed gives the same scores for the same model."""

    seed: int = 0

    def __call__(self, structures: Sequence[Structure]) -> dict[Structure, Scores]:
        return score_random(structures, self.seed)


def score_random(structures: Sequence[Structure], seed: int) -> dict[Structure, Scores]:
    """Scores of shape `[*sizes of the outer atoms, size]` for each structure."""
    rng = np.random.default_rng(seed)
    return {
        structure: rng.random([*(int(str(outer.size)) for outer in structure.outers), structure.size])
        for structure in structures
    }
