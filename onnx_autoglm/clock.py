"""Times the passes of a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any


class Clock:
    """Times the passes and tells the user which one runs."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.passes: list[dict[str, Any]] = []
        self._progress = progress

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[dict[str, Any]]:
        self._progress(name)
        started = time.perf_counter()
        effect: dict[str, Any] = {}
        yield effect
        self.passes.append({"name": name, "seconds": round(time.perf_counter() - started, 3), **effect})
