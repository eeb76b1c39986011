"""Which products compute in 8 bits, and which fall back, so that a limit of loss holds at the least cost in time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

from onnx_autoglm.divergence import Loss
from onnx_autoglm.quantization.places import Place
from onnx_autoglm.quantization.rehearsal import Rehearsal
from onnx_autoglm.quantization.schemes import Scheme

Rounded = Callable[[Collection[str]], tuple[frozenset[str], frozenset[str]]]
_SUSPECTS = 24
_LEAST_COST = 0.2  # of the time that goes with the multiply-adds of a unit
_RUNS = 2  # for the sensitivity of one; sums are measured on all


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """The products that read one activation: they round it together, or not at all.

    `cost` is what falling back adds to the time of a run, as a share of the whole; `fallback` the scheme it falls to.
    `error` is the relative squared error of the outputs of its products on sampled rows.
    """

    activation: str
    places: tuple[Place, ...]
    cost: float
    fallback: Scheme
    error: float = 0.0

    @property
    def macs(self) -> int:
        return sum(place.macs for place in self.places)


@dataclasses.dataclass(frozen=True)
class Mix:
    """The activations that are rounded, the loss that was measured with them, and what each one adds alone.

    `everything` is the loss with all of them rounded, `nothing` that with none: of the weights.
    """

    rounded: frozenset[str]
    loss: Loss
    sensitivity: Mapping[str, float]
    everything: Loss
    nothing: Loss


def mix(
    rehearsal: Rehearsal,
    units: Sequence[Unit],
    limit: float,
    rounded: Rounded,
    known: Mix | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> Mix:
    """The most that may be rounded with a measured loss of at most `limit` (`Loss.excess`).

    Of the activations with the largest errors each is rounded alone first, which tells its sensitivity; that of the rest
    follows from their errors in proportion. Then those fall back that lower the loss most for the time they cost, as few
    as the limit allows; how many is found by halving, each time by a measurement of all together. If even none is too
    much, none is rounded.

    Args:
        rounded: what is rounded in all, and which of the activations really are, if some were chosen.
        known: an earlier result for the same units, whose measurements are used again.
    """
    names = [unit.activation for unit in units]
    everything = known.everything if known else rehearsal.measure(rounded(names)[0])
    nothing = known.nothing if known else rehearsal.measure(rounded(())[0])
    if everything.excess <= limit:
        return Mix(rounded(names)[1], everything, {}, everything, nothing)
    sensitivity = (
        known.sensitivity if known and known.sensitivity else _sensitivity(rehearsal, units, rounded, step)
    )
    macs = max(sum(unit.macs for unit in units), 1)
    # Measured times are noisy: what falls back costs something, or the least sensitive would be the first to go.
    costs = {unit: max(unit.cost, _LEAST_COST * unit.macs / macs) for unit in units}
    order = sorted(units, key=lambda unit: -sensitivity[unit.activation] / costs[unit])
    low, high = 0, len(order)  # so many fall back: too few, and enough (or all)
    best = (frozenset[str](), nothing)
    while high - low > 1:
        middle = (low + high) // 2
        step(f"mix: {middle} of {len(order)} fall back")
        chosen = frozenset(unit.activation for unit in order[middle:])
        every, chosen = rounded(chosen)
        loss = rehearsal.measure(every)
        if loss.excess <= limit:
            high, best = middle, (chosen, loss)
        else:
            low = middle
    return Mix(best[0], best[1], sensitivity, everything, nothing)


def _sensitivity(
    rehearsal: Rehearsal, units: Sequence[Unit], rounded: Rounded, step: Callable[[str], None]
) -> dict[str, float]:
    """What rounding each activation alone adds to the divergence."""
    base = rehearsal.measure((), _RUNS)
    suspects = sorted(units, key=lambda unit: -unit.error)[:_SUSPECTS]
    sensitivity = {}
    for number, unit in enumerate(suspects, 1):
        step(f"sensitivity {number} of {len(suspects)}: {unit.activation}")
        alone = rehearsal.measure([unit.activation], _RUNS)
        sensitivity[unit.activation] = max(alone.divergence - base.divergence, 0.0)
    ratio = sum(sensitivity.values()) / max(sum(unit.error for unit in suspects), 1e-30)
    for unit in units:
        sensitivity.setdefault(unit.activation, ratio * unit.error)
    return sensitivity
