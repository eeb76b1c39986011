"""How well text calibrates that the model wrote itself, beside real text and random tokens, in one run.

    python models/build.py smollm2-glm smollm2-glm-kv -o build/models
    python tools/self_text.py build/models/smollm2-glm-kv/model.onnx [--tokens 8192] [--fraction 0.2 0.5]

FFN channels go by obs and what is left is refitted (affine), on each calibration text. The table has the perplexity
on two real texts relative to the dense model, and the seconds (and processor seconds) that writing took. A model without
a KV cache writes short rows, several to a window.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_autoglm.criteria import find_criterion, score
from onnx_autoglm.cut import analyse, apply_selection
from onnx_autoglm.data import load_dataset
from onnx_autoglm.data_text import token_feeds
from onnx_autoglm.dataset import Dataset
from onnx_autoglm.evidence import Data, Evidence
from onnx_autoglm.feed_roles import token_roles
from onnx_autoglm.modelfile import open_model
from onnx_autoglm.options import PruningOptions
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.passes.choose import candidates, choose
from onnx_autoglm.passes.repair_weights import repair_weights
from onnx_autoglm.passes.score_norm import Scores
from onnx_autoglm.quality import measure
from onnx_autoglm.sampling import Sampling
from onnx_autoglm.self_text import write_text

TEXTS = Path(__file__).parents[1] / "models" / "texts"


@dataclasses.dataclass(frozen=True)
class Text:
    """A calibration text, and what it cost to write it."""

    name: str
    data: Dataset
    seconds: float = 0.0
    processor_seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--fraction", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--tokens", type=int, default=8192, help="of each calibration text")
    parser.add_argument("--eval-tokens", type=int, default=4096, help="of each evaluation text")
    parser.add_argument("--window", type=int, nargs="+", default=[256], help="tokens per run")
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    source = canonicalize(open_model(arguments.model))
    held_out = {
        name: _text(arguments, source, name, arguments.eval_tokens, 512) for name in ("speech", "novel")
    }
    dense = {name: measure(source, data).perplexity for name, data in held_out.items()}
    print("dense: " + ", ".join(f"{name} {value:.2f}" for name, value in dense.items()))
    heads = [f"-{fraction:.0%} {name}" for fraction in arguments.fraction for name in held_out]
    print(f"{'calibrated on':44}{'tokens':>8}" + "".join(f"{head:>12}" for head in heads) + "   written in")
    for text in _texts(arguments, source):
        cells = []
        for pruned in _pruned(source, text.data, arguments.fraction):
            cells += [measure(pruned, data).perplexity / dense[name] for name, data in held_out.items()]
        row = f"{text.name:44}{text.data.rows:8}" + "".join(f"{cell:12.3f}" for cell in cells)
        print(f"{row}   {text.seconds:.0f} s ({text.processor_seconds:.0f} s of processors)", flush=True)


def _texts(arguments: argparse.Namespace, source: ir.Model) -> Iterator[Text]:
    for window in arguments.window:
        yield Text(
            f"real text, windows of {window}",
            _text(arguments, source, "calibration", arguments.tokens, window),
        )
    yield Text("random tokens", _random(source, arguments.tokens, arguments.window[0]))
    for window in arguments.window:
        for temperature in arguments.temperature:
            for seed in arguments.seed:
                started, busy = time.perf_counter(), time.process_time()
                data = write_text(
                    source,
                    tokens=arguments.tokens,
                    window=window,
                    seed=seed,
                    sampling=Sampling(temperature),
                )
                yield Text(
                    f"self-written, windows of {window}, T {temperature:g}, seed {seed}",
                    data,
                    time.perf_counter() - started,
                    time.process_time() - busy,
                )


def _text(arguments: argparse.Namespace, source: ir.Model, name: str, limit: int, window: int) -> Dataset:
    tokenizer = arguments.model.with_name("tokenizer.json")
    return load_dataset(TEXTS / f"{name}.txt", source, tokenizer=tokenizer, window=window, limit=limit)


def _random(source: ir.Model, tokens: int, window: int) -> Dataset:
    roles = token_roles(source)
    assert roles is not None
    rows = np.random.default_rng(0).integers(0, roles.vocabulary, (tokens // window, window))
    feeds = token_feeds(source, [row[None] for row in rows])
    return Dataset("random", "", rows.size, feeds, roles.tokens)


def _pruned(source: ir.Model, data: Dataset, fractions: list[float]) -> Iterator[ir.Model]:
    """The model without each fraction of its FFN channels; the data is looked at and scored once."""
    scores: dict[str, Scores] = {}
    for fraction in fractions:
        structures = analyse(source.clone())
        asked = {"ffn-channel": fraction}
        decisions = candidates(structures.found, asked, PruningOptions(), asked=True)
        wanted = {decision.structure.id: decision.structure for decision in decisions if not decision.reason}
        evidence = Evidence(structures, list(wanted.values()))
        if not scores:
            evidence.observe(source, Data(data, None))
            found, _ = score(find_criterion("obs"), list(wanted.values()), evidence)
            scores = {structure.id: row for structure, row in found.items()}
        own = {structure: scores[name] for name, structure in wanted.items()}
        selection, _ = choose(structures.found, own, asked, PruningOptions(), decisions)
        cut = apply_selection(structures, selection)
        pairs = [(feed, feed) for feed in data.feeds]
        repair_weights(source, cut.model, selection, evidence.consumers, pairs, "affine")
        yield cut.model


if __name__ == "__main__":
    main()
