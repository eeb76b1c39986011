"""`plan.json`: what was removed from which source, in a form that other programs can replay."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.structures import Structure, Structures
from onnx_autoglm.errors import UserError
from onnx_autoglm.sliced_tensor import SlicedTensor

FORMAT = "onnx-autoglm/plan"
_REMOVAL = {"initializer", "axis", "kept", "consumers"}
_INTERFACE = {"name", "axis", "kept"}
_LOSSY = {"consumer", "how", "inputs", "outputs"}
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """The content of `plan.json`.

    `removals` cut initializers of the source. `interfaces` cut graph inputs and outputs (caches) in the
    same terms. `lossy` lists norms and selections that see fewer entries, for the proof. See docs/formats.md.
    """

    source: dict[str, Any]
    structures: list[dict[str, Any]]
    removals: list[dict[str, Any]]
    interfaces: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    lossy: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    repair: str = "none"

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Reads a plan. Raises UserError if the file is not one."""
        try:
            data = json.loads(path.read_text())
        except OSError as error:
            raise UserError(f"cannot read the plan {path}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path} is not a plan: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise UserError(f"{path} is not a plan of version {VERSION} ({FORMAT})")
        missing = [name for name in ("source", "structures", "removals") if name not in data]
        if missing:
            raise UserError(f"the plan {path} lacks {', '.join(missing)}: write it again with optimize")
        names = [field.name for field in dataclasses.fields(cls) if field.name in data]
        plan = cls(**{name: data[name] for name in names})
        for entry, keys in ((plan.removals, _REMOVAL), (plan.interfaces, _INTERFACE), (plan.lossy, _LOSSY)):
            if not isinstance(entry, list) or any(not isinstance(e, dict) or keys - set(e) for e in entry):
                raise UserError(
                    f"the plan {path} is damaged: an entry lacks one of {', '.join(sorted(keys))}"
                )
        return plan


def describe_structure(structure: Structure, selection: Selection) -> dict[str, Any] | None:
    """The entry of a structure that was cut; None for one that stayed whole."""
    mask = selection.kept.get(structure.atom)
    if mask is None:
        return None
    rows = [np.flatnonzero(row).tolist() for row in mask.reshape(-1, structure.size)]
    entry = {
        "id": structure.id,
        "kind": structure.kind,
        "size": structure.size,
        "kept": rows if structure.outers else rows[0],
        "interface": structure.interface,
    }
    return entry | {"names": list(structure.names)} if structure.names else entry


def interface_cuts(structures: Structures, selection: Selection) -> list[dict[str, Any]]:
    """How graph inputs and outputs shrink."""
    graph = structures.analysis.graph
    cuts: list[dict[str, Any]] = []
    for value in (*graph.inputs, *graph.outputs):
        dims = structures.analysis.values.get(value) or []
        for axis, dim in enumerate(dims):
            if selection.touches(dim):
                kept, outer = selection.indices(dims, axis)
                cut: dict[str, Any] = {"name": value.name, "axis": axis, "kept": kept.tolist()}
                if outer is not None:
                    cut["outer_axis"] = outer
                cuts.append(cut)
    return cuts


def cut_arrays(arrays: dict[str, np.ndarray], cuts: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The arrays with the interface cuts of a plan applied, by name."""
    result = dict(arrays)
    for name in {cut["name"] for cut in cuts} & set(arrays):
        own = [cut for cut in cuts if cut["name"] == name]
        kept = {cut["axis"]: np.asarray(cut["kept"]) for cut in own}
        outer = {cut["axis"]: cut["outer_axis"] for cut in own if "outer_axis" in cut}
        result[name] = SlicedTensor(ir.tensor(arrays[name]), kept, outer).numpy()
    return result


def sha256(path: Path) -> str:
    """The hash of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
