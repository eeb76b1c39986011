"""Two minutes of clients that come, stream, vanish and send nonsense: nothing leaks and nothing gets stuck."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import recipes
from test_serve import ROOT, Server, serving

CLIENTS, SECONDS, WARM_UP = 200, 120, 40


class Crowd:
    """Clients, each in a thread, until the time is over; what they were answered is counted."""

    def __init__(self, server: Server, seconds: float) -> None:
        self.statuses: Counter[str] = Counter()
        self._server, self._end = server, time.monotonic() + seconds
        self._threads = [threading.Thread(target=self._live, args=(seed,)) for seed in range(CLIENTS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(SECONDS + 60)
        assert not any(thread.is_alive() for thread in self._threads)

    def _live(self, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self._end:
            deed = draw.choice(["whole", "stream", "vanish", "vanish", "nonsense", "too much"])
            try:
                self.statuses[f"{deed} {self._do(deed, draw)}"] += 1
            except (OSError, http.client.HTTPException) as error:
                self.statuses[f"{deed} {type(error).__name__}"] += 1
            time.sleep(draw.random())

    def _do(self, deed: str, draw: random.Random) -> int:
        connection = self._server.connect()
        tokens = [draw.randrange(256) for _ in range(draw.randint(1, 40))]
        body = {"prompt": tokens, "max_tokens": draw.randint(1, 60), "ignore_eos": True}
        body["stream"] = deed in ("stream", "vanish")
        if deed == "too much":
            body["max_tokens"] = 10**6
        raw = b"{nonsense" if deed == "nonsense" else json.dumps(body).encode()
        try:
            connection.request("POST", "/v1/completions", raw, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if deed == "vanish":
                answer.read(draw.randint(1, 400))
            else:
                answer.read()
            return answer.status
        finally:
            connection.close()


def resident(server: Server) -> float:
    lines = server.ask("/metrics")[1].splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("process_resident_memory_bytes ")))


@pytest.mark.slow
def test_a_crowd_for_two_minutes() -> None:
    pytest.importorskip("fastapi")
    path: Path = recipes.build("glm-gqa-op20-kv", ROOT) / "model.onnx"
    with serving(path, "--slots", "8", "--queue", "32") as server:
        crowd = Crowd(server, SECONDS)
        crowd.start()
        time.sleep(WARM_UP)
        before = resident(server)
        crowd.join()
        server.wait_for("active", 0)
        server.wait_for("waiting", 0)
        after = resident(server)
        print(dict(crowd.statuses), f"RSS {before / 1e6:.0f} to {after / 1e6:.0f} MB")
        assert after < 1.1 * before
        assert server.ask("/v1/completions", {"prompt": [1, 2], "max_tokens": 3})[0] == 200
        late = Crowd(server, 10)
        late.start()
        time.sleep(5)
        assert server.stop()[0] == 0  # in the middle of it
        late.join()
    allowed = {
        "whole": {"200", "429"},
        "stream": {"200", "429"},
        "vanish": {"200", "429"},
        "nonsense": {"400"},
        "too much": {"400"},
    }
    for name, count in crowd.statuses.items():
        deed, status = name.rsplit(" ", 1)
        assert status in allowed[deed], (name, count)
    assert all(crowd.statuses[f"{deed} {status}"] for deed, status in (("whole", "200"), ("vanish", "200")))
