"""Criteria: by what structures are scored. Those of the program, and the user's own in the same shape."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnx_autoglm.axes.structures import Structure
from onnx_autoglm.criterion_names import installed, reference_of
from onnx_autoglm.errors import UserError
from onnx_autoglm.evidence import Evidence
from onnx_autoglm.passes.score_activation import Method, ScoreActivation
from onnx_autoglm.passes.score_norm import ScoreNorm, Scores
from onnx_autoglm.passes.score_obs import ScoreObs
from onnx_autoglm.passes.score_random import ScoreRandom

Score = Callable[[Sequence[Structure], Evidence], Mapping[Structure, Scores]]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """How structures are scored; those of highest score stay.

    `score(structures, evidence)` gives each structure an array `[*sizes of its outer atoms, size]`
    (`Structure.shape`) of finite numbers. With `needs_data` the source is observed on calibration data first
    (`Evidence.reads`). Queries and keys that it leaves out are then scored by their energy, blocks by
    their influence, anything else by its norm.
    """

    name: str
    needs_data: bool
    score: Score


def find_criterion(choice: str | Callable[..., Any], *, seed: int = 0) -> Criterion:
    """The criterion of a name, of `MODULE:NAME`, of an installed package, or made of the user's own callable.

    A class is instantiated without arguments. Of the callable's attributes `name` and `needs_data` count.

    Raises UserError if it cannot be imported or called.
    """
    if isinstance(choice, str) and choice in _BUILT_IN:
        return _BUILT_IN[choice](seed)
    own: Any = choice
    if isinstance(choice, str):
        own = _imported(choice, choice if ":" in choice else installed()[choice])
    if isinstance(own, type):
        try:
            own = own()
        except TypeError as error:
            raise UserError(
                f"the criterion {reference_of(choice)} cannot be made without arguments: {error}"
            ) from error
    if not callable(own):
        raise UserError(
            f"the criterion {choice} is of type {type(own).__name__}: expected a function (structures, evidence), or a "
            "class whose instances are called like that"
        )
    name = str(getattr(own, "name", None) or reference_of(choice))

    def checked(structures: Sequence[Structure], evidence: Evidence) -> Mapping[Structure, Scores]:
        found = own(structures, evidence)
        if not isinstance(found, Mapping):
            raise UserError(
                f"the criterion {name} returns {type(found).__name__}: expected a dict with scores by structure"
            )
        return {s: _checked(name, s, found[s]) for s in structures if s in found}

    return Criterion(name, bool(getattr(own, "needs_data", False)), checked)


def score(
    criterion: Criterion, wanted: Sequence[Structure], evidence: Evidence
) -> tuple[dict[Structure, Scores], list[Structure]]:
    """Scores of all structures, and those among them that the criterion left to their norms.

    Raises UserError for scores of the user's own that have the wrong shape or are not finite.
    """
    scores = evidence.measured | dict(criterion.score(wanted, evidence))
    rest = [structure for structure in wanted if structure not in scores]
    return scores | ScoreNorm(2)(rest), rest


def _checked(name: str, structure: Structure, given: Any) -> Scores:
    where = f"the criterion {name}: scores of {structure.id}"
    try:
        scores = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} are no array of numbers: {error}") from error
    if scores.shape != structure.shape:
        raise UserError(f"{where} have shape {list(scores.shape)}: expected {list(structure.shape)}")
    if not np.isfinite(scores).all():
        count = int((~np.isfinite(scores)).sum())
        raise UserError(f"{where}: {count} of {scores.size} are not finite")
    return scores


# --- the user's own


def _imported(choice: str, reference: str) -> Any:
    module, _, path = reference.partition(":")
    try:
        with _current_folder_importable():
            found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a module of the user's does when it is imported
        raise UserError(
            f"the criterion {choice} cannot be imported: {type(error).__name__}: {error}; pass MODULE:NAME of something "
            "that Python can import from here"
        ) from error
    return found


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    """An installed command does not look for modules in the current folder, where users have theirs."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


# --- those of the program


def _by_norm(p: int) -> Callable[[int], Criterion]:
    return lambda _: Criterion(
        f"l{p}", False, lambda structures, _: ScoreNorm(p)([s for s in structures if s.places])
    )


def _by_obs(_: int) -> Criterion:
    def run(structures: Sequence[Structure], evidence: Evidence) -> Mapping[Structure, Scores]:
        return ScoreObs()(structures, evidence.consumers, evidence.observed, evidence.progress)

    return Criterion("obs", True, run)


def _by_activation(method: Method) -> Callable[[int], Criterion]:
    def run(structures: Sequence[Structure], evidence: Evidence) -> Mapping[Structure, Scores]:
        return ScoreActivation(method)(structures, evidence.consumers, evidence.observed)

    return lambda _: Criterion(method, True, run)


def _at_random(seed: int) -> Criterion:
    return Criterion("random", False, lambda structures, _: ScoreRandom(seed)(structures))


_BUILT_IN: dict[str, Callable[[int], Criterion]] = {
    "obs": _by_obs,
    "flap": _by_activation("flap"),
    "wanda": _by_activation("wanda"),
    "minitron": _by_activation("minitron"),
    "l2": _by_norm(2),
    "l1": _by_norm(1),
    "random": _at_random,
}
