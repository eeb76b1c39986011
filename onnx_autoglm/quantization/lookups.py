"""Tables whose rows are looked up by tokens: embeddings."""

from __future__ import annotations

import onnx_ir as ir

from onnx_autoglm.feed_roles import token_roles

_SMALLEST = 1 << 16  # entries from which it is worth it
_SAME_NUMBERS = frozenset("Cast Identity Reshape Squeeze Unsqueeze Flatten".split())


def find_lookups(model: ir.Model) -> list[str]:
    """The names of all constants `[rows, columns]` that nothing but Gather along axis 0 by token numbers looks into, and
    products that multiply them whole."""
    roles = token_roles(model)
    if roles is None:
        return []
    found = []
    for name, table in model.graph.initializers.items():
        tensor = table.const_value
        if tensor is None or len(tensor.shape) != 2 or tensor.size < _SMALLEST or table.is_graph_output():
            continue
        gathers = [(user, index) for user, index in table.uses() if user.op_type == "Gather"]
        rows = all(
            index == 0 and user.attributes.get_int("axis", 0) == 0 and _source(user.inputs[1]) == roles.tokens
            for user, index in gathers
        )
        if gathers and rows and tensor.dtype.is_floating_point():
            found.append(name)
    return found


def _source(value: ir.Value | None) -> str | None:
    """The graph input that holds the same numbers."""
    while value is not None and (maker := value.producer()) is not None and maker.op_type in _SAME_NUMBERS:
        value = maker.inputs[0]
    return value.name if value is not None and value.is_graph_input() else None
