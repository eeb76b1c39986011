"""What a run learns from data: the sets it was given, and what consumers read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from onnx_autoglm.axes.dims import leaves
from onnx_autoglm.axes.selection import Indices
from onnx_autoglm.axes.structures import Structure, Structures
from onnx_autoglm.consumers import Weight, consumers_of, find_consumers, members
from onnx_autoglm.data import Arrays, Dataset, load_dataset, refuse_idle_preprocess
from onnx_autoglm.data_text import feeds_for
from onnx_autoglm.errors import UserError
from onnx_autoglm.options import Options
from onnx_autoglm.passes.score_blocks import score_blocks
from onnx_autoglm.passes.score_energy import score_energy
from onnx_autoglm.passes.score_norm import Scores
from onnx_autoglm.plan import Plan, cut_arrays
from onnx_autoglm.precision_distance import as_inputs
from onnx_autoglm.quality import compare, find_scores
from onnx_autoglm.self_text import write_texts
from onnx_autoglm.statistics import Key, Moments, Observed, key_of, observe

Repair = Literal["affine", "bias", "none"]
Progress = Callable[[str], None]

HELD_OUT_TOKENS = 4096  # self-written text for evaluation


@dataclasses.dataclass(frozen=True)
class Data:
    """The calibration and evaluation sets of a run."""

    calibration: Dataset | None
    evaluation: Dataset | None
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, model: ir.Model, path: Path, options: Options) -> Data:
        """Reads both sets.

        Raises UserError for unreadable data, sets that share any, or a model that cannot be judged on them.
        """
        given = options.data
        refuse_idle_preprocess(given.preprocess, (given.calibration_path, given.evaluation))
        beside = path.with_name("tokenizer.json")
        tokenizer = given.tokenizer or (beside if beside.is_file() else None)

        def read(source: Path | None, limit: int) -> Dataset | None:
            if source is None:
                return None
            return load_dataset(
                source,
                model,
                tokenizer=tokenizer,
                window=given.window,
                limit=limit,
                preprocess=given.preprocess,
            )

        calibration = read(given.calibration_path, given.calibration_tokens)
        evaluation = read(given.evaluation, given.evaluation_tokens)
        if calibration and evaluation and calibration.samples & evaluation.samples:
            raise UserError("--calib and --eval share data: quality would be measured on what was fitted")
        if evaluation:
            find_scores(model, evaluation)  # before any work is done
        return cls(calibration, evaluation)

    def with_self_text(self, model: ir.Model, options: Options, progress: Progress) -> Data:
        """With calibration text that the model wrote, and more of it for evaluation if there is none.

        A model that cannot write leaves things as they are and a note, or raises UserError if the user asked for
        `--calib self`.
        """
        given = options.data
        tokens = [given.calibration_tokens] + [HELD_OUT_TOKENS] * (self.evaluation is None)
        try:
            calibration, *more = write_texts(
                model, tokens=tokens, window=given.window, seed=options.pruning.seed, step=progress
            )
        except UserError as error:
            if given.calibration == "self":
                raise UserError(
                    f"--calib self: {error}; pass --calib PATH (a text, or .npz samples)"
                ) from error
            note = f"no calibration data, and the model cannot write its own: {error}"
            return dataclasses.replace(self, notes=(*self.notes, note))
        note = (
            f"criterion and repair learn from {calibration.rows:,} tokens that the model wrote itself; --calib takes a "
            "text, or none"
        )
        held_out = [dataclasses.replace(part, name=f"{part.name}, held out") for part in more]
        evaluation = held_out[0] if held_out else self.evaluation
        return Data(calibration, evaluation, (*self.notes, note))

    def pairs(self, plan: Plan) -> list[tuple[Arrays, Arrays]]:
        """The calibration set, each feed as the source and as the pruned model take it."""
        assert self.calibration is not None
        return [(feed, cut_arrays(feed, plan.interfaces)) for feed in self.calibration]

    def cut(self, plan: Plan) -> Data:
        """The same data as the pruned model takes it."""

        def adapt(data: Dataset | None) -> Dataset | None:
            if data is None or not plan.interfaces:
                return data
            return dataclasses.replace(data, feeds=[cut_arrays(feed, plan.interfaces) for feed in data])

        return Data(adapt(self.calibration), adapt(self.evaluation), self.notes)

    def described(self) -> dict[str, Any] | None:
        return None if self.calibration is None else _described(self.calibration)

    def compare(
        self,
        source: ir.Model,
        result: ir.Model,
        progress: Progress,
        adapt: Callable[[Arrays], Arrays] = lambda feed: feed,
        *,
        native: bool = False,
    ) -> dict[str, Any]:
        """Quality of both models on the evaluation set, and how near they are to each other.

        `adapt` makes a feed of the result from one of the source, where inputs of the graph shrank. With `native` the
        result runs in its own types, 16-bit ones too.
        """
        data = self.evaluation
        assert data is not None
        cut = feeds_for(data, result) or (adapt(feed) for feed in data)
        feeds = (as_inputs(feed, result.graph.inputs) for feed in cut)
        outcome = compare(source, result, data, model_feeds=feeds, native=native, step=progress)
        return {"data": _described(data), **outcome.as_json()}


def _described(data: Dataset) -> dict[str, Any]:
    return {"name": data.name, "sha256": data.sha256, "rows": data.rows}


@dataclasses.dataclass(frozen=True, eq=False)
class Reads:
    """What one consumer of a structure reads, column by column, and what it does with it.

    `index [k]` is the place of each column in the flat scores of the structure (`Structure.shape`), or -1;
    `moments` are over all rows of the calibration set; `weight` is `[k, outputs]`.
    """

    index: Indices
    moments: Moments
    weight: Weight


class Evidence:
    """The consumers of the structures that may be cut, and what they read."""

    def __init__(
        self,
        structures: Structures,
        wanted: Sequence[Structure],
        progress: Progress = lambda _: None,
    ) -> None:
        atoms = {structure.atom for structure in wanted}
        self.progress = progress
        self._structures, self._wanted = structures, wanted
        self.consumers = [
            consumer
            for consumer in find_consumers(structures)
            if atoms & set(leaves(consumer.contraction.dim))
        ]
        self.observed: Mapping[Key, Observed] = {}
        self.measured: dict[Structure, Scores] = {}  # scores of what no weight contracts

    def observe(self, model: ir.Model, data: Data) -> dict[str, Any]:
        """Runs the source on the calibration set."""
        assert data.calibration is not None
        contractions = [consumer.contraction for consumer in self.consumers]
        if contractions:
            self.observed = observe(model, contractions, data.calibration.feeds, step=self.progress)
        self.measure(model, data)
        return {"rows": data.calibration.rows, "consumers": len(contractions)}

    def measure(self, model: ir.Model, data: Data) -> dict[str, Any]:
        """Scores what no weight contracts: the energy of query and key channels, the influence of blocks."""
        assert data.calibration is not None
        feeds = data.calibration.feeds
        unread = [s for s in self._wanted if not consumers_of(s, self.consumers)]
        self.measured = score_energy(unread, self._structures.analysis, model, feeds, self.progress)
        for structure in unread:
            if structure.kind == "block":
                self.measured[structure] = score_blocks(self._structures.blocks, model, feeds, self.progress)
        return {"rows": data.calibration.rows, "consumers": 0}

    def reads(self, structure: Structure) -> Iterator[Reads]:
        """What each consumer of a structure reads; nothing where it has none, or nothing was observed."""
        for consumer in consumers_of(structure, self.consumers):
            seen = self.observed.get(key_of(consumer.contraction))
            if seen is not None:
                yield Reads(members(structure, consumer), seen.all, consumer.rows())
