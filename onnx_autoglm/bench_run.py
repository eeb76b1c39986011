"""`bench`: how much faster is B than A, at what load, at what cost?"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnx_autoglm import modelfile
from onnx_autoglm.bench_load import LoadPoint, measure_load
from onnx_autoglm.bench_offline import subjects, take_turns
from onnx_autoglm.bench_options import BenchOptions
from onnx_autoglm.bench_report import Bench, write_bench
from onnx_autoglm.errors import UserError
from onnx_autoglm.evaluation import evaluate
from onnx_autoglm.feed_roles import token_roles
from onnx_autoglm.output import explained
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.plan import sha256
from onnx_autoglm.summary import versions

Progress = Callable[[str], None]


def bench(
    a: Path | str,
    b: Path | str,
    options: BenchOptions | None = None,
    *,
    output: Path | str | None = None,
    progress: Progress = lambda _: None,
) -> Bench:
    """Compares two models: latency in turns, load on two servers if asked for, quality if there is data.

    Args:
        a: the model before.
        b: the model after.
        options: what is timed, and how often.
        output: folder for bench.json and bench.png.
        progress: told which step runs.

    Raises:
        UserError: something the user can mend.
    """
    options = options or BenchOptions()
    paths = (Path(a), Path(b))
    if output is not None and Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"{output} is a file: choose another output folder")
    started = time.perf_counter()
    progress("open")
    vocabulary = _vocabulary(paths) if options.load else 0
    measures = take_turns(subjects(*paths, options), options, progress)
    load: tuple[list[LoadPoint], list[LoadPoint]] = ([], [])
    if options.load:
        load = measure_load(paths, vocabulary, options, progress)
    found = Bench(
        a=_described(paths[0]),
        b=_described(paths[1]),
        measures=measures,
        load_a=load[0],
        load_b=load[1],
        quality=_quality(paths, options, progress),
        options=options.model_dump(mode="json"),
        machine={"processors": os.cpu_count()},
        versions=versions(),
        seconds=round(time.perf_counter() - started, 3),
    )
    if output is not None:
        with explained(Path(output)):
            write_bench(found, Path(output))
    return found


def _vocabulary(paths: tuple[Path, Path]) -> int:
    """Tokens that both know. Raises UserError if one takes none."""
    sizes = []
    for path in paths:
        roles = token_roles(canonicalize(modelfile.open_model(path)))
        if roles is None:
            raise UserError(f"--load needs language models, and {path} takes no tokens")
        sizes.append(roles.vocabulary)
    return min(sizes)


def _described(path: Path) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in modelfile.source_files(modelfile.open_model(path)))
    return {"file": str(path), "sha256": sha256(path), "bytes": size}


def _quality(paths: tuple[Path, Path], options: BenchOptions, progress: Progress) -> dict[str, Any] | None:
    if options.data is None:
        return None
    tokenizer = options.tokenizer
    found = evaluate(
        paths[1],
        options.data,
        reference=paths[0],
        tokenizer=tokenizer,
        tokens=options.tokens,
        progress=progress,
    ).as_json()
    names = ("data", "metric", "quality", "reference_quality", "ratio", "agreement", "kl")
    return {name: found[name] for name in names}
