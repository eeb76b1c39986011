"""What became of each product: data for `quantization.json`, and tables for people."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnx_autoglm.quantization.decide import Plan
from onnx_autoglm.report import finite, quality_lines

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = "onnx-autoglm/quantization"
VERSION = 1


@dataclasses.dataclass
class QuantizationReport:
    """The outcome of `quantize`, as `quantization.json` has it.

    `share` is the part of all multiply-adds with weights by scheme; `loss` what was measured in rehearsal on calibration
    data, `quality` on evaluation data with the written model.
    """

    source: dict[str, Any]
    scheme: str
    files: dict[str, Any]
    products: list[dict[str, Any]]
    left_alone: list[dict[str, Any]]
    share: dict[str, float]
    smoothed: list[dict[str, Any]]
    loss: dict[str, Any]
    quality: dict[str, Any]
    audit: dict[str, Any]
    latency: dict[str, Any]
    calibration: dict[str, Any]
    options: dict[str, Any]
    seconds: float
    versions: dict[str, str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(finite(self.as_json()), indent=1, allow_nan=False) + "\n")

    def print(self, console: Console) -> None:
        """Writes the closing tables."""
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in ("", "file", "MB", "of the source"):
            table.add_column(name, justify="right" if name in ("MB", "of the source") else "left")
        whole = self.source["bytes"]
        table.add_row("source", self.source["file"], f"{whole / 1e6:.1f}", "")
        for target, entry in self.files.items():
            table.add_row(
                target, entry["file"], f"{entry['bytes'] / 1e6:.1f}", f"{entry['bytes'] / whole:.3f}"
            )
        console.print(table)
        for line in self._lines():
            console.print(line, highlight=False, markup=False)

    def _lines(self) -> list[str]:
        counts = Counter(entry["scheme"] for entry in self.products)
        lines = [
            "products: "
            + ", ".join(
                f"{counts[scheme]} {scheme} ({share:.1%} of the multiply-adds)"
                for scheme, share in self.share.items()
            )
        ]
        reasons = Counter(entry["reason"] for entry in self.left_alone)
        lines += [f"left alone: {count} x {reason}" for reason, count in reasons.most_common()]
        fallen = [entry for entry in self.products if entry["reason"]]
        lines += [f"fell back to {e['scheme']}: {e['node']} ({e['reason']})" for e in fallen[:8]]
        if len(fallen) > 8:
            lines.append(f"... and {len(fallen) - 8} more in quantization.json")
        if self.audit:
            lines.append(
                f"kernels in ONNX Runtime: {self.audit['integer']} of {self.audit['promised']} promised products compute in "
                f"integers ({', '.join(f'{n} x {name}' for name, n in self.audit['kernels'].items())})"
            )
        for regime, entry in self.latency.items():
            lines.append(
                f"time per run, {regime}: {entry['source_ms']:.1f} -> {entry['result_ms']:.1f} ms "
                f"(x{entry['speedup']:.2f} faster)"
            )
        if self.quality:
            lines += quality_lines(self.quality)
        return lines + [f"note: {note}" for note in self.notes]


def products(plan: Plan, source: ir.Model) -> list[dict[str, Any]]:
    """One entry per product: its scheme, where its range comes from, and the error that the range leaves, in dB."""
    entries = []
    for decision in plan.decisions:
        place = decision.place
        entry: dict[str, Any] = {
            "node": place.node,
            "operator": place.op,
            "weight": place.initializer,
            "inputs": place.inputs,
            "outputs": place.outputs,
            "scheme": decision.scheme,
            "reason": decision.reason,
        }
        own = plan.ranges.get(place.activation)
        if decision.scheme in ("w8a8", "fp8") and own is not None:
            error = 10 * math.log10(own.error) if own.error > 0 else -math.inf
            entry |= {"threshold": own.threshold, "calibrator": own.calibrator, "error_db": error}
        entries.append(entry)
    return entries
