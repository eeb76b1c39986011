"""Which scheme each product gets, so that a limit of loss holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_autoglm.dataset import Dataset
from onnx_autoglm.quantization.chains import Chain, kept_chains, rounded_values
from onnx_autoglm.quantization.mix import Mix, Unit, mix
from onnx_autoglm.quantization.options import QuantizationOptions
from onnx_autoglm.quantization.places import Place, Refused, by_activation
from onnx_autoglm.quantization.prepare import Prepared, Progress
from onnx_autoglm.quantization.rehearsal import Rehearsal
from onnx_autoglm.quantization.schemes import Decision, Range, Scheme
from onnx_autoglm.quantization.stored import floats_tensor, rounded_rows
from onnx_autoglm.quantization.timing import Times, time_schemes

PREFILL, DECODE = 128, 1  # rows at which products are timed
_MEASURED = 16  # runs of the calibration set on which losses are measured, at most


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Everything that decides what is written: one model, several emissions.

    `model` lies in files: the float model with smoothing and batch norms folded in.
    """

    model: ir.Model
    decisions: list[Decision]
    refused: list[Refused]
    ranges: dict[str, Range]
    chains: list[Chain]
    lookups: list[str]
    smoothed: list[dict[str, Any]]
    mix: Mix | None
    times: dict[str, Times]
    notes: list[str]

    @property
    def thresholds(self) -> dict[str, float]:
        return {name: own.threshold for name, own in self.ranges.items()}

    def share(self, *schemes: Scheme) -> float:
        """The share of multiply-adds with weights that have one of these schemes."""
        total = sum(d.place.macs for d in self.decisions) + sum(entry.macs for entry in self.refused)
        return sum(d.place.macs for d in self.decisions if d.scheme in schemes) / max(total, 1)


def decide(
    source: ir.Model,
    prepared: Prepared,
    data: Dataset | None,
    options: QuantizationOptions,
    scratch: Path,
    progress: Progress = lambda _: None,
    *,
    limit: float | None = None,
    before: Plan | None = None,
) -> Plan:
    """Gives every place a scheme.

    Args:
        source: the canonical model that losses are measured against.
        limit: of the loss on calibration data; that of the options by default.
        before: an earlier plan of the same model, whose measurements are used again.
    """
    places, chains = prepared.places, prepared.chains
    notes = list(prepared.notes)
    if options.scheme not in ("auto", "w8a8"):
        return _plan(prepared, prepared.alone, [], None, {}, notes)
    assert data is not None
    times = _times(places, options, progress) if before is None else before.times
    units = _units(places, times, prepared.ranges)
    rehearsal = _rehearse(source, prepared, data, scratch, progress)
    known = None if before is None else before.mix
    found = mix(
        rehearsal,
        units,
        options.max_loss if limit is None else limit,
        lambda chosen: rounded_values(places, chains, chosen),
        known,
        progress,
    )
    schemes: dict[str, Scheme] = {}
    for unit in units:
        own: Scheme = "w8a8" if unit.activation in found.rounded else unit.fallback
        schemes |= {place.node: own for place in unit.places}
    if options.scheme == "auto" and _is_slower(places, schemes, times):
        notes.append("8-bit weights alone are as fast here as with 8-bit activations, and lose less")
        schemes = prepared.alone
    active = {place.node for place in places if schemes[place.node] == "w8a8"}
    whole = kept_chains(places, chains, active)
    return _plan(prepared, schemes, whole, found, times, notes)


def _plan(
    prepared: Prepared,
    schemes: Mapping[str, Scheme],
    chains: list[Chain],
    found: Mix | None,
    times: dict[str, Times],
    notes: list[str],
) -> Plan:
    decisions = [
        Decision(
            place,
            schemes[place.node],
            prepared.weights[place.initializer],
            _why(place, schemes[place.node], found),
        )
        for place in prepared.places
    ]
    return Plan(
        prepared.model,
        decisions,
        prepared.refused,
        prepared.ranges,
        chains,
        prepared.lookups,
        prepared.smoothed,
        found,
        times,
        notes,
    )


def _times(places: Sequence[Place], options: QuantizationOptions, progress: Progress) -> dict[str, Times]:
    regimes = {"prefill": PREFILL, "decode": DECODE}
    return {
        regime: time_schemes(places, ("float", "w8", "w8a8"), rows, progress)
        for regime, rows in regimes.items()
        if options.regime in ("both", regime)
    }


def _rehearse(
    source: ir.Model, prepared: Prepared, data: Dataset, scratch: Path, progress: Progress
) -> Rehearsal:
    """The prepared model with the weights that its integers stand for."""
    rounded = prepared.model.clone()
    for place in prepared.places:
        value = rounded.graph.initializers[place.initializer]
        tensor = prepared.model.graph.initializers[place.initializer].const_value
        assert tensor is not None
        value.const_value = floats_tensor(prepared.weights[place.initializer], place, tensor)
    products = {place.initializer for place in prepared.places}
    for name in prepared.lookups:
        value = rounded.graph.initializers[name]
        if name not in products and value.const_value is not None:
            value.const_value = rounded_rows(value.const_value)
    step = max(1, len(data.feeds) // _MEASURED)
    numbers = list(range(0, len(data.feeds), step))[:_MEASURED]
    thresholds = {name: own.threshold for name, own in prepared.ranges.items()}
    readers: dict[str, set[str]] = {name: set() for name in thresholds}
    for place in prepared.places:
        readers[place.activation].add(place.node)
    results = {chain.values[-1] for chain in prepared.chains}
    only = {name: None if name in results else readers[name] for name in thresholds}
    return Rehearsal(source, rounded, thresholds, data, numbers, only, scratch=scratch, step=progress)


def _units(places: Sequence[Place], times: dict[str, Times], ranges: dict[str, Range]) -> list[Unit]:
    """One unit per activation, with the cheapest fallback by the measured times."""
    total = sum(place.macs for place in places)
    units = []
    for name, own in by_activation(places).items():
        if any(place.op == "Conv" for place in own):
            cost = sum(place.macs for place in own) / total
            units.append(Unit(name, tuple(own), cost, "float", ranges[name].error))
            continue
        costs = {scheme: _time(own, times, scheme, places) for scheme in ("w8", "float", "w8a8")}
        fallback: Scheme = "w8" if costs["w8"] <= costs["float"] else "float"
        cost = costs[fallback] - costs["w8a8"]
        units.append(Unit(name, tuple(own), cost, fallback, ranges[name].error))
    return units


def _time(own: Sequence[Place], times: dict[str, Times], scheme: Scheme, places: Sequence[Place]) -> float:
    """What products take in a scheme, as a share of what all take in floating point; the mean over regimes."""
    shares = []
    for table in times.values():
        whole = sum(table[place.inputs, place.outputs, "float"] for place in places if place.op != "Conv")
        shares.append(
            sum(table[place.inputs, place.outputs, scheme] for place in own if place.op != "Conv") / whole
        )
    return sum(shares) / max(len(shares), 1)


def _is_slower(places: Sequence[Place], schemes: dict[str, Scheme], times: dict[str, Times]) -> bool:
    """Whether the mix takes as long as 8-bit weights alone."""
    products = [place for place in places if place.op != "Conv"]
    if len(products) < len(places):
        return False
    mixed = sum(_time([place], times, schemes[place.node], products) for place in products)
    return mixed >= _time(products, times, "w8", products)


def _why(place: Place, scheme: Scheme, found: Mix | None) -> str:
    if scheme == "w8a8" or found is None:
        return ""
    alone = found.sensitivity.get(place.activation)
    return "" if alone is None else f"8-bit activations alone add {alone:.1e} to the loss here"
