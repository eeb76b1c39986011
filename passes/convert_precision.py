"""Converts a whole graph to float16 or bfloat16, with islands of float32 where 16 bits do not do."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal

import onnx_ir as ir
from onnx_ir.passes import common

from onnx_autoglm.dataset import Arrays
from onnx_autoglm.errors import UserError
from onnx_autoglm.op_kinds import PRODUCTS, is_float, node_name
from onnx_autoglm.op_types import signature
from onnx_autoglm.opset import raise_opset
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.precision_casts import CastCounts, Rewriter, count_casts, drop_float_casts
from onnx_autoglm.precision_distance import as_inputs, distance
from onnx_autoglm.precision_islands import Islands, find_islands
from onnx_autoglm.precision_masks import Masks, find_masks
from onnx_autoglm.precision_ranges import (
    BFLOAT16,
    FLOAT16,
    Format,
    observe_ranges,
)
from onnx_autoglm.scores import any_scores, class_scores, token_scores
from onnx_autoglm.upcast import HALF_TYPES, upcast
from onnx_autoglm.value_types import complete_types

FORMATS = {"fp16": FLOAT16, "bf16": BFLOAT16}
_BF16_OPSET = 22  # the first in which convolutions and pooling know bfloat16
_FEW = 4  # feeds on which it is checked that masks are still masks

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ConvertPrecision:
    """What to convert to.

    `io` is the type of the graph's float inputs and outputs: keep, fp16 or bf16. `keep_logits` makes the scores in
    float32 and returns them so.
    """

    precision: Literal["fp16", "bf16"] = "fp16"
    io: Literal["keep", "fp16", "bf16"] = "keep"
    keep_logits: bool = False


@dataclasses.dataclass(frozen=True)
class PrecisionReport:
    """What a conversion did.

    `nodes` counts those that make floats, `low` those in 16 bits, `islands` those in float32 by reason (with the first
    node of each), `masks` the constants that were moved into range, `casts` the casts in the
    result. `largest` are the values of largest magnitude that were measured.
    """

    precision: str
    opset: int
    measured: bool
    nodes: int
    low: int
    islands: list[dict[str, Any]]
    masks: list[str]
    casts: CastCounts
    largest: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def convert_precision(
    model: ir.Model,
    options: ConvertPrecision,
    feeds: Iterable[Arrays] | None,
    *,
    progress: Progress = lambda _: None,
) -> tuple[ir.Model, PrecisionReport]:
    """A copy of the model that computes in 16 bits, and what was done.

    Constants that stand for "never", such as the lowest float32 in a mask, are moved into the range of the format. If
    the result is further from the source then than rounding explains, and nearer with masks in float32, these stay so.

    Weights are cast while they are written. A 16-bit model may be converted as well: it is read as float32, so that
    its own casts do not count.

    Args:
        model: the model; it stays as it is.
        options: what to convert to.
        feeds: inputs on which the range of every value is measured, of the source's types. float16 needs them; for
            bfloat16, which holds whatever a float32 can be, they only check that masks are still masks.
        progress: told which step runs.

    Raises:
        UserError: float16 without feeds, an operator set too old, or nothing that can be converted.
    """
    kind = FORMATS[options.precision]
    feeds = None if feeds is None else list(feeds)
    if kind is FLOAT16 and not feeds:
        raise UserError(
            "float16 overflows at 65,504, so ranges must be measured: pass data with --calib PATH"
        )
    result, report = _convert(model, options, feeds, move_masks=True, progress=progress)
    if not feeds:
        return result, report
    near = distance(model, result, kind, feeds[:_FEW])
    if near.within:
        return result, report
    other = _convert(model, options, feeds, move_masks=False, progress=progress)
    kept = distance(model, other[0], kind, feeds[:_FEW])
    return (result, report) if near.rms <= 2 * kept.rms else other


def _convert(
    model: ir.Model,
    options: ConvertPrecision,
    feeds: list[Arrays] | None,
    *,
    move_masks: bool,
    progress: Progress,
) -> tuple[ir.Model, PrecisionReport]:
    kind = FORMATS[options.precision]
    interface = _interface(model, options)
    result = _float32(model)
    if kind is BFLOAT16 and _is_too_old(result, kind):
        result = _float32(raise_opset(result, _BF16_OPSET))
    masks = find_masks(result, kind, move=move_masks)
    ranges = None
    if kind is FLOAT16 and feeds is not None:
        inputs = result.graph.inputs
        ranges = observe_ranges(result, (as_inputs(feed, inputs) for feed in feeds), progress)
    scores = _scores(result) if options.keep_logits else None
    if scores is not None:
        interface[scores.name or ""] = ir.DataType.FLOAT
    islands = find_islands(
        result,
        kind,
        ranges,
        interface=interface,
        masked=masks.carriers,
        wide_masks=not move_masks,
        scores=scores,
        step=progress,
    )
    report = _report(result, options, islands, masks, ranges)
    if not report.low:
        first = report.islands[0] if report.islands else {"reason": "it holds no float32 numbers"}
        raise UserError(f"nothing in this model can be converted to {options.precision}: {first['reason']}")
    progress("convert")
    Rewriter(result, islands, interface).apply()
    common.RemoveUnusedNodesPass()(result)
    return result, dataclasses.replace(report, casts=count_casts(result))


def _float32(model: ir.Model) -> ir.Model:
    """A canonical copy with a type for every value, in which all floats are float32."""
    result = canonicalize(upcast(model))
    if result.ir_version < 4:  # where weights had to be listed as inputs
        common.RemoveInitializersFromInputsPass()(result)
    complete_types(result)
    drop_float_casts(result)
    return result


def _interface(model: ir.Model, options: ConvertPrecision) -> dict[str, ir.DataType]:
    """The type of each float input and output of the result."""
    io = None if options.io == "keep" else FORMATS[options.io].dtype
    kinds = HALF_TYPES | {ir.DataType.FLOAT}
    return {
        value.name or "": io or value.dtype
        for value in (*model.graph.inputs, *model.graph.outputs)
        if value.dtype in kinds
    }


def _is_too_old(model: ir.Model, kind: Format) -> bool:
    """Whether a product in this operator set cannot be computed in the format that later ones know."""
    opsets = tuple(model.opset_imports.items())
    for node in model.graph.all_nodes():
        own = signature(node, opsets) if node.op_type in PRODUCTS | {"MaxPool", "AveragePool"} else None
        if own is not None and not node.domain and not own.allows(own.output(0), kind.dtype):
            return dict(opsets)[""] < _BF16_OPSET
    return False


def _scores(model: ir.Model) -> ir.Value:
    found = token_scores(model) or class_scores(model) or any_scores(model)
    if found is None:
        raise UserError("--keep-logits-fp32: the model has no output of scores; leave it out")
    return next(value for value in model.graph.outputs if value.name == found.name)


def _report(
    model: ir.Model,
    options: ConvertPrecision,
    islands: Islands,
    masks: Masks,
    ranges: dict[str, float] | None,
) -> PrecisionReport:
    floats = [node for node in model.graph.all_nodes() if any(is_float(value) for value in node.outputs)]
    wide = [node for node in floats if node in islands.wide]
    counts = Counter(islands.wide[node] for node in wide)
    first: dict[str, ir.Node] = {}
    for node in wide:
        first.setdefault(islands.wide[node], node)
    top = sorted((ranges or {}).items(), key=lambda item: -item[1])[:10]
    return PrecisionReport(
        precision=options.precision,
        opset=model.opset_imports.get("", 0),
        measured=ranges is not None,
        nodes=len(floats),
        low=len(floats) - len(wide),
        islands=[{"reason": r, "nodes": n, "first": node_name(first[r])} for r, n in counts.most_common()],
        masks=list(masks.moved),
        casts=CastCounts(0, 0, 0, 0),
        largest=dict(top),
    )
