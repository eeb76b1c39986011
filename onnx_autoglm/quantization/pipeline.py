"""`quantize`, from top to bottom, and the same as a stage of `optimize`."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict

from onnx_autoglm import modelfile
from onnx_autoglm.errors import UserError
from onnx_autoglm.evidence import Data
from onnx_autoglm.feed_roles import token_roles
from onnx_autoglm.latency import time_in_turns
from onnx_autoglm.latency_table import workload
from onnx_autoglm.options import DataOptions, Options, collect_as
from onnx_autoglm.output import publish, staging
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.plan import sha256
from onnx_autoglm.quantization.decide import PREFILL, Plan, decide
from onnx_autoglm.quantization.emit import audited, emit
from onnx_autoglm.quantization.mix import Mix
from onnx_autoglm.quantization.options import QuantizationOptions
from onnx_autoglm.quantization.prepare import prepare
from onnx_autoglm.quantization.report import QuantizationReport, products
from onnx_autoglm.quantization.schemes import FILES, Scheme, Target
from onnx_autoglm.runtime import Session
from onnx_autoglm.summary import versions

Progress = Callable[[str], None]
REPORT = "quantization.json"
_ATTEMPTS = 3  # to meet the limit of loss on the evaluation data
_SAFE = 0.85  # of what activations may add, when one attempt missed the limit
_RUNS = 15
_LOSSES = ("loss", "everything", "nothing")


class QuantizeOptions(BaseModel):
    """Everything that `quantize` can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quantization: QuantizationOptions = QuantizationOptions()
    data: DataOptions = DataOptions()


def quantize(
    model: Path | str,
    output: Path | str,
    *,
    config: Path | str | None = None,
    progress: Progress = lambda _: None,
    **given: Any,
) -> QuantizationReport:
    """Quantizes a model and writes its emissions.

    Writes `model.onnx` (the float model, unchanged), `model.cpu.onnx`, `model.trt.onnx` and `quantization.json` into the
    folder `output`, all or none; large weights go beside each model. The input is never changed.

    Args:
        model: the ONNX file in floating point.
        given: options by the names of the command line, such as `quantize="w8a8", calib="text.txt"`.
        config: a YAML file with sections `quantization` and `data`, below the single options.

    Raises:
        UserError: something the user can mend; nothing was written.
        CheckFailed: a check of the result failed; nothing was written.
    """
    options = collect_as(QuantizeOptions, given, config)
    if options.quantization.scheme == "none":
        raise UserError("--quantize none leaves nothing to do: choose auto, w8a8, w8, w4 or fp8")
    path, folder = Path(model), Path(output)
    source = modelfile.open_model(path)
    target = folder / "model.onnx"
    is_same = target.exists() and target.samefile(path)
    for name in (*FILES.values(), *([] if is_same else ["model.onnx"])):
        modelfile.check_output_path(source, folder / name)
    canonicalize(source)
    data = _data(source, path, options, progress)
    with staging(folder) as staged:
        report = quantize_into(path, source, data, options.quantization, staged, progress)
        if not is_same:
            progress("copy the float model")
            modelfile.save_model(modelfile.open_model(path), staged / "model.onnx")
        report.write(staged / REPORT)
        if is_same:
            emissions = [name for file in FILES.values() for name in (file, f"{file}.data")]
            publish(staged, folder, (*emissions, REPORT))
        else:
            publish(staged, folder)
    return report


def quantize_into(
    path: Path,
    source: ir.Model,
    data: Data,
    options: QuantizationOptions,
    folder: Path,
    progress: Progress = lambda _: None,
) -> QuantizationReport:
    """Writes the emissions of a canonical model that lies at `path` into a folder, and measures them.

    Where the measured loss on the evaluation data exceeds the limit, more products fall back, until it holds.

    Raises UserError if it does not hold whatever falls back.
    """
    started = time.perf_counter()
    targets: list[Target] = ["cpu", "tensorrt"] if options.target == "all" else [options.target]
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=folder, ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        prepared = prepare(source, data.calibration, options, scratch, progress)
        plan: Plan | None = None
        limit = options.max_loss
        for _ in range(_ATTEMPTS):
            plan = decide(
                source, prepared, data.calibration, options, scratch, progress, limit=limit, before=plan
            )
            files = {target: emit(plan, target, path, folder, progress) for target in targets}
            measured = next((target for target in targets if target == "cpu"), targets[0])
            quality = _quality(path, files[measured], data, progress)
            missed = _missed(quality, options)
            if not missed or plan.mix is None:
                break
            limit = _tighter(plan.mix, quality, options.max_loss)
        assert plan is not None
        if missed:
            raise UserError(missed)
        notes = [*data.notes, *plan.notes]
        audits: dict[str, Any] = {}
        if "cpu" in files:
            progress("audit kernels")
            result, more = audited(files["cpu"], plan, options.strict, scratch)
            audits, notes = result.as_json(), notes + more
        latency = _latency(source, files["cpu"], options, progress) if "cpu" in files else {}
        report = QuantizationReport(
            source={"file": path.name, "sha256": sha256(path), "bytes": modelfile.weight_bytes(source)},
            scheme=options.scheme,
            files={target: _described(file) for target, file in files.items()},
            products=products(plan, source),
            left_alone=[dataclasses.asdict(entry) for entry in plan.refused],
            share=_shares(plan),
            smoothed=plan.smoothed,
            loss={}
            if plan.mix is None
            else {name: dataclasses.asdict(getattr(plan.mix, name)) for name in _LOSSES},
            quality=quality,
            audit=audits,
            latency=latency,
            calibration=data.described() or {},
            options=options.model_dump(mode="json"),
            seconds=time.perf_counter() - started,
            versions=versions(),
            notes=list(dict.fromkeys(notes)),
        )
    return report


def _data(source: ir.Model, path: Path, options: QuantizeOptions, progress: Progress) -> Data:
    whole = Options(data=options.data)
    data = Data.load(source, path, whole)
    learns = options.quantization.scheme not in ("w8",) or options.quantization.rounding == "gptq"
    if options.data.calibration in ("auto", "self") and learns:
        data = data.with_self_text(source, whole, progress)
    return data


def _quality(path: Path, emission: Path, data: Data, progress: Progress) -> dict[str, Any]:
    """Quality of the float model and of an emission, side by side on the evaluation data."""
    if data.evaluation is None:
        return {}
    result = modelfile.open_model(emission)
    return data.compare(modelfile.open_model(path), result, progress)


def _missed(quality: dict[str, Any], options: QuantizationOptions) -> str:
    """Why the limit of loss does not hold, or nothing. Weights alone are not bound by it: nothing could fall back."""
    if not quality or quality["metric"] == "agreement" or options.scheme not in ("auto", "w8a8"):
        return ""
    lost = _lost(quality)
    if not math.isfinite(lost) or lost > options.max_loss:
        return (
            f"quantizing loses {lost:.1%} on {quality['data']['name']}, more than the limit of {options.max_loss:.1%}, "
            "whatever falls back: raise --max-loss, or pass calibration data (--calib) that is more like it"
        )
    return ""


def _lost(quality: dict[str, Any]) -> float:
    """The share of quality that was lost: of perplexity, or of top-1."""
    ratio = float(quality["ratio"])
    return ratio - 1 if quality["metric"] == "perplexity" else 1 - ratio


def _tighter(found: Mix, quality: dict[str, Any], limit: float) -> float:
    """The limit on calibration data that would have met the limit on evaluation data.

    Weights alone are taken to lose the same on both, and what activations add to grow in proportion.
    """
    weights, rehearsed, measured = found.nothing.excess, found.loss.excess, _lost(quality)
    if not weights < limit < measured:
        return weights
    return weights + (rehearsed - weights) * (limit - weights) / (measured - weights) * _SAFE


def _latency(
    source: ir.Model, emission: Path, options: QuantizationOptions, progress: Progress
) -> dict[str, Any]:
    """Times of source and emission in turns, prompt and one more token, as far as asked for and possible."""
    roles = token_roles(source)
    has_cache = roles is not None and bool(roles.past_symbols)
    before = Session(source, optimize=True)
    after = Session(modelfile.open_model(emission), optimize=True)
    found: dict[str, Any] = {}
    for regime in ("prefill", "decode"):
        if options.regime not in ("both", regime) or (regime == "decode" and not has_cache):
            continue
        feed = workload(source, 1, PREFILL, "decode" if regime == "decode" else "prefill")
        own = {name: array for name, array in feed.items() if name in before.input_names}
        found[regime] = time_in_turns((before, own), (after, own), _RUNS, progress).as_json()
    return found


def _shares(plan: Plan) -> dict[str, float]:
    """The share of weighted multiply-adds by scheme."""
    names: tuple[Scheme, ...] = ("w8a8", "w8", "w4", "fp8", "float")
    return {scheme: share for scheme in names if (share := plan.share(scheme)) > 0}


def _described(file: Path) -> dict[str, Any]:
    beside = modelfile.data_path(file)
    size = file.stat().st_size + (beside.stat().st_size if beside.exists() else 0)
    return {"file": file.name, "bytes": size, "sha256": sha256(file)}
