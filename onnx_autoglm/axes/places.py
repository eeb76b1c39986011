"""Where axes live in initializers."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnx_autoglm.axes.dims import Dim


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """An initializer as some of its consumers see it."""

    value: ir.Value
    consumers: tuple[tuple[ir.Node, int], ...]
    dims: list[Dim]


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """One axis of an initializer in which a structure lives."""

    use: Use
    axis: int
