"""Proves a pruned model against its source: masked equals pruned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_autoglm.errors import CheckFailed, UserError
from onnx_autoglm.feeds import VARIANTS, candidate_feeds, first_run
from onnx_autoglm.modelfile import weight_bytes
from onnx_autoglm.passes.mask import mask
from onnx_autoglm.plan import Plan, cut_arrays
from onnx_autoglm.runtime import Difference, Session, compare
from onnx_autoglm.upcast import needs_upcast, upcast

Arrays = dict[str, np.ndarray]
_LARGE_BYTES = 1 << 30  # reading more weights than this takes seconds: two sets of inputs must do


@dataclasses.dataclass(frozen=True)
class Proof:
    """The outcome of one check: the worst difference, and on which sets of inputs it was looked for.

    `effect` is the difference that the cut itself makes: between the source and the masked source, relative,
    on the same inputs. Where it is zero the inputs do not show the cut, and equality says little.
    """

    difference: Difference
    effect: float
    inputs: list[dict[str, list[int]]]
    precision: str
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.difference.within(self.tolerance)

    @property
    def is_weak(self) -> bool:
        """Whether the inputs hardly show the cut: its effect is near rounding, so equality says little."""
        return self.effect < max(self.tolerance, 100 * self.difference.relative)


def check_masked(
    source: ir.Model,
    plan: Plan,
    pruned: ir.Model,
    *,
    feeds: Arrays | None = None,
    tolerance: float = 1e-4,
    scratch: Path | None = None,
    seed: int = 0,
    step: Callable[[str], None] = lambda _: None,
) -> Proof:
    """Runs the masked source and the pruned model on the same inputs and compares all outputs.

    Models in 16-bit floats are compared in float32: the same graph and weights with wider arithmetic, so
    that rounding cannot hide a wrong cut.

    Args:
        source: the canonicalized source; unchanged.
        feeds: inputs of the source; if not given, several sets of different sizes are generated from its
            signature, one of them with holes in its masks.
        tolerance: the largest relative difference accepted, per output (float32 rounding: 1e-4).
        scratch: folder for temporary weights.
        seed: of generated inputs.
        step: told what is going on.

    Raises:
        UserError: the source does not load or run in ONNX Runtime.
        CheckFailed: the source does, and the pruned model does not.
    """
    wide = needs_upcast(source)
    masked = mask(source.clone(), plan.removals, plan.lossy)
    if wide:
        source, masked, pruned = upcast(source), upcast(masked), upcast(pruned)
    step("running the masked source")
    session = Session(masked, scratch=scratch)
    used, expected = _runs(session, masked, feeds, seed)
    del session
    step("running the source")
    session = Session(source, scratch=scratch)
    before = [session.run(feed) for feed in used]
    del session
    step("running the pruned model")
    try:
        session = Session(pruned, scratch=scratch)
        after = [session.run(cut_arrays(feed, plan.interfaces)) for feed in used]
    except UserError as error:
        # The source runs on the same inputs, so this is no fault of the user's.
        raise CheckFailed(f"the pruned model does not run where the source does: {error}") from error
    effect, differences = 0.0, []
    for source_out, masked_out, pruned_out in zip(before, expected, after, strict=True):
        moved = compare(masked_out, source_out, source_out).relative
        effect = max(effect, moved if math.isfinite(moved) else 0.0)
        wanted = cut_arrays(masked_out, plan.interfaces)
        differences.append(compare(wanted, pruned_out, cut_arrays(source_out, plan.interfaces)))
    conclusive = [difference for difference in differences if difference.inconclusive is None]
    worst = max(conclusive or differences, key=lambda difference: difference.relative)
    # Nothing is known of an output that is never finite, on whatever inputs.
    unseen = set.intersection(*(set(difference.unseen) for difference in differences))
    worst = dataclasses.replace(worst, unseen=tuple(sorted(unseen)))
    shapes = [{name: list(array.shape) for name, array in feed.items()} for feed in used]
    return Proof(worst, effect, shapes, "float32" if wide else "as exported", tolerance)


def _runs(
    session: Session, model: ir.Model, feeds: Arrays | None, seed: int
) -> tuple[list[Arrays], list[Arrays]]:
    """Feeds of several sizes on which a model runs, and its outputs. The first must run, others may."""
    if feeds is not None:
        return [feeds], [session.run(feeds)]
    variants = VARIANTS[:2] if weight_bytes(model) > _LARGE_BYTES else VARIANTS
    used, outputs = [], []
    for number, variant in enumerate(variants):
        try:
            feed, result = first_run(session, candidate_feeds(model, seed + number, variant))
        except UserError:
            if number == 0:
                raise
            continue
        used.append(feed)
        outputs.append(result)
    return used, outputs
