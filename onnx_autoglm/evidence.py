"""What a run learns from data: the sets it was given, what consumers read, and the scores from both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from onnx_autoglm.axes.dims import leaves
from onnx_autoglm.axes.structures import Structure, Structures
from onnx_autoglm.consumers import find_consumers
from onnx_autoglm.data import Arrays, Dataset, load_dataset
from onnx_autoglm.errors import UserError
from onnx_autoglm.options import Options
from onnx_autoglm.passes.score_activation import ScoreActivation
from onnx_autoglm.passes.score_norm import ScoreNorm, Scores
from onnx_autoglm.passes.score_obs import ScoreObs
from onnx_autoglm.passes.score_random import ScoreRandom
from onnx_autoglm.plan import Plan, cut_arrays
from onnx_autoglm.quality import measure
from onnx_autoglm.statistics import Key, Observed, observe

Repair = Literal["affine", "bias", "none"]
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Data:
    """The calibration and evaluation sets of a run."""

    calibration: Dataset | None
    evaluation: Dataset | None

    @classmethod
    def load(cls, model: ir.Model, path: Path, options: Options) -> Data:
        """Reads both sets. Raises UserError for unreadable data, or if they are the same."""
        given = options.data
        beside = path.with_name("tokenizer.json")
        tokenizer = given.tokenizer or (beside if beside.is_file() else None)

        def read(source: Path | None, limit: int) -> Dataset | None:
            if source is None:
                return None
            return load_dataset(source, model, tokenizer=tokenizer, window=given.window, limit=limit)

        calibration = read(given.calibration, given.calibration_tokens)
        evaluation = read(given.evaluation, given.evaluation_tokens)
        if calibration and evaluation and calibration.windows() & evaluation.windows():
            raise UserError("--calib and --eval share data: quality would be measured on what was fitted")
        if evaluation and evaluation.token_input is None:
            raise UserError("quality is measured as perplexity: pass a text with --eval, not samples")
        return cls(calibration, evaluation)

    def pairs(self, plan: Plan) -> list[tuple[Arrays, Arrays]]:
        """The calibration set, each feed as the source and as the pruned model take it."""
        assert self.calibration is not None
        return [(feed, cut_arrays(feed, plan.interfaces)) for feed in self.calibration]

    def described(self) -> dict[str, Any] | None:
        return None if self.calibration is None else _described(self.calibration)

    def compare(self, source: ir.Model, result: ir.Model, progress: Progress) -> dict[str, Any]:
        """Quality of both models on the evaluation set."""
        assert self.evaluation is not None
        before, after = measure(source, self.evaluation, progress), measure(result, self.evaluation, progress)
        return {
            "data": _described(self.evaluation),
            "source": dataclasses.asdict(before),
            "result": dataclasses.asdict(after),
            "ratio": after.perplexity / before.perplexity,
        }


def _described(data: Dataset) -> dict[str, Any]:
    return {"name": data.name, "sha256": data.sha256, "rows": data.rows}


class Evidence:
    """The consumers of the structures that may be cut, and what they read."""

    def __init__(self, structures: Structures, wanted: Sequence[Structure]) -> None:
        atoms = {structure.atom for structure in wanted}
        self.consumers = [
            consumer
            for consumer in find_consumers(structures)
            if atoms & set(leaves(consumer.contraction.dim))
        ]
        self.observed: dict[Key, Observed] = {}

    def observe(self, model: ir.Model, data: Data, progress: Progress) -> dict[str, Any]:
        """Runs the source on the calibration set."""
        assert data.calibration is not None
        contractions = [consumer.contraction for consumer in self.consumers]
        if contractions:
            self.observed = observe(model, contractions, data.calibration, step=progress)
        return {"rows": data.calibration.rows, "consumers": len(contractions)}


def score(
    criterion: str, wanted: Sequence[Structure], evidence: Evidence, seed: int, progress: Progress
) -> dict[Structure, Scores]:
    """Scores by the named criterion; structures without a consumer to look at are scored by their norm."""
    if criterion == "random":
        return ScoreRandom(seed)(wanted)
    if criterion in ("l1", "l2"):
        return ScoreNorm(1 if criterion == "l1" else 2)(wanted)
    if criterion == "obs":
        scores = ScoreObs()(wanted, evidence.consumers, evidence.observed, progress)
    else:
        method: Literal["wanda", "flap"] = "wanda" if criterion == "wanda" else "flap"
        scores = ScoreActivation(method)(wanted, evidence.consumers, evidence.observed)
    rest = [structure for structure in wanted if structure not in scores]
    return scores | ScoreNorm(2)(rest)
