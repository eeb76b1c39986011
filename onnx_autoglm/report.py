"""The report of a run: data for `report.json`, and tables for people."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = "onnx-autoglm/report"
VERSION = 1


@dataclasses.dataclass
class ModelFigures:
    """What a model weighs: `bytes` of weights, `flops` in multiply-adds of one run at batch 1, sequence 128."""

    file: str
    parameters: int
    bytes: int
    flops: int
    nodes: int
    sha256: str = ""


@dataclasses.dataclass(frozen=True)
class PinReport:
    """A reason why an axis stays, the node that gives it, and how many axes of weights it holds."""

    reason: str
    node: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.reason} ({self.node})" if self.node else self.reason


@dataclasses.dataclass
class StructureReport:
    """One structure: `size` and `kept` count indices per selection, of which there are `groups`."""

    id: str
    layer: str
    kind: str
    size: int
    groups: int
    kept: int
    parameters: int
    share: float
    cost_per_index: float
    scores: dict[str, float]
    interface: list[str]
    pins: list[PinReport]
    reason: str = ""


@dataclasses.dataclass
class Inspection:
    """What `inspect` finds in a model."""

    source: ModelFigures
    structures: list[StructureReport]
    pins: list[PinReport]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {"format": "onnx-autoglm/inspection", "version": VERSION, **dataclasses.asdict(self)}

    def print(self, console: Console) -> None:
        """Writes the table of structures and of pins."""
        from rich.table import Table

        _print_figures(console, self.source, None)
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in ("layer", "kind"):
            table.add_column(name)
        for name in ("count", "size", "share"):
            table.add_column(name, justify="right")
        table.add_column("remarks", style="dim")
        for entry in self.structures:
            table.add_row(
                entry.id,
                entry.kind,
                str(entry.groups),
                str(entry.size),
                f"{100 * entry.share:.1f} %",
                _remark(entry),
                style="dim" if entry.pins else None,
            )
        console.print(table)
        if self.pins:
            console.print("\n[bold]Axes that stay as they are, and why[/bold]")
            for line in _grouped(self.pins):
                console.print(f"  {line}", highlight=False, markup=False)


def finite(data: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _grouped(pins: list[PinReport]) -> list[str]:
    """One line per reason, naming the node of the first place; the others are in the JSON."""
    places: dict[str, list[PinReport]] = defaultdict(list)
    for pin in pins:
        places[pin.reason].append(pin)
    lines = []
    for reason, row in sorted(places.items(), key=lambda item: -sum(pin.count for pin in item[1])):
        more = f" and {len(row) - 1} more" if len(row) > 1 else ""
        lines.append(
            f"{sum(pin.count for pin in row)} x {reason}" + (f" ({row[0].node}{more})" if row[0].node else "")
        )
    return lines


def _remark(entry: StructureReport) -> str:
    if entry.pins:
        more = f" (+{len(entry.pins) - 1} more)" if len(entry.pins) > 1 else ""
        return f"pinned: {entry.pins[0]}{more}"
    if entry.interface:
        return f"changes {', '.join(entry.interface[:2])}{', ...' if len(entry.interface) > 2 else ''}"
    return ""


@dataclasses.dataclass
class Report:
    """The outcome of `optimize`, as `report.json` has it."""

    source: ModelFigures
    result: ModelFigures
    passes: list[dict[str, Any]]
    structures: list[StructureReport]
    pins: list[PinReport]
    check: dict[str, Any]
    repair: dict[str, Any]
    quality: dict[str, Any]
    precision: dict[str, Any]
    budget: dict[str, Any]
    quantization: dict[str, Any]
    latency: dict[str, Any]
    options: dict[str, Any]
    versions: dict[str, str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(finite(self.as_json()), indent=1, allow_nan=False) + "\n")

    def print(self, console: Console) -> None:
        """Writes the closing tables."""
        from rich.table import Table

        _print_figures(console, self.source, self.result)
        cut = [entry for entry in self.structures if entry.kept < entry.size]
        rows: dict[str, dict[str, str]] = defaultdict(dict)
        kinds: list[str] = []
        for entry in cut:
            each = f" x{entry.groups}" if entry.groups > 1 else ""
            cell = f"{entry.kept}/{entry.size}{each}"
            before = rows[entry.layer].get(entry.kind)
            rows[entry.layer][entry.kind] = f"{before}, {cell}" if before else cell
            if entry.kind not in kinds:
                kinds.append(entry.kind)
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("kept")
        for kind in kinds:
            table.add_column(kind, justify="right")
        for layer, cells in rows.items():
            table.add_row(layer, *(cells.get(kind, "") for kind in kinds))
        console.print(table)
        self._print_left_alone(console)
        for note in self.notes:
            console.print(f"note: {note}", highlight=False, markup=False)
        for line in self._lines():
            console.print(line, highlight=False, markup=False)
        if self.quality:
            for line in quality_lines(self.quality):
                console.print(line, highlight=False, markup=False)
        for line in quantization_lines(self.quantization):
            console.print(line, highlight=False, markup=False)
        relative, limit = self.check["relative_difference"], self.check["tolerance"]
        console.print(
            f"masked == pruned: worst relative difference {relative:.1e} (limit {limit:.0e}); "
            f"the cut itself moves the outputs by {self.check['effect']:.1e}",
            highlight=False,
        )

    def _lines(self) -> list[str]:
        """What came of the budget, of the clock, and of configuration fields."""
        lines = []
        if self.budget:
            target, wanted, reached = (self.budget[name] for name in ("target", "wanted", "reached"))
            lines.append(f"budget {target}: asked for {wanted:.6g}, reached {reached:.6g}")
            if "config" in self.budget:
                fields = ", ".join(f"{name}={value}" for name, value in self.budget["config"].items())
                lines.append(f"configuration of the result: {fields}")
        if self.latency:
            how = (
                f"{self.latency['regime']}, batch {self.latency['batch']}, {self.latency['sequence']} tokens"
            )
            lines.append(
                f"time per run ({how}): {self.latency['source_ms']:.1f} -> {self.latency['result_ms']:.1f} ms "
                f"(x{self.latency['speedup']:.2f} faster)"
            )
        return lines

    def _print_left_alone(self, console: Console) -> None:
        reasons: Counter[tuple[str, str]] = Counter()
        for entry in self.structures:
            if entry.kept == entry.size and entry.reason:
                reasons[entry.kind, entry.reason] += 1
        if not reasons:
            return
        console.print("\n[bold]Left alone, and why[/bold]")
        for (kind, reason), count in reasons.most_common(12):
            console.print(f"  {count} x {kind}: {reason}", highlight=False, markup=False)
        if len(reasons) > 12:
            console.print(f"  ... and {len(reasons) - 12} more reasons in report.json")


def quantization_lines(quantization: dict[str, Any]) -> list[str]:
    """What quantizing made of the result, in short; quantization.json has the rest."""
    if not quantization:
        return []
    shares = ", ".join(f"{share:.1%} {scheme}" for scheme, share in quantization["share"].items())
    lines = [f"quantized: {shares} of the multiply-adds with weights"]
    for entry in quantization["files"].values():
        lines.append(f"  {entry['file']}: {entry['bytes'] / 1e6:.1f} MB")
    for regime, entry in quantization["latency"].items():
        lines.append(
            f"  {regime}: {entry['source_ms']:.1f} -> {entry['result_ms']:.1f} ms (x{entry['speedup']:.2f} faster)"
        )
    return lines + [
        f"  {line}" for line in (quality_lines(quantization["quality"]) if quantization["quality"] else [])
    ]


def quality_lines(quality: dict[str, Any]) -> list[str]:
    """The `quality` of a report in words."""
    name, before, after = quality["data"]["name"], quality["source"], quality["result"]
    same = f"both agree on {quality['agreement']:.1%} of {quality['positions']:,} positions of {name}"
    lines = [f"{same}, KL {quality['kl']:.4f} nats"]
    if quality["metric"] == "perplexity":
        lines.insert(
            0,
            f"perplexity on {name}: {before['perplexity']:.2f} -> {after['perplexity']:.2f} "
            f"(x{quality['ratio']:.3f}); next token right: {before['accuracy']:.1%} -> {after['accuracy']:.1%}",
        )
    elif quality["metric"] == "top-1":
        lines.insert(
            0,
            f"top-1 on {name}: {before['top1']:.1%} -> {after['top1']:.1%} (x{quality['ratio']:.3f}); "
            f"top-5: {before['top5']:.1%} -> {after['top5']:.1%}",
        )
    return lines


def _print_figures(console: Console, before: ModelFigures, after: ModelFigures | None) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    table.add_column("source", justify="right")
    if after is not None:
        table.add_column("result", justify="right")
        table.add_column("change", justify="right")
    for name in ("parameters", "bytes", "flops", "nodes"):
        old = getattr(before, name)
        cells = [name, f"{old:,}"]
        if after is not None:
            new = getattr(after, name)
            change = 100 * (new - old) / old if old else 0.0
            cells += [f"{new:,}", f"{change:+.1f} %"]
        table.add_row(*cells)
    console.print(table)
    console.print()
