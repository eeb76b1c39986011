"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_autoglm.serve_scheduler import Load

PREFIX = "onnx_autoglm"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self, load: Load | None) -> None:
        """`load` is that of the scheduler, where there is one."""
        from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            f"{PREFIX}_requests", "Answers, by path and status.", ("path", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            f"{PREFIX}_request_seconds",
            "Time from a request to the end of its answer.",
            ("path",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._first = Histogram(
            f"{PREFIX}_first_token_seconds",
            "Time from a request to its first token.",
            buckets=SECONDS,
            registry=self._registry,
        )
        if load is not None:
            self._registry.register(_LoadCollector(load))

    def answered(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def text(self) -> tuple[bytes, str]:
        """All metrics, and their content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _LoadCollector:
    """Reads the scheduler when it is asked."""

    def __init__(self, load: Load) -> None:
        self._load = load

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        load = self._load
        yield GaugeMetricFamily(f"{PREFIX}_waiting", "Requests in the queue.", load.waiting)
        yield GaugeMetricFamily(f"{PREFIX}_active", "Requests that are decoded.", load.active)
        yield CounterMetricFamily(f"{PREFIX}_prompt_tokens", "Tokens read.", value=load.prompt_tokens)
        yield CounterMetricFamily(f"{PREFIX}_written_tokens", "Tokens written.", value=load.written_tokens)
        yield CounterMetricFamily(f"{PREFIX}_steps", "Runs that wrote tokens.", value=load.steps)
        yield CounterMetricFamily(f"{PREFIX}_step_rows", "Rows of all these runs.", value=load.step_rows)
