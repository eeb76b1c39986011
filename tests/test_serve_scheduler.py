"""Continuous batching: the tokens of each request are those it gets alone, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import recipes
from helpers import model
from test_decode import FUSED, cached

from onnx_autoglm import UserError
from onnx_autoglm.decode import Decoder
from onnx_autoglm.modelfile import open_model
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.rows import RowEngine
from onnx_autoglm.sampling import GREEDY, Sampling
from onnx_autoglm.serve_scheduler import Closed, Event, Refused, Request, Scheduler

ROOT = Path(__file__).parents[1] / "build" / "models"
LENGTHS = (3, 11, 1, 7, 20, 2)


@pytest.fixture(scope="module")
def engine() -> RowEngine:
    return RowEngine(Decoder(canonicalize(open_model(recipes.build("glm-gqa-op20-kv", ROOT) / "model.onnx"))))


def prompts(vocabulary: int = 256) -> list[tuple[int, ...]]:
    random = np.random.default_rng(1)
    return [tuple(random.integers(0, vocabulary, length).tolist()) for length in LENGTHS]


class Client:
    """A request and what came of it."""

    def __init__(self, prompt: tuple[int, ...], tokens: int = 8, **more: object) -> None:
        self.events: list[Event] = []
        self.request = Request(prompt, tokens, self.events.append, **more)  # type: ignore[arg-type]

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if event.token is not None]

    @property
    def finish(self) -> str | None:
        return self.events[-1].finish if self.events else None


def finished(scheduler: Scheduler, clients: list[Client]) -> list[list[int]]:
    scheduler.submit([client.request for client in clients])
    while scheduler.step():
        pass
    return [client.tokens for client in clients]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, 50, 0.9, 1.2)])
def test_together_as_alone(engine: RowEngine, sampling: Sampling) -> None:
    assert not engine.alone
    expected = [
        engine.decoder.generate(np.array([prompt]), 8, sampling=sampling, seed=4)[0].tolist()
        for prompt in prompts()
    ]
    assert len({tuple(row) for row in expected}) == len(LENGTHS)
    for slots in (1, 4, 8):
        clients = [Client(prompt, sampling=sampling, seed=(4, 0)) for prompt in prompts()]
        assert finished(Scheduler(engine, slots=slots, piece=5), clients) == expected
        assert {client.finish for client in clients} == {"length"}


def test_rows_join_and_leave_between_steps(engine: RowEngine) -> None:
    scheduler = Scheduler(engine, slots=4)
    clients = [Client(prompt, 4 + 3 * number) for number, prompt in enumerate(prompts())]
    for client in clients:
        scheduler.submit([client.request])
        scheduler.step()
        scheduler.step()
    while scheduler.step():
        pass
    assert scheduler.load.step_rows > 1.5 * scheduler.load.steps
    for number, (client, prompt) in enumerate(zip(clients, prompts(), strict=True)):
        alone = engine.decoder.generate(np.array([prompt]), 4 + 3 * number)[0].tolist()
        assert client.tokens == alone, number


def graphs() -> Iterator[tuple[str, ir.Model, str]]:
    yield (
        "no cache",
        canonicalize(open_model(recipes.build("glm-gqa-op20", ROOT) / "model.onnx")),
        "no KV cache",
    )
    yield "no mask", cached(), "no attention mask"
    yield "fixed batch", cached(2), "fixed batch of 2"
    yield "one token at a time", cached("batch", 1), "no attention mask"
    yield "counts", model(FUSED), "no attention mask"


@pytest.mark.parametrize(("name", "source", "why"), list(graphs()), ids=lambda value: str(value)[:20])
def test_where_rows_cannot_be_joined_each_runs_alone(name: str, source: ir.Model, why: str) -> None:
    decoder = Decoder(source)
    engine = RowEngine(decoder)
    assert why in engine.alone
    own = prompts(decoder.vocabulary)
    expected = [decoder.generate(np.array([prompt]), 6)[0].tolist() for prompt in own]
    assert finished(Scheduler(engine), [Client(prompt, 6) for prompt in own]) == expected


def test_a_mask_that_is_not_heeded_is_noticed() -> None:
    """The graph takes a mask and uses it for something else."""
    text = """
    g (int64[batch,s] t, int64[batch,total] mask, float[batch,p,4] a) => (float[batch,s,16] y, float[batch,q,4] c)
    <int64 one, int64[1] one1, float zero, float[16,4] table, float[4,16] head>
    {
      e = Gather(table, t) c = Concat<axis=1>(a, e) r = CumSum(c, one)
      n = Shape<start=1, end=2>(a) m = Shape<start=1, end=2>(c) l = Slice(r, n, m, one1) z = Tanh(l)
      b = Cast<to=9>(mask) f = Cast<to=1>(b) i = ReduceSum<keepdims=0>(f) o = Mul(i, zero) x = Add(z, o)
      y = MatMul(x, head)
    }
    """
    constants = {"one": np.array(1), "one1": np.array([1]), "zero": np.array(0, np.float32)}
    engine = RowEngine(Decoder(model(text, weights=constants)))
    assert "other scores with padding" in engine.alone


def test_a_stop_token_ends_the_text_and_is_no_part_of_it(engine: RowEngine) -> None:
    prompt = prompts()[0]
    (alone,) = finished(Scheduler(engine), [Client(prompt)])
    client = Client(prompt, stops=frozenset([alone[3]]))
    finished(Scheduler(engine), [client])
    assert client.tokens == alone[: alone.index(alone[3])] and client.finish == "stop"


def test_cancelled_and_late_requests_free_their_rows(engine: RowEngine) -> None:
    scheduler = Scheduler(engine, slots=2)
    gone, late, waits = (
        Client(prompts()[0], 500),
        Client(prompts()[1], 500, timeout=0.0),
        Client(prompts()[2]),
    )
    tickets = scheduler.submit([client.request for client in (gone, late, waits)])
    scheduler.step()
    assert late.finish == "timeout" and gone.finish is None
    tickets[0].cancel()
    while scheduler.step():
        pass
    assert gone.finish == "cancelled" and 1 <= len(gone.tokens) <= 3
    assert waits.tokens == engine.decoder.generate(np.array([prompts()[2]]), 8)[0].tolist()
    assert scheduler.load.active == scheduler.load.waiting == 0


def test_a_full_queue_refuses_all_of_a_request(engine: RowEngine) -> None:
    scheduler = Scheduler(engine, slots=1, queue=2)
    first = [Client(prompt) for prompt in prompts()[:2]]
    scheduler.submit([client.request for client in first])
    more = [Client(prompt) for prompt in prompts()[2:4]]
    with pytest.raises(Refused) as caught:
        scheduler.submit([client.request for client in more])
    assert caught.value.retry_after >= 1
    while scheduler.step():
        pass
    assert all(client.finish == "length" for client in first) and not more[0].events


def test_closing_finishes_what_is_there_and_takes_nothing_new(engine: RowEngine) -> None:
    scheduler = Scheduler(engine, slots=2)
    clients = [Client(prompt) for prompt in prompts()]
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    scheduler.submit([client.request for client in clients])
    scheduler.close()
    with pytest.raises(Closed):
        scheduler.submit([clients[0].request])
    thread.join(30)
    assert not thread.is_alive() and {client.finish for client in clients} == {"length"}


def test_stopping_ends_everything(engine: RowEngine) -> None:
    scheduler = Scheduler(engine, slots=2)
    clients = [Client(prompt, 10_000) for prompt in prompts()]
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    scheduler.submit([client.request for client in clients])
    scheduler.stop()
    thread.join(30)
    assert not thread.is_alive() and {client.finish for client in clients} == {"cancelled"}


def test_a_failing_step_ends_its_requests_and_not_the_loop(
    engine: RowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, broken, sound = Scheduler(engine, slots=1), Client(prompts()[0]), Client(prompts()[1])
    extend = RowEngine.extend

    def fails_on_the_first(self: RowEngine, rows: object, tokens: np.ndarray) -> object:
        if tokens.shape[1] == len(prompts()[0]):
            raise UserError("no such luck")
        return extend(self, rows, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(RowEngine, "extend", fails_on_the_first)
    finished(scheduler, [broken, sound])
    assert broken.events == [Event(finish="error", error="no such luck")] and sound.finish == "length"


@pytest.mark.parametrize("prompt", [(), (256,), (-1,)])
def test_a_prompt_must_be_tokens(engine: RowEngine, prompt: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="all from 0 to 255"):
        Scheduler(engine).submit([Client(prompt).request])
