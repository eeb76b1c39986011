"""Reads a graph with a backend's parser; what the backend does not know is named, with the reason, before the build."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_autoglm.engine_backend import OPSETS, Backend
from onnx_autoglm.engine_log import BuildLog, plain
from onnx_autoglm.errors import UserError

_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A node that the backend cannot take, and why."""

    node: str
    op_type: str
    reason: str

    def __str__(self) -> str:
        where = f"{self.op_type} {self.node!r}" if self.node else self.op_type or "the graph"
        return f"{where}: {self.reason}"


@dataclasses.dataclass
class Network:
    """A parsed graph, with all that must stay alive while it is built."""

    builder: Any
    network: Any
    parser: Any


def refuse_opset(model: ir.Model) -> None:
    """Raises UserError if the parsers do not read the graph's version of ONNX."""
    opset = model.opset_imports.get("", 0)
    low, high = OPSETS
    if not low <= opset <= high:
        raise UserError(
            f"the graph has opset {opset}; engines are built from opset {low} to {high}: export it for one of these"
        )


def unsupported(backend: Backend, logger: Any, path: Path, model: ir.Model) -> list[Refusal]:
    """The nodes of the file that the backend says it cannot take; `model` is what the file holds."""
    trt = backend.trt
    builder = _builder(trt, logger)
    network = _network(trt, builder)  # held: the parser does not
    parser = trt.OnnxParser(network, logger)
    ask = getattr(parser, "supports_model_v2", None)
    data = path.read_bytes()
    # Before version 11 there is also the older question, which answers with the list of parts.
    supported = ask(data, str(path)) if ask else parser.supports_model(data, str(path))[0]
    return [] if supported else _refusals(parser, model) or [Refusal("", "", "no reason given")]


def parse(backend: Backend, logger: Any, log: BuildLog, path: Path, model: ir.Model) -> Network:
    """Reads the file, which holds `model`. Raises UserError naming the nodes that cannot be built."""
    trt = backend.trt
    refusals = unsupported(backend, logger, path, model)
    if refusals:
        raise UserError(_message(backend, refusals))
    builder = _builder(trt, logger)
    network = _network(trt, builder)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        refusals = _refusals(parser, model)
        if refusals:
            raise UserError(_message(backend, refusals))
        raise UserError(f"{backend.described} cannot read the graph: {log.reason('it gives no reason')}")
    return Network(builder, network, parser)


def _builder(trt: Any, logger: Any) -> Any:
    try:
        return trt.Builder(logger)
    except TypeError as error:  # what tensorrt does where there is no GPU
        raise UserError(
            "tensorrt cannot start without a GPU and its driver: build on the machine that has one, or with "
            "--backend rtx"
        ) from error


def _network(trt: Any, builder: Any) -> Any:
    """An empty network whose types are those of the graph: no builder flag changes a precision."""
    kinds = trt.NetworkDefinitionCreationFlag
    return builder.create_network(1 << int(kinds.STRONGLY_TYPED) if hasattr(kinds, "STRONGLY_TYPED") else 0)


def _refusals(parser: Any, model: ir.Model) -> list[Refusal]:
    nodes = list(model.graph)
    found = []
    for error in (parser.get_error(index) for index in range(parser.num_errors)):
        place = error.node()
        name = error.node_name()
        if not name and 0 <= place < len(nodes):
            name = nodes[place].outputs[0].name or ""
        found.append(Refusal(name, error.node_operator(), plain(error.desc())))
    return list(dict.fromkeys(found))


def _message(backend: Backend, refusals: list[Refusal]) -> str:
    shown = "; ".join(map(str, refusals[:_SHOWN]))
    more = f"; and {len(refusals) - _SHOWN} more" if len(refusals) > _SHOWN else ""
    return f"{backend.described} cannot build this graph: {shown}{more}"
