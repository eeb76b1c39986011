"""`convert`: a model in 16 bits, from top to bottom."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnx_autoglm import modelfile
from onnx_autoglm.convert_options import ConvertOptions
from onnx_autoglm.data import load_dataset, refuse_idle_preprocess
from onnx_autoglm.dataset import Arrays, Dataset
from onnx_autoglm.errors import CheckFailed, UserError
from onnx_autoglm.feeds import VARIANTS, candidate_feeds, first_working
from onnx_autoglm.options import collect_as
from onnx_autoglm.output import publish, staging
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.passes.check_onnx import check_loads, check_onnx
from onnx_autoglm.passes.convert_precision import (
    FORMATS,
    ConvertPrecision,
    PrecisionReport,
    convert_precision,
)
from onnx_autoglm.plan import sha256
from onnx_autoglm.precision_distance import Distance, as_inputs, distance, runnable
from onnx_autoglm.precision_options import PrecisionOptions
from onnx_autoglm.quality import compare, find_scores
from onnx_autoglm.report import finite, quality_lines
from onnx_autoglm.runtime import Session
from onnx_autoglm.self_text import write_text
from onnx_autoglm.summary import versions
from onnx_autoglm.upcast import upcast

if TYPE_CHECKING:
    from rich.console import Console

FORMAT, VERSION = "onnx-autoglm/conversion", 1
SELF_TOKENS = 1024  # text that a model writes to measure ranges on
UNMEASURED = "ranges were measured on generated inputs only: pass --calib PATH for inputs as they will come"
COMPARED = 4  # feeds on which source and result are run side by side

Progress = Callable[[str], None]


@dataclasses.dataclass
class Conversion:
    """The outcome of `convert`, as `report.json` has it."""

    source: dict[str, Any]
    result: dict[str, Any]
    conversion: PrecisionReport
    data: dict[str, Any]
    difference: Distance
    quality: dict[str, Any]
    options: dict[str, Any]
    versions: dict[str, str]
    notes: list[str]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        data: dict[str, Any] = finite(dataclasses.asdict(self))
        return {"format": FORMAT, "version": VERSION, **data}

    def print(self, console: Console) -> None:
        """Writes what was converted and what was not, and what it cost."""
        done, found = self.conversion, self.difference
        before, after = self.source["bytes"], self.result["bytes"]
        lines = [
            f"weights: {before:,} -> {after:,} bytes ({100 * after / max(before, 1):.1f} %)",
            f"{done.low} of {done.nodes} nodes compute in {done.precision}; {done.casts.all} casts between float types",
            *(
                f"  {entry['nodes']} in float32: {entry['reason']} ({entry['first']})"
                for entry in done.islands[:12]
            ),
            f"largest difference {found.largest:.1e}, rms {found.rms:.1e}, on {found.feeds} inputs",
            *(f"note: {note}" for note in self.notes),
            *(quality_lines(self.quality) if self.quality else ()),
        ]
        if len(done.islands) > 12:
            lines.insert(14, f"  ... and {len(done.islands) - 12} more reasons in report.json")
        for line in lines:
            console.print(line, highlight=False, markup=False)


def convert(
    model: Path | str,
    output: Path | str,
    options: ConvertOptions | None = None,
    *,
    progress: Progress = lambda _: None,
    **given: Any,
) -> Conversion:
    """Converts a model to float16 or bfloat16, compares it with the source and writes it.

    Writes `model.onnx` (and `model.onnx.data`) and `report.json` into the folder `output`, both or none. The input is
    never changed.

    Args:
        model: the ONNX file.
        output: the folder to write to; made if it does not exist.
        options: all options; or give single ones by the names of the command line, such as `precision="fp16"`.
        progress: told which step runs.

    Raises:
        UserError: something the user can mend; nothing was written.
        CheckFailed: the result does not load, or overflows; nothing was written.
    """
    started = time.perf_counter()
    if options is not None and given:
        raise UserError("give either options or single options, not both")
    options = collect_as(ConvertOptions, given) if options is None else options
    wanted = options.precision
    if wanted.precision == "none":
        raise UserError("say what to convert to: --precision fp16 or bf16")
    path, folder = Path(model), Path(output)
    progress("open")
    opened = modelfile.open_model(path)
    modelfile.check_output_path(opened, folder / "model.onnx")
    external = options.external_data
    if external is None and modelfile.has_external_data(opened):
        external = True
    source = canonicalize(modelfile.open_model(path))
    calibration, evaluation, notes = _data(source, path, options, progress)
    feeds = range_feeds(source, () if calibration is None else calibration)
    with staging(folder) as staged:
        target = staged / "model.onnx"
        found = convert_file(path, target, options.precision, feeds, external=external, progress=progress)
        written = modelfile.open_model(target)
        quality: dict[str, Any] = {}
        if evaluation is not None:
            running = runnable(written, FORMATS[wanted.precision])
            inputs = (as_inputs(feed, running.graph.inputs) for feed in evaluation)
            outcome = compare(source, running, evaluation, model_feeds=inputs, native=True, step=progress)
            quality = {"data": _described(evaluation), **outcome.as_json()}
        report = Conversion(
            source=_weight(opened, path.name, sha256(path)),
            result=_weight(written, target.name, sha256(target)),
            conversion=found.conversion,
            data={
                "ranges": "generated inputs" if calibration is None else _described(calibration),
                "feeds": len(feeds),
            },
            difference=found.difference,
            quality=quality,
            options=options.model_dump(mode="json"),
            versions=versions(),
            notes=list(dict.fromkeys([*notes, *found.notes])),
            seconds=round(time.perf_counter() - started, 3),
        )
        text = json.dumps(report.as_json(), indent=1, allow_nan=False)
        (staged / "report.json").write_text(text + "\n")
        publish(staged, folder)
    return report


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted file: what was done, how far it is from the source, and notes for the user."""

    conversion: PrecisionReport
    difference: Distance
    notes: tuple[str, ...]


def convert_file(
    source: Path,
    target: Path,
    wanted: PrecisionOptions,
    feeds: list[Arrays],
    *,
    external: bool | None = None,
    progress: Progress = lambda _: None,
) -> Converted:
    """Converts a model file, writes the result to another, checks that as others will see it, and compares both.

    Raises:
        UserError: the model cannot be converted.
        CheckFailed: the result does not load, or overflows where the source does not.
    """
    assert wanted.precision != "none"
    kind = FORMATS[wanted.precision]
    settings = ConvertPrecision(wanted.precision, wanted.io_precision, wanted.keep_logits_fp32)
    result, report = convert_precision(modelfile.open_model(source), settings, feeds, progress=progress)
    progress("write")
    modelfile.save_model(result, target, external=external)
    notes = [*check_onnx(target, source), *_check_loads(target, source, wanted.precision)]
    progress("compare")
    written = modelfile.open_model(target)
    difference = distance(modelfile.open_model(source), written, kind, feeds[:COMPARED])
    if difference.reason:
        raise CheckFailed(f"{wanted.precision} overflows: {difference.reason}; pass data with --calib PATH")
    if not difference.within:
        notes.append(
            f"the result is further from the source than rounding explains (rms {difference.rms:.1e}): judge it on data "
            "with --eval, or try the other format"
        )
    return Converted(report, difference, tuple(notes))


def convert_staged(
    staged: Path,
    wanted: PrecisionOptions,
    calibration: list[Arrays],
    external: bool | None,
    progress: Progress,
) -> tuple[dict[str, Any], ir.Model]:
    """Converts the model of a folder in place; returns what a report says of it, and the model as it runs here."""
    target = staged / "converted" / "model.onnx"
    feeds = range_feeds(modelfile.open_model(staged / "model.onnx"), calibration)
    found = convert_file(staged / "model.onnx", target, wanted, feeds, external=external, progress=progress)
    for file in target.parent.iterdir():
        file.replace(staged / file.name)
    target.parent.rmdir()
    done = found.conversion
    notes = [
        f"{done.low} of {done.nodes} nodes compute in {done.precision}; report.json has the others",
        *found.notes,
    ]
    if not calibration and done.measured:
        notes.append(UNMEASURED)
    running = runnable(modelfile.open_model(staged / "model.onnx"), FORMATS[done.precision])
    return {**dataclasses.asdict(found), "notes": notes}, running


def _data(
    model: ir.Model, path: Path, options: ConvertOptions, progress: Progress
) -> tuple[Dataset | None, Dataset | None, list[str]]:
    """What ranges are measured on (None: generated inputs), what quality is measured on, and notes."""
    given = options.data
    refuse_idle_preprocess(given.preprocess, (given.calibration_path, given.evaluation))
    beside = path.with_name("tokenizer.json")
    tokenizer = given.tokenizer or (beside if beside.is_file() else None)

    def read(source: Path | None, limit: int) -> Dataset | None:
        if source is None:
            return None
        settings = {"tokenizer": tokenizer, "window": given.window, "preprocess": given.preprocess}
        return load_dataset(source, model, limit=limit, **settings)  # type: ignore[arg-type]

    calibration = read(given.calibration_path, given.calibration_tokens)
    evaluation = read(given.evaluation, given.evaluation_tokens)
    if evaluation is not None:
        find_scores(model, evaluation)  # before any work is done
    notes: list[str] = []
    if calibration is None and given.calibration != "none" and options.precision.precision == "fp16":
        try:
            calibration = write_text(model, tokens=SELF_TOKENS, window=given.window, seed=0, step=progress)
            notes.append(
                "ranges were measured on text that the model wrote itself; --calib takes a text, or samples"
            )
        except UserError as error:
            if given.calibration == "self":
                raise UserError(
                    f"--calib self: {error}; pass --calib PATH (a text, or .npz samples)"
                ) from error
    if calibration is None and options.precision.precision == "fp16":
        notes.append(UNMEASURED)
    return calibration, evaluation, notes


def range_feeds(model: ir.Model, calibration: Iterable[Arrays]) -> list[Arrays]:
    """Generated inputs of several sizes, with holes in masks, and the calibration data behind them.

    Raises UserError if there are no data and no generated input runs.
    """
    floats, given = upcast(model), list(calibration)
    session = Session(floats)
    feeds: list[Arrays] = []
    for variant in VARIANTS:
        try:
            feeds.append(first_working(session, candidate_feeds(floats, variant=variant)))
        except UserError:
            if not given and variant is VARIANTS[0]:
                raise
    return [*feeds, *given]


def _check_loads(result: Path, source: Path, precision: str) -> list[str]:
    """As `check_loads`; that this machine has no bfloat16 kernels is a note."""
    try:
        return check_loads(result, source)
    except CheckFailed as error:
        if precision == "bf16" and "NOT_IMPLEMENTED" in str(error):
            return [
                "ONNX Runtime's CPU has no kernels for bfloat16: quality was measured with its rounding in float32"
            ]
        raise


def _weight(model: ir.Model, name: str, digest: str) -> dict[str, Any]:
    return {
        "file": name,
        "sha256": digest,
        "parameters": modelfile.parameters(model),
        "bytes": modelfile.weight_bytes(model),
        "nodes": model.graph.num_nodes(),
    }


def _described(data: Dataset) -> dict[str, Any]:
    return {"name": data.name, "sha256": data.sha256, "rows": data.rows}
