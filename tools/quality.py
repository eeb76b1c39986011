"""Perplexity after pruning a language model by every method, in one run.

    python models/build.py smollm2-glm -o build/models
    python tools/quality.py build/models/smollm2-glm/model.onnx [--kind ffn-channel] [--fraction 0.2 0.5]

Calibration is `models/texts/calibration.txt`, evaluation the two other texts there; the same fraction goes in every
layer. Ratios are to the dense model.

    python tools/quality.py MODEL --joint 0.2 0.3

removes that share of the parameters of query heads and FFN channels: jointly over kinds and layers, by one width per
kind, and for comparison from the FFN channels of all layers alike, as many parameters each time.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnx_autoglm import inspect, optimize
from onnx_autoglm.data import load_dataset
from onnx_autoglm.modelfile import open_model
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.quality import measure

TEXTS = Path(__file__).parents[1] / "models" / "texts"
METHODS = (("l2", "none"), ("wanda", "none"), ("flap", "bias"), ("flap", "affine"), ("obs", "affine"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--kind", default="ffn-channel")
    parser.add_argument("--fraction", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--joint", type=float, nargs="+", default=[])
    parser.add_argument("--calib", default=str(TEXTS / "calibration.txt"), help="a path, or self")
    parser.add_argument("--tokens", type=int, default=8192, help="of each evaluation text")
    parser.add_argument("--scratch", type=Path, default=Path("build/quality"))
    arguments = parser.parse_args()
    dense = _perplexities(arguments.model, arguments.model, arguments.tokens)
    print(f"dense: {_row(dense, dense)}", flush=True)
    rows = _joint_rows(arguments) if arguments.joint else _uniform_rows(arguments)
    for name, options in rows:
        started = time.perf_counter()
        learns = options.get("criterion") != "l2"
        report = optimize(
            arguments.model, arguments.scratch, calib=arguments.calib if learns else "none", **options
        )
        seconds = time.perf_counter() - started
        gone = report.source.parameters - report.result.parameters
        pruned = _perplexities(arguments.scratch / "model.onnx", arguments.model, arguments.tokens)
        print(f"{name:36} -{gone / 1e6:6.2f} M  {_row(pruned, dense)}  {seconds:5.0f} s", flush=True)
        shutil.rmtree(arguments.scratch)


def _uniform_rows(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    for fraction in arguments.fraction:
        for criterion, repair in METHODS:
            options = {
                "prune": {arguments.kind: fraction},
                "criterion": criterion,
                "repair": repair,
            }
            yield f"{arguments.kind} -{fraction:.0%} {criterion} + {repair}", options


def _joint_rows(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    found = inspect(arguments.model).structures
    held = {
        kind: sum(s.parameters for s in found if s.kind == kind) for kind in ("query-head", "ffn-channel")
    }
    for share in arguments.joint:
        yield f"joint -{share:.0%}", {"keep": 1 - share}
        yield f"joint -{share:.0%}, uniform layers", {"keep": 1 - share, "uniform": True}
        alone = {"ffn-channel": share * sum(held.values()) / held["ffn-channel"]}
        for criterion, repair in (METHODS[4], METHODS[2], METHODS[1]):
            options = {"prune": alone, "criterion": criterion, "repair": repair}
            yield f"FFN alone, {criterion} + {repair}", options


def _perplexities(path: Path, source: Path, tokens: int) -> dict[str, float]:
    model = canonicalize(open_model(path))
    tokenizer = source.with_name("tokenizer.json")
    result = {}
    for name in ("speech", "novel"):
        data = load_dataset(TEXTS / f"{name}.txt", model, tokenizer=tokenizer, limit=tokens)
        result[name] = measure(model, data).perplexity
    return result


def _row(values: dict[str, float], dense: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:10.2f} (x{value / dense[name]:.3f})" for name, value in values.items())


if __name__ == "__main__":
    main()
