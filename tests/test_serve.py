"""`serve` as its users meet it: a process, and clients that are polite, broken, many, or gone."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import recipes
from test_generate import ROOT, TEXTS, byte_tokenizer

from onnx_autoglm.generate import Generator

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

KEY = "a key of some length"
TEMPLATE = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% if m.role == "nobody" %}{{ raise_exception("who?") }}{% endif %}{% endfor %}{{ bos_token }}a:"""
# The random model writes some 1000 tokens a second; this many take long enough to interfere.
LONG = 1800


class Server:
    """A `serve` process and a client of it."""

    def __init__(self, model: Path, errors: IO[str], *options: str) -> None:
        self.errors = errors
        self.process = subprocess.Popen(
            [sys.executable, "-m", "onnx_autoglm", "serve", str(model), "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("serving "), line
        self.name = line.split()[1]
        self.port = int(line.rsplit(":", 1)[1])

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        connection = self.connect()
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if body is not None else {}
        connection.request("GET" if body is None else "POST", path, raw, {**kind, **(headers or {})})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        is_json = "json" in answer.headers.get("content-type", "")
        return answer.status, json.loads(data) if is_json else data.decode(), dict(answer.headers.items())

    def complete(self, prompt: Any, tokens: int = 8, **more: Any) -> Any:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}
        status, data, _ = self.ask("/v1/completions", body)
        assert status == 200, data
        return data

    def stream(self, path: str, body: Any) -> Iterator[Any]:
        connection = self.connect()
        connection.request(
            "POST", path, json.dumps({**body, "stream": True}), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        with contextlib.closing(connection):
            for line in answer:
                if line.strip():
                    yield line.decode().removeprefix("data: ").strip()

    def metric(self, name: str) -> float:
        lines = self.ask("/metrics")[1].splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"onnx_autoglm_{name} ")))

    def wait_for(self, name: str, value: float, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while self.metric(name) != value:
            assert time.monotonic() < end, f"{name} is {self.metric(name)}"
            time.sleep(0.02)

    def stop(self) -> tuple[int, str]:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.errors.seek(0)
        return self.process.returncode, self.errors.read()


@contextlib.contextmanager
def serving(model: Path, *options: str) -> Iterator[Server]:
    # A pipe that nobody reads would stop a server that has much to say.
    with tempfile.TemporaryFile("w+") as file:
        server = Server(model, file, *options)
        try:
            yield server
        finally:
            code, errors = server.stop()
    assert (code, "Traceback" in errors, errors.count("\n") < 5) == (0, False, True), errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    for file in recipes.build("glm-gqa-op20-kv", ROOT).glob("model.onnx*"):
        shutil.copy(file, folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "bos_token": "!"}))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(
        folder / "model.onnx", "--name", "small", "--slots", "4", "--queue", "12", "--max-tokens", "2000"
    ) as server:
        yield server


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    return Generator.open(folder / "model.onnx")


def test_completions_are_those_of_generate(server: Server, generator: Generator) -> None:
    expected = generator.generate(TEXTS, 8)
    data = server.complete(TEXTS)
    assert [choice["text"] for choice in data["choices"]] == [one.text for one in expected]
    assert [choice["finish_reason"] for choice in data["choices"]] == [one.finish for one in expected]
    assert data["object"] == "text_completion" and data["model"] == "small"
    read = sum(len(generator.encode(text)) for text in TEXTS)
    written = sum(len(one.tokens) for one in expected)
    assert data["usage"] == {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
    }
    tokens = server.complete(generator.encode(TEXTS[0]))
    assert tokens["choices"][0]["text"] == expected[0].text


def test_many_at_once_get_what_each_gets_alone(server: Server) -> None:
    asked = [(text * (1 + number % 3), 5 + number) for number, text in enumerate(TEXTS * 4)]
    alone = [server.complete(text, tokens)["choices"] for text, tokens in asked]
    steps, rows = server.metric("steps_total"), server.metric("step_rows_total")
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda one: server.complete(*one)["choices"], asked))
    assert together == alone
    assert server.metric("step_rows_total") - rows > 1.5 * (server.metric("steps_total") - steps)


def test_a_stream_is_the_whole_in_pieces(server: Server) -> None:
    body = {"prompt": TEXTS[1], "max_tokens": 20, "temperature": 0.7, "seed": 5, "n": 2}
    whole = server.ask("/v1/completions", body)[1]
    *events, done = server.stream("/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
    for index, choice in enumerate(whole["choices"]):
        own = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
        assert "".join(chunk["text"] for chunk in own) == choice["text"]
        assert [chunk["finish_reason"] for chunk in own][-1] == choice["finish_reason"]
    assert whole["choices"][0]["text"] != whole["choices"][1]["text"]


def test_a_chat_is_its_template(server: Server, generator: Generator) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}
    ]
    (expected,) = generator.generate(["user: Hello\n!a:"], 8)
    body = {"model": "small", "messages": messages, "max_completion_tokens": 8, "temperature": 0}
    status, data, _ = server.ask("/v1/chat/completions", body)
    assert status == 200, data
    assert data["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
    *events, _ = server.stream("/v1/chat/completions", body)
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == expected.text
    body["messages"] = [{"role": "nobody", "content": "x"}]
    status, data, _ = server.ask("/v1/chat/completions", body)
    assert status == 400 and "refuses these messages: who?" in data["error"]["message"]


def test_a_stop_text(server: Server) -> None:
    whole = server.complete("Hello", 24)["choices"][0]["text"]
    data = server.complete("Hello", 24, stop=whole[6:8])["choices"][0]
    assert data["text"] == whole[: whole.index(whole[6:8])] and data["finish_reason"] == "stop"


def test_models_and_health(server: Server) -> None:
    assert [one["id"] for one in server.ask("/v1/models")[1]["data"]] == ["small"]
    assert server.ask("/v1/models/small")[0] == 200 and server.ask("/v1/models/large")[0] == 404
    assert server.ask("/healthz")[:2] == (200, {"status": "ok"})
    text = server.ask("/metrics")[1]
    assert 'onnx_autoglm_requests_total{path="/healthz",status="200"}' in text
    assert "process_resident_memory_bytes" in text


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/completions", b"{", 400, "not JSON"),
        ("/v1/completions", b"[" * 100_000, 400, "not JSON"),
        ("/v1/completions", b'{"prompt": "x", "temperature": NaN}', 400, "not JSON"),
        ("/v1/completions", [], 400, "must be a JSON object"),
        ("/v1/completions", {}, 400, "prompt"),
        ("/v1/completions", {"prompt": ""}, 400, "at least one token"),
        ("/v1/completions", {"prompt": []}, 400, "at least one token"),
        ("/v1/completions", {"prompt": [999]}, 400, "from 0 to 255"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 2001}, 400, "2000 or less"),
        ("/v1/completions", {"prompt": "x" * 3000}, 400, "longer than the context of 2048"),
        ("/v1/completions", {"prompt": "x", "temperature": -1}, 400, "temperature"),
        ("/v1/completions", {"prompt": "x", "n": 17}, 400, "at most 16"),
        ("/v1/completions", {"prompt": "x", "logprobs": 3}, 400, "logprobs is not supported"),
        ("/v1/completions", {"prompt": "x", "no_such_field": 3}, 400, "no_such_field"),
        ("/v1/completions", {"prompt": "x", "model": "other"}, 404, "there is small"),
        ("/v1/completions", {"prompt": "x" * (5 << 20)}, 413, "larger than 4194304 bytes"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0.content"),
        ("/predict", {"inputs": {}}, 404, "use /v1/completions"),
        ("/v1/nothing", {}, 404, "Not Found"),
        ("/v1/completions", None, 405, "Method Not Allowed"),
    ],
)
def test_what_is_refused_and_how(server: Server, path: str, body: Any, status: int, said: str) -> None:
    found, data, _ = server.ask(path, body)
    assert found == status and said in data["error"]["message"], data
    assert set(data["error"]) == {"message", "type", "param", "code"}


def test_a_form_is_no_json(server: Server) -> None:
    assert server.ask("/v1/completions", {"prompt": "x"}, {"Content-Type": "text/plain"})[0] == 415


def test_a_full_queue_says_when_to_come_back(server: Server) -> None:
    """16 places: requests of 4 choices each, so the fifth has none."""
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        body = {"prompt": "x", "max_tokens": LONG // 4, "n": 4, "ignore_eos": True}
        busy = [pool.submit(server.ask, "/v1/completions", body) for _ in range(4)]
        while server.metric("active") + server.metric("waiting") < 13:
            time.sleep(0.01)
        status, data, headers = server.ask("/v1/completions", body)
        assert (status, data["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        assert {future.result()[0] for future in busy} == {200}


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_not_served(server: Server, stream: bool) -> None:
    before = server.metric("written_tokens_total")
    body = {"prompt": "x", "max_tokens": LONG, "ignore_eos": True, "stream": stream, "n": 4}
    connection = server.connect()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    while server.metric("active") < 4:
        time.sleep(0.005)
    assert connection.sock is not None
    connection.sock.close()
    connection.close()
    server.wait_for("active", 0, 5)
    assert server.metric("written_tokens_total") - before < 4 * LONG
    assert server.complete("Hello")["choices"]


def test_half_a_request_harms_nobody(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Le"
        )
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"\x00\xff nonsense\r\n\r\n")
    assert server.complete("Hello")["choices"]


def test_sigterm_lets_requests_finish(folder: Path) -> None:
    with serving(folder / "model.onnx", "--slots", "2") as server:
        body = {"prompt": "x", "max_tokens": 900, "temperature": 0, "ignore_eos": True}
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            futures = [
                pool.submit(server.ask, "/v1/completions", body) for _ in range(3)
            ]  # one of them waits
            while server.metric("active") + server.metric("waiting") < 3:
                time.sleep(0.005)
            server.process.send_signal(signal.SIGTERM)
            answers = [future.result() for future in futures]
        assert [status for status, _, _ in answers] == [200] * 3
        assert {data["usage"]["completion_tokens"] for _, data, _ in answers} == {900}
        assert server.process.wait(20) == 0
        with pytest.raises(OSError):
            server.ask("/healthz")


def test_what_does_not_finish_in_time_is_cut_off(folder: Path) -> None:
    with serving(folder / "model.onnx", "--drain-seconds", "0", "--max-tokens", "2000") as server:
        events = server.stream("/v1/completions", {"prompt": "x", "max_tokens": 2000, "ignore_eos": True})
        next(events)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        *_, error, done = events
        assert "shutting down" in json.loads(error)["error"]["message"] and done == "[DONE]"
        assert server.process.wait(20) == 0 and time.monotonic() - started < 5


def test_the_timeout_of_a_request(folder: Path) -> None:
    with serving(folder / "model.onnx", "--timeout", "0.2", "--max-tokens", "2000") as server:
        body = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True}
        status, data, _ = server.ask("/v1/completions", body)
        assert (status, data["error"]["code"]) == (504, "timeout")
        *_, error, done = server.stream("/v1/completions", body)
        assert json.loads(error)["error"]["code"] == "timeout" and done == "[DONE]"


def test_the_api_key(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    with serving(folder / "model.onnx", "--api-key-file", str(tmp_path / "key")) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
            status, data, _ = server.ask("/v1/models", None, headers)
            assert (status, data["error"]["code"]) == (401, "invalid_api_key")
        assert server.ask("/metrics")[0] == 401 and server.ask("/healthz")[0] == 200
        assert server.ask("/v1/models", None, {"Authorization": f"Bearer {KEY}"})[0] == 200


def test_without_a_chat_template(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "model.onnx", tmp_path)
    shutil.copy(folder / "tokenizer.json", tmp_path)
    with serving(tmp_path / "model.onnx") as server:
        body = {"messages": [{"role": "user", "content": "x"}]}
        status, data, _ = server.ask("/v1/chat/completions", body)
        assert (status, data["error"]["code"]) == (400, "no_chat_template")


def test_other_models_predict() -> None:
    path = recipes.build("vit-op20", ROOT)
    sample = dict(np.load(path / "sample.npz"))
    with serving(path / "model.onnx") as server:
        inputs = {name: array.tolist() for name, array in sample.items()}
        status, data, _ = server.ask("/predict", {"inputs": inputs})
        assert status == 200, data
        from onnx_autoglm.modelfile import open_model
        from onnx_autoglm.runtime import Session

        expected = Session(open_model(path / "model.onnx")).run(sample)
        for name, array in expected.items():
            assert np.abs(np.array(data["outputs"][name]) - array).max() < 1e-4 * np.abs(array).max()
        (name,) = inputs
        for wrong, said in (
            ({}, "is missing"),
            ({**inputs, "x": 1}, "no input 'x'"),
            ({name: [[1], [1, 2]]}, "even array"),
            ({name: "text"}, "even array"),
            ({name: [1.0]}, "has shape [1]"),
        ):
            status, data, _ = server.ask("/predict", {"inputs": wrong})
            assert status == 400 and said in data["error"]["message"], data
        status, data, _ = server.ask("/v1/completions", {"prompt": "x"})
        assert status == 404 and "use /predict" in data["error"]["message"]


def test_prompts_are_not_logged(folder: Path) -> None:
    secret = "a secret of mine"
    with tempfile.TemporaryFile("w+") as file:
        server = Server(folder / "model.onnx", file)
        server.complete(secret)
        server.ask("/v1/completions", {"prompt": secret, "n": secret})
        server.ask("/v1/completions", {"prompt": [secret, 1]})
        server.process.send_signal(signal.SIGTERM)
        said, _ = server.process.communicate(timeout=30)
        file.seek(0)
        assert secret not in said + file.read()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--port", "TAKEN"], "choose another with --port"),
        (["--port", "99999"], "options: port"),
        (["--host", "no such host"], "is no address"),
        (["--api-key-file", "nowhere"], "cannot read the API key"),
        (["--slots", "0"], "options: slots"),
    ],
)
def test_mistakes_are_one_line(folder: Path, options: list[str], expected: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [str(taken.getsockname()[1]) if word == "TAKEN" else word for word in options]
        done = subprocess.run(
            [sys.executable, "-m", "onnx_autoglm", "serve", folder / "model.onnx", *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1 and expected in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def test_the_openai_client(server: Server) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
    ) as client:
        whole = client.completions.create(model="small", prompt="Hello", max_tokens=8, temperature=0)
        assert whole.choices[0].text == server.complete("Hello")["choices"][0]["text"]
        how = {
            "model": "small",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 8,
            "seed": 1,
        }
        chat = client.chat.completions.create(**how)
        stream = client.chat.completions.create(**how, stream=True)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert said == chat.choices[0].message.content != ""
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="Hello")
        assert [one.id for one in client.models.list()] == ["small"]
