"""`engine.json`: what an engine is, what it was built from, and how to build it again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_autoglm.errors import UserError
from onnx_autoglm.report import finite

FORMAT, VERSION = "onnx-autoglm/engine", 1
NAME = "engine.json"


@dataclasses.dataclass
class EngineReport:
    """What `build` did. `plan` is None, with the `reason`, where only the recipe was written."""

    source: dict[str, str]
    plan: dict[str, Any] | None
    reason: str
    backend: dict[str, Any]
    device: dict[str, Any] | None
    profiles: list[dict[str, Any]]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    prepared: dict[str, Any]
    options: dict[str, Any]
    command: str
    trtexec: str
    seconds: float
    versions: dict[str, str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(finite(self.as_json()), indent=1, allow_nan=False) + "\n")

    def lines(self) -> list[str]:
        """What the user should see at the end."""
        if self.plan is None:
            return [f"no engine: {self.reason}", *(f"note: {note}" for note in self.notes)]
        names = ", ".join(profile["name"] for profile in self.profiles)
        made = f"engine {self.plan['file']}: {self.plan['bytes']:,} bytes, {self.seconds:.1f} s"
        shown = f"{made}, {self.backend['package']} {self.backend['version']}, profiles: {names}"
        return [shown, *(f"note: {note}" for note in self.notes)]


def read_engine_report(path: Path) -> EngineReport:
    """Raises UserError if the file is none."""
    try:
        data = json.loads(path.read_text())
        if data.pop("format") != FORMAT:
            raise ValueError
        if data.pop("version") != VERSION:
            raise UserError(f"{path} is of another version of onnx-autoglm: build the engine again")
        return EngineReport(**data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as the description of an engine: build it again") from error


def signature(values: list[ir.Value]) -> list[dict[str, Any]]:
    """Names, types and shapes (symbols as text, an unnamed one as null)."""
    return [
        {
            "name": value.name,
            "type": None if value.dtype is None else value.dtype.name.lower(),
            "shape": None
            if value.shape is None
            else [dim if isinstance(dim, int) else dim.value for dim in value.shape],
        }
        for value in values
    ]
