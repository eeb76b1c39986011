"""Runs a graph piece by piece over a set of feeds, so that weights may change ahead of the place reached."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import onnx_ir as ir

from onnx_autoglm.dataset import Arrays
from onnx_autoglm.runtime import Session
from onnx_autoglm.upcast import HALF_TYPES, needs_upcast, upcast


class Walk:
    """A model on its way through all feeds.

    Between the pieces only those values are held that later nodes read, and they lie in files, not in memory.
    Nodes may be inserted, and weights changed, behind the place reached. 16-bit models run in float32.
    """

    def __init__(self, model: ir.Model, feeds: Iterable[Arrays], scratch: Path | None = None) -> None:
        """Args: `scratch` is the folder for the values held; the system's for temporary files by default."""
        self.model = model
        self._half = needs_upcast(model)
        self._folder = tempfile.TemporaryDirectory(prefix="onnx-autoglm-", dir=scratch)
        self._done: set[ir.Node] = set()
        self._held: list[dict[str, Path]] = []
        names = {value.name for value in model.graph.inputs}
        for feed in feeds:
            self._held.append({})
            self._hold(len(self._held) - 1, {name: feed[name] for name in feed if name in names})

    def __len__(self) -> int:
        """The number of feeds."""
        return len(self._held)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def reach(self, names: Iterable[str], keep: Iterable[str] = ()) -> None:
        """Goes on until the named values are computed, and holds them and those of `keep`."""
        names = list(names)
        piece = self._until(names)
        wanted = {*names, *keep, *self._read_after(piece)}
        held = set(self._held[0]) if self._held else set()
        made = [value.name or "" for node in piece for value in node.outputs if value.name in wanted]
        if made:
            session = self._session(made)
            for index in range(len(self._held)):
                self._hold(index, session.run(self._arrays(index, session.input_names)))
        for index in range(len(self._held)):
            for name in held - wanted:
                self._held[index].pop(name).unlink()
        self._done.update(piece)

    def values(self, names: Sequence[str]) -> Iterator[Arrays]:
        """The named values of each feed, held or computed from what is; the place reached stays."""
        names = list(dict.fromkeys(names))
        ahead = [name for name in names if self._held and name not in self._held[0]]
        session = self._session(ahead) if ahead else None
        for index in range(len(self._held)):
            found = self._arrays(index, [name for name in names if name not in ahead])
            if session is not None:
                found |= session.run(self._arrays(index, session.input_names))
            yield found

    def _until(self, names: Sequence[str]) -> list[ir.Node]:
        """The nodes that have not run yet, up to the last that makes one of the named values."""
        left = [node for node in self.model.graph if node not in self._done]
        wanted = set(names)
        ends = [i for i, node in enumerate(left) if any(value.name in wanted for value in node.outputs)]
        return left[: ends[-1] + 1] if ends else []

    def _read_after(self, piece: Sequence[ir.Node]) -> set[str]:
        """What the nodes behind a piece read."""
        passed = {*self._done, *piece}
        return {
            value.name or ""
            for node in self.model.graph
            if node not in passed
            for value in _inputs(node)
            if value is not None
        }

    def _session(self, names: Sequence[str]) -> Session:
        """What computes the named values from those held."""
        held = self._held[0]
        graph = self.model.graph
        starts = [*graph.inputs, *(value for node in graph for value in node.outputs if value.name in held)]
        inner = ir.convenience.extract(graph, [value for value in starts if value.name in held], list(names))
        for value in [*inner.inputs, *inner.outputs]:
            if value.dtype is None:
                value.dtype = ir.DataType.FLOAT
        for value in inner.inputs:
            value.shape = None  # a declared shape may be that of before the cut
        model = ir.Model(
            inner, ir_version=self.model.ir_version, functions=list(self.model.functions.values())
        )
        return Session(upcast(model) if self._half else model, optimize=True)

    def _hold(self, index: int, arrays: Arrays) -> None:
        for name, array in arrays.items():
            if self._half and ir.DataType.from_numpy(array.dtype) in HALF_TYPES:
                array = array.astype(np.float32)
            number = len(self._held[index])
            path = Path(self._folder.name) / f"{index}-{len(self._done)}-{number}.npy"
            np.save(path, array)
            self._held[index][name] = path

    def _arrays(self, index: int, names: Iterable[str]) -> Arrays:
        return {name: np.load(self._held[index][name]) for name in names}


def _inputs(node: ir.Node) -> Iterator[ir.Value | None]:
    """What a node reads, its bodies included."""
    yield from node.inputs
    for attribute in node.attributes.values():
        graphs: Sequence[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = attribute.as_graphs()
        for graph in graphs:
            for inner in graph:
                yield from _inputs(inner)
            yield from graph.outputs
