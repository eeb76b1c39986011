"""Two models in one process that take turns: a prompt, one more token, or one run."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from onnx_autoglm import modelfile
from onnx_autoglm.bench_options import BenchOptions
from onnx_autoglm.bench_stats import Ratio, Times, Verdict, paired_ratio
from onnx_autoglm.decode import Decoder
from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_roles import token_roles
from onnx_autoglm.latency import sample_feed
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.runtime import Session

WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class Measure:
    """One kind of work (`prefill`, `decode` or `run`): times of both, the ratio, and what that says."""

    name: str
    a: Times
    b: Times
    ratio: Ratio
    verdict: Verdict


class Subject(Protocol):
    """A loaded model; `round` does all kinds of work once and gives the seconds of each run, by kind."""

    def round(self) -> dict[str, list[float]]: ...


class Writer:
    """A language model: reads a prompt, then writes tokens. Only the scores of the last position are computed."""

    def __init__(self, decoder: Decoder, tokens: np.ndarray, steps: int) -> None:
        """`tokens` is `[batch, prompt]`; `steps` tokens follow, if there is a cache."""
        self._decoder, self._tokens, self._steps = decoder, tokens, steps

    def round(self) -> dict[str, list[float]]:
        decoder, tokens = self._decoder, self._tokens
        batch, seen = tokens.shape
        started = time.perf_counter()
        scores, past = decoder.run(tokens, decoder.empty(batch), 0)
        found = {"prefill": [time.perf_counter() - started]}
        if not decoder.cached:
            return found
        found["decode"] = []
        for number in range(self._steps):
            last = scores.argmax(axis=-1)[:, None]
            started = time.perf_counter()
            scores, past = decoder.run(last, past, seen + number)
            found["decode"].append(time.perf_counter() - started)
        return found


class Runner:
    """Any other model: one run at batch 1."""

    def __init__(self, model: ir.Model, threads: int | None) -> None:
        self._session = Session(model, optimize=True, threads=threads)
        self._feed = sample_feed(self._session, model, None)

    def round(self) -> dict[str, list[float]]:
        started = time.perf_counter()
        self._session.run(self._feed)
        return {"run": [time.perf_counter() - started]}


def subjects(a: Path, b: Path, options: BenchOptions) -> tuple[Subject, Subject]:
    """Both models, with the same prompts. Raises UserError if one does not load, or only one writes text."""
    models = [canonicalize(modelfile.open_model(path)) for path in (a, b)]
    texts = [token_roles(model) is not None for model in models]
    if texts[0] != texts[1]:
        raise UserError(f"only {(a, b)[texts[1]]} takes tokens: compare two models of one task")
    decoders = [_decoder(model, options.threads) for model in models] if texts[0] else [None, None]
    if decoders[0] is None or decoders[1] is None:
        return Runner(models[0], options.threads), Runner(models[1], options.threads)
    roles = [decoder.roles.inputs for decoder in decoders if decoder is not None]
    batches = [one.batch or options.batch for one in roles]
    if batches[0] != batches[1]:
        raise UserError(f"one model has a fixed batch of {max(batches)}: pass --batch {max(batches)}")
    shape = (batches[0], options.prompt_tokens)
    tokens = np.random.default_rng(options.seed).integers(0, min(one.vocabulary for one in roles), shape)
    first, second = (Writer(one, tokens, options.decode_tokens) for one in decoders if one is not None)
    return first, second


def _decoder(model: ir.Model, threads: int | None) -> Decoder | None:
    """None for models that take tokens and do not write, such as encoders."""
    try:
        return Decoder(model, threads=threads)
    except UserError:
        return None


def take_turns(
    pair: tuple[Subject, Subject], options: BenchOptions, step: Callable[[str], None] = lambda _: None
) -> list[Measure]:
    """Measures both in turns; who goes first changes from round to round."""
    for _ in range(WARM_UP):
        for subject in pair:
            subject.round()
    rounds: list[list[dict[str, list[float]]]] = []
    for number in range(options.rounds):
        step(f"round {number + 1} of {options.rounds}")
        order = (0, 1) if number % 2 == 0 else (1, 0)
        found = {index: pair[index].round() for index in order}
        rounds.append([found[0], found[1]])
    return [_measure(name, rounds, options) for name in rounds[0][0] if name in rounds[0][1]]


def _measure(name: str, rounds: list[list[dict[str, list[float]]]], options: BenchOptions) -> Measure:
    every = [[seconds for both in rounds for seconds in both[side][name]] for side in (0, 1)]
    # Steps of one round are not independent of each other, so a round counts once.
    medians = [[statistics.median(both[side][name]) for both in rounds] for side in (0, 1)]
    ratio = paired_ratio(medians[0], medians[1], options.seed)
    return Measure(name, Times.of(every[0]), Times.of(every[1]), ratio, ratio.verdict(options.margin))
