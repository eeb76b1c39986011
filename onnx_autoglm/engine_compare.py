"""Compares an engine with ONNX Runtime on the same feeds, by polygraphy's comparator."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from onnx_autoglm.engine_runner import EngineSession
from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_sizes import fed_inputs
from onnx_autoglm.feeds import candidate_feeds, first_working
from onnx_autoglm.modelfile import open_model
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.runtime import Session

Arrays = dict[str, np.ndarray]


class Runs(Protocol):
    """What both kinds of sessions have."""

    output_names: list[str]

    def run(self, feeds: Arrays) -> Arrays: ...


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Whether all outputs are close on all feeds, and the largest differences of each output."""

    close: bool
    absolute: dict[str, float]
    relative: dict[str, float]


def compare_engine(
    engine: Path | str,
    model: Path | str,
    feeds: Sequence[Arrays] = (),
    *,
    rtol: float = 1e-2,
    atol: float = 1e-2,
) -> Comparison:
    """Runs the engine and the model that it was built from.

    Args:
        feeds: what to run on; by default one set that is generated from the model's signature.
        rtol, atol: an element is close if it differs by less than `atol + rtol * |expected|`. The defaults are for
            half precision, and for the TF32 products of float32 engines.

    Raises:
        UserError: the engine or the model cannot be loaded or does not run.
    """
    source = canonicalize(open_model(model))
    session = Session(source)
    chosen = list(feeds) or [first_working(session, candidate_feeds(source))]
    with EngineSession(engine) as other:
        return compare_sessions(source, session, other, chosen, rtol=rtol, atol=atol)


def compare_sessions(
    model: ir.Model, expected: Runs, actual: Runs, feeds: Sequence[Arrays], *, rtol: float, atol: float
) -> Comparison:
    """Runs both on all feeds, which are those of `model`. Raises UserError without polygraphy, or if one fails."""
    try:
        from polygraphy.comparator import Comparator, SimpleCompareFunc
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise UserError("polygraphy is missing; run: pip install 'onnx-autoglm[polygraphy]'") from error
    runners = [_runner("onnxruntime", expected, model), _runner("engine", actual, model)]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        results = Comparator.run(runners, data_loader=list(feeds))
        found = Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(rtol=rtol, atol=atol))
    absolute: dict[str, float] = {}
    relative: dict[str, float] = {}
    close = True
    outputs = [one for pairs in found for iterations in pairs.values() for one in iterations]
    for name, result in (item for one in outputs for item in one.items()):
        close = close and bool(result)
        # Where shapes differ there are no numbers.
        absolute[name] = max(absolute.get(name, 0.0), getattr(result, "max_absdiff", math.inf))
        relative[name] = max(relative.get(name, 0.0), getattr(result, "max_reldiff", math.inf))
    return Comparison(close, absolute, relative)


def _runner(name: str, session: Runs, model: ir.Model) -> Any:
    """A session as polygraphy's comparator wants it."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    run: Callable[[Arrays], Arrays] = session.run

    class Runner(BaseRunner):
        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for value in fed_inputs(model):
                dims = [dim if isinstance(dim, int) else None for dim in value.shape or ()]
                assert value.dtype is not None
                metadata.add(value.name, dtype=value.dtype.numpy(), shape=dims)
            return metadata

        def infer_impl(self, feed_dict: Arrays) -> Arrays:
            started = time.perf_counter()
            outputs = dict(run(dict(feed_dict)))
            self.inference_time = time.perf_counter() - started
            return outputs

    return Runner(name=name)
