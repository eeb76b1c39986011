"""Whether ONNX Runtime really computes in integers what was promised: read off the graph that it makes of a model."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx_autoglm.errors import UserError
from onnx_autoglm.quantization.schemes import Decision

# Kernels that multiply integers, by operator as ONNX Runtime names them.
INTEGER_KERNELS = frozenset(
    "MatMulIntegerToFloat MatMulInteger QLinearMatMul QGemm DynamicQuantizeMatMul QLinearConv ConvInteger MatMulNBits".split()
)
_FLOAT_PRODUCTS = frozenset("MatMul Gemm Conv FusedMatMul FusedGemm FusedConv NhwcFusedConv NhwcConv".split())


@dataclasses.dataclass(frozen=True)
class Audit:
    """`promised` products, those of them that run in `integer` kernels, and `fell_back` with the kernel they run in.

    `kernels` counts the operators of products in the optimized graph.
    """

    promised: int
    integer: int
    fell_back: list[dict[str, str]]
    kernels: dict[str, int]

    @property
    def holds(self) -> bool:
        return self.integer == self.promised and not self.fell_back

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def audit(path: Path, decisions: Sequence[Decision], scratch: Path | None = None) -> Audit:
    """Loads a quantized model in ONNX Runtime and reads its optimized graph back.

    A product counts as fallen back if a float kernel multiplies what a DequantizeLinear made of a weight: the weight is
    then unpacked on every run, which is slower than no quantization.

    Raises UserError if ONNX Runtime does not load the model.
    """
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="onnx-autoglm-", dir=scratch) as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
        )
        options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise UserError(
                f"ONNX Runtime cannot load {path.name}: {' '.join(str(error).split())[:300]}"
            ) from error
        graph = onnx.load(str(optimized), load_external_data=False).graph
    return _read(graph, decisions)


def _read(graph: Any, decisions: Sequence[Decision]) -> Audit:
    promised = [decision for decision in decisions if decision.scheme != "float"]
    makers = {name: node for node in graph.node for name in node.output}
    kernels = Counter(
        node.op_type for node in graph.node if node.op_type in INTEGER_KERNELS | _FLOAT_PRODUCTS
    )
    # Fusions rename, so what is left over is found by what it reads: a weight that is unpacked on every run.
    fallen = []
    for node in graph.node:
        if node.op_type in _FLOAT_PRODUCTS and len(node.input) > 1 and _unpacks(node.input[1], makers):
            fallen.append({"node": node.name or node.output[0], "kernel": node.op_type})
    integer = sum(count for name, count in kernels.items() if name in INTEGER_KERNELS)
    return Audit(len(promised), min(integer, len(promised)), fallen, dict(kernels))


def _unpacks(name: str, makers: dict[str, Any]) -> bool:
    node = makers.get(name)
    while node is not None and node.op_type in ("Transpose", "Cast", "Reshape"):
        node = makers.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"
