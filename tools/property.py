"""Random graphs, pruned at random: masked must equal pruned, or the refusal must have a reason.

    python tools/property.py --cases 600

`run_case` is one case; `tests/test_random_graphs.py` runs some of them on every change.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from random_graphs import random_graph

from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.structures import Structure, Structures
from onnx_autoglm.cut import cut_model
from onnx_autoglm.kinds import KINDS
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.passes.check_masked import check_masked

TOLERANCE = 2e-4  # float32, relative to the largest entry of an output


@dataclasses.dataclass
class Case:
    """What became of one random graph.

    `difference` is None where nothing was cut. `doubt` says why equality means nothing (an output of zeros).
    `failure` says what is wrong, else None.
    """

    seed: int
    built: str
    found: Counter[str] = dataclasses.field(default_factory=Counter)
    cut: Counter[str] = dataclasses.field(default_factory=Counter)
    pinned: Counter[str] = dataclasses.field(default_factory=Counter)
    varied: int = 0
    reasons: Counter[str] = dataclasses.field(default_factory=Counter)
    difference: float | None = None
    doubt: str | None = None
    failure: str | None = None

    @property
    def is_proved(self) -> bool:
        return self.failure is None and self.doubt is None and self.difference is not None


def run_case(seed: int) -> Case:
    """Builds, prunes and proves the graph of a seed. Never raises: an exception is a failure."""
    proto = random_graph(seed)
    case = Case(seed, proto.graph.name)
    try:
        _run(case, proto)
    except Exception:  # noqa: BLE001 - any exception is what this looks for
        case.failure = traceback.format_exc(limit=-4)
    return case


def _run(case: Case, proto: onnx.ModelProto) -> None:
    onnx.checker.check_model(proto, full_check=True)
    source = canonicalize(ir.from_proto(proto))
    before = ir.to_proto(source).SerializeToString(deterministic=True)
    rng = np.random.default_rng(case.seed)
    cut = cut_model(source, lambda structures: choose(structures, case, rng))
    if ir.to_proto(source).SerializeToString(deterministic=True) != before:
        case.failure = "the source was changed"
        return
    for structure in cut.structures:
        if any(not pin.reason.strip() for pin in structure.pins):
            case.failure = f"{structure.id} is pinned without a reason"
            return
    if not case.cut:
        return
    if not cut.removals:
        case.failure = "nothing was removed"
        return
    pruned = ir.to_proto(cut.model)
    proof = check_masked(source, cut.plan({}), cut.model, tolerance=TOLERANCE)
    case.difference = proof.difference.relative
    case.doubt = proof.difference.inconclusive if case.difference == 0 else None
    if not proof.holds and case.doubt is None:
        case.failure = f"masked differs from pruned: {proof.difference}"
        return
    onnx.checker.check_model(pruned, full_check=True)
    onnx.shape_inference.infer_shapes(pruned, check_type=True, strict_mode=True, data_prop=True)


def choose(structures: Structures, case: Case, rng: np.random.Generator) -> Selection:
    """Some indices of some of the structures that may be cut, others in each outer index."""
    selection = Selection()
    share = rng.choice([0.3, 0.7, 1.0])
    for structure in structures:
        case.found[structure.kind] += 1
        if structure.pins:
            case.pinned[structure.kind] += 1
            case.reasons.update(pin.reason for pin in structure.pins)
        elif structure.size > _floor(structure) and rng.random() < share:
            selection.keep(structure.atom, structure.outers, _random_mask(structure, rng))
            case.cut[structure.kind] += 1
            case.varied += bool(structure.outers)
    return selection


def _random_mask(structure: Structure, rng: np.random.Generator) -> np.ndarray:
    """The same count, less than all, in each outer index; another choice in each."""
    sizes = [int(outer.size) for outer in structure.outers]  # type: ignore[arg-type]
    count = int(rng.integers(_floor(structure), structure.size))
    order = rng.random((*sizes, structure.size)).argsort(axis=-1)
    mask: np.ndarray = order < count
    return mask


def _floor(structure: Structure) -> int:
    """A norm over a single channel is zero whatever comes in, which would prove nothing."""
    return max(structure.floor, 2 if structure.kind == "hidden" else 1)


def run_cases(first: int, count: int) -> Iterator[Case]:
    return (run_case(seed) for seed in range(first, first + count))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=600, help="how many graphs (default: 600)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--verbose", action="store_true", help="one line per case")
    options = parser.parse_args()
    started = time.monotonic()
    cases = []
    for case in run_cases(options.first, options.cases):
        cases.append(case)
        if case.failure is not None:
            print(f"seed {case.seed} ({case.built})\n{case.failure.rstrip()}\n", flush=True)
        elif options.verbose:
            what = "refused" if case.difference is None else f"{case.difference:.1e} {dict(case.cut)}"
            print(f"seed {case.seed}: {what} ({case.built})", flush=True)
    print(summary(cases, time.monotonic() - started))
    return 1 if any(case.failure for case in cases) else 0


def summary(cases: list[Case], seconds: float) -> str:
    """A table of what the cases covered."""
    proved = [case for case in cases if case.is_proved]
    refused = [case for case in cases if case.failure is None and case.difference is None]
    doubtful = [case for case in cases if case.failure is None and case.doubt is not None]
    worst = max(proved, key=lambda case: case.difference or 0.0, default=None)
    lines = [
        f"cases               {len(cases):6d}   in {seconds:.0f} s",
        f"cut and proved      {len(proved):6d}   (selections that vary: {sum(bool(c.varied) for c in proved)})",
        f"left whole          {len(refused):6d}",
        f"output of zeros     {len(doubtful):6d}",
        f"failed              {sum(case.failure is not None for case in cases):6d}",
        f"worst difference    {worst.difference if worst else 0.0:.1e}   (seed {worst.seed if worst else '-'})",
        "",
        f"{'kind':16}{'found':>8}{'cut':>8}{'pinned':>8}",
    ]
    for kind in KINDS:
        counts = (sum(getattr(case, field)[kind] for case in cases) for field in ("found", "cut", "pinned"))
        lines.append(f"{kind:16}" + "".join(f"{count:8d}" for count in counts))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
