"""Calibration text that a language model writes itself, so that pruning needs no data.

What a model writes at temperature 1 is drawn from its own distribution, and activations on it have nearly the
means and covariances that they have on real text (LLM-QAT; Williams et al. 2024). `tools/self_text.py` measures it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnx_autoglm.data_text import token_feeds
from onnx_autoglm.dataset import Dataset, hash_of
from onnx_autoglm.decode import Decoder
from onnx_autoglm.errors import UserError
from onnx_autoglm.sampling import Sampling

NAME = "self-written"
SAMPLING = Sampling()
FEWEST_RUNS = 10  # statistics hold out every fifth run of the model
# A step costs more the longer its row is, so many short rows are cheaper than few long ones.
LONGEST_ROW = 256
# Without a cache a row of n tokens takes n runs over up to n tokens.
LONGEST_ROW_UNCACHED = 32
MOST_TOKENS_UNCACHED = 5120  # of all texts together


def write_text(
    model: ir.Model,
    *,
    tokens: int,
    window: int,
    seed: int,
    sampling: Sampling = SAMPLING,
    step: Callable[[str], None] = lambda _: None,
) -> Dataset:
    """Text that the model writes, as feeds of that model.

    Every row starts with a token drawn uniformly from the vocabulary. Without a KV cache rows are short, and several
    of them make a window; there is less text then.

    Args:
        model: a causal language model.
        tokens: about how many tokens; whole windows are written, at least 10.
        window: tokens per run of the model, at most; shorter where longer ones would take too long.
        seed: the same seed gives the same text.
        sampling: how tokens are drawn.
        step: told how far it is.

    Raises:
        UserError: the model cannot write, with the reason.
    """
    return write_texts(model, tokens=[tokens], window=window, seed=seed, sampling=sampling, step=step)[0]


def write_texts(
    model: ir.Model,
    *,
    tokens: Sequence[int],
    window: int,
    seed: int,
    sampling: Sampling = SAMPLING,
    step: Callable[[str], None] = lambda _: None,
) -> list[Dataset]:
    """Several texts at once that share no row; else as `write_text`."""
    decoder = Decoder(model)
    window = min(window, LONGEST_ROW)
    row = window if decoder.cached else min(window, LONGEST_ROW_UNCACHED)
    per_window = window // row
    share = 1.0 if decoder.cached else min(1.0, MOST_TOKENS_UNCACHED / sum(tokens))
    counts = [max(FEWEST_RUNS, int(share * wanted) // (row * per_window)) for wanted in tokens]
    total = sum(counts) * per_window
    first = np.random.default_rng(seed).integers(0, decoder.vocabulary, (total, 1))
    written = decoder.generate(first, row - 1, sampling=sampling, seed=seed, step=step)
    windows = np.concatenate([first, written], axis=1).reshape(sum(counts), -1)
    parts = np.split(windows, np.cumsum(counts)[:-1])
    return [_dataset(model, decoder.roles.inputs.tokens, part) for part in parts]


def _dataset(model: ir.Model, token_input: str, windows: np.ndarray) -> Dataset:
    if np.ptp(windows) == 0:
        raise UserError("the model writes one token only")
    feeds = token_feeds(model, [window[None] for window in windows])
    samples = frozenset(hash_of({"": window}) for window in windows)
    digest = hashlib.sha256(windows.tobytes()).hexdigest()
    return Dataset(NAME, digest, windows.size, feeds, token_input, samples=samples)
