"""What a run will hold in memory at most, estimated before its long part."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from onnx_autoglm.axes.dims import leaves
from onnx_autoglm.axes.structures import Structure
from onnx_autoglm.consumers import Consumer, consumers_of
from onnx_autoglm.errors import UserError
from onnx_autoglm.refit import why_no_refit

# Bytes at the peak of each step, counted in matrices [k, k] of what a consumer reads and [k, m] of its weight, as
# tracemalloc measures them. A consumer that waits for others of its structure holds less.
_OBSERVE = 24
_SCORE, _SCORE_WAITING = (32, 16), (8, 8)
_REPAIR = (40, 71)  # two targets compete where a consumer ends in a sum; 47 would do elsewhere


@dataclasses.dataclass(frozen=True)
class Need:
    """The memory of one step: `bytes`, who needs it, and how to do with less."""

    bytes: int
    who: str
    remedy: str


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that can be had without swapping; None where the system does not say (not Linux)."""
    try:
        for line in meminfo.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def refuse_too_much(needs: Sequence[Need], available: int | None) -> None:
    """Raises UserError if one step needs more than there is; steps run one after another."""
    if available is None or not needs:
        return
    worst = max(needs, key=lambda need: need.bytes)
    if worst.bytes > available:
        raise UserError(
            f"{worst.who} needs about {_readable(worst.bytes)} of memory, and {_readable(available)} are available: "
            f"{worst.remedy}"
        )


def _readable(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def needs_of_data(
    structures: Sequence[Structure], consumers: Sequence[Consumer], *, criterion: str
) -> list[Need]:
    """What observing the consumers takes, and scoring the structures by what was observed."""
    remedy = "leave it out with --exclude, or choose by norms (--criterion l2 --repair none)"
    needs = [Need(_OBSERVE * _size(c)[0] ** 2, f"observing {_name(c)}", remedy) for c in consumers]
    for structure in structures if criterion == "obs" else ():
        own = sorted((_size(c) for c in consumers_of(structure, list(consumers))), reverse=True)
        waiting = sum(_bytes(_SCORE_WAITING, size) for size in own[1:])
        if own:
            total = _bytes(_SCORE, own[0]) + waiting
            needs.append(
                Need(
                    total, f"scoring {structure.id}", "leave it out with --exclude, or use --criterion wanda"
                )
            )
    return needs


def needs_of_repair(
    structures: Sequence[Structure], consumers: Sequence[Consumer], fractions: Mapping[str, float]
) -> list[Need]:
    """What the affine repair of consumers takes, from which `fractions` of each kind have gone."""
    needs = []
    for consumer in consumers:
        if why_no_refit(consumer):
            continue
        held = set(leaves(consumer.contraction.dim))
        share = math.prod(1 - fractions.get(s.kind, 0.0) for s in structures if s.atom in held)
        columns, outputs = _size(consumer)
        kernel = math.prod(_shape(consumer)[2:]) if consumer.contraction.node.op_type == "Conv" else 1
        size = math.ceil(columns * share) * kernel, outputs // kernel
        needs.append(
            Need(
                _bytes(_REPAIR, size),
                f"repairing {_name(consumer)}",
                "use --repair bias, or leave it out with --exclude",
            )
        )
    return needs


def needs_of_trials(model: ir.Model, consumers: Sequence[Consumer]) -> list[Need]:
    """What trying cuts on a model takes: ONNX Runtime's copy of its weights, and new weights of the consumers."""
    new = sum(4 * math.prod(_size(consumer)) for consumer in consumers)
    return [
        Need(
            copied_bytes(model) + new,
            "trying cuts for a budget",
            "fix how much of each kind goes with --prune",
        )
    ]


def needs_of_quality(model: ir.Model) -> list[Need]:
    """What comparing source and result takes: two copies of the weights."""
    remedy = "give --calib PATH and no --eval, and measure each model alone with onnx-autoglm eval"
    return [Need(2 * copied_bytes(model), "comparing the result with its source", remedy)]


def copied_bytes(model: ir.Model) -> int:
    """What ONNX Runtime copies of the weights of a model that it optimises: matrices of products, in float32."""
    weights = {
        value.const_value
        for node in model.graph
        if node.op_type in ("MatMul", "Gemm", "FusedMatMul", "Conv")
        for value in node.inputs
        if value is not None and value.const_value is not None
    }
    return sum(4 * int(tensor.size) for tensor in weights)


def _bytes(factors: tuple[int, int], size: tuple[int, int]) -> int:
    columns, outputs = size
    return factors[0] * columns**2 + factors[1] * columns * outputs


def _shape(consumer: Consumer) -> tuple[int, ...]:
    assert consumer.initializer.const_value is not None
    return tuple(consumer.initializer.const_value.shape.numpy())


def _size(consumer: Consumer) -> tuple[int, int]:
    """The weight as `[k, outputs]`."""
    shape = _shape(consumer)
    columns = shape[consumer.axis]
    return columns, math.prod(shape) // max(columns, 1)


def _name(consumer: Consumer) -> str:
    """The weight, by its name, and how many columns it reads."""
    return f"what {consumer.initializer.name} reads ({_size(consumer)[0]:,} columns)"
