"""What `bench` found: as a table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_autoglm.bench_load import LoadPoint
from onnx_autoglm.bench_offline import Measure
from onnx_autoglm.output import staging
from onnx_autoglm.report import finite

if TYPE_CHECKING:
    from rich.console import Console

FORMAT, VERSION = "onnx-autoglm/bench", 1


@dataclasses.dataclass
class Bench:
    """Two models side by side.

    `measures` are of one process in which both take turns; `load_a` and `load_b` of servers at rising rates; `quality`
    is that of B with A as the reference, as `eval` gives it.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    measures: list[Measure]
    load_a: list[LoadPoint]
    load_b: list[LoadPoint]
    quality: dict[str, Any] | None
    options: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        data: dict[str, Any] = finite(dataclasses.asdict(self))
        return {"format": FORMAT, "version": VERSION, **data}

    def print(self, console: Console) -> None:
        """Writes the tables."""
        console.print(f"A {self.a['file']}, {self.a['bytes'] / 1e6:,.1f} MB", highlight=False, markup=False)
        console.print(f"B {self.b['file']}, {self.b['bytes'] / 1e6:,.1f} MB", highlight=False, markup=False)
        self._print_measures(console)
        if self.load_a or self.load_b:
            self._print_load(console)
        if self.quality is not None:
            metric, ratio = self.quality["metric"], self.quality["ratio"]
            console.print(
                f"quality on {self.quality['data']['name']}: {metric} of B over A {ratio:.3f}, agreement "
                f"{self.quality['agreement']:.1%}, KL {self.quality['kl']:.4f} nats",
                highlight=False,
                markup=False,
            )

    def _print_measures(self, console: Console) -> None:
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("ms")
        for name in ("A p50", "A p99", "B p50", "B p99", "B is faster by", "95 % interval", ""):
            table.add_column(name, justify="right")
        for one in self.measures:
            numbers = (f"{value:,.2f}" for value in (one.a.p50, one.a.p99, one.b.p50, one.b.p99))
            ratio = one.ratio
            table.add_row(
                one.name,
                *numbers,
                f"x{ratio.median:.3f}",
                f"{ratio.low:.3f} to {ratio.high:.3f}",
                one.verdict,
            )
        console.print(table)

    def _print_load(self, console: Console) -> None:
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("offered/s")
        names = ("answered/s", "tokens/s", "p50 ms", "p99 ms", "first token p50", "p99", "RSS MB", "refused")
        for name in ("", *names, ""):
            table.add_column(name, justify="right")
        every = [
            (point, side) for side, points in (("A", self.load_a), ("B", self.load_b)) for point in points
        ]
        for point, side in sorted(every, key=lambda item: (item[0].rate, item[1])):
            times = (point.p50, point.p99, point.first_token_p50, point.first_token_p99)
            table.add_row(
                f"{point.rate:.3g}",
                side,
                f"{point.qps:.3g}",
                f"{point.tokens_per_second:,.1f}",
                *("" if value is None else f"{value:,.0f}" for value in times),
                "" if point.rss is None else f"{point.rss / 1e6:,.0f}",
                str(point.refused + point.failed),
                "saturated" if point.saturated else "",
            )
        console.print(table)


def write_bench(found: Bench, folder: Path) -> None:
    """Writes bench.json and, with matplotlib, bench.png: each whole, over those of an earlier run."""
    with staging(folder) as staged:
        (staged / "bench.json").write_text(json.dumps(found.as_json(), indent=1, allow_nan=False) + "\n")
        drawn = draw(found, staged / "bench.png")
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(staged / "bench.json", folder / "bench.json")
        if drawn:
            os.replace(staged / "bench.png", folder / "bench.png")
        else:
            (folder / "bench.png").unlink(missing_ok=True)  # of an earlier run, with other numbers


def draw(found: Bench, path: Path) -> bool:
    """Ratios with their intervals, and latency and throughput over load; False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    has_load = bool(found.load_a or found.load_b)
    figure = Figure(figsize=(13 if has_load else 5, 4), layout="constrained")
    axes = figure.add_subplot(1, 3 if has_load else 1, 1)
    for place, one in enumerate(found.measures):
        below, above = one.ratio.median - one.ratio.low, one.ratio.high - one.ratio.median
        axes.errorbar([place], [one.ratio.median], yerr=[[below], [above]], fmt="o", capsize=6)
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_xticks(range(len(found.measures)), [one.name for one in found.measures])
    axes.set_xlim(-0.5, len(found.measures) - 0.5)
    axes.set_ylabel("B is faster by (95 % interval)")
    if has_load:
        for panel, (field, label) in enumerate((("p99", "p99, ms"), ("tokens_per_second", "tokens/s")), 2):
            axes = figure.add_subplot(1, 3, panel)
            for name, points in (("A", found.load_a), ("B", found.load_b)):
                shown = [point for point in points if getattr(point, field) is not None]
                rates = [point.rate for point in shown]
                axes.plot(rates, [getattr(point, field) for point in shown], marker="o", label=name)
            axes.set_xlabel("requests per second, offered")
            axes.set_ylabel(label)
            axes.set_yscale("log" if field == "p99" else "linear")
            axes.grid(alpha=0.3)
            axes.legend()
    figure.savefig(path, dpi=150)
    return True
