"""What a backend says while it builds: kept for a log file, for error messages and for a progress line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Progress = Callable[[str], None]


class BuildLog:
    """Messages of a backend, in order, with their severity."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []

    def add(self, severity: str, message: str) -> None:
        if severity != "VERBOSE":  # a line per layer and kernel
            self.lines.append(f"[{severity}] {message}")
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message)

    def reason(self, default: str) -> str:
        """The first error, on one line and without the place in the backend's source."""
        return plain(self.errors[0]) if self.errors else default


def plain(message: str) -> str:
    """A backend's message on one line, without the places in its source and its codes."""
    text = " ".join(message.split())
    text = text.split(" [checkMacros.cpp::catchCudaError")[0]  # it looked for a GPU on the way
    said = re.search(r'&& "([^"]+)"', text)  # a failed assertion: the condition, and what it means
    if said:
        text = said[1]
    if "Plugin not found" in text:
        text = "no operator and no plugin of this name"
    if text in ("", "false"):
        text = "not supported"
    text = re.sub(r"^\[[\w.]+\.(?:cpp|h)::[\w:]+\] ", "", text)
    text = re.sub(r"^(?:\[?\w+\.(?:cpp|h)[:\d]*\]?[: ]*)+", "", text)
    text = re.sub(r"Error Code \d+: ", "", text)
    text = re.sub(r"^Invalid Node - \S+ ", "", text)
    text = re.sub(r"\s*\bIn [\w:~()]+ at \S+\.(?:cpp|h):\d+", "", text)
    text = re.sub(r"\(\s*\((.*)\)\)$", r"(\1)", text)
    return text if len(text) <= 400 else text[:400] + "..."


def logger_for(trt: Any, log: BuildLog) -> Any:
    """A logger for the backend that writes into `log`; it must outlive what is made with it."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            # An exception must not pass through the backend; a broken message is no reason to stop.
            log.add(severity.name if hasattr(severity, "name") else str(severity), str(message))

    return Logger()


def monitor_for(trt: Any, progress: Progress) -> Any:
    """A progress monitor of the backend. `cancelled` says that the user interrupted it, which stops the build."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self._steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._steps[name] = steps

        def step_complete(self, name: str, step: int) -> bool:
            try:
                progress(f"build: {name} {step + 1}/{self._steps.get(name, 0)}")
            except KeyboardInterrupt:
                self.cancelled = True
            return not self.cancelled

        def phase_finish(self, name: str) -> None:
            self._steps.pop(name, None)

    return Monitor()
