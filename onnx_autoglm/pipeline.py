"""`optimize`, `inspect` and `check`, each from top to bottom."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_autoglm import modelfile
from onnx_autoglm.budget import Outcome, Spender
from onnx_autoglm.clock import Clock
from onnx_autoglm.consumers import normed_values
from onnx_autoglm.conversion import convert_staged
from onnx_autoglm.criteria import score
from onnx_autoglm.cut import analyse, apply_selection
from onnx_autoglm.engine_stage import add_engine
from onnx_autoglm.errors import CheckFailed, UserError
from onnx_autoglm.evidence import Data, Evidence
from onnx_autoglm.feed_files import load_feeds
from onnx_autoglm.flops import count_flops
from onnx_autoglm.options import TOLERANCE, Options, collect
from onnx_autoglm.output import publish, staging
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.passes.check_masked import Proof, check_masked
from onnx_autoglm.passes.check_onnx import check_loads, check_onnx
from onnx_autoglm.passes.choose import choose, shortfalls
from onnx_autoglm.passes.remove_blocks import chosen_blocks
from onnx_autoglm.passes.repair_weights import repair_weights
from onnx_autoglm.passes.swap_choice import swap_choice
from onnx_autoglm.plan import Plan, cut_arrays, sha256
from onnx_autoglm.quantization.pipeline import REPORT as QUANTIZATION_REPORT
from onnx_autoglm.quantization.pipeline import quantize_into
from onnx_autoglm.report import Inspection, Report
from onnx_autoglm.request import (
    criterion_of,
    decisions_for,
    default_budget,
    has_budget,
    measurable,
    methods_of,
    refuse_blind_limit,
    refuse_large,
    refuse_loss,
    refuse_nothing,
    refuse_unknown_layers,
    removed_names,
    wants_blocks,
    wants_self_text,
)
from onnx_autoglm.runtime import Session
from onnx_autoglm.summary import figures, pin_reports, proof_json, structure_reports, versions
from onnx_autoglm.upcast import needs_upcast, upcast

Progress = Callable[[str], None]


def optimize(
    model: Path | str,
    output: Path | str,
    options: Options | None = None,
    *,
    config: Path | str | None = None,
    progress: Progress = lambda _: None,
    **given: Any,
) -> Report:
    """Prunes a model, proves the result and writes it.

    Writes `model.onnx` (and `model.onnx.data`), `plan.json` and `report.json` into the folder `output`, all
    of them or none. The input is never changed.

    Args:
        model: the ONNX file.
        output: the folder to write to; made if it does not exist.
        options: all options; or give single ones by the names of the command line, such as
            `prune={"ffn-channel": 0.25}, criterion="l1"`.
        config: a YAML configuration file, below the single options.
        progress: told which step runs.

    Raises:
        UserError: something the user can mend; nothing was written.
        CheckFailed: the result could not be proved equal to the masked source; nothing was written.
    """
    source_path, folder = Path(model), Path(output)
    if options is not None and (given or config is not None):
        raise UserError("give either options or single options (and config), not both")
    options = collect(given, config) if options is None else options
    chosen = criterion_of(options)
    clock = Clock(progress)
    with clock("open"):
        source = modelfile.open_model(source_path)
        modelfile.check_output_path(source, folder / "model.onnx")
        external = _wants_external(source, options)
        nodes = source.graph.num_nodes()
        canonicalize(source)
        feeds = None if options.check.inputs is None else load_feeds(options.check.inputs, source)
        data = Data.load(source, source_path, options)
    with clock("infer axes") as effect:
        structures = analyse(source.clone())
        before = figures(source, source_path, count_flops(structures.analysis), nodes)
        before.sha256 = sha256(source_path)
        effect["structures"] = len(structures.found)
    refuse_unknown_layers(options, structures)
    decisions_for(structures, options)  # what is impossible is refused before the long part
    if wants_self_text(options, chosen):
        with clock("write text") as effect:
            data = data.with_self_text(source, options, progress)
            effect["tokens"] = 0 if data.calibration is None else data.calibration.rows
    refuse_blind_limit(options, data)
    criterion, repair = methods_of(options, data, chosen)
    options, notes = default_budget(options, data)
    decisions, fractions, asked, more = decisions_for(structures, options)
    notes = [*notes, *more, *data.notes]
    wanted = [decision.structure for decision in decisions if not decision.reason]
    evidence = Evidence(structures, wanted, progress)
    refuse_large(options, source, data, criterion, repair, wanted, evidence, fractions)
    if criterion.needs_data or (repair != "none" and has_budget(options)):
        with clock("observe") as effect:
            effect.update(evidence.observe(source, data))
    elif wants_blocks(options, criterion):
        with clock("observe") as effect:
            effect.update(evidence.measure(source, data))
    with clock("score") as effect:
        scores, by_norm = score(criterion, wanted, evidence)
        effect["criterion"] = criterion.name
        blind = Counter(structure.kind for structure in by_norm)
        notes += [
            f"{n} x {kind} scored by norm: {criterion.name} says nothing of it" for kind, n in blind.items()
        ]
    outcome: Outcome | None = None
    with clock("choose") as effect:
        if has_budget(options):
            if data.calibration is None:
                notes.append(
                    "no calibration data: layers and kinds were compared by their normalised scores alone, not by "
                    "what their cuts do to the outputs"
                )
            else:
                scores = measurable(decisions, scores, evidence)
            spender = Spender(structures, scores, evidence, data, source, options, repair, progress)
            outcome = spender.spend()
            selection = spender.selection(outcome.counts)
            for decision in decisions:
                if not decision.reason:
                    decision.settle(outcome.counts[decision.structure], "the budget leaves all of it")
            del spender
        else:
            selection, _ = choose(structures.found, scores, fractions, options.pruning, decisions)
            missed = shortfalls(decisions, fractions, options.pruning)
            if missed and asked:
                raise UserError("\n".join(missed))
            notes += missed
        if options.pruning.swaps:
            effect["swaps"] = swap_choice(
                selection, wanted, evidence.consumers, evidence.observed, options.pruning.swaps, progress
            )
        effect["cut"] = len(selection.kept)
        refuse_nothing(decisions)
        changed = {name for d in decisions if d.keep < d.structure.size for name in d.structure.interface}
        notes += removed_names(structures, selection)
        if changed:
            notes.append(
                f"changes the shape of graph inputs and outputs (plan.json: interfaces): {', '.join(sorted(changed))}"
            )
    reports, pins = structure_reports(structures, decisions, scores), pin_reports(structures)
    with clock("remove and repair") as effect:
        gone = {node for block in chosen_blocks(structures, selection) for node in block.dying()}
        after_flops = count_flops(structures.analysis, selection, gone)
        cut = apply_selection(structures, selection)
        plan = dataclasses.replace(
            cut.plan({"file": source_path.name, "sha256": before.sha256}), repair=repair
        )
        effect.update(initializers=len({r.initializer for r in cut.removals}), repairs=cut.repairs)
    with staging(folder) as staged:
        with clock("write"):
            modelfile.save_model(
                cut.model,
                staged / "model.onnx",
                external=external,
                progress=lambda done, total: progress(f"write {done / max(total, 1):.0%}"),
            )
        with clock("check"):
            notes += check_onnx(staged / "model.onnx", source_path)
            notes += check_loads(staged / "model.onnx", source_path)
            pruned = modelfile.open_model(staged / "model.onnx")
            proof = check_masked(
                source,
                plan,
                canonicalize(pruned),
                feeds=feeds,
                tolerance=options.check.tolerance,
                scratch=staged,
                seed=options.pruning.seed,
                step=progress,
            )
            _refuse_failure(proof)
            if proof.difference.unseen:
                notes.append(
                    f"on the inputs of the proof no number of {', '.join(proof.difference.unseen)} is finite, so it was "
                    "not compared: pass sample inputs with --inputs"
                )
            if proof.is_weak:
                notes.append(
                    f"the cut moves the outputs by {proof.effect:.1e} only on the inputs of the proof, which is near "
                    "rounding, so the proof is weak: pass sample inputs with --inputs"
                )
        repaired: list[dict[str, Any]] = []
        if repair != "none":
            with clock("repair weights") as effect:
                repaired = repair_weights(
                    source,
                    cut.model,
                    selection,
                    evidence.consumers,
                    data.pairs(plan),
                    repair,
                    progress,
                    staged,
                    normed_values(structures.analysis),
                )
                effect["consumers"] = sum(entry["repaired"] for entry in repaired)
            with clock("write repaired"):
                modelfile.save_model(cut.model, staged / "repaired" / "model.onnx", external=external)
                for file in (staged / "repaired").iterdir():
                    file.replace(staged / file.name)
                (staged / "repaired").rmdir()
                notes += check_onnx(staged / "model.onnx", source_path)
                notes += check_loads(staged / "model.onnx", source_path)
                pruned = canonicalize(modelfile.open_model(staged / "model.onnx"))
                _refuse_what_does_not_run(pruned, data, plan)
        if repair != "none" and not any(entry["repaired"] for entry in repaired):
            repair = "none"
            notes.append("no consumer could be repaired; report.json has the reasons")
            plan = dataclasses.replace(plan, repair=repair)
        precision: dict[str, Any] = {}
        running = pruned
        if options.precision.precision != "none":
            with clock("convert precision"):
                calibration = [] if data.calibration is None else [feed for _, feed in data.pairs(plan)]
                precision, running = convert_staged(
                    staged, options.precision, calibration, external, progress
                )
                pruned = canonicalize(modelfile.open_model(staged / "model.onnx"))
                notes += precision["notes"]
        quality: dict[str, Any] = {}
        if data.evaluation is not None:
            with clock("quality"):
                quality = data.compare(
                    modelfile.open_model(source_path),
                    running,
                    progress,
                    lambda feed: cut_arrays(feed, plan.interfaces),
                    native=bool(precision),
                )
                refuse_loss(quality, options)
        quantization: dict[str, Any] = {}
        if options.quantization.scheme != "none":
            with clock("quantize") as effect:
                quantized = quantize_into(
                    staged / "model.onnx", pruned, data.cut(plan), options.quantization, staged, progress
                )
                quantized.write(staged / QUANTIZATION_REPORT)
                quantization = quantized.as_json()
                effect["products"] = len(quantized.products)
        if options.engine.build != "none":
            with clock("engine"):
                notes += add_engine(staged, options.engine, progress)
        report = Report(
            source=before,
            result=figures(pruned, folder / "model.onnx", after_flops, cut.model.graph.num_nodes()),
            passes=clock.passes,
            structures=reports,
            pins=pins,
            check=proof_json(proof),
            repair={"method": repair, "consumers": repaired, "calibration": data.described()},
            quality=quality,
            precision=precision,
            budget={} if outcome is None else outcome.report,
            quantization=quantization,
            latency={} if outcome is None or outcome.latency is None else outcome.latency,
            options={**options.model_dump(mode="json"), "fractions": fractions},
            versions=versions(),
            notes=list(dict.fromkeys(notes)),
        )
        report.result.sha256 = sha256(staged / "model.onnx")
        (staged / "plan.json").write_text(json.dumps(plan.as_json()) + "\n")
        report.write(staged / "report.json")
        publish(staged, folder)
    return report


def inspect(model: Path | str) -> Inspection:
    """Finds all prunable structures of a model and every reason why an axis must stay.

    Raises UserError if the model cannot be read.
    """
    path = Path(model)
    started = time.perf_counter()
    source = modelfile.open_model(path)
    nodes = source.graph.num_nodes()
    structures = analyse(canonicalize(source))
    found = figures(source, path, count_flops(structures.analysis), nodes)
    reports = structure_reports(structures, [], {})
    return Inspection(found, reports, pin_reports(structures), time.perf_counter() - started)


def check(
    source: Path | str,
    plan: Path | str,
    pruned: Path | str,
    *,
    inputs: Path | None = None,
    tolerance: float = TOLERANCE,
    progress: Progress = lambda _: None,
) -> Proof:
    """Repeats the proof of a pruned model from its plan alone.

    Raises:
        UserError: a file cannot be read, or the plan belongs to another source.
        CheckFailed: masked source and pruned model differ.
    """
    recipe = Plan.read(Path(plan))
    if recipe.source.get("sha256") != sha256(_existing(Path(source))):
        raise UserError(
            f"{source} is not the source of {plan} (its sha256 differs): pass the file that was pruned"
        )
    if recipe.repair != "none":
        raise UserError(
            f"{pruned} was repaired after its proof (repair: {recipe.repair}), so it differs from the masked source by "
            "intent; repeat the proof with optimize --repair none"
        )
    model = canonicalize(modelfile.open_model(source))
    feeds = None if inputs is None else load_feeds(inputs, model)
    result = canonicalize(modelfile.open_model(pruned))
    if needs_upcast(result) and not needs_upcast(model):
        raise UserError(
            f"{pruned} was converted to 16 bits after its proof; repeat the proof with optimize --precision none"
        )
    proof = check_masked(model, recipe, result, feeds=feeds, tolerance=tolerance, step=progress)
    _refuse_failure(proof)
    return proof


# --- files


def _wants_external(source: ir.Model, options: Options) -> bool | None:
    if options.external_data is not None:
        return options.external_data
    return True if modelfile.has_external_data(source) else None


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    return path


def _refuse_what_does_not_run(model: ir.Model, data: Data, plan: Plan) -> None:
    """A repaired model must run on the data and give finite numbers."""
    assert data.calibration is not None
    _, feed = data.pairs(plan)[0]
    try:
        outputs = Session(upcast(model) if needs_upcast(model) else model).run(feed)
    except UserError as error:
        raise CheckFailed(f"the repaired model does not run: {error}") from error
    for name, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CheckFailed(f"the repaired model computes numbers that are not finite: {name}")


def _refuse_failure(proof: Proof) -> None:
    if proof.holds:
        return
    difference = proof.difference
    if difference.inconclusive:
        raise CheckFailed(
            f"the proof is inconclusive: {difference.inconclusive}; pass sample inputs with --inputs"
        )
    detail = (
        difference.reason or f"relative difference {difference.relative:.1e}, allowed {proof.tolerance:.0e}"
    )
    raise CheckFailed(f"masked source and pruned model differ at output {difference.output}: {detail}")
