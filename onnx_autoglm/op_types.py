"""What operator schemas say about types: which inputs and outputs of a node share one, and which types it may be."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import onnx
import onnx_ir as ir


@dataclasses.dataclass(frozen=True)
class Signature:
    """The type variable of each input and output (a type's own name where it is fixed), and what each may be.

    `variadic` says that the last one stands for all that follow.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    allowed: dict[str, frozenset[str]]

    def input(self, index: int) -> str:
        """The type variable of an input."""
        return self.inputs[min(index, len(self.inputs) - 1)]

    def output(self, index: int) -> str:
        """The type variable of an output."""
        return self.outputs[min(index, len(self.outputs) - 1)]

    def allows(self, variable: str, dtype: ir.DataType) -> bool:
        """Whether a type variable may stand for tensors of a type."""
        name = f"tensor({_NAMES[dtype]})"
        allowed = self.allowed.get(variable)
        # Sequences hold tensors of the types that they may hold.
        return variable == name if allowed is None else name in allowed or f"seq({name})" in allowed


_NAMES = {ir.DataType.FLOAT: "float", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}


def signature(node: ir.Node, opsets: Sequence[tuple[str, int]]) -> Signature | None:
    """The signature of a node in a model with these operator sets; None if nobody knows the operator."""
    version = node.version or dict(opsets).get(node.domain)
    if version is None:
        return None
    if node.domain in ("", "ai.onnx.ml"):
        return _onnx_signature(node.domain, node.op_type, version)
    return _runtime_signatures().get((node.domain, node.op_type))


@functools.cache
def _onnx_signature(domain: str, op_type: str, version: int) -> Signature | None:
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    return Signature(
        tuple(item.type_str for item in schema.inputs),
        tuple(item.type_str for item in schema.outputs),
        {item.type_param_str: frozenset(item.allowed_type_strs) for item in schema.type_constraints},
    )


@functools.lru_cache(maxsize=1)
def _runtime_signatures() -> dict[tuple[str, str], Signature]:
    """The operators that ONNX Runtime adds, if it is there and tells."""
    try:
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
    except ImportError:
        return {}
    return {
        (schema.domain, schema.name): Signature(
            tuple(item.typeStr for item in schema.inputs),
            tuple(item.typeStr for item in schema.outputs),
            {item.type_param_str: frozenset(item.allowed_type_strs) for item in schema.type_constraints},
        )
        for schema in get_all_operator_schema()
        if schema.domain not in ("", "ai.onnx.ml")
    }
