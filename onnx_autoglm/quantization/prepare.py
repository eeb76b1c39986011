"""Everything about a model that does not depend on how much it may lose: smoothing, ranges, integer weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_autoglm import modelfile
from onnx_autoglm.axes.structures import Structures
from onnx_autoglm.cut import analyse
from onnx_autoglm.dataset import Dataset
from onnx_autoglm.errors import UserError
from onnx_autoglm.options import matches
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.passes.fold_batchnorm import fold_batchnorm
from onnx_autoglm.passes.smooth import smooth
from onnx_autoglm.quantization.absorb import Folding, Refusal, find_folding
from onnx_autoglm.quantization.calibrate import Recording, constant_activations, record
from onnx_autoglm.quantization.chains import Chain, find_chains
from onnx_autoglm.quantization.choose_ranges import choose_ranges, range_of
from onnx_autoglm.quantization.lookups import find_lookups
from onnx_autoglm.quantization.options import QuantizationOptions
from onnx_autoglm.quantization.places import Place, Refused, by_activation, find_places
from onnx_autoglm.quantization.ranges import LEVELS
from onnx_autoglm.quantization.refuse import refuse_quantized
from onnx_autoglm.quantization.round_weights import round_weights
from onnx_autoglm.quantization.same import refuse_change
from onnx_autoglm.quantization.schemes import Range, Scheme
from onnx_autoglm.quantization.stored import Shelf
from onnx_autoglm.quantization.weights import Quantized
from onnx_autoglm.value_types import complete_types

Progress = Callable[[str], None]
ROUNDING = ("auto", "w8a8", "fp8")  # schemes with 8-bit activations


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A model ready to be quantized.

    `model` lies in files: the float model with smoothing and batch norms folded in. `ranges` are those of activations
    and of the results of `chains`, `lookups` the tables of embeddings to be stored in 8 bits, `weights` by initializer, `alone` the scheme of each place by node if its activation
    stays in floating point.
    """

    model: ir.Model
    places: list[Place]
    refused: list[Refused]
    ranges: dict[str, Range]
    chains: list[Chain]
    lookups: list[str]
    weights: dict[str, Quantized]
    alone: dict[str, Scheme]
    smoothed: list[dict[str, Any]]
    notes: list[str]


def prepare(
    source: ir.Model,
    data: Dataset | None,
    options: QuantizationOptions,
    scratch: Path,
    progress: Progress = lambda _: None,
) -> Prepared:
    """Smooths, calibrates and rounds, for a scheme other than `none`; the canonical source stays as it is.

    Args:
        data: calibration data; needed for 8-bit activations, for GPTQ and for smoothing.
        scratch: a folder for everything that is large.

    Raises UserError for a model that is quantized already or has nothing to quantize, or data that it does not run on.
    """
    refuse_quantized(source, "the model")
    scratch.mkdir(parents=True, exist_ok=True)
    scheme = options.scheme
    if scheme in ROUNDING and data is None:
        raise UserError(
            "8-bit activations need calibration data: pass --calib PATH (a text, or samples), or --quantize w8 for weights "
            "alone"
        )
    notes: list[str] = []
    model = source.clone()
    complete_types(model)
    if folded := fold_batchnorm(model):
        notes.append(f"{folded} batch norms were folded into the convolutions before them")
    structures = analyse(model.clone())
    places, refused = find_places(structures)
    places = [place for place in places if not _kept(place, options.keep_float)]
    if not places:
        why = refused[0].reason if refused else "the model has no product of an activation and a weight"
        raise UserError(f"nothing can be quantized: {why}")
    chains = find_chains(model.graph, places) if scheme in ("auto", "w8a8") else []
    lookups = find_lookups(model) if options.embedding == "int8" else []
    lookups = [name for name in lookups if not matches(name, options.keep_float)]
    smoothed: list[dict[str, Any]] = []
    recordings: dict[str, Recording] = {}
    ranges: dict[str, Range] = {}
    if data is not None:
        if options.smooth and scheme in (*ROUNDING, "w4"):
            block = options.block if scheme == "w4" else None
            smoothed = _smooth(model, structures, places, data, block, scratch, progress)
        refuse_change(source, model, data)
        progress("write the smoothed model")
        modelfile.save_model(model, scratch / "smoothed" / "model.onnx", external=True)
        model = canonicalize(modelfile.open_model(scratch / "smoothed" / "model.onnx"))
        recordings, ranges = _record(model, places, chains, data, options, scratch, progress)
        if dead := set(constant_activations(recordings)):
            named = ", ".join(sorted(dead)[:3])
            notes.append(
                f"{len(dead)} activations are zero on all calibration data and stay in floating point: {named}"
            )
            places = [place for place in places if place.activation not in dead]
        read = {place.activation for place in places}
        chains = [chain for chain in chains if chain.values[-1] in ranges or chain.values[-1] in read]
        if scheme in ROUNDING:
            ranges |= choose_ranges(model, places, recordings, options.calibrator, progress)
    if scheme in ROUNDING:
        # A range so narrow that its step is zero in the type of the graph cannot be written.
        dead = {name for name, own in ranges.items() if own.threshold / LEVELS < _least(model, name)}
        ranges = {name: own for name, own in ranges.items() if name not in dead}
        places = [place for place in places if place.activation not in dead]
        chains = [chain for chain in chains if chain.values[-1] not in dead]
        ended = {chain.node for chain in chains}
        lone = [place for place in places if place.op == "Conv" and place.node not in ended]
        why = "no kernel computes a convolution of integers to floats, and its result cannot be integers"
        refused += [Refused(place.label, why, place.macs) for place in lone]
        places = [place for place in places if place not in lone]
        if not places:
            raise UserError(
                f"nothing can be quantized: {refused[-1].reason if refused else 'all activations are zero'}"
            )
    alone = {place.node: _alone(model, place, scheme) for place in places}
    weights = round_weights(
        model,
        places,
        recordings,
        ranges,
        Shelf(scratch / "weights"),
        {place.initializer: options.block for place in places if alone[place.node] == "w4"},
        options.rounding,
        progress,
    )
    return Prepared(model, places, refused, ranges, chains, lookups, weights, alone, smoothed, notes)


def _least(model: ir.Model, name: str) -> float:
    """The smallest normal number of the type of a value."""
    value = next((v for node in model.graph for v in node.outputs if v.name == name), None)
    is_half = value is not None and value.dtype == ir.DataType.FLOAT16
    return float(np.finfo(np.float16 if is_half else np.float32).tiny)


def _alone(model: ir.Model, place: Place, scheme: str) -> Scheme:
    """How a place computes with its activation in floating point."""
    if place.op == "Conv":
        return "float"  # no kernel multiplies an image by packed weights
    table = model.graph.initializers[place.initializer]
    is_table = any(user.op_type == "Gather" for user, _ in table.uses())
    if scheme == "w4" and not is_table:  # rows of a table are looked up in 8 bits
        return "w4"
    return "fp8" if scheme == "fp8" else "w8"


def _kept(place: Place, globs: tuple[str, ...]) -> bool:
    return bool(globs) and (
        matches(place.label, globs) or matches(place.node, globs) or matches(place.initializer, globs)
    )


def _smooth(
    model: ir.Model,
    structures: Structures,
    places: Sequence[Place],
    data: Dataset,
    block: int | None,
    scratch: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    recordings, _ = record(
        model, places, data.feeds, scratch=scratch, step=lambda text: progress(f"smooth: {text}")
    )
    foldings: list[Folding] = []
    stay: list[dict[str, Any]] = []
    for name, own in by_activation(places).items():
        try:
            folding = find_folding(structures.analysis, own)
            if block is not None and folding.lookups:
                raise Refusal("its weight is a table of embeddings, which stays in 8 bits")
            foldings.append(folding)
        except Refusal as refusal:
            stay.append({"activation": name, "strength": None, "reason": str(refusal)})
    return smooth(model, foldings, recordings, block=block, step=progress) + stay


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
