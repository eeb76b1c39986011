"""What a run is asked to cut, and everything that makes that impossible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.structures import Structure, Structures
from onnx_autoglm.budget import USUAL_KINDS
from onnx_autoglm.consumers import consumers_of
from onnx_autoglm.criteria import Criterion, find_criterion
from onnx_autoglm.errors import UserError
from onnx_autoglm.evidence import Data, Evidence, Repair
from onnx_autoglm.memory import (
    Need,
    available_bytes,
    needs_of_data,
    needs_of_quality,
    needs_of_repair,
    needs_of_trials,
    refuse_too_much,
)
from onnx_autoglm.options import DEFAULT_FRACTION, Options, matches
from onnx_autoglm.passes.choose import BY_CHOICE, Decision, candidates
from onnx_autoglm.passes.score_norm import Scores


def has_budget(options: Options) -> bool:
    return options.budget.target is not None and not options.pruning.sparsity_level


def default_budget(options: Options, data: Data) -> tuple[Options, list[str]]:
    """Without any target a quarter goes: with data, where it costs least."""
    if options.pruning.sparsity_level or options.budget.target or data.calibration is None:
        return options, []
    budget = options.budget.model_copy(update={"keep": 1 - DEFAULT_FRACTION})
    note = "no target given: removing a quarter of the parameters of heads and channels, where it costs least"
    return options.model_copy(update={"budget": budget}), [note]


def decisions_for(
    structures: Structures, options: Options
) -> tuple[list[Decision], dict[str, float], bool, list[str]]:
    """What may be cut, the fraction of each kind, whether the user named the kinds, and notes.

    Raises UserError if nothing can be cut, or nothing of a kind that the user asked for.
    """
    fractions, asked, notes = fractions_of(structures, options)
    decisions = candidates(structures.found, fractions, options.pruning, asked=asked)
    refuse_the_impossible(decisions, fractions, structures, asked=asked)
    return decisions, fractions, asked, notes


def measurable(
    decisions: list[Decision], scores: dict[Structure, Scores], evidence: Evidence
) -> dict[Structure, Scores]:
    """The scores of structures whose loss a trial can measure; the others are out of the competition."""
    for decision in decisions:
        if not decision.reason and not consumers_of(decision.structure, evidence.consumers):
            decision.reason = "its loss cannot be measured: no weight contracts it; name it with --prune"
    wanted = {decision.structure for decision in decisions if not decision.reason}
    if not wanted:
        raise UserError(f"nothing can compete for a budget: {decisions[0].reason}")
    return {structure: own for structure, own in scores.items() if structure in wanted}


def refuse_blind_limit(options: Options, data: Data) -> None:
    """Raises UserError for a limit on a loss that nothing measures."""
    evaluation = data.evaluation
    if options.budget.max_loss is not None and (evaluation is None or evaluation.metric == "agreement"):
        raise UserError("--max-loss is measured on a text, or on samples with labels: pass --eval PATH")


def refuse_large(
    options: Options,
    model: ir.Model,
    data: Data,
    criterion: Criterion,
    repair: Repair,
    wanted: Sequence[Structure],
    evidence: Evidence,
    fractions: dict[str, float],
) -> None:
    """Raises UserError if some step ahead needs more memory than there is."""
    needs: list[Need] = []
    if criterion.needs_data or (repair != "none" and has_budget(options)):
        needs += needs_of_data(wanted, evidence.consumers, criterion=criterion.name)
    if repair == "affine":
        needs += needs_of_repair(wanted, evidence.consumers, fractions)
    if has_budget(options) and data.calibration is not None:
        needs += needs_of_trials(model, evidence.consumers)
    if data.evaluation is not None:
        needs += needs_of_quality(model)
    refuse_too_much(needs, available_bytes())


def refuse_loss(quality: dict[str, Any], options: Options) -> None:
    limit = options.budget.max_loss
    # Perplexity rises as quality falls; top-1 and agreement fall.
    loss = quality["ratio"] - 1 if quality["metric"] == "perplexity" else 1 - quality["ratio"]
    if limit is not None and not loss <= limit:
        raise UserError(
            f"--max-loss {limit:.2%} is exceeded: the loss of {quality['metric']} is {loss:.2%} on the evaluation data; "
            "ask for a smaller cut, or allow more"
        )


def fractions_of(structures: Structures, options: Options) -> tuple[dict[str, float], bool, list[str]]:
    wanted = options.pruning.sparsity_level
    if has_budget(options):
        present = {structure.kind for structure in structures.found if not structure.pins}
        kinds = options.budget.kinds or tuple(kind for kind in USUAL_KINDS if kind in present)
        return dict.fromkeys(kinds, 0.0), bool(options.budget.kinds), []
    if isinstance(wanted, dict) and wanted:
        return dict(wanted), True, []
    fraction = wanted if isinstance(wanted, float) else DEFAULT_FRACTION
    found = {structure.kind for structure in structures.found if not structure.pins}
    usual: list[str] = ["query-head", "ffn-channel"]
    names = [kind for kind in usual if kind in found]
    if not names and "conv-channel" in found:
        names.append("conv-channel")
    what = " and ".join(f"{kind}s" for kind in names)
    share = "a quarter" if fraction == DEFAULT_FRACTION else f"{fraction:.0%}"
    note = f"no kinds given: removing {share} of the {what}, as near as their counts allow"
    return dict.fromkeys(names, fraction), False, [note]


def refuse_unknown_layers(options: Options, structures: Structures) -> None:
    names = [name for structure in structures.found for name in (structure.id, *structure.names)]
    for glob in (*options.pruning.target_layers, *options.pruning.exclude_layers):
        if not any(matches(name, (glob,)) for name in names):
            raise UserError(f"no layer matches {glob!r}: see the names with onnx-autoglm inspect")


def refuse_the_impossible(
    decisions: list[Decision], fractions: dict[str, float], structures: Structures, *, asked: bool
) -> None:
    """Raises UserError if nothing can be cut, or nothing of a kind that the user asked for."""
    if not fractions:
        raise UserError("nothing in this model can be pruned: onnx-autoglm inspect shows every reason")
    if all(decision.reason for decision in decisions) and decisions:
        first = decisions[0]
        raise UserError(f"nothing can be removed: {first.structure.id}: {first.reason}")
    for kind in fractions if asked else ():
        row = [decision for decision in decisions if decision.structure.kind == kind]
        if not row:
            present = sorted({s.kind for s in structures.found if s.kind != "other"}) or ["none"]
            lost = [f"{s.id}: {s.pins[0]}" for s in structures.found if s.kind == "other"][:2]
            why = f"; lost from sight: {'; '.join(lost)}" if lost else ""
            raise UserError(f"this model has no {kind}; it has {', '.join(present)}{why}")
        if all(decision.reason and decision.reason not in BY_CHOICE for decision in row):
            raise UserError(f"no {kind} can be removed: {row[0].structure.id}: {row[0].reason}")


def removed_names(structures: Structures, selection: Selection) -> list[str]:
    """A note with the names of what was removed whole."""
    return [
        f"removed whole: {', '.join(n for n, stays in zip(s.names, selection.kept[s.atom], strict=True) if not stays)}"
        for s in structures.found
        if s.names and s.atom in selection.kept
    ]


def refuse_nothing(decisions: list[Decision]) -> None:
    if all(decision.keep == decision.structure.size for decision in decisions):
        first = next(decision for decision in decisions)
        raise UserError(f"nothing would be removed: {first.structure.id}: {first.reason}; raise the fraction")


def criterion_of(options: Options) -> Criterion | None:
    """The criterion that the user chose; None for `auto`. Raises UserError if it cannot be had."""
    chosen = options.pruning.algorithm
    return None if chosen == "auto" else find_criterion(chosen, seed=options.pruning.seed)


def wants_blocks(options: Options, criterion: Criterion | None) -> bool:
    """Whether whole blocks may go, which only data can compare."""
    kinds = options.pruning.sparsity_level
    return isinstance(kinds, dict) and "block" in kinds and not (criterion and criterion.name == "random")


def wants_self_text(options: Options, criterion: Criterion | None) -> bool:
    """Whether anything learns from data, and none is given."""
    learns = criterion is None or criterion.needs_data or options.repair != "none"
    learns |= wants_blocks(options, criterion)
    return learns and options.data.calibration in ("auto", "self")


def methods_of(options: Options, data: Data, chosen: Criterion | None) -> tuple[Criterion, Repair]:
    """The criterion and the repair that `auto` comes to. Raises UserError if one needs data that is not there."""
    given = data.calibration is not None
    criterion = chosen or find_criterion("obs" if given else "l2")
    repair: Repair = "affine" if given else "none"
    if options.repair != "auto":
        repair = options.repair
    if options.pruning.swaps and criterion.name != "obs":
        raise UserError(
            f"--swaps improves the choice of obs, not of {criterion.name}: drop it, or use --criterion obs"
        )
    blocks = wants_blocks(options, criterion)
    if not given and (criterion.needs_data or blocks or repair != "none"):
        what = (
            criterion.name
            if criterion.needs_data
            else "the choice of blocks"
            if blocks
            else f"repair {repair}"
        )
        why = f" ({data.notes[0]})" if data.notes else ""
        raise UserError(f"{what} needs calibration data: pass --calib PATH (a text, samples or images){why}")
    return criterion, repair
