"""From a float model to its integer emissions, from top to bottom."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_autoglm import modelfile
from onnx_autoglm.axes.structures import Structures
from onnx_autoglm.cut import analyse
from onnx_autoglm.dataset import Dataset
from onnx_autoglm.errors import CheckFailed, UserError
from onnx_autoglm.options import matches
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.passes.check_onnx import check_loads, check_onnx
from onnx_autoglm.passes.fold_batchnorm import fold_batchnorm
from onnx_autoglm.passes.insert_qdq import insert_qdq
from onnx_autoglm.passes.smooth import smooth
from onnx_autoglm.quantization.absorb import Folding, Refusal, find_folding
from onnx_autoglm.quantization.audit import Audit, audit
from onnx_autoglm.quantization.calibrate import Recording, constant_activations, record
from onnx_autoglm.quantization.chains import Chain, find_chains
from onnx_autoglm.quantization.choose_ranges import choose_ranges, range_of
from onnx_autoglm.quantization.mix import Mix, Unit, mix
from onnx_autoglm.quantization.options import QuantizationOptions
from onnx_autoglm.quantization.places import Place, Refused, find_places
from onnx_autoglm.quantization.refuse import refuse_quantized
from onnx_autoglm.quantization.rehearsal import Rehearsal
from onnx_autoglm.quantization.round_weights import round_weights
from onnx_autoglm.quantization.schemes import FILES, Decision, Range, Scheme, Target
from onnx_autoglm.quantization.stored import Shelf, floats_tensor
from onnx_autoglm.quantization.timing import Times, time_schemes
from onnx_autoglm.quantization.weights import Bits, Quantized
from onnx_autoglm.runtime import Session, compare
from onnx_autoglm.upcast import needs_upcast, upcast, upcast_arrays
from onnx_autoglm.value_types import complete_types

Progress = Callable[[str], None]
PREFILL, DECODE = 128, 1  # rows at which products are timed
_MEASURED = 16  # runs of the calibration set on which losses are measured, at most
_SAME, _SAME_16 = (
    1e-3,
    3e-2,
)  # relative differences that rounding of rescaled weights may leave, by their type


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


def plan_quantization(
    source: ir.Model,
    data: Dataset | None,
    options: QuantizationOptions,
    scratch: Path,
    progress: Progress = lambda _: None,
    max_loss: float | None = None,
) -> Plan:
    """Decides how a canonical model is quantized, by a scheme other than `none`; the model stays as it is.

    Args:
        data: calibration data; needed for 8-bit activations, for GPTQ and for smoothing.
        scratch: a folder for everything that is large.
        max_loss: overrides that of the options.

    Raises UserError for a model that is quantized already or has nothing to quantize, or data that it does not run on.
    """
    refuse_quantized(source, "the model")
    scratch.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    model = source.clone()
    complete_types(model)
    folded = fold_batchnorm(model)
    if folded:
        notes.append(f"{folded} batch norms were folded into the convolutions before them")
    structures = analyse(model.clone())
    places, refused = find_places(structures)
    places = [place for place in places if not _kept(place, options.keep_float)]
    if not places:
        raise UserError(
            "nothing can be quantized: "
            + (refused[0].reason if refused else "the model has no product of an activation and a weight")
        )
    scheme = options.scheme
    assert scheme != "none"
    if scheme in ("auto", "w8a8", "fp8") and data is None:
        raise UserError(
            "8-bit activations need calibration data: pass --calib PATH (a text, or samples), or --quantize w8 for weights "
            "alone"
        )
    smoothed: list[dict[str, Any]] = []
    recordings: dict[str, Recording] = {}
    others: dict[str, Range] = {}
    chains = find_chains(model.graph, places) if scheme in ("auto", "w8a8") else []
    if data is not None:
        if options.smooth and scheme in ("auto", "w8a8", "fp8"):
            smoothed = _smooth(model, structures, places, data, scratch, progress)
        _refuse_change(source, model, data)
        progress("write the smoothed model")
        modelfile.save_model(model, scratch / "smoothed" / "model.onnx", external=True)
        model = canonicalize(modelfile.open_model(scratch / "smoothed" / "model.onnx"))
        recordings, others = _record(model, places, chains, data, options, scratch, progress)
        dead = set(constant_activations(recordings))
        if dead:
            notes.append(
                f"{len(dead)} activations are zero on all calibration data and stay in floating point: {', '.join(sorted(dead)[:3])}"
            )
            places = [place for place in places if place.activation not in dead]
    ranges = choose_ranges(model, places, recordings, options.calibrator, progress) if recordings else {}
    bits: Bits = 4 if scheme == "w4" else 8
    block = options.block if scheme == "w4" else None
    shelf = Shelf(scratch / "weights")
    weights = round_weights(model, places, recordings, ranges, shelf, bits, block, options.rounding, progress)
    times = {}
    if scheme == "auto" or scheme == "w8a8":
        regimes = {"prefill": PREFILL, "decode": DECODE}
        for regime, rows in regimes.items():
            if options.regime in ("both", regime):
                times[regime] = time_schemes(places, ("float", "w8", "w8a8"), rows, progress)
    found: Mix | None = None
    schemes: dict[str, Scheme] = {}
    if scheme in ("auto", "w8a8"):
        assert data is not None
        limit = options.max_loss if max_loss is None else max_loss
        units = _units(places, times, ranges)
        found = _mix(
            source,
            model,
            places,
            weights,
            {**ranges, **others},
            units,
            chains,
            data,
            limit,
            scratch,
            progress,
        )
        for unit in units:
            own: Scheme = "w8a8" if unit.activation in found.rounded else unit.fallback
            schemes |= {place.node: own for place in unit.places}
        if scheme == "auto" and _is_slower(places, schemes, times):
            notes.append("8-bit weights alone are as fast here as with 8-bit activations, and lose less")
            schemes = {place.node: "float" if place.op == "Conv" else "w8" for place in places}
    else:
        weights_alone: dict[str, Scheme] = {"w8": "w8", "w4": "w4", "fp8": "fp8"}
        schemes = {place.node: "float" if place.op == "Conv" else weights_alone[scheme] for place in places}
    chains = [chain for chain in chains if _is_whole(chain, chains, schemes)]
    decisions = [
        Decision(
            place,
            schemes[place.node],
            weights[place.initializer],
            _why(place, schemes[place.node], scheme, found),
        )
        for place in places
    ]
    return Plan(model, decisions, refused, {**ranges, **others}, chains, smoothed, found, times, notes)


def emit(
    plan: Plan, target: Target, source: Path, folder: Path, options: QuantizationOptions, progress: Progress
) -> Path:
    """Writes one emission into a folder and checks that it is a valid model that loads; returns its path.

    Raises CheckFailed if the ONNX checker or ONNX Runtime refuses it, but not the `source`.
    """
    progress(f"write {FILES[target]}")
    model = plan.model.clone()
    insert_qdq(
        model, plan.decisions, plan.thresholds, target, plan.chains, lookups=options.embedding == "int8"
    )
    path = folder / FILES[target]
    modelfile.save_model(model, path)
    check_onnx(path, source)
    if target == "cpu":
        check_loads(path, source)
    return path


def audited(path: Path, plan: Plan, strict: bool, scratch: Path) -> tuple[Audit, list[str]]:
    """Whether the CPU emission runs in integers as promised, and a note if not.

    Raises CheckFailed if it does not and `strict` is set.
    """
    result = audit(path, plan.decisions, scratch)
    if result.holds:
        return result, []
    first = result.fell_back[0]
    message = (
        f"{len(result.fell_back)} of {result.promised} products run in floating point in ONNX Runtime although their weights "
        f"are integers, the first {first['node']} ({first['kernel']})"
    )
    if strict:
        raise CheckFailed(f"{message}; leave --strict out to write it nevertheless")
    return result, [f"WARNING: {message}"]


def _kept(place: Place, globs: tuple[str, ...]) -> bool:
    return bool(globs) and (
        matches(place.label, globs) or matches(place.node, globs) or matches(place.initializer, globs)
    )


def _smooth(
    model: ir.Model,
    structures: Structures,
    places: Sequence[Place],
    data: Dataset,
    scratch: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    recordings, _ = record(
        model, places, data.feeds, scratch=scratch, step=lambda text: progress(f"smooth: {text}")
    )
    foldings: list[Folding] = []
    stay: list[dict[str, Any]] = []
    for name, own in _by_activation(places).items():
        try:
            foldings.append(find_folding(structures.analysis, own))
        except Refusal as refusal:
            stay.append({"activation": name, "strength": None, "reason": str(refusal)})
    return smooth(model, foldings, recordings, step=progress) + stay


def _refuse_change(source: ir.Model, model: ir.Model, data: Dataset) -> None:
    """Raises CheckFailed if the smoothed model computes something else than the source."""
    outputs = []
    for one in (source, model):
        session = Session(upcast(one) if needs_upcast(one) else one)
        feed = {name: array for name, array in data.feeds[0].items() if name in session.input_names}
        feed = upcast_arrays(feed) if needs_upcast(one) else feed
        outputs.append(session.run(feed))
    difference = compare(*outputs)
    if not difference.within(_SAME_16 if needs_upcast(source) else _SAME) and difference.inconclusive is None:
        raise CheckFailed(
            f"folding changed what the model computes: {difference.output} differs by {difference.relative:.1e}; pass "
            "--no-smooth, and report this"
        )


def _record(
    model: ir.Model,
    places: Sequence[Place],
    chains: Sequence[Chain],
    data: Dataset,
    options: QuantizationOptions,
    scratch: Path,
    progress: Progress,
) -> tuple[dict[str, Recording], dict[str, Range]]:
    """Recordings of what places read, and ranges of the other values that are to be integers."""
    read = {place.activation for place in places}
    extra = {chain.values[-1] for chain in chains} - read
    moments = scratch / "moments" if options.rounding == "gptq" else None
    recordings, histograms = record(
        model, places, data.feeds, moments=moments, others=sorted(extra), scratch=scratch, step=progress
    )
    return recordings, {
        name: range_of(own, options.calibrator) for name, own in histograms.items() if own.largest > 0
    }


def _by_activation(places: Sequence[Place]) -> dict[str, list[Place]]:
    found: dict[str, list[Place]] = {}
    for place in places:
        found.setdefault(place.activation, []).append(place)
    return found


def _units(places: Sequence[Place], times: dict[str, Times], ranges: dict[str, Range]) -> list[Unit]:
    """One unit per activation, with the cheapest fallback by the measured times."""
    total = sum(place.macs for place in places)
    units = []
    for name, own in _by_activation(places).items():
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


def _mix(
    source: ir.Model,
    model: ir.Model,
    places: Sequence[Place],
    weights: dict[str, Quantized],
    ranges: dict[str, Range],
    units: Sequence[Unit],
    chains: Sequence[Chain],
    data: Dataset,
    limit: float,
    scratch: Path,
    progress: Progress,
) -> Mix:
    rounded = model.clone()
    for place in places:
        value = rounded.graph.initializers[place.initializer]
        tensor = model.graph.initializers[place.initializer].const_value
        assert tensor is not None
        value.const_value = floats_tensor(weights[place.initializer], place, tensor)
    step = max(1, len(data.feeds) // _MEASURED)
    numbers = list(range(0, len(data.feeds), step))[:_MEASURED]
    thresholds = {name: own.threshold for name, own in ranges.items()}
    rehearsal = Rehearsal(source, rounded, thresholds, data, numbers, scratch=scratch, step=progress)
    read = {place.activation for place in places}
    always = [
        chain.values[-1] for chain in chains if chain.values[-1] not in read and chain.values[-1] in ranges
    ]
    return mix(rehearsal, units, limit, always, progress)


def _is_whole(chain: Chain, chains: Sequence[Chain], schemes: dict[str, Scheme]) -> bool:
    """Whether all convolutions that a chain is about compute in 8 bits."""
    if not chain.operands:
        return schemes.get(chain.node) == "w8a8"
    return True


def _why(place: Place, scheme: Scheme, asked: str, found: Mix | None) -> str:
    if scheme == "w8a8" or found is None or asked not in ("auto", "w8a8"):
        return ""
    alone = found.sensitivity.get(place.activation)
    return "" if alone is None else f"8-bit activations alone add {alone:.1e} to the loss here"
