"""How users say by which criterion structures are scored; no heavy imports, since the options need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

BUILT_IN = ("auto", "obs", "flap", "wanda", "minitron", "l2", "l1", "random")
ENTRY_POINTS = "onnx_autoglm.criteria"  # the group in which installed packages name theirs


def installed() -> dict[str, str]:
    """Criteria of installed packages: `MODULE:NAME` by name."""
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def reference_of(criterion: str | Callable[..., Any]) -> str:
    """The text that stands for a criterion: its name, or where it can be imported from."""
    if isinstance(criterion, str):
        return criterion
    named = criterion if hasattr(criterion, "__qualname__") else type(criterion)
    return f"{named.__module__}:{named.__qualname__}"


def _known(value: Any) -> Any:
    """A callable, a name, or `MODULE:NAME`. Raises ValueError for anything else; nothing is imported yet."""
    if callable(value):
        return value
    if isinstance(value, str) and (value in BUILT_IN or ":" in value or value in installed()):
        return value
    names = ", ".join((*BUILT_IN, *installed()))
    raise ValueError(f"unknown criterion {value!r}; criteria are {names}, or your own as MODULE:NAME")


CriterionOption = Annotated[
    Any, BeforeValidator(_known), PlainSerializer(reference_of, return_type=str, when_used="json")
]
