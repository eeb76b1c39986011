"""Conversions that check themselves, for the tests of 16-bit graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnx_autoglm.emulate import emulate
from onnx_autoglm.passes.convert_precision import ConvertPrecision, PrecisionReport, convert_precision
from onnx_autoglm.runtime import Session, compare

Arrays = dict[str, np.ndarray]
TOLERANCE = {"fp16": 4e-3, "bf16": 3e-2}
TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def noise(*shape: int, scale: float = 1.0, seed: int = 1) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def converted(
    source: ir.Model, feed: Arrays, precision: Any = "fp16", tolerance: float | None = None, **options: Any
) -> tuple[ir.Model, PrecisionReport]:
    """The converted model, which passes the ONNX checker, runs, and computes what the source does."""
    before = ir.to_proto(source).SerializeToString()
    result, report = convert_precision(source, ConvertPrecision(precision, **options), [feed])
    assert ir.to_proto(source).SerializeToString() == before
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    expected = Session(source).run(feed)
    types = {value.name: value.dtype.numpy() for value in result.graph.inputs if value.dtype is not None}
    inputs = {name: array.astype(types[name]) for name, array in feed.items()}
    if precision == "bf16":
        actual = Session(emulate(result)).run(feed)
    else:
        actual = Session(result, optimize=True).run(inputs)
    difference = compare(expected, actual)
    assert difference.within(tolerance or TOLERANCE[precision]), difference
    assert report.casts.cancelling == report.casts.repeated == 0
    return result, report


def types(result: ir.Model) -> dict[str, str]:
    """The type of each value by its name."""
    values = [value for node in result.graph.all_nodes() for value in node.outputs]
    values += [value for graph in result.graphs() for value in graph.initializers.values()]
    return {value.name or "": value.dtype.name for value in values if value.dtype is not None}


def reasons(report: PrecisionReport) -> str:
    return "\n".join(entry["reason"] for entry in report.islands)


def scalar(number: float) -> np.ndarray:
    return np.array(number, np.float32)
