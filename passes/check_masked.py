"""Proves a pruned model against its source: masked equals pruned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_autoglm.errors import CheckFailed, UserError
from onnx_autoglm.feeds import candidate_feeds, first_run
from onnx_autoglm.passes.mask import mask
from onnx_autoglm.plan import Plan, cut_arrays
from onnx_autoglm.runtime import Difference, Session, compare
from onnx_autoglm.upcast import needs_upcast, upcast

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Proof:
    """The outcome of one check: the worst difference, and on what inputs it was seen.

    `effect` is the difference that the cut itself makes: between the source and the masked source, relative,
    on the same inputs. Where it is zero the inputs do not show the cut, and equality says little.
    """

    difference: Difference
    effect: float
    inputs: dict[str, list[int]]
    precision: str
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.difference.within(self.tolerance)


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
        feeds: inputs of the source; generated from its signature if not given.
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
    candidates: Iterable[Arrays] = [feeds] if feeds is not None else candidate_feeds(masked, seed)
    used, expected = first_run(session, candidates)
    del session
    step("running the source")
    effect = compare(Session(source, scratch=scratch).run(used), expected).relative
    step("running the pruned model")
    try:
        actual = Session(pruned, scratch=scratch).run(cut_arrays(used, plan.interfaces))
    except UserError as error:
        # The source runs on the same inputs, so this is no fault of the user's.
        raise CheckFailed(f"the pruned model does not run where the source does: {error}") from error
    difference = compare(cut_arrays(expected, plan.interfaces), actual)
    shapes = {name: list(array.shape) for name, array in used.items()}
    return Proof(difference, effect, shapes, "float32" if wide else "as exported", tolerance)
