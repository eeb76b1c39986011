"""Perplexity of exported language models on a text, in ONNX Runtime.

    python tools/perplexity.py build/models/smollm2-glm/model.onnx build/demo/model.onnx \
        --tokenizer build/models/smollm2-glm/tokenizer.json --text models/texts/novel.txt

For graphs without a KV cache: windows of `--window` tokens that do not overlap, each token but the first of a
window counted once. The first model is the reference of the ratio.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192, help="at most this many tokens of each text")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    for text in arguments.text:
        tokens = np.array(tokenizer.encode(text.read_text()).ids[: arguments.tokens], dtype=np.int64)
        reference = None
        for path in arguments.models:
            value = perplexity(path, tokens, arguments.window)
            reference = reference or value
            print(
                f"{text.name:12} {path!s:50} perplexity {value:12.2f}  ratio {value / reference:.3f}",
                flush=True,
            )


def perplexity(path: Path, tokens: np.ndarray, window: int) -> float:
    """exp of the mean negative log-likelihood of the next token."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, window):
        row = tokens[None, start : start + window]
        if row.shape[1] < 2:
            break
        ones = np.ones_like(row)
        positions = np.arange(row.shape[1], dtype=np.int64)[None]
        known = {"input_ids": row, "attention_mask": ones, "position_ids": positions}
        (logits,) = session.run(["logits"], {name: known[name] for name in names})
        scores = logits[0, :-1].astype(np.float64)
        peak = scores.max(axis=-1, keepdims=True)
        log_sum = np.log(np.exp(scores - peak).sum(axis=-1)) + peak[:, 0]
        total += float((log_sum - scores[np.arange(len(scores)), row[0, 1:]]).sum())
        count += len(scores)
    return math.exp(min(total / count, 700.0))


if __name__ == "__main__":
    main()
