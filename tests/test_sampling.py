"""Drawing the next token: shares, limits, penalties."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_autoglm import UserError
from onnx_autoglm.sampling import GREEDY, Sampling, pick


def test_draws_follow_the_scores() -> None:
    scores = np.log(np.array([[0.1, 0.2, 0.3, 0.4]], np.float32))
    draws = (np.arange(1000) + 0.5) / 1000

    def shares(sampling: Sampling) -> list[float]:
        return [
            round(float(share), 2)
            for share in np.bincount(pick(np.repeat(scores, 1000, 0), sampling, draws), minlength=4) / 1000
        ]

    assert shares(Sampling()) == [0.1, 0.2, 0.3, 0.4]
    assert shares(Sampling(temperature=0.5)) == [0.03, 0.13, 0.3, 0.53]
    assert shares(Sampling(top_k=2)) == [0, 0, 0.43, 0.57]
    assert shares(Sampling(top_p=0.65)) == [0, 0, 0.43, 0.57]
    assert shares(Sampling(top_p=0.75)) == [0, 0.22, 0.33, 0.44]
    assert pick(scores, None, draws[:1]).tolist() == [3]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"repetition_penalty": 0}]
)
def test_a_sampling_that_makes_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="must be"):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_a_token_that_was_there_is_penalized_on_both_sides_of_zero() -> None:
    """A score of 2 becomes 1, one of -1 becomes -2: each is then behind its rival."""
    none = np.zeros(1)
    scores = np.array([[2.0, 1.5, -1.0]], np.float32)
    penalty = Sampling(temperature=0, repetition_penalty=2)
    assert pick(scores, GREEDY, none).tolist() == [0]
    assert pick(scores, penalty, none, [np.array([0, 0])]).tolist() == [1]
    negative = np.array([[-1.0, -1.5]], np.float32)
    assert pick(negative, penalty, none, [np.array([0])]).tolist() == [1]
    assert scores.tolist() == [[2.0, 1.5, -1.0]]
