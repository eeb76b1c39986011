"""How the time of a model in ONNX Runtime, on this machine, falls with the width of its structures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.structures import Structure, Structures
from onnx_autoglm.cut import cut_model
from onnx_autoglm.data_text import token_feed
from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_roles import token_roles
from onnx_autoglm.feeds import generate_feeds
from onnx_autoglm.latency import Latency, time_in_turns
from onnx_autoglm.passes.ladder import keep_best
from onnx_autoglm.plan import cut_arrays
from onnx_autoglm.runtime import Session

Arrays = dict[str, np.ndarray]
Regime = Literal["prefill", "decode"]
LEVELS = (0.75, 0.5, 0.25)  # shares of a kind that stay while its latency is measured
_RUNS = 11


def workload(model: ir.Model, batch: int, sequence: int, regime: Regime) -> Arrays:
    """Feeds for timing: a prompt of `sequence` tokens, or one token after a past of as many.

    Models without tokens get one batch of generated inputs.

    Raises UserError for `decode` without a cache.
    """
    roles = token_roles(model)
    if roles is None:
        return generate_feeds(model, batch=batch)
    if regime == "decode" and not roles.past_symbols:
        raise UserError("--regime decode needs a model with a KV cache: export it with one, or time prefill")
    length = roles.length or (sequence if regime == "prefill" else 1)
    past = 0 if regime == "prefill" else sequence
    tokens = np.random.default_rng(0).integers(0, roles.vocabulary, (roles.batch or batch, length))
    return token_feed(model, roles, tokens, past)


class Stopwatch:
    """Times cuts of one model against the model itself."""

    def __init__(self, model: ir.Model, feed: Arrays) -> None:
        """`model` is canonical; it is only read. Raises UserError if it does not run on the feed."""
        self._model, self._feed = model, feed
        self._source = Session(model, optimize=True)

    def measure(self, counts: Mapping[str, int]) -> Latency:
        """The latency when the named structures keep so many indices, whichever those are."""

        def first(structures: Structures) -> Selection:
            selection = Selection()
            for structure in structures.found:
                keep = counts.get(structure.id, structure.size)
                falling = np.broadcast_to(-np.arange(structure.size, dtype=np.float64), structure.shape)
                keep_best(selection, structure, falling, keep)
            return selection

        cut = cut_model(self._model, first)
        session = Session(cut.model, optimize=True)
        pruned = cut_arrays(self._feed, cut.interfaces)
        return time_in_turns((self._source, self._feed), (session, pruned), _RUNS)


def latency_savings(
    stopwatch: Stopwatch,
    structures: Sequence[Structure],
    costs: Mapping[Structure, float],
    step: Callable[[str], None] = lambda _: None,
) -> Callable[[Structure, int], float]:
    """What each structure saves of the source's time (1 is all of it) when so many of its indices stay.

    Each kind is narrowed in all its structures at once, at a few levels; a structure has the share of the
    kind's saving that its FLOPs (`costs`, per index) have of the kind's.
    """
    by_kind: dict[str, list[Structure]] = {}
    for structure in structures:
        by_kind.setdefault(structure.kind, []).append(structure)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    shares: dict[Structure, float] = {}
    for kind, row in by_kind.items():
        total = sum(costs[structure] * structure.size for structure in row) or 1.0
        shares |= {structure: costs[structure] * structure.size / total for structure in row}
        gone, saved = [0.0], [0.0]
        for level in LEVELS:
            step(f"time {kind} at {level:.0%}")
            counts = {s.id: max(s.floor, 1, round(s.size * level)) for s in row}
            removed = sum(costs[s] * (s.size - counts[s.id]) for s in row) / total
            if removed > gone[-1]:
                ratio = 1 / stopwatch.measure(counts).speedup
                gone.append(removed)
                saved.append(max(1 - ratio, saved[-1]))
        curves[kind] = (gone, saved)

    def saving(structure: Structure, keep: int) -> float:
        gone, saved = curves[structure.kind]
        share = 1 - keep / structure.size
        if share > gone[-1] > 0:  # beyond what was measured: as steep as before
            slope = (saved[-1] - saved[-2]) / (gone[-1] - gone[-2])
            return shares[structure] * (saved[-1] + slope * (share - gone[-1]))
        return shares[structure] * float(np.interp(share, gone, saved))

    return saving


def described(latency: Latency, batch: int, sequence: int, regime: Regime) -> dict[str, Any]:
    """The entry of the report."""
    import onnxruntime

    how = {
        "batch": batch,
        "sequence": sequence,
        "regime": regime,
        "runtime": f"onnxruntime {onnxruntime.__version__}",
    }
    return {**latency.as_json(), **how, "method": "median of runs of source and result in turns"}
