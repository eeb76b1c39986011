"""The table of a sweep, as data, as CSV and as a picture."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_autoglm.latency import Latency
from onnx_autoglm.output import explained, staging
from onnx_autoglm.report import finite

if TYPE_CHECKING:
    from rich.console import Console

FORMAT, VERSION = "onnx-autoglm/sweep", 1


@dataclasses.dataclass
class Row:
    """One point, or the source itself; `ratio`s and shares are to the source.

    `quality` is perplexity, top-1 or (without labels) the agreement with the source, as `metric` says. Latencies are
    medians in ms; `seconds` is the time that `optimize` took. `error` says why there is no result.
    """

    name: str
    options: dict[str, Any]
    parameters: int | None = None
    parameters_share: float | None = None
    bytes: int | None = None
    flops: int | None = None
    flops_share: float | None = None
    metric: str | None = None
    quality: float | None = None
    ratio: float | None = None
    agreement: float | None = None
    kl: float | None = None
    latency_ms: float | None = None
    source_latency_ms: float | None = None
    speedup: float | None = None
    seconds: float | None = None
    error: str = ""


@dataclasses.dataclass
class Sweep:
    """What `sweep` found: the source in the first row, then each point; `reused` names those not run again."""

    source: dict[str, Any]
    rows: list[Row]
    data: dict[str, Any] | None
    reused: list[str]
    latency: dict[str, Any] | None
    versions: dict[str, str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        data: dict[str, Any] = finite(dataclasses.asdict(self))
        return {"format": FORMAT, "version": VERSION, **data}

    def print(self, console: Console) -> None:
        """Writes the table, and what went wrong."""
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("point")
        metric = next((row.metric for row in self.rows if row.metric), "quality")
        for name in ("parameters", "flops", metric, "ratio", "agreement", "latency", "speed-up"):
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(
                row.name,
                *(_cell(number, "{:.1%}") for number in (row.parameters_share, row.flops_share)),
                _cell(row.quality, "{:.2f}" if row.metric == "perplexity" else "{:.1%}"),
                *(_cell(row.ratio, "x{:.3f}"), _cell(row.agreement, "{:.1%}")),
                *(_cell(row.latency_ms, "{:,.2f} ms"), _cell(row.speedup, "x{:.2f}")),
                style="red" if row.error else None,
            )
        console.print(table)
        for row in self.rows:
            if row.error:
                console.print(f"{row.name}: {row.error}", highlight=False, markup=False)
        for note in self.notes:
            console.print(f"note: {note}", highlight=False, markup=False)


def _cell(number: float | None, form: str) -> str:
    return "" if number is None else form.format(number)


def source_row(report: dict[str, Any]) -> Row:
    """The source as the report of any point has it."""
    figures, quality = report["source"], report["quality"]
    row = Row("source", {}, figures["parameters"], 1.0, figures["bytes"], figures["flops"], 1.0)
    if quality:
        row.metric, row.quality, row.ratio = quality["metric"], _headline(quality, "source"), 1.0
        row.agreement, row.kl = 1.0, 0.0
    return row


def point_row(name: str, options: dict[str, Any], report: dict[str, Any]) -> Row:
    """A point as its report has it, without latency."""
    before, after, quality = report["source"], report["result"], report["quality"]
    row = Row(
        name,
        options,
        after["parameters"],
        after["parameters"] / max(before["parameters"], 1),
        after["bytes"],
        after["flops"],
        after["flops"] / before["flops"] if before["flops"] else None,
        seconds=round(sum(step["seconds"] for step in report["passes"]), 3),
    )
    if quality:
        row.metric, row.quality, row.ratio = quality["metric"], _headline(quality, "result"), quality["ratio"]
        row.agreement, row.kl = quality["agreement"], quality["kl"]
    return row


def _headline(quality: dict[str, Any], side: str) -> float | None:
    if quality["metric"] == "agreement":
        return quality["agreement"] if side == "result" else 1.0
    number: float | None = quality[side]["perplexity" if quality["metric"] == "perplexity" else "top1"]
    return number


def add_latency(row: Row, latency: Latency) -> None:
    row.latency_ms, row.source_latency_ms = latency.result_ms, latency.source_ms
    row.speedup = latency.speedup


def write_tables(sweep: Sweep, folder: Path) -> None:
    """Writes sweep.json, sweep.csv and, with matplotlib, sweep.png: each whole, over those of an earlier sweep.

    Raises UserError if the folder cannot be written to.
    """
    with staging(folder) as staged, explained(folder):
        names = ["sweep.json", "sweep.csv"]
        if draw(sweep, staged / "sweep.png"):
            names.append("sweep.png")
        else:
            sweep.notes.append("no sweep.png without matplotlib: pip install 'onnx-autoglm[plot]'")
        (staged / "sweep.json").write_text(json.dumps(sweep.as_json(), indent=1, allow_nan=False) + "\n")
        _write_csv(sweep.rows, staged / "sweep.csv")
        folder.mkdir(parents=True, exist_ok=True)
        if "sweep.png" not in names:
            (folder / "sweep.png").unlink(missing_ok=True)  # of an earlier sweep, with other numbers
        for name in names:
            os.replace(staged / name, folder / name)


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    keywords = list(dict.fromkeys(keyword for row in rows for keyword in row.options))
    columns = [field.name for field in dataclasses.fields(Row) if field.name != "options"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([columns[0], *keywords, *columns[1:]])
        for row in rows:
            values = [getattr(row, column) for column in columns]
            writer.writerow([values[0], *(row.options.get(word, "") for word in keywords), *values[1:]])


def draw(sweep: Sweep, path: Path) -> bool:
    """Quality and speed over the share of parameters; False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = sorted(
        (row for row in sweep.rows if row.parameters_share is not None),
        key=lambda row: row.parameters_share or 0,
    )
    metric = next((row.metric for row in rows if row.metric), None)
    panels = [("quality", f"{metric}", metric == "perplexity")] if metric else []
    panels += [("speedup", "speed-up in ONNX Runtime", False)] if any(row.speedup for row in rows) else []
    panels = panels or [("flops_share", "FLOPs, share of the source", False)]
    one_option = len({word for row in rows for word in row.options}) == 1
    line = "-" if one_option else "none"  # through a grid of several options it would go back and forth
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for index, (field, label, logarithmic) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), index)
        shown = [row for row in rows if getattr(row, field) is not None]
        shares = [100 * (row.parameters_share or 0) for row in shown]
        axes.plot(shares, [getattr(row, field) for row in shown], marker="o", linestyle=line)
        axes.set_xlabel("parameters, % of the source")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.invert_xaxis()
        if logarithmic:
            axes.set_yscale("log")
    figure.suptitle(sweep.source["file"])
    figure.savefig(path, dpi=150)
    return True
