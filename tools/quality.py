"""Perplexity after pruning a language model by every method, in one run.

    python models/build.py smollm2-glm -o build/models
    python tools/quality.py build/models/smollm2-glm/model.onnx [--kind ffn-channel] [--fraction 0.2 0.5]

Calibration is `models/texts/calibration.txt`, evaluation the two other texts there; the same fraction goes in every
layer. Ratios are to the dense model.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from onnx_autoglm import optimize
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
    parser.add_argument("--tokens", type=int, default=8192, help="of each evaluation text")
    parser.add_argument("--scratch", type=Path, default=Path("build/quality"))
    arguments = parser.parse_args()
    dense = _perplexities(arguments.model, arguments.model, arguments.tokens)
    print(f"dense: {_row(dense, dense)}", flush=True)
    for fraction in arguments.fraction:
        for criterion, repair in METHODS:
            started = time.perf_counter()
            learns = criterion != "l2"
            optimize(
                arguments.model,
                arguments.scratch,
                prune={arguments.kind: fraction},
                criterion=criterion,
                repair=repair,
                calib=TEXTS / "calibration.txt" if learns else None,
            )
            seconds = time.perf_counter() - started
            pruned = _perplexities(arguments.scratch / "model.onnx", arguments.model, arguments.tokens)
            name = f"{arguments.kind} -{fraction:.0%} {criterion} + {repair}"
            print(f"{name:36} {_row(pruned, dense)}  {seconds:5.0f} s", flush=True)
            shutil.rmtree(arguments.scratch)


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
