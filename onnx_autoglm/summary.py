"""What a report says, read off models, structures and decisions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_autoglm import modelfile
from onnx_autoglm.axes.dims import leaves
from onnx_autoglm.axes.structures import Structure, Structures
from onnx_autoglm.passes.check_masked import Proof
from onnx_autoglm.passes.choose import Decision
from onnx_autoglm.passes.score_norm import Scores
from onnx_autoglm.report import ModelFigures, PinReport, StructureReport


def figures(model: ir.Model, path: Path, flops: int, nodes: int) -> ModelFigures:
    return ModelFigures(
        file=path.name,
        parameters=modelfile.parameters(model),
        bytes=modelfile.weight_bytes(model),
        flops=flops,
        nodes=nodes,
    )


def structure_reports(
    structures: Structures, decisions: list[Decision], scores: dict[Structure, Scores]
) -> list[StructureReport]:
    decided = {decision.structure: decision for decision in decisions}
    total = max(sum(_entries(value) for value in structures.analysis.graph.initializers.values()), 1)
    reports = []
    for structure in structures.found:
        decision = decided.get(structure)
        reports.append(
            StructureReport(
                id=structure.id,
                layer=structure.layer,
                kind=structure.kind,
                size=structure.size,
                groups=structure.groups,
                kept=decision.keep if decision else structure.size,
                parameters=structure.parameters,
                share=structure.parameters / total,
                cost_per_index=structure.cost,
                scores=_summary(scores.get(structure)),
                interface=structure.interface,
                pins=[PinReport(pin.reason, pin.node) for pin in structure.pins],
                reason=decision.reason if decision else "",
            )
        )
    return reports


def _entries(value: ir.Value) -> int:
    return 0 if value.const_value is None else int(value.const_value.size)


def _summary(scores: Scores | None) -> dict[str, float]:
    if scores is None:
        return {}
    return {
        "min": float(scores.min()),
        "mean": float(scores.mean()),
        "max": float(scores.max()),
        "std": float(scores.std()),
    }


def pin_reports(structures: Structures) -> list[PinReport]:
    """Every reason why an axis of a weight stays, with how many axes it holds, most frequent first."""
    counts = Counter((pin.reason, pin.node) for structure in structures.found for pin in structure.pins)
    listed = {structure.atom for structure in structures.found}
    others = {
        atom
        for use in structures.uses
        if use.value.const_value is not None and use.value not in structures.analysis.contents
        for dim in use.dims
        for atom in leaves(dim)
        if atom not in listed
    }
    for dim, pin in structures.analysis.pins:
        counts[pin.reason, pin.node] += len(others & set(leaves(dim)))
    return [PinReport(reason, node, count) for (reason, node), count in counts.most_common() if count]


def proof_json(proof: Proof) -> dict[str, Any]:
    return {
        "relative_difference": proof.difference.relative,
        "effect": proof.effect,
        "output": proof.difference.output,
        "tolerance": proof.tolerance,
        "precision": proof.precision,
        "inputs": proof.inputs,
    }


def versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in ("onnx-autoglm", "onnx", "onnx-ir", "onnxruntime", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
