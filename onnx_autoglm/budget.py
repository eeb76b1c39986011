"""Meets one budget for the whole model: all kinds and layers compete for what may stay."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.structures import Structure, Structures
from onnx_autoglm.dataset import Dataset
from onnx_autoglm.divergence import Loss
from onnx_autoglm.errors import UserError
from onnx_autoglm.evidence import Data, Evidence, Repair
from onnx_autoglm.latency_table import Stopwatch, described, latency_savings, workload
from onnx_autoglm.options import BudgetOptions, Options
from onnx_autoglm.passes.allocate import allocate
from onnx_autoglm.passes.ladder import keep_best
from onnx_autoglm.passes.price import DEPTHS, LossCurve, price
from onnx_autoglm.passes.score_norm import Scores
from onnx_autoglm.resources import Resource, resource_of, unit_costs
from onnx_autoglm.statistics import HELD_OUT
from onnx_autoglm.trial import Trial

Progress = Callable[[str], None]
USUAL_KINDS = ("query-head", "ffn-channel", "expert-channel", "conv-channel")
_PRICE_TOKENS = 1536  # of calibration data, on which the losses of single cuts are measured
_SEARCH_RUNS = 8  # of evaluation data, while a loss is searched for
_CLOSE, _PROMISE = 0.005, 0.05  # how near a target must be met: by counting, by the clock
_FIELDS = {
    "ffn-channel": "intermediate_size",
    "query-head": "num_attention_heads",
    "kv-group": "num_key_value_heads",
    "expert-channel": "moe_intermediate_size",
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How many indices of each competing structure stay, and what the report says about it."""

    counts: dict[Structure, int]
    report: dict[str, Any]
    latency: dict[str, Any] | None = None


class Spender:
    """Everything a budget is solved with."""

    def __init__(
        self,
        structures: Structures,
        scores: Mapping[Structure, Scores],
        evidence: Evidence,
        data: Data,
        model: ir.Model,
        options: Options,
        repair: Repair,
        progress: Progress,
    ) -> None:
        self.structures, self.scores, self.evidence = structures, scores, evidence
        self.data, self.model, self.options = data, model, options
        self.repair, self.progress = repair, progress
        self.budget: BudgetOptions = options.budget
        self.curves = self._price()

    def _price(self) -> dict[Structure, LossCurve]:
        """Losses measured on held-out calibration data; without data the scores must do."""
        trial = None
        if self.data.calibration is not None:
            window = max(1, self.data.calibration.rows // max(len(self.data.calibration.feeds), 1))
            held_out = range(HELD_OUT - 1, len(self.data.calibration.feeds), HELD_OUT)
            trial = self._trial(self.data.calibration, _spread(held_out, _PRICE_TOKENS // window))
        return price(trial, self.scores, DEPTHS, self.options.pruning, self.progress)

    def _trial(self, data: Dataset, numbers: Sequence[int]) -> Trial:
        return Trial(
            self.model,
            self.evidence.consumers,
            self.evidence.observed,
            data,
            numbers=numbers,
            repair=self.repair,
            step=self.progress,
        )

    def spend(self) -> Outcome:
        """Solves for whichever target was given. Raises UserError if it cannot be reached."""
        target = self.budget.target
        if target == "speedup":
            return self._by_clock()
        if target == "max_loss":
            return self._by_loss()
        return self._by_counting(target or "keep")

    # --- parameters, FLOPs, bytes

    def _by_counting(self, target: str) -> Outcome:
        resource = resource_of(
            {"keep": "parameters", "flops": "flops", "size": "bytes"}[target], self.structures
        )
        costs = unit_costs(list(self.curves), resource)
        whole, competing = resource(Selection()), sum(costs[s] * s.size for s in self.curves)
        if target == "keep":
            wanted = (1 - float(self.budget.keep or 0)) * competing
        elif target == "flops":
            wanted = (1 - float(self.budget.flops or 0)) * whole
        else:
            wanted = whole - float(self.budget.size or 0)
            if wanted <= 0:
                raise UserError(f"the weights have {whole:.0f} bytes already: --size must be below that")
        counts = self._solve(resource, costs, wanted)
        saved = whole - resource(self.selection(counts))
        if saved < wanted * (1 - 2 * _CLOSE) and saved < wanted - self._largest_step(costs):
            most = sum(costs[s] * (s.size - curve.ladder.floor) for s, curve in self.curves.items())
            raise UserError(
                f"--{target} cannot be reached: it asks to remove {wanted:.4g} of {whole:.4g}, and at most {most:.4g} can go "
                f"from {', '.join(sorted({s.kind for s in self.curves}))}; add --kinds, or ask for less"
            )
        return Outcome(counts, self._described(counts, {"wanted": wanted, "reached": saved, "whole": whole}))

    def _largest_step(self, costs: Mapping[Structure, float]) -> float:
        """What one step of the allocation may leave unspent."""
        steps: dict[object, float] = defaultdict(float)
        for structure, curve in self.curves.items():
            key = (structure.kind, structure.size) if self.budget.uniform else structure
            steps[key] += costs[structure] * curve.ladder.tile
        return max(steps.values())

    def _solve(
        self, resource: Resource, costs: Mapping[Structure, float], wanted: float
    ) -> dict[Structure, int]:
        """Allocates; where costs do not add up (factors of one axis) the target is corrected by what came of it."""

        def saving(structure: Structure, keep: int) -> float:
            return (structure.size - keep) * costs[structure]

        whole, asked = resource(Selection()), wanted
        best: tuple[float, dict[Structure, int]] | None = None
        for _ in range(4):
            counts = allocate(self.curves, saving, asked, uniform=self.budget.uniform)
            saved = whole - resource(self.selection(counts))
            miss = abs(saved - wanted) / max(wanted, 1e-30)
            if best is None or miss < best[0]:
                best = miss, counts
            if miss <= _CLOSE or saved <= 0:
                break
            asked *= wanted / saved
        assert best is not None
        return best[1]

    def selection(self, counts: Mapping[Structure, int]) -> Selection:
        selection = Selection()
        for structure, keep in counts.items():
            keep_best(selection, structure, self.scores[structure], keep)
        return selection

    # --- quality

    def _by_loss(self) -> Outcome:
        """Bisects the share of the competing parameters that goes; the last word has the whole evaluation set."""
        limit = float(self.budget.max_loss or 0)
        evaluation = self.data.evaluation
        assert evaluation is not None
        resource = resource_of("parameters", self.structures)
        costs = unit_costs(list(self.curves), resource)
        competing = sum(costs[s] * s.size for s in self.curves)
        short = self._trial(evaluation, _spread(range(len(evaluation.feeds)), _SEARCH_RUNS))
        base = short.measure(Selection())
        low, high = 0.0, 0.9
        for round_ in range(7):
            share = (low + high) / 2
            self.progress(f"search {round_ + 1} of 7: -{share:.1%}")
            counts = self._solve(resource, costs, share * competing)
            loss = _worse(base, short.measure(self.selection(counts), quick=True), evaluation.metric)
            low, high = (share, high) if loss <= limit else (low, share)
        del short
        full = self._trial(evaluation, range(len(evaluation.feeds)))
        base = full.measure(Selection())
        share = low
        for _ in range(8):
            counts = self._solve(resource, costs, share * competing)
            if all(keep == structure.size for structure, keep in counts.items()):
                break
            self.progress(f"verify -{share:.1%}")
            loss = _worse(base, full.measure(self.selection(counts)), evaluation.metric)
            if loss <= limit:
                reached = {"wanted": limit, "reached": loss, "removed": share}
                return Outcome(counts, self._described(counts, reached))
            share *= 0.85
        raise UserError(f"no cut stays within --max-loss {limit:.2%} on {evaluation.name}: allow more")

    # --- time

    def _by_clock(self) -> Outcome:
        budget = self.budget
        feed = workload(self.model, budget.batch, budget.sequence, budget.regime)
        stopwatch = Stopwatch(self.model, feed)
        costs = unit_costs(list(self.curves), resource_of("flops", self.structures))
        saving = latency_savings(stopwatch, list(self.curves), costs, self.progress)
        promised = float(budget.speedup or 1)
        wanted = asked = 1 - 1 / promised
        tried: list[tuple[float, dict[Structure, int], Any]] = []
        for round_ in range(4):
            counts = allocate(self.curves, saving, asked, uniform=budget.uniform)
            self.progress(f"time the result, round {round_ + 1}")
            latency = stopwatch.measure({s.id: keep for s, keep in counts.items()})
            tried.append((abs(latency.speedup / promised - 1), counts, latency))
            if tried[-1][0] <= _PROMISE / 2:
                break
            asked = min(asked * wanted / max(1 - 1 / latency.speedup, 1e-3), 0.98)
        _, counts, latency = min(tried, key=lambda item: item[0])
        if latency.speedup < promised * (1 - _PROMISE):
            raise UserError(
                f"--speedup {promised:g} cannot be reached: {latency.speedup:.2f} was measured at batch {budget.batch}, "
                f"{budget.sequence} tokens, {budget.regime}; ask for less, or add --kinds"
            )
        found = described(latency, budget.batch, budget.sequence, budget.regime)
        return Outcome(
            counts, self._described(counts, {"wanted": promised, "reached": latency.speedup}), found
        )

    # --- the report

    def _described(self, counts: Mapping[Structure, int], reached: dict[str, float]) -> dict[str, Any]:
        result: dict[str, Any] = {"target": self.budget.target or "keep", **reached}
        result["predicted_loss"] = sum(self.curves[s].loss(keep) for s, keep in counts.items())
        result["losses"] = {s.id: curve.points() for s, curve in self.curves.items()}
        if self.budget.uniform:
            result["config"] = config_fields(self.structures, counts)
        return result


def _spread(numbers: range, count: int) -> list[int]:
    """At most `count` of the numbers, at least one, from all over."""
    count = min(max(count, 1), len(numbers))
    return [numbers[(2 * index + 1) * len(numbers) // (2 * count)] for index in range(count)]


def _worse(before: Loss, after: Loss, metric: str) -> float:
    """By what fraction perplexity rose, or top-1 fell."""
    if metric == "perplexity":
        return math.expm1(min(after.likelihood - before.likelihood, 700.0))
    return 1 - after.accuracy / max(before.accuracy, 1e-30)


def config_fields(structures: Structures, counts: Mapping[Structure, int]) -> dict[str, int]:
    """The usual configuration fields of a model whose layers are all equal, with their new values.

    A head count is that of the whole layer: heads of a group times groups.
    """
    found: dict[str, set[int]] = defaultdict(set)
    for structure in structures.found:
        if structure.kind in _FIELDS:
            keep = counts.get(structure, structure.size)
            groups = structure.groups if structure.kind == "query-head" else 1
            found[_FIELDS[structure.kind]].add(keep * groups)
    return {field: values.pop() for field, values in found.items() if len(values) == 1}
