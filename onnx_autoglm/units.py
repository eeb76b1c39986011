"""How users write numbers: fractions of kinds, percent, bytes."""

from __future__ import annotations

import re
from typing import Any


def parse_fractions(text: str) -> dict[str, float]:
    """`KIND=FRACTION` texts joined by commas. Raises ValueError."""
    result: dict[str, float] = {}
    for item in text.split(","):
        kind, _, number = item.strip().partition("=")
        if kind in result:
            raise ValueError(f"{kind} is given twice")
        try:
            result[kind] = float(number)
        except ValueError:
            message = f"{item!r}: write KIND=FRACTION, for example ffn-channel=0.25"
            raise ValueError(message) from None
    return result


def fraction_of(text: Any) -> Any:
    """`2%` and `0.02` are the same."""
    if isinstance(text, str) and text.strip().endswith("%"):
        return float(text.strip()[:-1]) / 100
    return text


def bytes_of(text: Any) -> Any:
    """`200MB` in bytes; units are those of 1000, or of 1024 with an i (`200MiB`)."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kKMGT]?)(i?)B?\s*", text) if isinstance(text, str) else None
    if match is None:
        return text
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
