"""The points of a sweep: every combination of the values that options of `optimize` are to take."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx_autoglm.errors import UserError
from onnx_autoglm.options import Options, collect

Values = Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of `optimize`: `name` is its folder, `given` what sets it apart, `options` all of its options."""

    name: str
    given: dict[str, Any]
    options: Options


def parse_vary(texts: Sequence[str]) -> dict[str, list[str]]:
    """Values by option, from `OPTION=VALUE,VALUE,...` texts.

    A comma separates two values, a plus two parts of one value: `prune=ffn-channel=0.1+query-head=0.1,qk-pair=0.2` is
    two points. An option given twice takes the values of both.

    Raises UserError for a text that is none of this.
    """
    result: dict[str, list[str]] = {}
    for text in texts:
        option, separator, values = text.partition("=")
        keyword = option.strip().removeprefix("--").replace("-", "_")
        parts = [part.strip() for part in values.split(",")]
        if not separator or not keyword or not all(parts):
            raise UserError(
                f"--vary {text!r}: write OPTION=VALUE,VALUE,..., for example criterion=l1,l2 or "
                "prune=ffn-channel=0.1,ffn-channel=0.2+query-head=0.1"
            )
        result.setdefault(keyword, []).extend(parts)
    return result


def make_points(vary: Values, given: Mapping[str, Any], config: Path | str | None) -> list[Point]:
    """All combinations, each with valid options and a folder name of its own.

    Raises UserError if there is nothing to vary, a value is given twice, or an option or a value is not allowed.
    """
    axes = {keyword: list(values) for keyword, values in vary.items() if len(values)}
    if not axes:
        raise UserError(
            "nothing to vary: pass --keep 0.9 0.8 0.7, or --vary OPTION=VALUE,VALUE (for example "
            "--vary prune=ffn-channel=0.1,ffn-channel=0.2)"
        )
    fixed = [keyword for keyword in axes if given.get(keyword) not in (None, (), "", {})]
    if fixed:
        raise UserError(
            f"{fixed[0]} is both fixed (--{fixed[0].replace('_', '-')}) and varied: drop one of them"
        )
    points = []
    for values in itertools.product(*axes.values()):
        own = {keyword: _joined(value) for keyword, value in zip(axes, values, strict=True)}
        name = "_".join(_label(keyword, value) for keyword, value in own.items())
        points.append(Point(name, own, collect({**given, **own}, config)))
    names = [point.name for point in points]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two points of the sweep are both called {twice}: give each value once")
    return points


def _joined(value: Any) -> Any:
    """A text as one value: a number, or parts joined by a plus."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if value.isdecimal() else float(value)
    except ValueError:
        return value.replace("+", ",")


def _label(keyword: str, value: Any) -> str:
    """`keep-0.80`, `prune-ffn-channel-0.10`: numbers with at least two decimals, nothing that a path cannot hold."""
    if isinstance(value, Mapping):
        value = ",".join(f"{kind}={number}" for kind, number in value.items())
    elif isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    text = re.sub(r"(?<![\w.])\d*\.\d+(?![\w.])", lambda match: _decimals(match[0]), str(value))
    return re.sub(r"[^\w.+-]+", "-", f"{keyword.replace('_', '-')}-{text.replace(',', '+')}").strip("-")


def _decimals(text: str) -> str:
    digits = text.partition(".")[2].rstrip("0")
    return f"{float(text):.{max(2, len(digits))}f}"
