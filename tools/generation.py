"""Greedy text of the exported SmolLM2 beside that of transformers: are the tokens the same, and who is faster?

    python tools/generation.py build/models/smollm2-glm-kv/model.onnx

Prompts of different lengths, alone and in batches (transformers pads them on the left). Then the tokens per second of
requests that are decoded together. The threads of both sides are `--threads`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import smollm

from onnx_autoglm.generate import Generator

PROMPTS = (
    "The capital of France is",
    "Water is made of hydrogen",
    "Once upon a time, in a village by the sea, there lived",
    "The three most important things to know about bread are",
    "def fibonacci(n):",
    "My favourite season is autumn, because",
    "In 1969",
    "A triangle has three sides. A square has four. A pentagon has five. A hexagon has",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    other, _ = smollm.load()
    for batch in (1, 4):
        ours = Generator.open(arguments.model, rows=batch, threads=arguments.threads)
        ours.ends = frozenset()
        prompts = [ours.encode(text) for text in PROMPTS]
        compare(ours, other, prompts, batch, arguments.tokens, arguments.threads)
    for rows in (1, 4, 8):
        ours = Generator(ours.engine, rows=rows)
        _, seconds = written_by_us(ours, prompts, arguments.tokens)
        print(f"{rows} at once: {len(prompts) * arguments.tokens / seconds:6.1f} tokens/s", flush=True)


def compare(
    ours: Generator, other: Any, prompts: list[list[int]], batch: int, tokens: int, threads: int
) -> None:
    """Prints how many prompts get the same tokens from both, and the time of both."""
    mine, seconds = written_by_us(ours, prompts, tokens)
    theirs, other_seconds = written_by_transformers(other, prompts, batch, tokens, threads)
    same = sum(a == b for a, b in zip(mine, theirs, strict=True))
    count = len(prompts) * tokens
    print(
        f"batch {batch}: {same} of {len(prompts)} prompts get the same {tokens} tokens; tokens/s: "
        f"{count / seconds:.1f}, transformers {count / other_seconds:.1f}",
        flush=True,
    )


def written_by_us(ours: Generator, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], float]:
    rows: list[list[int]] = [[] for _ in prompts]
    started = time.perf_counter()
    for row, event in ours.tokens(prompts, tokens):
        if event.token is not None:
            rows[row].append(event.token)
    return rows, time.perf_counter() - started


def written_by_transformers(
    model: Any, prompts: list[list[int]], batch: int, tokens: int, threads: int
) -> tuple[list[list[int]], float]:
    import torch

    torch.set_num_threads(threads)
    rows: list[list[int]] = []
    started = time.perf_counter()
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in some])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in some])
        how = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
        with torch.no_grad():
            found = model.generate(ids, attention_mask=mask, **how, eos_token_id=None)
        rows += found[:, width:].tolist()
    return rows, time.perf_counter() - started


if __name__ == "__main__":
    main()
