"""How long ONNX Runtime takes for one product in each scheme, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnx_autoglm.passes.insert_qdq import insert_qdq
from onnx_autoglm.quantization.places import Place
from onnx_autoglm.quantization.schemes import Decision, Scheme
from onnx_autoglm.quantization.weights import nearest
from onnx_autoglm.runtime import Session

_WORKING_SET = 64 << 20  # bytes of different weights, so that each run reads them from memory as a model does
_MOST = 24  # copies
_RUNS = 7

Times = dict[tuple[int, int, Scheme], float]


def time_schemes(
    places: Sequence[Place],
    schemes: Sequence[Scheme],
    rows: int,
    step: Callable[[str], None] = lambda _: None,
) -> Times:
    """Milliseconds of one product by its inputs, outputs and scheme, for so many rows; the best of several runs.

    Only products of matrices are timed. Several products of one shape with weights of their own run in one graph.
    """
    times: Times = {}
    shapes = sorted({(place.inputs, place.outputs) for place in places if place.op != "Conv"})
    for number, (inputs, outputs) in enumerate(shapes, 1):
        step(f"time {number} of {len(shapes)}: {inputs} x {outputs} at {rows} rows")
        copies = max(1, min(_MOST, _WORKING_SET // (4 * inputs * outputs)))
        sessions = {
            scheme: Session(_model(inputs, outputs, copies, scheme), optimize=True) for scheme in schemes
        }
        feed = {"x": np.random.default_rng(0).normal(size=(1, rows, inputs)).astype(np.float32)}
        best = dict.fromkeys(schemes, np.inf)
        for run in range(_RUNS + 1):
            for scheme, session in sessions.items():
                started = time.perf_counter()
                session.run(feed)
                if run:
                    best[scheme] = min(best[scheme], time.perf_counter() - started)
        for scheme in schemes:
            times[inputs, outputs, scheme] = 1000 * best[scheme] / copies
    return times


def _model(inputs: int, outputs: int, copies: int, scheme: Scheme) -> ir.Model:
    """Products of one activation with several weights, each reduced to its largest entry."""
    generator = np.random.default_rng(1)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, None, inputs]))
    nodes, weights, ends, decisions = [], [], [], []
    for copy in range(copies):
        array = generator.standard_normal((inputs, outputs), dtype=np.float32)
        weight = ir.Value(name=f"w{copy}", const_value=ir.Tensor(array, name=f"w{copy}"))
        weight.shape, weight.dtype = ir.Shape(array.shape), ir.DataType.FLOAT
        product = ir.node("MatMul", [x, weight])
        product.outputs[0].name = f"y{copy}"
        end = ir.node("ReduceMax", [product.outputs[0]], {"keepdims": 0})
        end.outputs[0].name = f"end{copy}"
        for node in (product, end):
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        end.outputs[0].shape = ir.Shape([])
        nodes += [product, end]
        weights.append(weight)
        ends.append(end.outputs[0])
        place = Place(f"y{copy}", "MatMul", "", "x", -1, 1, f"w{copy}", 1, 0, inputs, outputs)
        block = 32 if scheme == "w4" else None
        held = None if scheme == "float" else nearest(array, 4 if scheme == "w4" else 8, block, clip=False)
        decisions.append(Decision(place, scheme, held))
    graph = ir.Graph([x], ends, nodes=nodes, initializers=weights, opset_imports={"": 21}, name="timing")
    model = ir.Model(graph, ir_version=10)
    insert_qdq(model, decisions, {"x": 4.0}, "cpu")
    return model
