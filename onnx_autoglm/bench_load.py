"""Two servers under the same load: requests arrive at random, whether or not the server keeps up (an open loop)."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from onnx_autoglm.bench_options import BenchOptions
from onnx_autoglm.errors import UserError

FIRST_SHARE = 0.5  # of what one request at a time would allow: the lowest rate
GROWTH = 1.5
MOST_RATES = 12
ALONE = 4  # requests, to see how long one takes
REQUEST_SECONDS = 300
RSS = "process_resident_memory_bytes"


@dataclasses.dataclass(frozen=True)
class LoadPoint:
    """One server at one rate. Latencies in ms, counted from the time a request was due.

    `rate` is what was offered, `qps` what was answered, in requests per second. `saturated`: at the end of the time
    more requests were open than the server decodes at once, or some were refused. `rss` is in bytes.
    """

    rate: float
    requests: int
    answered: int
    refused: int
    failed: int
    qps: float
    tokens_per_second: float
    p50: float | None
    p99: float | None
    first_token_p50: float | None
    first_token_p99: float | None
    rss: int | None
    saturated: bool


@dataclasses.dataclass(frozen=True)
class _Reply:
    """Seconds from the time it was due; `status` 0 stands for a broken connection."""

    status: int
    first: float
    last: float
    tokens: int
    ended: float


class LoadServer:
    """A `serve` process."""

    def __init__(self, model: Path, options: BenchOptions, said: IO[str]) -> None:
        """Starts it; what it says goes to a file. Raises UserError if it does not come up."""
        length = options.prompt_tokens + options.decode_tokens
        words = [sys.executable, "-m", "onnx_autoglm", "serve", str(model), "--port", "0"]
        words += ["--slots", str(options.slots), "--context", str(max(length, 2))]
        words += ["--max-tokens", str(options.decode_tokens), "--timeout", str(REQUEST_SECONDS)]
        words += [] if options.threads is None else ["--threads", str(options.threads)]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=said, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("serving "):
            self._process.communicate()
            said.seek(0)
            why = said.read().strip().removeprefix("error: ")
            raise UserError(f"the server of {model} does not start: {why}")
        self._port = int(line.rsplit(":", 1)[1])

    def complete(self, prompt: list[int], tokens: int, due: float) -> _Reply:
        """One streamed request."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        first = written = 0.0
        try:
            with contextlib.closing(self._connect()) as connection:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/v1/completions", json.dumps(body), headers)
                answer = connection.getresponse()
                for line in answer:
                    if line.startswith(b"data: {") and not first:
                        first = time.perf_counter() - due
                    if b'"usage"' in line:
                        written = json.loads(line[6:])["usage"]["completion_tokens"]
        except (OSError, http.client.HTTPException):
            return _Reply(0, 0, 0, 0, time.perf_counter())
        status = answer.status if answer.status != 200 or written else 0
        ended = time.perf_counter()
        return _Reply(status, first, ended - due, int(written), ended)

    def rss(self) -> int | None:
        """Resident bytes, where the system tells."""
        with contextlib.closing(self._connect()) as connection:
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        found = [line.split()[1] for line in lines if line.startswith(f"{RSS} ")]
        return int(float(found[0])) if found else None

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=REQUEST_SECONDS)


@contextlib.contextmanager
def _started(model: Path, options: BenchOptions) -> Iterator[LoadServer]:
    # A pipe that nobody reads would stop a server that has much to say.
    with tempfile.TemporaryFile("w+") as said:
        server = LoadServer(model, options, said)
        try:
            yield server
        finally:
            server.stop()


def measure_load(
    models: tuple[Path, Path],
    vocabulary: int,
    options: BenchOptions,
    step: Callable[[str], None] = lambda _: None,
) -> tuple[list[LoadPoint], list[LoadPoint]]:
    """Offers both servers the same requests at the same times, one server after the other, at rising rates.

    Each stays until it is saturated. Raises UserError if a server does not start or does not answer.
    """
    points: tuple[list[LoadPoint], list[LoadPoint]] = ([], [])
    step("start the servers")
    with _started(models[0], options) as first, _started(models[1], options) as second:
        servers = (first, second)
        alone = [_alone(server, vocabulary, options) for server in servers]
        start = FIRST_SHARE / max(alone)
        rates = options.rates or tuple(start * GROWTH**number for number in range(MOST_RATES))
        for number, rate in enumerate(rates):
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                if points[side] and points[side][-1].saturated:
                    continue
                step(f"{rate:.2g} requests per second on {'AB'[side]}")
                points[side].append(_offer(servers[side], rate, vocabulary, options))
    return points


def _alone(server: LoadServer, vocabulary: int, options: BenchOptions) -> float:
    """Seconds of one request on an idle server: the fastest of a few, since the first ones warm it up."""
    prompt = _prompts(1, vocabulary, options)[0]
    replies = [server.complete(prompt, options.decode_tokens, time.perf_counter()) for _ in range(ALONE)]
    if replies[-1].status != 200:
        raise UserError(
            f"a server answers with {replies[-1].status}: bench --load needs models that write text"
        )
    return min(reply.last for reply in replies if reply.status == 200)


def _prompts(count: int, vocabulary: int, options: BenchOptions) -> list[list[int]]:
    random = np.random.default_rng((options.seed, 1))
    drawn: list[list[int]] = random.integers(0, vocabulary, (count, options.prompt_tokens)).tolist()
    return drawn


def arrivals(rate: float, seconds: float, seed: int) -> np.ndarray:
    """The times of a Poisson process of that rate, in seconds; at least one."""
    count = int(rate * seconds * 2 + 20)
    times = np.random.default_rng((seed, 2)).exponential(1 / rate, count).cumsum()
    return times[: max(1, int((times < seconds).sum()))]


def _offer(server: LoadServer, rate: float, vocabulary: int, options: BenchOptions) -> LoadPoint:
    times = arrivals(rate, options.seconds, options.seed)
    prompts = _prompts(len(times), vocabulary, options)
    replies: queue.SimpleQueue[_Reply] = queue.SimpleQueue()
    started = time.perf_counter()
    threads = []
    for due, prompt in zip(times + started, prompts, strict=True):
        time.sleep(max(0.0, due - time.perf_counter()))
        ask = threading.Thread(
            target=lambda prompt=prompt, due=float(due): replies.put(
                server.complete(prompt, options.decode_tokens, due)
            )
        )
        ask.start()
        threads.append(ask)
    time.sleep(max(0.0, started + options.seconds - time.perf_counter()))
    still_open = len(threads) - replies.qsize()
    rss = server.rss()
    for thread in threads:
        thread.join()
    found = [replies.get() for _ in threads]
    took = max(options.seconds, max(reply.ended for reply in found) - started)
    return _point(rate, found, took, rss, still_open > options.slots)


def _point(rate: float, found: list[_Reply], took: float, rss: int | None, backlog: bool) -> LoadPoint:
    good = [reply for reply in found if reply.status == 200]
    refused = sum(reply.status == 429 for reply in found)
    failed = len(found) - len(good) - refused
    last = _percentiles([reply.last for reply in good])
    first = _percentiles([reply.first for reply in good])
    return LoadPoint(
        rate=rate,
        requests=len(found),
        answered=len(good),
        refused=refused,
        failed=failed,
        qps=len(good) / took,
        tokens_per_second=sum(reply.tokens for reply in good) / took,
        p50=last[0],
        p99=last[1],
        first_token_p50=first[0],
        first_token_p99=first[1],
        rss=rss,
        saturated=backlog or refused > 0 or failed > 0,
    )


def _percentiles(seconds: list[float]) -> tuple[float | None, float | None]:
    """P50 and P99 in milliseconds."""
    if not seconds:
        return None, None
    middle, high = np.percentile(seconds, (50, 99))
    return 1000 * float(middle), 1000 * float(high)
